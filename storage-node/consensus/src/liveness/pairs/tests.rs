use super::*;

const MS: u64 = 1_000_000;
const LEASE_MS: u64 = 300;

fn node(n: u8) -> NodeId {
    NodeId::from_bytes([n; 16]).expect("not zero")
}

fn at(ms: u64) -> Timestamp {
    Timestamp(ms * MS)
}

fn pairs(boot: u64) -> Pairs {
    let options = PairOptions {
        node: node(1),
        heartbeat: Duration::from_millis(100),
        lease: Duration::from_millis(LEASE_MS),
        drift_ppm: 1000,
        boot,
    };
    let mut pairs = Pairs::new(options);
    pairs.watch(at(1000), node(2));
    pairs
}

fn epoch(boot: u64, count: u64) -> SupportEpoch {
    SupportEpoch { boot, count }
}

#[test]
fn heartbeats_go_to_watched_nodes_once_an_interval() {
    let mut pairs = pairs(1);
    assert_eq!(pairs.deadline(), Some(at(1000)));
    assert_eq!(pairs.on_deadline(at(1000)), vec![DueHeartbeat { to: node(2), sequence: 1 }]);
    assert_eq!(pairs.on_deadline(at(1050)), vec![]);
    assert_eq!(pairs.on_deadline(at(1100)), vec![DueHeartbeat { to: node(2), sequence: 2 }]);
    pairs.forget(node(2));
    assert_eq!(pairs.deadline(), None);
}

#[test]
fn a_pair_exchanges_heartbeats_together_and_one_end_begins() {
    let options = |n| PairOptions { node: node(n), ..pairs(1).options };
    let (mut begins, mut answers) = (Pairs::new(options(1)), Pairs::new(options(2)));
    begins.watch(at(1000), node(2));
    answers.watch(at(1000), node(1));
    begins.on_deadline(at(1000));
    answers.on_deadline(at(1000));
    for now in (1100..2000).step_by(100) {
        assert_eq!(begins.deadline(), Some(at(now)), "the end that begins wakes for nothing else");
        assert_eq!(begins.on_deadline(at(now)).len(), 1);
        assert!(answers.deadline() > Some(at(now)), "the other end is woken by what comes");
        answers.on_heartbeat(at(now), node(1), 1, false);
        assert_eq!(answers.on_deadline(at(now)).len(), 1, "it sends its own with the answer");
        begins.on_heartbeat(at(now), node(2), 1, false);
        assert_eq!(begins.on_deadline(at(now)), vec![], "and is not answered with another");
    }
    // Without the other it goes on by itself, more than twice in a lease.
    assert_eq!(answers.deadline(), Some(at(1900 + 125)));
    assert_eq!(answers.on_deadline(at(1900 + 125)).len(), 1);
    assert_eq!(answers.deadline(), Some(at(1900 + 250)));
}

#[test]
fn what_wakes_a_node_for_one_pair_begins_its_others() {
    let mut pairs = pairs(1);
    pairs.watch(at(1000), node(3));
    assert_eq!(pairs.on_deadline(at(1000)).len(), 2);
    pairs.on_heartbeat(at(1060), node(3), 1, false);
    let to: Vec<NodeId> = pairs.on_deadline(at(1060)).into_iter().map(|due| due.to).collect();
    assert_eq!(to, [node(2), node(3)]);
    // From then on they are due together.
    assert_eq!(pairs.deadline(), Some(at(1160)));
    assert_eq!(pairs.on_deadline(at(1160)).len(), 2);
}

#[test]
fn support_counts_from_the_send_time_and_less_by_the_drift() {
    let mut pairs = pairs(1);
    pairs.on_deadline(at(1000));
    pairs.on_deadline(at(1100));
    // The answer to the first heartbeat is late; it proves no more than what it answers.
    pairs.on_reply(node(2), 1, epoch(5, 0));
    let (_, until) = pairs.supported_by(node(2)).expect("answered");
    assert!(until < at(1000 + LEASE_MS) && until > at(1000 + LEASE_MS - 2), "{until}");
    pairs.on_reply(node(2), 2, epoch(5, 0));
    let (_, later) = pairs.supported_by(node(2)).expect("answered");
    assert!(later > until);
    // An answer twice, or to what was never asked, changes nothing.
    pairs.on_reply(node(2), 1, epoch(5, 0));
    pairs.on_reply(node(2), 77, epoch(5, 0));
    assert_eq!(pairs.supported_by(node(2)), Some((epoch(5, 0), later)));
}

#[test]
fn a_promise_is_no_shorter_than_what_the_other_counts() {
    let mut giver = pairs(7);
    giver.on_heartbeat(at(2000), node(2), 1, false).expect("watched");
    assert_eq!(giver.promised_to(node(2)), at(2000 + LEASE_MS));
}

#[test]
fn a_withdrawal_raises_the_epoch_and_ends_no_promise() {
    let mut giver = pairs(7);
    assert_eq!(giver.on_heartbeat(at(2000), node(2), 1, false), Some(epoch(7, 0)));
    giver.withdraw(node(2));
    assert_eq!(giver.promised_to(node(2)), at(2000 + LEASE_MS));
    assert_eq!(giver.on_heartbeat(at(2100), node(2), 1, false), Some(epoch(7, 1)));
    // Nor is an epoch used again after the pair was forgotten.
    giver.forget(node(2));
    giver.watch(at(2200), node(2));
    assert!(giver.epoch_for(node(2)) > epoch(7, 1));
}

#[test]
fn support_that_lapsed_comes_back_in_another_epoch() {
    let mut giver = pairs(7);
    giver.on_heartbeat(at(2000), node(2), 1, false);
    assert_eq!(giver.on_heartbeat(at(2000 + LEASE_MS - 1), node(2), 1, false), Some(epoch(7, 0)));
    assert_eq!(giver.on_heartbeat(at(3000), node(2), 1, false), Some(epoch(7, 1)));
}

#[test]
fn silence_a_closed_connection_a_new_boot_and_a_stalled_disk_are_suspicions() {
    let mut pairs = pairs(1);
    pairs.on_heartbeat(at(1000), node(2), 1, false);
    pairs.on_deadline(at(1000 + LEASE_MS - 1));
    assert_eq!(pairs.take_events(), vec![]);
    pairs.on_deadline(at(1000 + LEASE_MS));
    assert_eq!(pairs.take_events(), vec![PairEvent::Suspected(node(2))]);
    pairs.on_deadline(at(2000));
    assert_eq!(pairs.take_events(), vec![], "told once");
    pairs.on_heartbeat(at(2000), node(2), 1, false);
    assert_eq!(pairs.take_events(), vec![PairEvent::SupportChanged(node(2))]);

    pairs.on_closed(node(2));
    assert_eq!(pairs.take_events(), vec![PairEvent::Suspected(node(2))]);
    pairs.on_heartbeat(at(2050), node(2), 1, false);
    pairs.take_events();

    pairs.on_heartbeat(at(2100), node(2), 2, false);
    let events = pairs.take_events();
    assert_eq!(events, vec![PairEvent::Suspected(node(2)), PairEvent::SupportChanged(node(2))]);
    assert_eq!(pairs.on_heartbeat(at(2150), node(2), 1, false), None, "an earlier life is not supported");

    pairs.on_heartbeat(at(2200), node(2), 2, true);
    assert_eq!(pairs.take_events(), vec![PairEvent::Suspected(node(2))]);
    pairs.on_heartbeat(at(2300), node(2), 2, true);
    assert_eq!(pairs.take_events(), vec![], "it stays suspected while the disk stalls");
    assert!(pairs.is_suspected(node(2)));
}

#[test]
fn a_changed_epoch_is_told_so_that_leaders_ask_anew() {
    let mut pairs = pairs(1);
    pairs.on_deadline(at(1000));
    pairs.on_reply(node(2), 1, epoch(5, 0));
    assert_eq!(pairs.take_events(), vec![PairEvent::SupportChanged(node(2))]);
    pairs.on_deadline(at(1100));
    pairs.on_reply(node(2), 2, epoch(5, 0));
    assert_eq!(pairs.take_events(), vec![]);
    pairs.on_deadline(at(1200));
    pairs.on_reply(node(2), 3, epoch(5, 1));
    assert_eq!(pairs.take_events(), vec![PairEvent::SupportChanged(node(2))]);
}

#[test]
fn strangers_are_neither_supported_nor_suspected() {
    let mut pairs = pairs(1);
    assert_eq!(pairs.on_heartbeat(at(1000), node(9), 1, false), None);
    pairs.on_closed(node(9));
    pairs.on_reply(node(9), 1, epoch(1, 1));
    assert_eq!(pairs.take_events(), vec![]);
    assert_eq!(pairs.supported_by(node(9)), None);
}
