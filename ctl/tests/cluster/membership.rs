//! Nodes and disks come and go while the volume is in use: no error, nothing acknowledged is lost.

use std::fs;

use serde_json::Value;

use crate::harness::{Cluster, wait_for};
use crate::model::Model;
use crate::workload::{End, Outcome, Workload, verify};

/// 16 MiB of the volume are used.
const BLOCKS: usize = 4096;

fn finish(workload: Workload) -> Model {
    let Outcome { model, end, completed, longest_gap } = workload.stop();
    assert_eq!(end, End::Stopped);
    println!("{completed} requests, longest gap {} ms", longest_gap.as_millis());
    model
}

fn node(cluster: &Cluster, name: &str) -> Value {
    let nodes = cluster.json(&["node", "list", "--json"]);
    nodes.as_array().expect("nodes").iter().find(|node| node["name"] == name).expect("a node of this cluster").clone()
}

fn disks(node: &Value) -> Vec<(String, String)> {
    let disks = node["disks"].as_array().expect("disks").iter();
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    disks.map(|disk| (text(&disk["disk"]), text(&disk["state"]))).collect()
}

fn wait_whole(cluster: &Cluster) -> Vec<String> {
    wait_copies(cluster, 3)
}

/// So many copies, each on another node, all of them well and nothing on its way.
fn wait_copies(cluster: &Cluster, copies: usize) -> Vec<String> {
    wait_for("the volume is whole", || {
        let volume = cluster.volume("v");
        let replicas = volume["replicas"].as_array()?;
        let whole = replicas.len() == copies && replicas.iter().all(|replica| replica["condition"] == "healthy");
        let nodes = replicas.iter().map(|replica| replica["node"].as_str().expect("a name").to_owned()).collect();
        (whole && volume["reason"].is_null()).then_some(nodes)
    })
}

fn metadata_members(cluster: &Cluster) -> Vec<String> {
    let nodes = cluster.json(&["node", "list", "--json"]);
    let members = nodes.as_array().expect("nodes").iter().filter(|node| node["metadataMember"] == true);
    members.map(|node| node["name"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn a_node_whose_folder_is_deleted_comes_back_as_a_new_member_by_itself() {
    let cluster = Cluster::start(&[]);
    let workload = Workload::start_on(&cluster, BLOCKS, 11);
    let victim = cluster.leader("v");
    let former = disks(&node(&cluster, &victim));
    fs::remove_dir_all(cluster.dir().join(&victim)).expect("the folder goes");
    let old = cluster.kill(&victim);
    workload.wait_completed(200);
    cluster.wait_restart(&victim, old);
    let disks = wait_for("the node has a new disk and the former one is lost", || {
        let disks = disks(&node(&cluster, &victim));
        let lost = disks.iter().any(|(disk, state)| *disk == former[0].0 && state == "lost");
        (lost && disks.iter().any(|(_, state)| state == "active")).then_some(disks)
    });
    assert_eq!(disks.len(), 2, "{disks:?}");
    let nodes = wait_whole(&cluster);
    assert!(nodes.contains(&victim), "{nodes:?}");
    wait_for("the metadata plane is whole", || {
        let said = cluster.json(&["explain", "cluster", "--json"]);
        (metadata_members(&cluster).len() == 3 && said.as_array()?.is_empty()).then_some(())
    });
    workload.wait_completed(100);
    let mut model = finish(workload);
    // Without one of the other two, every quorum needs what the new member holds.
    let other = nodes.into_iter().find(|node| *node != victim).expect("three nodes");
    let dir = cluster.dir().to_str().expect("a path in UTF-8").to_owned();
    cluster.must(&["dev", "node", "stop", &other, "--dir", &dir]);
    verify(&cluster.nbd_socket("local"), &mut model);
}

#[test]
fn a_removed_node_leaves_nothing_behind_that_anybody_needs() {
    let cluster = Cluster::start(&["--nodes", "4"]);
    let workload = Workload::start_on(&cluster, BLOCKS, 12);
    let victim = cluster.leader("v");
    cluster.must(&["node", "remove", &victim]);
    workload.wait_completed(100);
    wait_for("the node is removed", || (node(&cluster, &victim)["state"] == "removed").then_some(()));
    let nodes = wait_whole(&cluster);
    assert!(!nodes.contains(&victim), "{nodes:?}");
    let members = metadata_members(&cluster);
    assert!(members.len() == 3 && !members.contains(&victim), "{members:?}");
    // The agent has learned where the copies are now.
    cluster.must(&["dev", "node", "stop", &victim, "--dir", cluster.dir().to_str().expect("a path in UTF-8")]);
    workload.wait_completed(200);
    // Now there is nowhere to go for what the others hold.
    let refused = cluster.run(&["node", "remove", &nodes[0]]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("NowhereToGo") && said.contains("volume v"), "{said}");
    let serves = cluster.run(&["disk", "replace", &nodes[0]]);
    assert!(String::from_utf8_lossy(&serves.stderr).contains("DiskServes"));
    let again = cluster.run(&["node", "add", &victim]);
    assert!(!again.status.success(), "a name of the past is refused");
    let leader = cluster.leader("v");
    let old = cluster.kill(&leader);
    workload.wait_completed(200);
    cluster.wait_restart(&leader, old);
    wait_whole(&cluster);
    let mut model = finish(workload);
    verify(&cluster.nbd_socket("local"), &mut model);
}

#[test]
fn the_number_of_copies_changes_while_the_volume_is_used() {
    let cluster = Cluster::start(&[]);
    cluster.must(&["volume", "create", "v", "--size", "256Mi", "--replicas", "1"]);
    let workload = Workload::start(&cluster.attach("v", "local", &[]), Model::new(BLOCKS), 13);
    workload.wait_completed(100);
    let refused = cluster.run(&["volume", "set", "v", "--replicas", "4"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("NowhereToGo") && said.contains("has another copy"), "{said}");

    let set = cluster.json(&["volume", "set", "v", "--replicas", "3", "--json"]);
    assert_eq!(set["reason"]["subject"], "volume/v", "it says what it waits for: {set}");
    let nodes = wait_copies(&cluster, 3);
    assert_eq!(cluster.volume("v")["health"], "healthy");
    // One of three may go, whichever it is.
    let leader = cluster.leader("v");
    let old = cluster.kill(&leader);
    workload.wait_completed(200);
    cluster.wait_restart(&leader, old);
    nodes.iter().for_each(|node| cluster.wait_healthy("v", node));

    cluster.must(&["volume", "set", "v", "--replicas", "2"]);
    let left = wait_copies(&cluster, 2);
    workload.wait_completed(200);
    let mut model = finish(workload);
    // Nothing needs the one that has none any more.
    let other = nodes.into_iter().find(|node| !left.contains(node)).expect("one went");
    wait_for("its data is gone", || {
        let node = node(&cluster, &other);
        (node["disks"][0]["replicas"] == 0).then_some(())
    });
    cluster.must(&["dev", "node", "stop", &other, "--dir", cluster.dir().to_str().expect("a path in UTF-8")]);
    verify(&cluster.nbd_socket("local"), &mut model);
}
