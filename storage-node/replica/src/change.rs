//! [`next_step`]: how a group gets from its members to those it is to have, one safe step at a time.
//!
//! Pure; asked by the group's leader, again and again, until there is nothing left to do. The configuration in force is
//! all it remembers, so a new leader goes on where the former one was.
//!
//! 1. What is to be a voter and is no member becomes a learner, which nobody waits for.
//! 2. When every such learner has caught up, and enough of all that are to stay to decide without the others, one joint
//!    change makes them voters and takes the others out.

use std::collections::BTreeMap;

use holdfast_consensus::{Configuration, Member, Role};
use holdfast_id::{NodeId, ReplicaId};

/// What has become of a wish to have these voters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Committed: exactly these are the members, and all of them vote.
    Done,
    /// A change, this one or another, is on its way through the log.
    UnderWay,
    /// A member that is to stay has so many entries still to flush.
    CatchingUp { replica: ReplicaId, behind: u64 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Nothing,
    Wait { replica: ReplicaId, behind: u64 },
    Propose(Configuration),
}

/// `current` is committed and not joint; `behind` tells how much a member lacks, 0 where it may decide alone with others
/// like it.
pub(crate) fn next_step(
    current: &Configuration,
    voters: &BTreeMap<ReplicaId, NodeId>,
    behind: impl Fn(ReplicaId) -> u64,
) -> Step {
    let wanted: Vec<Member> =
        voters.iter().map(|(replica, node)| Member { replica: *replica, node: *node, role: Role::Voter }).collect();
    if current.members == wanted {
        return Step::Nothing;
    }
    let role = |replica: &ReplicaId| current.members.iter().find(|member| member.replica == *replica).map(|m| m.role);
    if voters.keys().any(|replica| role(replica).is_none()) {
        let stays = |member: &&Member| member.role == Role::Voter || voters.contains_key(&member.replica);
        let mut members: Vec<Member> = current.members.iter().filter(stays).copied().collect();
        let new = voters.iter().filter(|(replica, _)| role(replica).is_none());
        members.extend(new.map(|(replica, node)| Member { replica: *replica, node: *node, role: Role::Learner }));
        members.sort();
        return Step::Propose(Configuration { members, ..current.clone() });
    }
    let learners = voters.keys().filter(|replica| role(replica) == Some(Role::Learner));
    if let Some((replica, behind)) = learners.map(|replica| (*replica, behind(*replica))).find(|(_, n)| *n > 0) {
        return Step::Wait { replica, behind };
    }
    // The joint change is decided by those who stay as well: where they cannot, the group would stand still in it.
    let late: Vec<(ReplicaId, u64)> =
        voters.keys().map(|replica| (*replica, behind(*replica))).filter(|(_, behind)| *behind > 0).collect();
    if let Some((replica, behind)) = late.first().filter(|_| voters.len() - late.len() <= voters.len() / 2) {
        return Step::Wait { replica: *replica, behind: *behind };
    }
    let copies = u8::try_from(wanted.len()).unwrap_or(u8::MAX);
    Step::Propose(Configuration { members: wanted, outgoing: Vec::new(), min_data: current.min_data.min(copies) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(n: u8) -> ReplicaId {
        ReplicaId::from_bytes([n; 16]).expect("not zero")
    }

    fn node(n: u8) -> NodeId {
        NodeId::from_bytes([n; 16]).expect("not zero")
    }

    fn configuration(voters: &[u8], learners: &[u8]) -> Configuration {
        let member = |n: &u8, role| Member { replica: replica(*n), node: node(*n), role };
        let mut members: Vec<Member> = voters.iter().map(|n| member(n, Role::Voter)).collect();
        members.extend(learners.iter().map(|n| member(n, Role::Learner)));
        members.sort();
        Configuration { members, outgoing: Vec::new(), min_data: 1 }
    }

    fn wanted(ids: &[u8]) -> BTreeMap<ReplicaId, NodeId> {
        ids.iter().map(|n| (replica(*n), node(*n))).collect()
    }

    #[test]
    fn a_replacement_learns_first_and_votes_when_it_has_caught_up() {
        let step = |current: &Configuration, behind| next_step(current, &wanted(&[1, 2, 4]), |_| behind);
        let founded = configuration(&[1, 2, 3], &[]);
        let learning = configuration(&[1, 2, 3], &[4]);
        assert_eq!(step(&founded, 9), Step::Propose(learning.clone()));
        assert_eq!(step(&learning, 9), Step::Wait { replica: replica(4), behind: 9 });
        let changed = configuration(&[1, 2, 4], &[]);
        assert_eq!(step(&learning, 0), Step::Propose(changed.clone()));
        assert_eq!(step(&changed, 0), Step::Nothing);
    }

    #[test]
    fn a_learner_that_is_not_wanted_any_more_makes_room_for_the_next() {
        let step = next_step(&configuration(&[1, 2, 3], &[4]), &wanted(&[1, 2, 5]), |_| 0);
        assert_eq!(step, Step::Propose(configuration(&[1, 2, 3], &[5])));
        let step = next_step(&configuration(&[1, 2, 3], &[4]), &wanted(&[1, 2, 3]), |_| 0);
        assert_eq!(step, Step::Propose(configuration(&[1, 2, 3], &[])));
    }

    #[test]
    fn a_voter_leaves_when_those_that_stay_can_decide_without_it() {
        let late = |who: &'static [u8]| move |id: ReplicaId| u64::from(who.iter().any(|n| replica(*n) == id)) * 5;
        let three = configuration(&[1, 2, 3], &[]);
        let step = |late_ones| next_step(&three, &wanted(&[1, 2]), late(late_ones));
        assert_eq!(step(&[2]), Step::Wait { replica: replica(2), behind: 5 });
        assert_eq!(step(&[3]), Step::Propose(configuration(&[1, 2], &[])), "who leaves need not have anything");
        let five = configuration(&[1, 2, 3, 4], &[]);
        let step = |late_ones| next_step(&five, &wanted(&[1, 2, 3]), late(late_ones));
        assert_eq!(step(&[3]), Step::Propose(configuration(&[1, 2, 3], &[])));
        assert_eq!(step(&[2, 3]), Step::Wait { replica: replica(2), behind: 5 });
    }

    /// Whatever was begun before, no step takes a voter out while one that is wanted does not vote.
    #[test]
    fn no_voter_leaves_before_its_replacement_may_vote() {
        for voters in 1u8..32 {
            for learners in 0u8..32 {
                for target in 1u8..32 {
                    let ids = |mask: u8| (1u8..=5).filter(|n| mask & (1 << (n - 1)) != 0).collect::<Vec<_>>();
                    if voters & learners != 0 {
                        continue;
                    }
                    let current = configuration(&ids(voters), &ids(learners));
                    // Voters have everything, learners nothing.
                    let behind = |id| u64::from(!current.is_voter(id));
                    let Step::Propose(next) = next_step(&current, &wanted(&ids(target)), behind) else { continue };
                    next.validate().expect("legal");
                    let leaves = ids(voters).into_iter().any(|n| !next.is_voter(replica(n)));
                    assert!(!leaves || target & voters == target, "{voters:b} {learners:b} {target:b}");
                }
            }
        }
    }
}
