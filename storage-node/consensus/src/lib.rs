//! Raft, generic over the command, without I/O, clock or randomness.
//!
//! Events go in with the time, effects come out as data and say what must be durable before what. The same code runs
//! in the storage node and in the simulator.

#![forbid(unsafe_code)]

pub mod configuration;
pub mod effect;
mod election;
pub mod entry;
mod following;
mod leading;
pub mod liveness;
mod log;
pub mod message;
mod pace;
mod progress;
pub mod raft;
mod random;
pub mod refusal;
pub mod status;
pub mod time;

pub use configuration::ConfigurationError;
pub use effect::{Effect, Persist, PersistSequence};
pub use entry::{Body, Command, Configuration, Entry, HardState, LogIndex, Member, Position, Role, Term};
pub use liveness::{Liveness, SupportEpoch};
pub use log::APPEND_ENTRIES_MAX;
pub use message::{Addressed, AppendResult, Message, MessageBody, Shortage};
pub use progress::ProgressState;
pub use raft::{Options, Raft, Restored};
pub use refusal::Refusal;
pub use status::{PeerStatus, Standing, Status};
pub use time::Timestamp;
