//! Properties over random histories: determinism, snapshots anywhere, idempotence, and the agreement of planner and lint.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_id::{ClusterId, DiskId, NodeId, ReplicaId, VolumeId};
use holdfast_metadata::catalogue::{DiskState, Founder, Member, NodeState};
use holdfast_metadata::command::*;
use holdfast_metadata::intent::{Control, IntentReply, IntentResult};
use holdfast_metadata::lint::Finding;
use holdfast_metadata::spec::{LABELS_BYTES_MAX, LABELS_MAX, Labels, Name, Spread, VolumeSpec};
use holdfast_metadata::state::STATE_BYTES_MAX;
use holdfast_metadata::{Catalogue, Command, Outcome, executor, lint, planner, upkeep};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn id(kind: u8, number: u64) -> [u8; 16] {
    let mut bytes = [kind; 16];
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    bytes
}

fn node(number: u64) -> NodeId {
    NodeId::from_bytes(id(1, number)).expect("not zero")
}

fn disk(number: u64) -> DiskId {
    DiskId::from_bytes(id(2, number)).expect("not zero")
}

fn volume(number: u64) -> VolumeId {
    VolumeId::from_bytes(id(3, number)).expect("not zero")
}

fn replica(number: u64) -> ReplicaId {
    ReplicaId::from_bytes(id(4, number)).expect("not zero")
}

fn name(prefix: &str, number: u64) -> Name {
    Name::new(&format!("{prefix}-{number}")).expect("a name")
}

fn founded() -> Catalogue {
    let founder = |number: u64| Founder {
        node: node(number),
        replica: replica(1_000_000 + number),
        name: name("n", number),
        peer_address: format!("n-{number}:7000"),
        api_address: format!("n-{number}:7001"),
        zone: number.is_multiple_of(2).then(|| "even".to_owned()),
    };
    let cluster = ClusterId::from_bytes(id(9, 1)).expect("not zero");
    Catalogue::found(cluster, &[founder(0), founder(1), founder(2)]).expect("three distinct founders")
}

/// A step of a history; which command it is may depend on the state, as it does for a leader.
#[derive(Clone, Debug)]
enum Step {
    Node {
        number: u64,
        zone: Option<u8>,
    },
    State {
        number: u64,
        state: u8,
    },
    Disk {
        number: u64,
        mib: u64,
    },
    Update {
        number: u64,
        mib: u64,
        free: u64,
        failed: bool,
    },
    Create {
        number: u64,
        mib: u64,
        replicas: u8,
    },
    Delete {
        number: u64,
        generation: Option<u64>,
    },
    Resize {
        number: u64,
        mib: u64,
        generation: Option<u64>,
    },
    Replicas {
        number: u64,
        replicas: u8,
        generation: Option<u64>,
    },
    DiskState {
        number: u64,
        state: u8,
    },
    /// What the leader does by itself.
    Upkeep,
    /// A node answers the n-th intent that is due.
    Answer {
        pick: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (0u64..7, proptest::option::of(0u8..3)).prop_map(|(number, zone)| Step::Node { number, zone }),
        1 => (0u64..7, 0u8..6).prop_map(|(number, state)| Step::State { number, state }),
        3 => (0u64..12, 0u64..400).prop_map(|(number, mib)| Step::Disk { number, mib }),
        1 => (0u64..12, 0u64..400, 0u64..500, proptest::bool::weighted(0.2))
            .prop_map(|(number, mib, free, failed)| Step::Update { number, mib, free, failed }),
        6 => (0u64..6, 1u64..120, 1u8..=5).prop_map(|(number, mib, replicas)| Step::Create { number, mib, replicas }),
        2 => (0u64..30, proptest::option::of(1u64..4))
            .prop_map(|(number, generation)| Step::Delete { number, generation }),
        2 => (0u64..30, 1u64..200, proptest::option::of(1u64..4))
            .prop_map(|(number, mib, generation)| Step::Resize { number, mib, generation }),
        3 => (0u64..6, 0u8..=6, proptest::option::weighted(0.2, 1u64..4))
            .prop_map(|(number, replicas, generation)| Step::Replicas { number, replicas, generation }),
        1 => (0u64..12, 0u8..4).prop_map(|(number, state)| Step::DiskState { number, state }),
        6 => Just(Step::Upkeep),
        8 => (0usize..16).prop_map(|pick| Step::Answer { pick }),
    ]
}

/// `count` numbers volumes and replicas afresh. The n-th volume that exists is what deletes and resizes aim at.
fn command(catalogue: &Catalogue, step: &Step, count: u64) -> Option<Command> {
    let nth = |number: u64| catalogue.volumes().keys().nth(number as usize).copied().unwrap_or_else(|| volume(number));
    Some(match *step {
        Step::Node { number, zone } => Command::RegisterNode(RegisterNode {
            node: node(number),
            name: name("n", number),
            peer_address: format!("n-{number}:7000"),
            api_address: format!("n-{number}:7001"),
            zone: zone.map(|zone| format!("zone-{zone}")),
        }),
        Step::State { number, state } => {
            let state = match state {
                0 => NodeState::Removed,
                3 => NodeState::Removing,
                4 => NodeState::Away,
                1 | 2 => NodeState::Draining,
                _ => NodeState::Active,
            };
            Command::SetNodeState(SetNodeState { node: node(number), state })
        }
        Step::Disk { number, mib } => Command::RegisterDisk(RegisterDisk {
            disk: disk(number),
            node: node(number % 7),
            capacity_bytes: mib * MIB,
            only: number.is_multiple_of(3),
        }),
        Step::DiskState { number, state } => {
            let state = match state {
                0 => DiskState::Failed,
                1 => DiskState::Removing,
                2 => DiskState::Removed,
                _ => DiskState::Active,
            };
            Command::SetDiskState(SetDiskState { disk: disk(number), state })
        }
        Step::Upkeep => upkeep::next(catalogue, replica(2_000_000 + count))?,
        Step::Update { number, mib, free, failed } => Command::UpdateDisk(UpdateDisk {
            disk: disk(number),
            capacity_bytes: mib * MIB,
            free_bytes: free * MIB,
            failed,
        }),
        Step::Create { number, mib, replicas } => {
            let spec = VolumeSpec { size_bytes: mib * MIB, logical_block_bytes: 512, replicas, spread: Spread::Node };
            let ids: Vec<ReplicaId> = (0..5).map(|n| replica(count * 5 + n)).collect();
            let members = planner::plan_volume(catalogue, &spec, &[], &ids).ok()?;
            Command::CreateVolume(CreateVolume {
                volume: volume(count),
                name: name("v", number),
                spec,
                labels: Labels::new(),
                members,
                planned_at: catalogue.revision(),
            })
        }
        Step::Delete { number, generation } => {
            Command::DeleteVolume(DeleteVolume { volume: nth(number), expected_generation: generation })
        }
        Step::Resize { number, mib, generation } => Command::ResizeVolume(ResizeVolume {
            volume: nth(number),
            size_bytes: mib * MIB,
            expected_generation: generation,
        }),
        Step::Replicas { number, replicas, generation } => Command::SetVolumeReplicas(SetVolumeReplicas {
            volume: nth(number),
            replicas,
            expected_generation: generation,
        }),
        Step::Answer { pick } => {
            let due = executor::due(catalogue);
            let intent = due.get(pick % due.len().max(1))?;
            let control = Control::Intent(intent.clone());
            assert_eq!(Control::decode(&control.encode()).expect("its own encoding"), control);
            let (generation, action) = (intent.generation, intent.action.clone());
            let reply = IntentReply { generation, action, result: IntentResult::Done };
            executor::on_reply(catalogue, intent.node, &reply)?
        }
    })
}

/// Runs a history, calling `each` with the state before a command, and the command.
fn run(steps: &[Step], mut each: impl FnMut(&Catalogue, u64, &Command, &Outcome)) -> Catalogue {
    let mut catalogue = founded();
    for (count, step) in steps.iter().enumerate() {
        if let Some(command) = command(&catalogue, step, count as u64) {
            let before = catalogue.clone();
            let index = count as u64 * 2 + 1;
            let outcome = catalogue.apply(index, &command.encode()).expect("a command of this version");
            catalogue.check().expect("the invariants hold");
            each(&before, index, &command, &outcome);
        }
    }
    catalogue
}

fn create(volume_number: u64, spec: VolumeSpec, members: Vec<Member>, planned_at: u64) -> Command {
    let name = name("fresh", volume_number);
    Command::CreateVolume(CreateVolume {
        volume: volume(volume_number),
        name,
        spec,
        labels: Labels::new(),
        members,
        planned_at,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// A replica restored from a snapshot in the middle, and one that runs through, are equal at every later index.
    #[test]
    fn a_snapshot_anywhere_changes_nothing(steps in proptest::collection::vec(step(), 1..80), at in 0usize..80) {
        let mut log = Vec::new();
        let through = run(&steps, |_, index, command, outcome| log.push((index, command.encode(), outcome.clone())));
        let mut other = founded();
        for (number, (index, bytes, outcome)) in log.iter().enumerate() {
            if number == at {
                other = Catalogue::decode_state(&other.encode_state()).expect("its own encoding");
            }
            prop_assert_eq!(&other.apply(*index, bytes).expect("known"), outcome);
        }
        prop_assert_eq!(other.encode_state(), through.encode_state());
        prop_assert_eq!(other.state_hash(), through.state_hash());
    }

    /// Applied again at once, a command changes nothing but the revision.
    #[test]
    fn a_command_takes_effect_once(steps in proptest::collection::vec(step(), 1..60)) {
        let mut twice = founded();
        let once = run(&steps, |_, index, command, _| {
            twice.apply(index, &command.encode()).expect("known");
            let mut again = twice.clone();
            let outcome = again.apply(index + 1, &command.encode()).expect("known");
            assert_ne!(outcome, Outcome::Applied);
            let value = |catalogue: &Catalogue| {
                let mut value: serde_json::Value = serde_json::from_slice(&catalogue.encode_state()).expect("json");
                value["catalogue"]["applied"].take();
                value
            };
            assert_eq!(value(&again), value(&twice));
        });
        prop_assert_eq!(once, twice);
    }

    /// Whatever the cluster looks like, what the planner makes is clean, applies, and never passes a disk's room; and
    /// where the planner refuses, there are fewer fitting nodes than copies.
    #[test]
    fn every_plan_is_clean(steps in proptest::collection::vec(step(), 1..60), mib in 1u64..200, replicas in 1u8..=5) {
        let mut catalogue = run(&steps, |before, _, command, outcome| {
            if let Command::CreateVolume(_) = command {
                assert_eq!(lint::check(before, command), Ok(()));
                assert!(!matches!(outcome, Outcome::Refused(refusal) if refusal.code() == "UnsafeChange"));
            }
        });
        let spec = VolumeSpec { size_bytes: mib * MIB, logical_block_bytes: 4096, replicas, spread: Spread::Node };
        let ids: Vec<ReplicaId> = (0..5).map(|n| replica(500_000 + n)).collect();
        let planned = planner::plan_volume(&catalogue, &spec, &[], &ids);
        prop_assert_eq!(&planned, &planner::plan_volume(&catalogue.clone(), &spec, &[], &ids));
        // The oracle: room by its definition, written down once more.
        let room = |id: &DiskId, disk: &holdfast_metadata::catalogue::Disk| {
            let members = catalogue.volumes().values().flat_map(|v| {
                v.members.iter().chain(v.coming()).map(|m| (m.member.disk, v.spec.size_bytes))
            });
            let tombs = catalogue.tombstones().values().map(|t| (t.disk, t.size_bytes));
            let used: u64 = members.chain(tombs).filter(|(on, _)| on == id).map(|(_, size)| size).sum();
            (disk.capacity_bytes - disk.capacity_bytes / 20).saturating_sub(used).min(disk.free_bytes)
        };
        let fitting: BTreeSet<NodeId> = catalogue
            .disks()
            .iter()
            .filter(|(id, disk)| {
                disk.state == DiskState::Active
                    && catalogue.nodes()[&disk.node].state == NodeState::Active
                    && room(id, disk) >= spec.size_bytes
            })
            .map(|(_, disk)| disk.node)
            .collect();
        match planned {
            Ok(members) => {
                let nodes: BTreeSet<NodeId> = members.iter().map(|member| member.node).collect();
                prop_assert_eq!(nodes.len(), usize::from(replicas));
                prop_assert!(nodes.is_subset(&fitting));
                let zone = |node: &NodeId| catalogue.nodes()[node].zone.clone();
                let used: BTreeSet<_> = nodes.iter().map(zone).collect();
                let there: BTreeSet<_> = fitting.iter().map(zone).collect();
                prop_assert_eq!(used.len(), there.len().min(usize::from(replicas)));
                let command = create(900_000, spec, members, catalogue.revision());
                prop_assert_eq!(lint::check(&catalogue, &command), Ok(()));
                let index = catalogue.revision() + 1;
                prop_assert_eq!(catalogue.apply(index, &command.encode()).expect("known"), Outcome::Applied);
                catalogue.check().expect("the invariants hold");
            }
            Err(error) => {
                prop_assert!(fitting.len() < usize::from(replicas), "{error}");
                prop_assert_eq!(error.code(), "NoPlacement");
            }
        }
    }

    /// Every way to break a rule in a good plan is found, by the finding of that rule, and refused by `apply`.
    #[test]
    fn every_broken_rule_is_found(mib in 1u64..200, replicas in 2u8..=4, victim in 0usize..4, mutation in 0usize..9) {
        let mut catalogue = founded();
        let mut index = 0;
        let mut apply = |catalogue: &mut Catalogue, command: Command| {
            index += 1;
            assert_eq!(catalogue.apply(index, &command.encode()).expect("known"), Outcome::Applied);
        };
        for number in 0..5 {
            if number > 2 {
                let step = Step::Node { number, zone: Some(number as u8) };
                let command = command(&catalogue, &step, 0).expect("a command");
                apply(&mut catalogue, command);
            }
            let command =
                RegisterDisk { disk: disk(number), node: node(number), capacity_bytes: 1 << 30, only: true };
            apply(&mut catalogue, Command::RegisterDisk(command));
        }
        let spec = VolumeSpec { size_bytes: mib * MIB, logical_block_bytes: 512, replicas, spread: Spread::Node };
        let ids: Vec<ReplicaId> = (0..5).map(replica).collect();
        let mut members = planner::plan_volume(&catalogue, &spec, &[], &ids).expect("there is room");
        prop_assert_eq!(lint::check(&catalogue, &create(1, spec, members.clone(), 0)), Ok(()));
        let victim = victim % members.len();
        let other = (victim + 1) % members.len();
        let update = |free_bytes: u64, failed: bool| UpdateDisk {
            disk: members[victim].disk, capacity_bytes: 1 << 30, free_bytes, failed,
        };
        let found: fn(&Finding) -> bool = match mutation {
            0 => {
                members.remove(victim);
                |finding| matches!(finding, Finding::WrongCopies { .. })
            }
            1 => {
                members[victim] = Member { replica: members[victim].replica, ..members[other] };
                |finding| matches!(finding, Finding::SameNode { .. })
            }
            2 => {
                members[victim].replica = members[other].replica;
                |finding| matches!(finding, Finding::ReplicaReused { .. })
            }
            3 => {
                members[victim].replica = replica(1_000_000);
                |finding| matches!(finding, Finding::ReplicaReused { .. })
            }
            4 => {
                members[victim].disk = disk(77);
                |finding| matches!(finding, Finding::UnknownDisk { .. })
            }
            5 => {
                members[victim].disk = members[other].disk;
                |finding| matches!(finding, Finding::DiskElsewhere { .. })
            }
            6 => {
                apply(&mut catalogue, Command::UpdateDisk(update(1 << 30, true)));
                |finding| matches!(finding, Finding::DiskFailed { .. })
            }
            7 => {
                apply(&mut catalogue, Command::UpdateDisk(update(mib * MIB - 1, false)));
                |finding| matches!(finding, Finding::NoRoom { .. })
            }
            _ => {
                let state = NodeState::Draining;
                apply(&mut catalogue, Command::SetNodeState(SetNodeState { node: members[victim].node, state }));
                |finding| matches!(finding, Finding::NodeNotActive { .. })
            }
        };
        let broken = create(1, spec, members, catalogue.revision());
        let findings = lint::check(&catalogue, &broken).expect_err("a rule is broken");
        prop_assert!(findings.iter().any(found), "{findings:?}");
        let before = catalogue.volumes().clone();
        let outcome = catalogue.apply(catalogue.revision() + 1, &broken.encode()).expect("known");
        prop_assert!(matches!(outcome, Outcome::Refused(refusal) if refusal.code() == "UnsafeChange"));
        prop_assert_eq!(catalogue.volumes(), &before);
    }

    /// A delete is told to a node only for a replica whose volume was deleted, and only to the node that has it.
    #[test]
    fn data_is_deleted_only_by_order(steps in proptest::collection::vec(step(), 1..80)) {
        let mut deleted = BTreeSet::new();
        let mut replaced = BTreeSet::new();
        let mut home: BTreeMap<ReplicaId, (VolumeId, NodeId)> = BTreeMap::new();
        let metadata = founded().metadata_id();
        home.extend(founded().metadata().members.iter().map(|place| (place.replica, (metadata, place.node))));
        run(&steps, |before, _, command, outcome| {
            match command {
                Command::CreateVolume(create) if *outcome == Outcome::Applied => {
                    home.extend(create.members.iter().map(|member| (member.replica, (create.volume, member.node))));
                }
                Command::DeleteVolume(delete) if *outcome == Outcome::Applied => {
                    deleted.insert(delete.volume);
                }
                Command::ReplaceReplica(replace) if *outcome == Outcome::Applied => {
                    home.extend(replace.new.map(|new| (new.replica, (replace.volume, new.node))));
                }
                Command::ReplicaReplaced(done) if *outcome == Outcome::Applied => {
                    let placement = before.placement(done.volume).expect("it has one");
                    replaced.extend(placement.replacement.expect("it was replaced").old);
                }
                _ => {}
            }
            for intent in executor::due(before) {
                if let holdfast_metadata::intent::Action::DeleteReplica(delete) = intent.action {
                    let (volume, node) = home[&delete.replica];
                    assert!(deleted.contains(&volume) || replaced.contains(&delete.replica));
                    assert!(node == intent.node && delete.group.volume == volume);
                }
            }
        });
    }

    /// What the leader does by itself is always safe and always done. While some nodes are silent no volume loses a copy
    /// that counts and is wanted; once all answer it comes to an end, where whatever has not moved has a reason.
    #[test]
    fn leaving_replicas_move_or_have_a_reason(steps in proptest::collection::vec(step(), 1..60), silent in 0u64..7) {
        let mut catalogue = run(&steps, |_, _, _, _| {});
        let counts = |catalogue: &Catalogue| -> BTreeMap<VolumeId, usize> {
            let ids = catalogue.volumes().iter().filter(|(_, v)| !v.members.is_empty()).map(|(id, _)| *id);
            let ids = ids.chain([catalogue.metadata_id()]);
            ids.map(|id| (id, catalogue.placement(id).expect("it has one").quorum(catalogue).0)).collect()
        };
        for round in 0..4_000u64 {
            let before = counts(&catalogue);
            let index = catalogue.revision() + 1;
            let silent = (round < 200).then(|| node(silent));
            let command = match upkeep::next(&catalogue, replica(3_000_000 + round)) {
                Some(command) => {
                    prop_assert_eq!(lint::check(&catalogue, &command), Ok(()));
                    Some(command)
                }
                None => executor::due(&catalogue).into_iter().find_map(|intent| {
                    let reply = IntentReply {
                        generation: intent.generation, action: intent.action.clone(), result: IntentResult::Done,
                    };
                    executor::on_reply(&catalogue, intent.node, &reply).filter(|_| Some(intent.node) != silent)
                }),
            };
            let Some(command) = command else {
                if silent.is_some() { continue } else { break }
            };
            prop_assert_eq!(catalogue.apply(index, &command.encode()).expect("known"), Outcome::Applied);
            catalogue.check().expect("the invariants hold");
            let after = counts(&catalogue);
            let wanted = |id: &VolumeId| catalogue.placement(*id).expect("it has one").wanted;
            let lost = before.iter().any(|(id, copies)| after.get(id).is_some_and(|left| *left < wanted(id).min(*copies)));
            prop_assert!(!lost, "{command:?}");
            prop_assert!(round < 3_999, "it does not come to an end: {command:?}");
        }
        let ids = catalogue.volumes().keys().copied().chain([catalogue.metadata_id()]);
        for id in ids.collect::<Vec<_>>() {
            let placement = catalogue.placement(id).expect("it has one");
            let dead = placement.replacement.is_some_and(|found| found.is_lost(&catalogue));
            prop_assert!(placement.replacement.is_none() || dead, "all nodes have answered");
            let held = upkeep::held(&catalogue, id);
            for (wish, held) in &held {
                prop_assert!(held.is_err() && *held != Err(upkeep::Held::Queue), "{wish:?} {held:?}");
            }
            let settled = placement.members.len() == placement.wanted || placement.members.is_empty();
            prop_assert!(settled || !held.is_empty(), "{placement:?}");
        }
    }

    /// Hostile bytes are an error, never a panic.
    #[test]
    fn hostile_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), flip in any::<(usize, u8)>()) {
        let catalogue = founded();
        assert!(Command::decode(&bytes).is_err() && Control::decode(&bytes).is_err());
        assert!(Catalogue::decode_state(&bytes).is_err());
        let mut state = catalogue.encode_state();
        let at = flip.0 % state.len();
        state[at] = flip.1;
        if let Ok(decoded) = Catalogue::decode_state(&state) {
            decoded.check().expect("what is decoded is consistent");
        }
    }
}

/// The limits of the catalogue, all at once, still make a state that the store keeps.
#[test]
fn the_fullest_catalogue_fits() {
    use holdfast_metadata::catalogue::{DISKS_MAX, NODES_MAX, VOLUMES_MAX};
    let text =
        |prefix: &str, number: u64, length: usize| format!("{prefix}{number:0>width$}", width = length - prefix.len());
    let cluster = ClusterId::from_bytes([0xff; 16]).expect("not zero");
    let mut value: serde_json::Value = serde_json::from_slice(&founded().encode_state()).expect("json");
    value["catalogue"]["cluster"] = serde_json::json!(cluster);
    let catalogue = &mut value["catalogue"];
    for number in 3..NODES_MAX as u64 {
        let host = text("h", number, 255);
        catalogue["nodes"][node(number).to_string()] = serde_json::json!({
            "name": text("n", number, 63), "peer_address": format!("{host}:65535"), "api_address": format!("{host}:65535"),
            "zone": text("z", number, 261), "state": "draining",
        });
    }
    for number in 0..DISKS_MAX as u64 {
        catalogue["disks"][disk(number).to_string()] = serde_json::json!({
            "node": node(number % NODES_MAX as u64), "capacity_bytes": u64::MAX, "free_bytes": u64::MAX, "state": "active",
        });
    }
    let labels: Labels =
        (0..LABELS_MAX).map(|n| (n.to_string(), "v".repeat(LABELS_BYTES_MAX / LABELS_MAX - 1))).collect();
    for number in 0..VOLUMES_MAX as u64 {
        let members: Vec<serde_json::Value> = (0..5)
            .map(|n| {
                serde_json::json!({
                    "member": {"replica": replica(number * 5 + n), "node": node(n), "disk": disk(n)},
                    "created": false, "obstacle": "too_many_replicas",
                })
            })
            .collect();
        let size = 64u64 << 40;
        catalogue["volumes"][volume(number).to_string()] = serde_json::json!({
            "name": text("v", number, 63),
            "spec": {"size_bytes": size, "logical_block_bytes": 4096, "replicas": 5, "spread": "zone"},
            "labels": labels,
            "provisioned_bytes": size, "founding_bytes": size, "members": members, "state": "creating",
            "generation": u64::from(u32::MAX),
            "replacement": {"old": replica(number * 5), "new": {
                "member": {"replica": replica(100_000 + number), "node": node(5), "disk": disk(5)},
                "created": false, "obstacle": "too_many_replicas",
            }},
        });
    }
    let bytes = serde_json::to_vec(&value).expect("json");
    let mut full = Catalogue::decode_state(&bytes).expect("within the limits");
    assert_eq!(full.volumes().len(), VOLUMES_MAX);
    // Deleted, members become tombstones, which are longer.
    for number in 0..VOLUMES_MAX as u64 {
        let delete = DeleteVolume { volume: volume(number), expected_generation: None };
        let outcome = full.apply(number + 1, &Command::DeleteVolume(delete).encode());
        assert!(outcome.is_ok());
    }
    assert!(full.encode_state().len() <= STATE_BYTES_MAX, "{} bytes", full.encode_state().len());
}
