//! Wrong use: words that say what to do, an exit code, and nothing changed.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Output;

use crate::harness::{Cluster, holdfast};

/// It must fail, and say `expected`.
pub fn refused(output: &Output, expected: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it did as it was told");
    // 101 would be a panic, and a signal has no code.
    assert!(matches!(output.status.code(), Some(1 | 2)), "it crashed: {} {said}", output.status);
    assert!(said.contains(expected), "{expected:?} is not in {said:?}");
}

#[test]
fn volumes_that_cannot_be_are_refused() {
    let cluster = Cluster::start(&[]);
    cluster.must(&["volume", "create", "v", "--size", "64Mi"]);
    let before = cluster.json(&["volume", "list", "--json"]);
    let refusals: &[(&[&str], &str)] = &[
        (&["volume", "get", "nosuch"], "UnknownVolume"),
        (&["volume", "delete", "nosuch"], "UnknownVolume"),
        (&["volume", "resize", "nosuch", "--size", "1Gi"], "UnknownVolume"),
        (&["attach", "nosuch", "--nbd-socket", "unused"], "UnknownVolume"),
        (&["detach", "nosuch"], "UnknownVolume"),
        (&["explain", "volume", "nosuch"], "UnknownVolume"),
        (&["explain", "node", "nosuch"], "UnknownNode"),
        (&["volume", "create", "w", "--size", "0"], "smallest volume"),
        (&["volume", "create", "w", "--size", "1025Ki"], "InvalidSpec"),
        (&["volume", "create", "w", "--size", "900Gi"], "NoPlacement"),
        (&["volume", "create", "w", "--size", "900Ti"], "largest volume"),
        (&["volume", "create", "w", "--size", "64Mi", "--replicas", "4"], "4 replicas need 4 nodes"),
        (&["volume", "create", "w", "--size", "64Mi", "--replicas", "0"], "--replicas"),
        (&["volume", "create", "w", "--size", "64Mi", "--replicas", "9"], "use 1 to 5"),
        (&["volume", "create", "w", "--size", "64Mi", "--block", "100"], "use 512 or 4096"),
        (&["volume", "create", "w", "--size", "64MB"], "use Ki, Mi, Gi or Ti"),
        (&["volume", "create", "W w", "--size", "64Mi"], "is not a name"),
        (&["volume", "create", "v", "--size", "128Mi"], "VolumeDiffers"),
        (&["volume", "resize", "v", "--size", "32Mi"], "CannotShrink"),
        (&["volume", "resize", "v", "--size", "900Gi"], "UnsafeChange"),
        (&["detach", "v"], "no agent"),
    ];
    for (arguments, expected) in refusals {
        refused(&cluster.run(arguments), expected);
    }
    assert_eq!(cluster.json(&["volume", "list", "--json"]), before, "nothing changed");
}

#[test]
fn a_held_volume_is_not_attached_without_being_taken_over() {
    let cluster = Cluster::start(&[]);
    cluster.must(&["volume", "create", "v", "--size", "64Mi"]);
    let socket = cluster.attach("v", "first", &[]);
    let held = cluster.volume("v");
    let path = cluster.nbd_socket("second");
    let path = path.to_str().expect("a path in UTF-8");
    refused(&cluster.run(&["attach", "v", "--nbd-socket", path, "--agent", "second"]), "attached by first (epoch 1)");
    refused(&cluster.run(&["attach", "v", "--nbd-socket", path, "--agent", "first"]), socket.to_str().expect("UTF-8"));
    refused(&cluster.run(&["attach", "v", "--nbd-socket", "/nonexistent/socket", "--agent", "third"]), "cannot listen");
    refused(&cluster.run(&["attach", "v", "--nbd-socket", path, "--agent", "../x"]), "agent's name");
    refused(&cluster.run(&["volume", "delete", "v"]), "detach it first");
    let after = cluster.volume("v");
    assert_eq!((&after["epoch"], &after["attachedTo"]), (&held["epoch"], &held["attachedTo"]));
    assert_eq!(cluster.attachment("first")["state"], "attached");
}

/// A storage node by hand, in the place of the stopped `node` of `cluster`.
fn storage_node(cluster: &Cluster, node: &str, disk_of: &Path, pki_of: &Path, listen: &str, api: &str) -> Output {
    let mut command = holdfast();
    command.args(["storage-node", "--name", node, "--listen", listen, "--api", api]);
    command.arg("--dir").arg(cluster.dir().join("by-hand")).arg("--device").arg(disk_of).arg("--pki").arg(pki_of);
    command.output().expect("holdfast runs")
}

#[test]
fn a_node_does_not_start_with_what_is_not_its_own() {
    let (ours, theirs) = (Cluster::start(&[]), Cluster::start(&["--nodes", "1"]));
    for (cluster, node) in [(&ours, "node-2"), (&theirs, "node-0")] {
        let output = holdfast().args(["dev", "node", "stop", node, "--dir"]).arg(cluster.dir()).output();
        assert!(output.expect("holdfast runs").status.success());
    }
    let any = "127.0.0.1:0";
    let (disk, pki) = (ours.dir().join("node-2/disk"), ours.dir().join("pki"));
    let written = || fs::metadata(&disk).and_then(|disk| disk.modified()).expect("the disk");
    let before = written();

    let taken = TcpListener::bind(any).expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    refused(&storage_node(&ours, "node-2", &disk, &pki, &taken, any), "is another node running there?");
    refused(&storage_node(&ours, "node-2", &disk, &pki, any, &taken), "is another node running there?");
    refused(&storage_node(&ours, "node-1", &disk, &pki, any, any), "is that of node");
    refused(&storage_node(&ours, "node-0", &disk, &theirs.dir().join("pki"), any, any), "is that of node");
    refused(&storage_node(&ours, "node-2", &theirs.dir().join("node-0/disk"), &pki, any, any), "is that of node");
    refused(&storage_node(&ours, "node-9", &disk, &pki, any, any), "node-9.pem");
    refused(&storage_node(&ours, "admin", &disk, &pki, any, any), "configure the right files");
    refused(
        &storage_node(&ours, "node-2", &ours.dir().join("node-1/disk"), &pki, any, any),
        "in use by another process",
    );
    assert_eq!(written(), before, "the disk was not touched");

    let output = holdfast().args(["dev", "up", "--dir"]).arg(ours.dir()).output().expect("holdfast runs");
    refused(&output, "another `holdfast dev up` runs");
    let output = holdfast().args(["dev", "node", "stop", "node-9", "--dir"]).arg(ours.dir()).output();
    refused(&output.expect("holdfast runs"), "there are: node-0, node-1, node-2");
}
