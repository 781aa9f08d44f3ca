//! Raft, generic over the command, without I/O, clock or randomness.
//!
//! Events go in with the time, effects come out as data and say what must be durable before what. The same code runs
//! in the storage node and in the simulator.

pub mod effect;
pub mod entry;
pub mod liveness;
pub mod message;
pub mod time;

pub use effect::{Effect, Persist, PersistSequence};
pub use entry::{Body, Command, Configuration, Entry, HardState, LogIndex, Member, Position, Role, Term};
pub use liveness::{Liveness, SupportEpoch};
pub use message::{Addressed, AppendResult, Message, MessageBody};
pub use time::Timestamp;
