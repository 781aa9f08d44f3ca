//! Attachments that the control API asks for: repeated, lost and at the wrong node they come to one epoch.

use std::time::Duration;

use holdfast_block::Operation;
use holdfast_consensus::Position;
use holdfast_protocol::session::{Epoch, Instance, Refusal, Reply, Request, Session, Stamp};
use holdfast_shard::{AdminError, AdminReply, AdminRequest, AttachVolume, ClientId, ClientRole};

use crate::world::Cluster;

fn attach(cluster: &Cluster, holder: &str, instance: u128, take_over: bool) -> AdminRequest {
    let attach =
        AttachVolume { volume: cluster.volume, holder: holder.into(), instance: Instance(instance), take_over };
    AdminRequest::Attach(attach)
}

/// At the leader, as often as another attachment is under way.
fn attached(cluster: &mut Cluster, holder: &str, instance: u128, take_over: bool) -> (u64, bool) {
    let request = attach(cluster, holder, instance, take_over);
    match ask(cluster, request) {
        AdminReply::Attached { epoch, already } => (epoch.0, already),
        reply => panic!("{reply:?}"),
    }
}

fn ask(cluster: &mut Cluster, request: AdminRequest) -> AdminReply {
    cluster.run_until("a leader", |cluster| cluster.leader().is_some());
    let leader = cluster.leader().unwrap();
    cluster.ask(leader, request)
}

fn detach(cluster: &Cluster, epoch: u64) -> AdminRequest {
    AdminRequest::Detach { volume: cluster.volume, epoch: Epoch(epoch) }
}

fn last_index(cluster: &Cluster) -> u64 {
    let leader = cluster.leader().unwrap();
    cluster.shards[leader].report().volumes[0].replica.last.0
}

#[test]
fn a_repeated_attachment_keeps_its_epoch_without_an_entry() {
    let mut cluster = Cluster::new();
    assert_eq!(attached(&mut cluster, "a", 1, false), (1, false));
    let last = last_index(&cluster);
    for instance in 2..10 {
        assert_eq!(attached(&mut cluster, "a", instance, false), (1, true));
    }
    assert_eq!(last_index(&cluster), last);
    cluster.restart();
    assert_eq!(attached(&mut cluster, "a", 20, false), (1, true), "the attachment is in the log");
}

#[test]
fn another_holder_waits_for_the_detachment_or_takes_over() {
    let mut cluster = Cluster::new();
    assert_eq!(attached(&mut cluster, "a", 1, false), (1, false));
    let request = attach(&cluster, "b", 2, false);
    let reply = ask(&mut cluster, request);
    assert!(
        matches!(&reply, AdminReply::Failed(AdminError::Held { holder, epoch: Epoch(1) }) if holder == "a"),
        "{reply:?}"
    );
    assert_eq!(attached(&mut cluster, "b", 3, true), (2, false));
    // The detachment of the machine that lost it is over, whatever the present holder does.
    let over = detach(&cluster, 1);
    assert!(matches!(ask(&mut cluster, over), AdminReply::Detached));
    assert_eq!(attached(&mut cluster, "b", 4, false), (2, true));
    for _ in 0..2 {
        let current = detach(&cluster, 2);
        assert!(matches!(ask(&mut cluster, current), AdminReply::Detached));
    }
    let never = detach(&cluster, 9);
    let reply = ask(&mut cluster, never);
    let unknown = AdminError::UnknownEpoch { epoch: Epoch(9), latest: Epoch(2) };
    assert!(matches!(&reply, AdminReply::Failed(error) if *error == unknown), "{reply:?}");
    assert_eq!(attached(&mut cluster, "a", 5, false), (3, false));
}

/// The second is judged before the first is in force: it must not end the epoch that the first is told.
#[test]
fn attachments_under_way_together_come_to_one_epoch() {
    let mut cluster = Cluster::new();
    let leader = cluster.leader().unwrap();
    let requests: Vec<AdminRequest> = (1..4).map(|instance| attach(&cluster, "a", instance, true)).collect();
    let tokens = cluster.tell(leader, requests);
    let mut granted = Vec::new();
    for token in tokens {
        match cluster.answer(token) {
            AdminReply::Attached { epoch, .. } => granted.push(epoch.0),
            AdminReply::Failed(AdminError::AttachmentUnderWay) => {}
            reply => panic!("{reply:?}"),
        }
    }
    assert!(!granted.is_empty() && granted.iter().all(|epoch| *epoch == 1), "{granted:?}");
    assert_eq!(attached(&mut cluster, "a", 9, true), (1, true));
}

#[test]
fn others_say_who_leads() {
    let mut cluster = Cluster::new();
    let leader = cluster.leader().unwrap();
    let led_by = cluster.shards[leader].superblock().node;
    for number in (0..cluster.shards.len()).filter(|number| *number != leader) {
        for request in [attach(&cluster, "a", 1, false), detach(&cluster, 1)] {
            let reply = cluster.ask(number, request);
            let expected = AdminError::NotLeader { leader: Some(led_by) };
            assert!(matches!(&reply, AdminReply::Failed(error) if *error == expected), "{reply:?}");
        }
    }
}

/// Somebody else may lead by then, and have given the volume away.
#[test]
fn a_leader_that_hears_nobody_confirms_no_attachment() {
    let mut cluster = Cluster::new();
    assert_eq!(attached(&mut cluster, "a", 1, false), (1, false));
    let leader = cluster.leader().unwrap();
    cluster.on_the_way = Box::new(|_| None);
    cluster.pass(Duration::from_secs(2));
    let request = attach(&cluster, "a", 2, false);
    let token = cluster.tell(leader, vec![request])[0];
    cluster.pass(Duration::from_secs(5));
    let reply = cluster.take_answer(token);
    assert!(matches!(reply, None | Some(AdminReply::Failed(AdminError::NotLeader { .. }))), "{reply:?}");
}

/// The machine's agent asks the leader; what it hears first, hints aside.
fn heard(cluster: &mut Cluster, machine: &str, request: Request) -> Reply {
    let leader = cluster.leader().unwrap();
    cluster.replies.clear();
    cluster.request_as(leader, ClientId(9), ClientRole::NodeAgent(machine.into()), request);
    let answer = |cluster: &Cluster| {
        let of_it = |reply: &&(ClientId, Reply)| !matches!(reply.1, Reply::Replicas { .. } | Reply::Resized { .. });
        cluster.replies.iter().find(of_it).map(|(_, reply)| reply.clone())
    };
    cluster.run_until("an answer", |cluster| answer(cluster).is_some());
    answer(cluster).unwrap()
}

fn open(cluster: &Cluster, epoch: u64) -> Request {
    Request::OpenSession { volume: cluster.volume, epoch: Epoch(epoch), instance: Instance(77) }
}

#[test]
fn a_machines_agent_serves_what_was_attached_for_it_and_nothing_else() {
    let mut cluster = Cluster::new();
    assert_eq!(attached(&mut cluster, "a", 1, false), (1, false));
    let request = open(&cluster, 1);
    let reply = heard(&mut cluster, "b", request);
    assert!(matches!(&reply, Reply::Refused { reason: Refusal::NotAllowed { .. }, .. }), "{reply:?}");
    let request = open(&cluster, 1);
    let reply = heard(&mut cluster, "a", request);
    let Reply::Attached { epoch: Epoch(1), session, .. } = reply else { panic!("{reply:?}") };
    let io = |session: Session| Request::Io {
        volume: cluster.volume,
        stamp: Stamp { epoch: Epoch(1), session, sequence: 1 << 63, oldest: 1 },
        seen: Position::default(),
        operation: Operation::Read { offset: 0, length: 512 },
    };
    let (own, stolen) = (io(session), io(session));
    let reply = heard(&mut cluster, "b", stolen);
    assert!(matches!(&reply, Reply::Io { result: Err(holdfast_block::Error::Fenced), .. }), "{reply:?}");
    let reply = heard(&mut cluster, "a", own);
    assert!(matches!(&reply, Reply::Io { result: Ok(data), .. } if data.len() == 512), "{reply:?}");
}

/// It must learn that its epoch is over, or its device would wait for ever.
#[test]
fn an_epoch_that_is_over_is_told_by_its_own_number() {
    let mut cluster = Cluster::new();
    assert_eq!(attached(&mut cluster, "a", 1, false), (1, false));
    assert_eq!(attached(&mut cluster, "b", 2, true), (2, false));
    let volume = cluster.volume;
    for request in [open(&cluster, 1), Request::Detach { volume, epoch: Epoch(1) }] {
        let reply = heard(&mut cluster, "a", request);
        let reason = Refusal::Stale { epoch: Epoch(1) };
        assert!(matches!(&reply, Reply::Refused { reason: told, .. } if *told == reason), "{reply:?}");
    }
}
