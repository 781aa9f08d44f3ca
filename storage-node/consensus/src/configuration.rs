//! Majorities, joint or not, and which configurations are legal.

use holdfast_id::ReplicaId;

use crate::entry::{Configuration, Member, Role};

/// Members of a configuration, each side of a joint one.
pub const MEMBERS_MAX: usize = 16;

/// Why a configuration is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigurationError {
    #[error("members are not sorted by replica, or one stands twice")]
    Unsorted,
    #[error("no voter")]
    NoVoter,
    #[error("more than {MEMBERS_MAX} members")]
    TooMany,
    #[error("witnesses are not supported yet")]
    Witness,
    #[error("min_data must be between 1 and the number of voters")]
    MinData,
    #[error("a proposed configuration must not be joint")]
    Joint,
    #[error("nothing would change")]
    Unchanged,
}

impl Configuration {
    pub fn validate(&self) -> Result<(), ConfigurationError> {
        validate_members(&self.members)?;
        if !self.outgoing.is_empty() {
            validate_members(&self.outgoing)?;
        }
        let copies = voters(&self.members).count();
        if self.min_data == 0 || usize::from(self.min_data) > copies {
            return Err(ConfigurationError::MinData);
        }
        Ok(())
    }

    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Votes in either side.
    pub fn is_voter(&self, replica: ReplicaId) -> bool {
        voters(&self.members).chain(voters(&self.outgoing)).any(|voter| voter == replica)
    }

    pub fn is_member(&self, replica: ReplicaId) -> bool {
        self.replicas().any(|member| member == replica)
    }

    /// Every member of either side; one in both comes twice.
    pub fn replicas(&self) -> impl Iterator<Item = ReplicaId> {
        self.members.iter().chain(&self.outgoing).map(|member| member.replica)
    }

    /// The greatest value that a majority of the voters (of each side) have reached.
    pub(crate) fn agreed<T: Ord + Copy>(&self, value: impl Fn(ReplicaId) -> T) -> T {
        let incoming = majority(&self.members, &value).expect("a configuration in use has a voter");
        majority(&self.outgoing, &value).map_or(incoming, |outgoing| incoming.min(outgoing))
    }

    /// The greatest value that `min_data` copies with data have reached.
    pub(crate) fn copied<T: Ord + Copy>(&self, value: impl Fn(ReplicaId) -> T) -> T {
        let mut values: Vec<T> = voters(&self.members).map(value).collect();
        values.sort_unstable();
        values[values.len() - usize::from(self.min_data)]
    }
}

fn voters(members: &[Member]) -> impl Iterator<Item = ReplicaId> {
    members.iter().filter(|member| member.role == Role::Voter).map(|member| member.replica)
}

fn majority<T: Ord + Copy>(members: &[Member], value: impl Fn(ReplicaId) -> T) -> Option<T> {
    let mut values: Vec<T> = voters(members).map(value).collect();
    values.sort_unstable();
    // With n values in rising order, floor(n/2)+1 of them are at or above the one at ceil(n/2)-1.
    values.len().checked_sub(1).map(|top| values[top / 2])
}

fn validate_members(members: &[Member]) -> Result<(), ConfigurationError> {
    if members.len() > MEMBERS_MAX {
        return Err(ConfigurationError::TooMany);
    }
    if members.windows(2).any(|pair| pair[0].replica >= pair[1].replica) {
        return Err(ConfigurationError::Unsorted);
    }
    if members.iter().any(|member| member.role == Role::Witness) {
        return Err(ConfigurationError::Witness);
    }
    if voters(members).next().is_none() {
        return Err(ConfigurationError::NoVoter);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use holdfast_id::NodeId;

    use super::*;

    fn replica(n: u8) -> ReplicaId {
        ReplicaId::from_bytes([n; 16]).expect("not zero")
    }

    fn voting(ids: &[u8]) -> Vec<Member> {
        let node = |n| NodeId::from_bytes([n; 16]).expect("not zero");
        ids.iter().map(|n| Member { replica: replica(*n), node: node(*n), role: Role::Voter }).collect()
    }

    #[test]
    fn agreed_is_reached_by_a_majority_of_each_side() {
        for (incoming, outgoing, expected) in [
            (&[3][..], &[][..], 3),
            (&[3, 4], &[], 3),
            (&[3, 4, 5], &[], 4),
            (&[2, 3, 4, 5], &[], 3),
            (&[1, 2, 3, 4, 5], &[], 3),
            (&[3, 4, 5], &[1, 2, 3], 2),
            (&[3, 4, 5], &[7, 8, 9], 4),
        ] {
            let configuration = Configuration { members: voting(incoming), outgoing: voting(outgoing), min_data: 1 };
            assert_eq!(configuration.agreed(|id| id.to_bytes()[0]), expected, "{incoming:?} {outgoing:?}");
        }
    }

    #[test]
    fn copied_is_reached_by_min_data_copies() {
        for (min_data, expected) in [(1, 5), (2, 4), (3, 3)] {
            let configuration = Configuration { members: voting(&[3, 4, 5]), outgoing: vec![], min_data };
            assert_eq!(configuration.copied(|id| id.to_bytes()[0]), expected);
        }
    }

    #[test]
    fn illegal_configurations_are_refused() {
        let good = Configuration { members: voting(&[1, 2, 3]), outgoing: vec![], min_data: 2 };
        assert_eq!(good.validate(), Ok(()));
        let with = |change: &dyn Fn(&mut Configuration)| {
            let mut configuration = good.clone();
            change(&mut configuration);
            configuration.validate()
        };
        assert_eq!(with(&|c| c.members.swap(0, 1)), Err(ConfigurationError::Unsorted));
        assert_eq!(with(&|c| c.outgoing = voting(&[2, 2])), Err(ConfigurationError::Unsorted));
        assert_eq!(with(&|c| c.members.clear()), Err(ConfigurationError::NoVoter));
        assert_eq!(with(&|c| c.members[0].role = Role::Witness), Err(ConfigurationError::Witness));
        assert_eq!(with(&|c| c.min_data = 0), Err(ConfigurationError::MinData));
        assert_eq!(with(&|c| c.min_data = 4), Err(ConfigurationError::MinData));
        assert_eq!(with(&|c| c.members = voting(&(1..=17).collect::<Vec<_>>())), Err(ConfigurationError::TooMany));
    }
}
