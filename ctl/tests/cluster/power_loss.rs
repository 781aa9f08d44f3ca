//! All nodes die at once, and what their disks had not flushed dies with them.

use crate::harness::{Cluster, signal};
use crate::model::Model;
use crate::workload::{BLOCKS_MAX, End, Outcome, UNLIMITED, Workload, verify};

const BLOCKS: usize = 8192;
const ROUNDS: u32 = 3;
/// Written before each power loss: more than a copy applies between two checkpoints, so that some of it is in its
/// place, and of the log gone, on every disk.
const BYTES: u64 = 40 << 20;

/// Panics where anything that was acknowledged is not there, or the device does not go on. `blocks_max`: of one request.
fn lose_power(blocks_max: u64, planted: Option<&str>) {
    // Founded on good disks: what is tested comes later, and formatting a slow one takes its time.
    let mut cluster = Cluster::start(&[]);
    cluster.restart(&["--device-fault", "lose-unflushed"], planted);
    cluster.must(&["volume", "create", "v", "--size", "256Mi"]);
    let socket = cluster.attach("v", "local", &[]);
    let workload = Workload::start_with(UNLIMITED, blocks_max, &socket, Model::new(BLOCKS), 3);
    for _ in 0..ROUNDS {
        workload.wait_written(BYTES);
        workload.wait_full();
        let killed: Vec<(String, u32)> =
            cluster.nodes().into_iter().map(|node| (node.clone(), cluster.pid(&node))).collect();
        killed.iter().for_each(|(_, pid)| signal(*pid, libc::SIGKILL));
        killed.iter().for_each(|(node, old)| cluster.wait_restart(node, *old));
        // The device waited, and goes on: what was in flight is answered, and every read is checked.
        workload.wait_completed(50);
    }
    let Outcome { mut model, end, completed, longest_gap } = workload.stop();
    assert_eq!(end, End::Stopped);
    verify(&socket, &mut model);
    println!("power loss, {ROUNDS} rounds: {completed} requests, longest gap {} ms", longest_gap.as_millis());
}

#[test]
fn all_nodes_killed_at_once_keep_every_acknowledged_write() {
    lose_power(BLOCKS_MAX, None);
}

/// The test above must fail with each of these.
#[cfg(feature = "planted")]
mod planted {
    use std::panic::catch_unwind;

    use super::BLOCKS_MAX;

    /// Shorter than a slot: all data is in the log first, whose writes flush nothing else.
    const IN_LOG_BLOCKS_MAX: u64 = 15;

    fn is_found(bug: &'static str, blocks_max: u64) {
        let failure = catch_unwind(|| super::lose_power(blocks_max, Some(bug))).expect_err("the bug is not found");
        let said = failure.downcast_ref::<String>().map_or("", String::as_str);
        println!("{bug}: {said}");
        // It never answers again, or with an error, or (in a thread of the workload) with what must not be read.
        let failures = ["are unanswered", "the device failed", "no thread of the workload panicked"];
        assert!(failures.iter().any(|failure| said.contains(failure)), "it failed otherwise");
    }

    #[test]
    fn a_wal_that_is_not_flushed_is_found() {
        is_found("skip-wal-flush", IN_LOG_BLOCKS_MAX);
    }

    #[test]
    fn payloads_that_are_not_flushed_with_their_batch_are_found() {
        is_found("skip-payload-flush", BLOCKS_MAX);
    }

    #[test]
    fn slots_that_are_not_flushed_before_their_checkpoint_are_found() {
        is_found("skip-slot-flush", IN_LOG_BLOCKS_MAX);
    }
}
