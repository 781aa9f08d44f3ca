//! A node that was away for longer than its peers keep log comes back by the parts that differ.

use crate::harness::{Cluster, holdfast, wait_for};
use crate::model::Model;
use crate::workload::{End, Outcome, Workload, verify};

/// 32 MiB of the volume are used.
const BLOCKS: usize = 8192;
/// Five times so much is more than a volume keeps of its log, with a checkpoint's worth above it.
const PART_BYTES: u64 = 32 << 20;
const BYTES_PER_SECOND: u64 = 200 << 20;

fn node(cluster: &Cluster, verb: &str, name: &str) {
    let output = holdfast().args(["dev", "node", verb, name, "--dir"]).arg(cluster.dir()).output();
    assert!(output.expect("holdfast runs").status.success(), "{verb} {name}");
}

#[test]
fn a_node_that_missed_more_than_the_log_is_rebuilt_by_what_differs_and_can_lead() {
    let cluster = Cluster::start(&[]);
    cluster.must(&["volume", "create", "v", "--size", "256Mi"]);
    let socket = cluster.attach("v", "local", &[]);
    let workload = Workload::start_at(BYTES_PER_SECOND, &socket, Model::new(BLOCKS), 7);
    workload.wait_written(8 << 20);
    let away = cluster.follower("v");
    node(&cluster, "stop", &away);
    for _ in 0..5 {
        workload.wait_written(PART_BYTES);
    }
    let Outcome { model, end, .. } = workload.stop();
    assert_eq!(end, End::Stopped);
    // It is rebuilt while the volume is written.
    let workload = Workload::start(&socket, model, 8);
    node(&cluster, "start", &away);
    cluster.wait_healthy("v", &away);
    let rebuild = wait_for("the rebuild is told", || {
        let volume = cluster.volume("v");
        let replica = volume["replicas"].as_array()?.iter().find(|replica| replica["node"] == away.as_str())?.clone();
        Some(replica["rebuild"].clone()).filter(|rebuild| rebuild["phase"] == "done")
    });
    let copied = rebuild["bytesCopied"].as_u64().expect("a number");
    println!("rebuilt with {copied} bytes copied, {} slots compared", rebuild["slotsCompared"]);
    assert!(copied > 0, "the log alone cannot have reached: {rebuild}");
    let Outcome { model, end, .. } = workload.stop();
    assert_eq!(end, End::Stopped);

    // The copy is as good as any: with the third one behind, it alone can follow the leader.
    let leader = cluster.leader("v");
    let third = cluster.nodes().into_iter().find(|name| *name != leader && *name != away).expect("three nodes");
    node(&cluster, "stop", &third);
    let workload = Workload::start(&socket, model, 9);
    workload.wait_completed(200);
    let Outcome { mut model, end, .. } = workload.stop();
    assert_eq!(end, End::Stopped);
    node(&cluster, "stop", &leader);
    node(&cluster, "start", &third);
    wait_for("the rebuilt copy leads", || Some(cluster.leader("v")).filter(|next| *next == away));
    verify(&socket, &mut model);
    node(&cluster, "start", &leader);
    cluster.wait_healthy("v", &leader);
    cluster.wait_healthy("v", &third);
}
