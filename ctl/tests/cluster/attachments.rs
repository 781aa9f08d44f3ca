//! Who holds a volume: a second holder ends the first one's writes for good; the same agent comes back as itself.

use crate::harness::{Cluster, signal, wait_for};
use crate::model::Model;
use crate::nbd::{self, EIO};
use crate::workload::{End, Workload, read_all, verify};

/// 4 MiB: writes meet, and a new holder reads all of it while the old one's are in flight.
const BLOCKS: usize = 1024;

fn rounds(variable: &str, default: u32) -> u32 {
    std::env::var(variable).map_or(default, |rounds| rounds.parse().expect("a number of rounds"))
}

#[test]
fn nothing_of_a_fenced_holder_lands_after_the_first_read_of_the_next() {
    let cluster = Cluster::start(&[]);
    cluster.must(&["volume", "create", "v", "--size", "64Mi"]);
    let mut socket = cluster.attach("v", "a", &[]);
    let mut model = Model::new(BLOCKS);
    for round in 0..rounds("HOLDFAST_TAKE_OVER_ROUNDS", 20) {
        let (first, second) = if round % 2 == 0 { ("a", "b") } else { ("b", "a") };
        let workload = Workload::start(&socket, model, u64::from(round));
        workload.wait_completed(20);
        workload.wait_full();
        let next = cluster.attach("v", second, &["--take-over"]);
        let seen = read_all(&next, BLOCKS);
        let outcome = workload.join();
        assert_eq!(outcome.end, End::Error(EIO), "round {round}: the first holder's device fails");
        model = outcome.model;
        model.settle_all(&seen);
        // The second one's first reads decided; the model now allows nothing else.
        verify(&next, &mut model);
        assert_eq!(cluster.attachment(first)["state"], "fenced");
        assert!(nbd::connect(&socket).is_err(), "a fenced device is gone for new clients");
        if round % 10 == 9 {
            // For good: the next process of that agent knows, and takes nothing back by itself.
            signal(cluster.agent_pid(first), libc::SIGKILL);
            wait_for("it is gone", || cluster.agents(first).is_empty().then_some(()));
            let path = socket.to_str().expect("a path in UTF-8");
            let again = cluster.run(&["attach", "v", "--nbd-socket", path, "--agent", first]);
            assert!(!again.status.success(), "the volume is another one's: {again:?}");
            assert!(nbd::connect(&socket).is_err());
            assert_eq!(read_all(&next, BLOCKS), seen, "nothing has changed for the second one");
        }
        cluster.must(&["detach", "v", "--agent", first]);
        socket = next;
    }
}

#[test]
fn a_killed_agent_resumes_its_epoch_with_everything_acknowledged() {
    let cluster = Cluster::start(&[]);
    cluster.must(&["volume", "create", "v", "--size", "64Mi"]);
    let socket = cluster.attach("v", "local", &[]);
    let epoch = cluster.attachment("local")["epoch"].clone();
    let mut model = Model::new(BLOCKS);
    for round in 0..3 {
        let workload = Workload::start(&socket, model, 100 + round);
        workload.wait_completed(50);
        workload.wait_full();
        signal(cluster.agent_pid("local"), libc::SIGKILL);
        let outcome = workload.join();
        assert_eq!(outcome.end, End::Disconnected);
        model = outcome.model;
        cluster.attach("v", "local", &[]);
        let attachment = cluster.attachment("local");
        assert_eq!(attachment["epoch"], epoch, "the same holder, the same epoch: {attachment:#}");
        verify(&socket, &mut model);
    }
    let outcome = {
        let workload = Workload::start(&socket, model, 200);
        workload.wait_completed(50);
        workload.stop()
    };
    assert_eq!(outcome.end, End::Stopped);
    model = outcome.model;
    verify(&socket, &mut model);
}
