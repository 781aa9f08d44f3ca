use super::*;

fn names(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("m-{i}")).collect()
}

fn empty(i: usize) -> Said {
    Said::Empty { node_id: format!("node-{i}") }
}

fn formatted(i: usize, cluster: &str) -> Said {
    Said::Formatted { node_id: format!("node-{i}"), cluster_id: cluster.into(), disk_id: format!("disk-{i}") }
}

fn silent() -> Said {
    Said::Nothing { why: "no address".into() }
}

fn said(all: impl IntoIterator<Item = Said>) -> BTreeMap<String, Said> {
    all.into_iter().enumerate().map(|(i, said)| (format!("m-{i}"), said)).collect()
}

/// The world as the operator sees it: members that remember what they were told, and the record.
struct World {
    members: BTreeMap<String, Said>,
    record: Option<Record>,
    minted: usize,
}

impl World {
    fn new(count: usize) -> World {
        World { members: said((0..count).map(empty)), record: None, minted: 0 }
    }

    /// Does one step; `crash`: the step's calls are made and their answers lost before they are recorded.
    fn step(&mut self, crash: bool) -> Step {
        let expected = names(self.members.len());
        let step = next(&expected, &self.members, self.record.as_ref());
        match &step {
            Step::Mint { founders } => {
                self.minted += 1;
                let founders = founders.iter().map(|(name, node_id)| Founder {
                    name: name.clone(),
                    node_id: node_id.clone(),
                    replica_id: format!("replica-{name}"),
                    zone: String::new(),
                });
                let record = Record {
                    cluster_id: format!("cluster-{}", self.minted),
                    founders: founders.collect(),
                    founded: BTreeMap::new(),
                };
                if !crash {
                    self.record = Some(record);
                }
            }
            Step::Adopt { cluster_id } => {
                self.record = Some(Record { cluster_id: cluster_id.clone(), ..Record::default() });
            }
            Step::RecordFounded { disks } if !crash => {
                self.record.as_mut().unwrap().founded.extend(disks.clone());
            }
            Step::RecordFounded { .. } => {}
            Step::Found { names } | Step::Join { names } => {
                let cluster = self.record.as_ref().unwrap().cluster_id.clone();
                let told = if crash { 1 } else { names.len() };
                for name in &names[..told] {
                    let i: usize = name[2..].parse().unwrap();
                    self.members.insert(name.clone(), formatted(i, &cluster));
                }
            }
            Step::Settled { .. } | Step::Wait { .. } | Step::Stuck { .. } => {}
        }
        step
    }

    fn settle(&mut self) {
        for _ in 0..20 {
            if matches!(self.step(false), Step::Settled { .. }) {
                return;
            }
        }
        panic!("it does not settle: {:?} {:?}", self.members, self.record);
    }
}

#[test]
fn a_cluster_is_founded_by_one_three_or_five_and_the_others_join() {
    for (count, expected) in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (8, 5)] {
        let mut world = World::new(count);
        world.settle();
        let record = world.record.unwrap();
        assert_eq!(record.founders.len(), expected, "{count}");
        assert!(record.is_founded());
        assert!(world.members.values().all(|said| matches!(said, Said::Formatted { .. })));
    }
}

#[test]
fn nothing_is_minted_before_every_member_has_answered() {
    let mut members = said([empty(0), silent(), empty(2)]);
    let step = next(&names(3), &members, None);
    assert!(
        matches!(&step, Step::Wait { silent, why } if silent == &["m-1"] && why.contains("no address")),
        "{step:?}"
    );
    members.remove("m-1");
    assert!(matches!(next(&names(3), &members, None), Step::Wait { .. }));
}

#[test]
fn a_crash_after_any_step_ends_in_one_cluster() {
    for crashes in 0u32..64 {
        let mut world = World::new(4);
        for line in 0..6 {
            world.step(crashes & (1 << line) != 0);
        }
        world.settle();
        let record = world.record.as_ref().unwrap();
        assert!(
            world
                .members
                .values()
                .all(|said| matches!(said, Said::Formatted { cluster_id, .. } if *cluster_id == record.cluster_id))
        );
    }
}

#[test]
fn a_founder_whose_disk_is_empty_again_joins_and_never_founds_twice() {
    let mut world = World::new(3);
    world.settle();
    world.members.insert("m-1".into(), empty(1));
    assert_eq!(world.step(false), Step::Join { names: vec!["m-1".into()] });
}

#[test]
fn founding_goes_on_with_those_that_are_there_while_one_is_silent() {
    let mut world = World::new(3);
    world.step(false);
    world.members.insert("m-0".into(), silent());
    assert_eq!(world.step(false), Step::Found { names: vec!["m-1".into(), "m-2".into()] });
    assert!(matches!(world.step(false), Step::RecordFounded { .. }));
    assert!(matches!(world.step(false), Step::Wait { .. }));
    world.members.insert("m-0".into(), empty(0));
    assert_eq!(world.step(false), Step::Found { names: vec!["m-0".into()] });
}

#[test]
fn a_cluster_that_is_there_is_found_even_while_others_are_silent() {
    let step = next(&names(3), &said([silent(), formatted(1, "old"), empty(2)]), None);
    assert_eq!(step, Step::Adopt { cluster_id: "old".into() });
    let record = Record { cluster_id: "old".into(), ..Record::default() };
    let step = next(&names(3), &said([silent(), formatted(1, "old"), empty(2)]), Some(&record));
    assert_eq!(step, Step::Join { names: vec!["m-2".into()] });
}

#[test]
fn what_belongs_to_another_cluster_is_never_touched() {
    let record = Record { cluster_id: "ours".into(), ..Record::default() };
    for (members, record, reason) in [
        (said([formatted(0, "a"), formatted(1, "b"), empty(2)]), None, "DifferentClusters"),
        (said([formatted(0, "ours"), formatted(1, "theirs"), empty(2)]), Some(&record), "ForeignCluster"),
        (said([empty(0), Said::Unusable { why: "holds ext4".into() }, empty(2)]), None, "DiskUnusable"),
        (said([empty(0), empty(0), empty(2)]), None, "SameIdentity"),
    ] {
        let step = next(&names(3), &members, record);
        assert!(matches!(&step, Step::Stuck { reason: found, .. } if *found == reason), "{step:?}");
    }
}

#[test]
fn one_bad_disk_does_not_stop_a_cluster_that_runs() {
    let record = Record { cluster_id: "ours".into(), ..Record::default() };
    let members = said([formatted(0, "ours"), Said::Unusable { why: "holds ext4".into() }, empty(2)]);
    assert_eq!(next(&names(3), &members, Some(&record)), Step::Join { names: vec!["m-2".into()] });
}
