//! Why a command was not taken. None of these leaves a trace in the log.

use holdfast_id::ReplicaId;

use crate::configuration::ConfigurationError;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("this replica does not lead")]
    NotLeader { leader: Option<ReplicaId> },
    /// A round that may earn the lease again is under way; worth another try after a round trip.
    #[error("the leader's lease is over")]
    NoLease,
    #[error("leadership is on its way to another replica")]
    Transferring,
    /// Also while no entry of this leader's term is committed.
    #[error("another configuration change is not finished")]
    ConfigurationPending,
    #[error("illegal configuration: {0}")]
    Configuration(#[from] ConfigurationError),
    #[error("too much waits for a quorum already, or a copy catches up and must gain on the writes")]
    Busy,
    #[error("a majority has no room for more data")]
    NoRoom,
    #[error("the target of the transfer cannot lead: it is this replica, no voter, unreachable or far behind")]
    UnfitTarget,
}
