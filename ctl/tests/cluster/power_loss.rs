//! All nodes die at once, and what their disks had not flushed dies with them.

use crate::harness::Cluster;
use crate::model::Model;
use crate::workload::{End, Outcome, Workload, verify};

const BLOCKS: usize = 8192;
const ROUNDS: u32 = 3;

#[test]
fn all_nodes_killed_at_once_keep_every_acknowledged_write() {
    // Founded on good disks: what is tested comes later, and formatting a slow one takes its time.
    let mut cluster = Cluster::start(&[]);
    cluster.restart(&["--device-fault", "lose-unflushed"]);
    cluster.must(&["volume", "create", "v", "--size", "256Mi"]);
    let socket = cluster.attach("v", "local", &[]);
    let workload = Workload::start(&socket, Model::new(BLOCKS), 3);
    for _ in 0..ROUNDS {
        workload.wait_completed(150);
        workload.wait_full();
        let killed: Vec<(String, u32)> =
            cluster.nodes().into_iter().map(|node| (node.clone(), cluster.pid(&node))).collect();
        killed.iter().for_each(|(_, pid)| crate::harness::signal(*pid, libc::SIGKILL));
        killed.iter().for_each(|(node, old)| cluster.wait_restart(node, *old));
        // The device waited, and goes on: what was in flight is answered, and every read is checked.
        workload.wait_completed(50);
    }
    let Outcome { mut model, end, completed, longest_gap } = workload.stop();
    assert_eq!(end, End::Stopped);
    verify(&socket, &mut model);
    println!("power loss, {ROUNDS} rounds: {completed} requests, longest gap {} ms", longest_gap.as_millis());
}
