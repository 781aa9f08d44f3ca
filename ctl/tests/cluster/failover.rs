//! A node is killed or stopped while the volume is in use: no error, nothing acknowledged is lost, no stale read.

use std::time::Duration;

use crate::harness::{Cluster, holdfast, signal, wait_for};
use crate::workload::{End, Outcome, Workload, verify};

/// 32 MiB of the volume are used: every block is written and read several times.
const BLOCKS: usize = 8192;
/// Far above what a failover takes; what it takes is printed.
const GAP_MAX: Duration = Duration::from_secs(10);

fn finish(cluster: &Cluster, what: &str, workload: Workload) {
    let Outcome { mut model, end, completed, longest_gap } = workload.stop();
    assert_eq!(end, End::Stopped);
    verify(&cluster.nbd_socket("local"), &mut model);
    println!("{what}: {completed} requests, longest gap {} ms", longest_gap.as_millis());
    assert!(longest_gap < GAP_MAX, "a gap of {longest_gap:?}");
}

#[test]
fn a_killed_leader_and_then_a_killed_follower_cost_no_error() {
    let cluster = Cluster::start(&[]);
    let workload = Workload::start_on(&cluster, BLOCKS, 1);
    let leader = cluster.leader("v");
    let old = cluster.kill(&leader);
    workload.wait_completed(200);
    cluster.wait_restart(&leader, old);
    cluster.wait_healthy("v", &leader);
    let follower = cluster.follower("v");
    let old = cluster.kill(&follower);
    workload.wait_completed(200);
    cluster.wait_restart(&follower, old);
    cluster.wait_healthy("v", &follower);
    workload.wait_completed(100);
    finish(&cluster, "leader and follower killed", workload);
}

#[test]
fn a_stopped_leader_is_replaced_and_serves_nothing_stale_when_it_continues() {
    let cluster = Cluster::start(&[]);
    let workload = Workload::start_on(&cluster, BLOCKS, 2);
    let leader = cluster.leader("v");
    let pid = cluster.pid(&leader);
    signal(pid, libc::SIGSTOP);
    workload.wait_completed(400);
    let next = wait_for("another leader", || Some(cluster.leader("v")).filter(|next| *next != leader));
    signal(pid, libc::SIGCONT);
    workload.wait_completed(200);
    cluster.wait_healthy("v", &leader);
    assert_eq!(cluster.pid(&leader), pid, "it was stopped, not restarted");
    // The same again, faster than anybody notices: the lease must tell the stopped one, not the others.
    let pid = cluster.pid(&next);
    for _ in 0..5 {
        signal(pid, libc::SIGSTOP);
        workload.wait_completed(20);
        signal(pid, libc::SIGCONT);
        workload.wait_completed(20);
    }
    finish(&cluster, "leader stopped", workload);
}

#[test]
fn a_node_that_is_told_to_end_hands_over_and_closes_its_disk() {
    let cluster = Cluster::start(&[]);
    let workload = Workload::start_on(&cluster, BLOCKS, 4);
    let leader = cluster.leader("v");
    let node = |verb: &str| {
        let output = holdfast().args(["dev", "node", verb, &leader, "--dir"]).arg(cluster.dir()).output();
        assert!(output.expect("holdfast runs").status.success());
    };
    node("stop");
    assert_ne!(cluster.leader("v"), leader, "another one leads before the stopped one is gone");
    workload.wait_completed(100);
    let disk = cluster.dir().join(&leader).join("disk");
    let described = holdfast().args(["disk", "describe"]).arg(&disk).output().expect("holdfast runs");
    let described = String::from_utf8_lossy(&described.stdout);
    assert!(described.contains(", closed in order"), "{described}");
    node("start");
    cluster.wait_healthy("v", &leader);
    finish(&cluster, "leader ended in order", workload);
}
