//! The metadata plane's state machine: which nodes, disks and volumes there are and where the copies lie.
//!
//! Pure and synchronous. A driver replicates [`Command`]s through one consensus group and gives them to
//! [`Catalogue::apply`] in log order; on the leader it asks [`planner`] for placements, [`lint`] whether a command may
//! be proposed, [`upkeep`] for what is due by itself, and [`executor`] for what nodes have to be told. It is not in the data path: volumes serve, elect and
//! fail over without it.
//!
//! Invariants, checked on every decoded state and by the tests after every command:
//! 1. Equal commands in equal order give equal states, hashes and outcomes, whatever snapshot was taken on the way.
//! 2. Every member and tombstone names a disk the catalogue knows, on the node it lies on.
//! 3. A replica is never both a member and a tombstone, and never a member twice.
//! 4. A node is told to delete a replica only because of a tombstone for that very replica.
//! 5. Placed bytes of a disk never pass its capacity less the reserve by a command that places.
//!
//! The rules of [`lint`] and [`spec`] are part of the state machine, because `apply` refuses by them: replicas of mixed
//! versions must refuse alike, so a changed rule needs a new [`command::COMMAND_VERSION`].

#![forbid(unsafe_code)]

mod apply;
pub mod catalogue;
pub mod command;
pub mod executor;
pub mod intent;
pub mod lint;
pub mod planner;
pub mod reason;
mod replacing;
pub mod spec;
pub mod state;
pub mod upkeep;

pub use apply::{ApplyError, Outcome, Refusal};
pub use catalogue::Catalogue;
pub use command::Command;
