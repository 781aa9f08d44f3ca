//! Scripts: commands in, outcomes and states out. `REWRITE=1` writes what came out; read the difference before keeping it.
//!
//! Every command is applied to three replicas: one that runs through, one that is encoded and decoded after every
//! command, and one that sees every command twice. Their states must stay the same bytes.

use std::collections::BTreeMap;
use std::fmt::Write;

use datadriven::{TestCase, walk};
use holdfast_id::{ClusterId, DiskId, NodeId, ReplicaId, VolumeId};
use holdfast_metadata::catalogue::{DiskState, Founder, Member, NodeState, Obstacle};
use holdfast_metadata::command::*;
use holdfast_metadata::intent::{Action, Control, Intent, IntentReply, IntentResult};
use holdfast_metadata::spec::{Name, Spread, VolumeSpec};
use holdfast_metadata::{Catalogue, Command, Outcome, executor, lint, planner, reason, upkeep};

const GIB: f64 = (1u64 << 30) as f64;

fn bytes(kind: u8, text: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0] = kind;
    bytes[1..=text.len()].copy_from_slice(text.as_bytes());
    bytes
}

#[derive(Default)]
struct Script {
    replicas: Vec<Catalogue>,
    index: u64,
    last: Option<Command>,
    labels: BTreeMap<String, String>,
    next_replica: u32,
}

impl Script {
    fn node(&mut self, name: &str) -> NodeId {
        let id = NodeId::from_bytes(bytes(b'n', name)).expect("not zero");
        self.labels.insert(id.to_string(), format!("<node {name}>"));
        id
    }

    fn disk(&mut self, name: &str) -> DiskId {
        let id = DiskId::from_bytes(bytes(b'd', name)).expect("not zero");
        self.labels.insert(id.to_string(), format!("<disk {name}>"));
        id
    }

    fn volume(&mut self, name: &str) -> VolumeId {
        let id = VolumeId::from_bytes(bytes(b'v', name)).expect("not zero");
        self.labels.insert(id.to_string(), format!("<volume {name}>"));
        id
    }

    fn replica(&mut self, number: u32) -> ReplicaId {
        let id = ReplicaId::from_bytes(bytes(b'r', &format!("{number:04}"))).expect("not zero");
        self.labels.insert(id.to_string(), format!("<replica {number}>"));
        id
    }

    fn catalogue(&self) -> &Catalogue {
        &self.replicas[0]
    }

    fn named(&self, mut text: String) -> String {
        for (id, label) in &self.labels {
            text = text.replace(id, label);
        }
        text
    }

    fn apply(&mut self, command: Command) -> String {
        self.index += 1;
        let clean = lint::check(self.catalogue(), &command);
        let preview = self.catalogue().preview(&command);
        let encoded = command.encode();
        let outcomes: Vec<Outcome> =
            self.replicas.iter_mut().map(|replica| replica.apply(self.index, &encoded).expect("it is known")).collect();
        assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]));
        assert_eq!(preview, outcomes[0], "a preview is what happens");
        assert!(clean.is_ok() || matches!(outcomes[0], Outcome::Refused(_) | Outcome::Unchanged), "{clean:?}");
        self.replicas[1] = Catalogue::decode_state(&self.replicas[1].encode_state()).expect("its own encoding");
        self.index += 1;
        let again = self.replicas[2].apply(self.index, &encoded).expect("it is known");
        assert_ne!(again, Outcome::Applied, "a command takes effect once");
        for replica in &mut self.replicas[..2] {
            replica.apply(self.index, &encoded).expect("it is known");
        }
        let hashes: Vec<u64> = self.replicas.iter().map(Catalogue::state_hash).collect();
        assert!(hashes.iter().all(|hash| *hash == hashes[0]));
        self.catalogue().check().expect("the invariants hold");
        self.last = Some(command);
        match &outcomes[0] {
            Outcome::Applied => "applied\n".into(),
            Outcome::Unchanged => "unchanged\n".into(),
            Outcome::Refused(refusal) => self.named(format!("refused {}: {refusal}\n", refusal.code())),
        }
    }

    fn members(&mut self, texts: &[String], replicas: &[ReplicaId]) -> Vec<Member> {
        let place = |text: &String| text.split_once('/').map(|(n, d)| (n.to_owned(), d.to_owned())).expect("node/disk");
        let places: Vec<(String, String)> = texts.iter().map(place).collect();
        let pairs = places.iter().zip(replicas);
        pairs.map(|((node, disk), id)| Member { replica: *id, node: self.node(node), disk: self.disk(disk) }).collect()
    }

    fn answer(&mut self, case: &mut TestCase, matches: impl Fn(&Action) -> bool, result: IntentResult) -> String {
        let volume: String = case.take_arg("volume").expect("volume=");
        let node: String = case.take_arg("node").expect("node=");
        let from: String = case.try_take_arg("from").expect("a name").unwrap_or_else(|| node.clone());
        let id = if volume == "metadata" { self.catalogue().metadata_id() } else { self.volume(&volume) };
        let (volume, node, from) = (id, self.node(&node), self.node(&from));
        let due = executor::due(self.catalogue());
        let wanted = |i: &&Intent| i.node == node && i.action.group().volume == volume && matches(&i.action);
        let Some(intent) = due.iter().find(wanted) else { return "nothing is due\n".into() };
        let reply = IntentReply { generation: intent.generation, action: intent.action.clone(), result };
        match executor::on_reply(self.catalogue(), from, &reply) {
            None => "ignored\n".into(),
            Some(command) => self.apply(command),
        }
    }

    fn step(&mut self, case: &mut TestCase) -> String {
        let size = |case: &mut TestCase, name: &str| {
            case.try_take_arg::<f64>(name).expect("GiB").map(|gib| (gib * GIB) as u64 / 4096 * 4096)
        };
        match case.directive.clone().as_str() {
            "found" => {
                let lines: Vec<String> = case.input.lines().map(str::to_owned).collect();
                let mut founders = Vec::new();
                for line in &lines {
                    let mut words = line.split(' ');
                    let name = words.next().expect("a name");
                    self.next_replica += 1;
                    founders.push(Founder {
                        node: self.node(name),
                        replica: self.replica(self.next_replica),
                        name: Name::new(name).expect("a name"),
                        peer_address: format!("{name}:7000"),
                        api_address: format!("{name}:7001"),
                        zone: words.next().map(str::to_owned),
                    });
                }
                let cluster = ClusterId::from_bytes(bytes(b'c', "cluster")).expect("not zero");
                let found = Catalogue::found(cluster, &founders);
                founders.reverse();
                assert_eq!(found, Catalogue::found(cluster, &founders), "the order of the founders does not matter");
                match found {
                    Ok(catalogue) => {
                        self.replicas = vec![catalogue; 3];
                        "founded\n".into()
                    }
                    Err(error) => format!("{error}\n"),
                }
            }
            "node" => {
                let name: String = case.take_arg("name").expect("name=");
                let id: Option<String> = case.try_take_arg("id").expect("a name");
                let zone = case.try_take_arg("zone").expect("a zone");
                let address = case.input.trim();
                let peer_address = if address.is_empty() { format!("{name}:7000") } else { address.to_owned() };
                let node = self.node(id.as_deref().unwrap_or(&name));
                self.apply(Command::RegisterNode(RegisterNode {
                    node,
                    api_address: format!("{name}:7001"),
                    name: Name::new(&name).expect("a name"),
                    peer_address,
                    zone,
                }))
            }
            "node-state" => {
                let name: String = case.take_arg("name").expect("name=");
                let state: String = case.take_arg("state").expect("state=");
                let state = match state.as_str() {
                    "active" => NodeState::Active,
                    "draining" => NodeState::Draining,
                    "removing" => NodeState::Removing,
                    "removed" => NodeState::Removed,
                    "away" => NodeState::Away,
                    other => panic!("{other}"),
                };
                let node = self.node(&name);
                self.apply(Command::SetNodeState(SetNodeState { node, state }))
            }
            "disk" => {
                let name: String = case.take_arg("name").expect("name=");
                let node: String = case.take_arg("node").expect("node=");
                let capacity_bytes = size(case, "gib").expect("gib=");
                let only = case.take_flag("only").expect("a flag");
                let (disk, node) = (self.disk(&name), self.node(&node));
                self.apply(Command::RegisterDisk(RegisterDisk { disk, node, capacity_bytes, only }))
            }
            "update-disk" => {
                let name: String = case.take_arg("name").expect("name=");
                let capacity_bytes = size(case, "gib").expect("gib=");
                let free_bytes = size(case, "free").expect("free=");
                let failed = case.take_flag("failed").expect("a flag");
                let disk = self.disk(&name);
                self.apply(Command::UpdateDisk(UpdateDisk { disk, capacity_bytes, free_bytes, failed }))
            }
            "disk-state" => {
                let name: String = case.take_arg("name").expect("name=");
                let state: String = case.take_arg("state").expect("state=");
                let state = match state.as_str() {
                    "active" => DiskState::Active,
                    "removing" => DiskState::Removing,
                    "removed" => DiskState::Removed,
                    "lost" => DiskState::Failed,
                    other => panic!("{other}"),
                };
                let disk = self.disk(&name);
                self.apply(Command::SetDiskState(SetDiskState { disk, state }))
            }
            // The leader's own next command; what it is is printed.
            "upkeep" => {
                let fresh = self.replica(self.next_replica + 1);
                let Some(command) = upkeep::next(self.catalogue(), fresh) else { return "nothing\n".into() };
                let what = match &command {
                    Command::ReplaceReplica(replace) => {
                        self.next_replica += 1;
                        let what = self.catalogue().volume_label(replace.volume);
                        let new =
                            replace.new.map(|Member { replica, node, disk }| format!("{replica} on {node} {disk}"));
                        match (replace.old, new) {
                            (Some(old), Some(new)) => format!("{what}: {old} is replaced by {new}\n"),
                            (None, Some(new)) => format!("{what}: {new} comes\n"),
                            (Some(old), None) => format!("{what}: {old} goes\n"),
                            (None, None) => panic!("{replace:?}"),
                        }
                    }
                    Command::SetNodeState(set) => format!("{} is {:?}\n", set.node, set.state),
                    Command::SetDiskState(set) => format!("{} is {:?}\n", set.disk, set.state),
                    other => panic!("{other:?}"),
                };
                self.named(what) + &self.apply(command)
            }
            "changed" => self.answer(case, |a| matches!(a, Action::ChangeMembers(_)), IntentResult::Done),
            "learning" => {
                let result = IntentResult::UnderWay { behind: 7 };
                self.answer(case, |a| matches!(a, Action::ChangeMembers(_)), result)
            }
            "plan" | "create" => {
                let name: String = case.take_arg("name").expect("name=");
                let id: Option<String> = case.try_take_arg("id").expect("a name");
                let size_bytes = size(case, "gib").expect("gib=");
                let replicas = case.try_take_arg("replicas").expect("a number").unwrap_or(3);
                let logical_block_bytes = case.try_take_arg("block").expect("a number").unwrap_or(512);
                let planned_at = case.try_take_arg("planned-at").expect("a number").unwrap_or(self.index);
                let on: Vec<String> = case.input.lines().map(str::to_owned).collect();
                let spread = match case.try_take_arg::<String>("spread").expect("a word").as_deref() {
                    Some("zone") => Spread::Zone,
                    _ => Spread::Node,
                };
                let list = |text: Option<String>| text.unwrap_or_default().split('_').map(str::to_owned).collect();
                let preferred: Vec<String> = list(case.try_take_arg("prefer").expect("names"));
                let label: Option<String> = case.try_take_arg("label").expect("a text");
                let labels = label.map(|value| ("label".to_owned(), value)).into_iter().collect();
                let spec = VolumeSpec { size_bytes, logical_block_bytes, replicas, spread };
                let first = self.next_replica;
                let ids: Vec<ReplicaId> = (1..=8).map(|number| self.replica(first + number)).collect();
                let planned = if on.is_empty() {
                    planner::plan_volume(self.catalogue(), &spec, &preferred, &ids)
                } else {
                    Ok(self.members(&on, &ids))
                };
                let members = match planned {
                    Ok(members) => members,
                    Err(error) => return format!("refused {}: {error}\n", error.code()),
                };
                let volume = self.volume(id.as_deref().unwrap_or(&name));
                let mut out = String::new();
                for member in &members {
                    writeln!(out, "{} on {} {}", member.replica, member.node, member.disk).expect("memory");
                }
                let mut out = self.named(out);
                if case.directive == "create" {
                    self.next_replica += 8;
                    let name = Name::new(&name).expect("a name");
                    let create = CreateVolume { volume, name, spec, labels, members, planned_at };
                    out += &self.apply(Command::CreateVolume(create));
                }
                out
            }
            "created" => {
                let create = |a: &Action| matches!(a, Action::CreateReplica(_) | Action::CreateMetadataReplica(_));
                self.answer(case, create, IntentResult::Done)
            }
            "no-space" => {
                let result = IntentResult::Refused(Obstacle::NoSpace);
                self.answer(case, |a| matches!(a, Action::CreateReplica(_)), result)
            }
            "deleted" => self.answer(case, |a| matches!(a, Action::DeleteReplica(_)), IntentResult::Done),
            "resized" => self.answer(case, |a| matches!(a, Action::ResizeGroup(_)), IntentResult::Done),
            "resize-elsewhere" => self.answer(case, |a| matches!(a, Action::ResizeGroup(_)), IntentResult::NotLeader),
            "resize" => {
                let name: String = case.take_arg("name").expect("name=");
                let size_bytes = size(case, "gib").expect("gib=");
                let expected_generation = case.try_take_arg("generation").expect("a number");
                let volume = self.volume(&name);
                self.apply(Command::ResizeVolume(ResizeVolume { volume, size_bytes, expected_generation }))
            }
            "replicas" => {
                let name: String = case.take_arg("name").expect("name=");
                let replicas: u8 = case.take_arg("count").expect("a number");
                let expected_generation = case.try_take_arg("generation").expect("a number");
                let volume = self.volume(&name);
                self.apply(Command::SetVolumeReplicas(SetVolumeReplicas { volume, replicas, expected_generation }))
            }
            "delete" => {
                let name: String = case.take_arg("name").expect("name=");
                let expected_generation = case.try_take_arg("generation").expect("a number");
                let volume = self.volume(&name);
                self.apply(Command::DeleteVolume(DeleteVolume { volume, expected_generation }))
            }
            "late-created" => {
                let volume: String = case.take_arg("volume").expect("volume=");
                let number: u32 = case.take_arg("replica").expect("a number");
                let (volume, replica) = (self.volume(&volume), self.replica(number));
                self.apply(Command::VolumeReplicaCreated(VolumeReplicaCreated { volume, replica }))
            }
            "again" => {
                let command = self.last.clone().expect("there was one");
                self.apply(command)
            }
            "raw" => {
                let input = case.input.trim().to_owned();
                self.index += 1;
                let (index, before) = (self.index, self.catalogue().encode_state());
                let error = self.replicas[0].apply(index, input.as_bytes()).expect_err("it is not a command");
                assert_eq!(self.catalogue().encode_state(), before, "an error changes nothing");
                let good = Command::DeleteVolume(DeleteVolume { volume: self.volume("x"), expected_generation: None });
                assert_eq!(self.replicas[0].apply(index + 1, &good.encode()), Err(error.clone()), "nothing is skipped");
                let mut restored = Catalogue::decode_state(&before).expect("its own encoding");
                assert!(restored.apply(index + 1, &good.encode()).is_ok(), "a stop is not part of the state");
                self.replicas[0] = self.replicas[1].clone();
                let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                format!("{source}\n")
            }
            "due" => {
                let mut out = String::new();
                for intent in executor::due(self.catalogue()) {
                    let control = Control::Intent(intent.clone());
                    assert_eq!(Control::decode(&control.encode()).expect("its own encoding"), control);
                    let what = match &intent.action {
                        Action::CreateReplica(create) => {
                            format!("create {} on {} {}", create.replica, create.disk, create.size_bytes)
                        }
                        Action::DeleteReplica(delete) => format!("delete {} on {}", delete.replica, delete.disk),
                        Action::ResizeGroup(resize) => format!("resize {} to {}", resize.group, resize.size_bytes),
                        Action::CreateMetadataReplica(create) => {
                            format!("create the metadata replica {} on {}", create.replica, create.disk)
                        }
                        Action::ChangeMembers(change) => {
                            let voters: Vec<String> = change.voters.iter().map(|(id, _)| id.to_string()).collect();
                            format!("change the members of {} to {}", change.group, voters.join(" "))
                        }
                    };
                    writeln!(out, "{} generation {}: {what}", intent.node, intent.generation).expect("memory");
                }
                self.named(if out.is_empty() { "nothing\n".into() } else { out })
            }
            "explain" => {
                let name: Option<String> = case.try_take_arg("volume").expect("a name");
                let reasons = match name {
                    Some(name) if name == "metadata" => reason::explain_metadata(self.catalogue()),
                    Some(name) => {
                        let id = self.volume(&name);
                        reason::explain_volume(self.catalogue(), id)
                    }
                    None => reason::explain_nodes(self.catalogue()),
                };
                let mut out = String::new();
                for reason in reasons {
                    writeln!(out, "{} {}: {} ({})", reason.subject, reason.code, reason.message, reason.action)
                        .expect("memory");
                }
                self.named(if out.is_empty() { "nothing\n".into() } else { out })
            }
            "volumes" => {
                let mut out = String::new();
                for volume in self.catalogue().volumes().values() {
                    let (state, spec) = (volume.state, volume.spec);
                    writeln!(
                        out,
                        "{} {state:?} generation {} size {} provisioned {} copies {}",
                        volume.name, volume.generation, spec.size_bytes, volume.provisioned_bytes, spec.replicas
                    )
                    .expect("memory");
                }
                for (replica, tombstone) in self.catalogue().tombstones() {
                    writeln!(out, "tombstone {replica} on {}", tombstone.node).expect("memory");
                }
                self.named(if out.is_empty() { "none\n".into() } else { out })
            }
            "members" => {
                let volume: String = case.take_arg("volume").expect("volume=");
                let id = if volume == "metadata" { self.catalogue().metadata_id() } else { self.volume(&volume) };
                let mut out = String::new();
                for place in self.catalogue().placement(id).expect("it is there").members {
                    let disk = place.disk.map_or("no disk yet".into(), |disk| disk.to_string());
                    writeln!(out, "{} on {} {disk}", place.replica, place.node).expect("memory");
                }
                self.named(out)
            }
            "peers" => {
                let peers = self.catalogue().peers();
                peers
                    .values()
                    .map(|peer| format!("{} {} {}\n", peer.name, peer.peer_address, peer.api_address))
                    .collect()
            }
            other => panic!("unknown directive {other}"),
        }
    }
}

#[test]
fn scripts() {
    walk(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scripts"), |file| {
        let mut script = Script::default();
        file.run(|case| {
            let out = script.step(case);
            case.expect_empty().expect("every argument is used");
            out
        });
    });
}
