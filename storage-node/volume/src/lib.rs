//! The state machine of a volume: attachments, sessions, size, and what each log entry does to the blocks.
//!
//! [`Volume`] is replicated: every replica applies the same entries in the same order and holds the same bytes of
//! state. [`Admission`] is the leader's alone and volatile: it orders overlapping requests and turns requests in
//! logical blocks into entries of whole physical blocks. Both are synchronous values driven by the shard.
//!
//! Absent on purpose: sockets, devices, terms and votes, the data itself (it passes through as reference-counted
//! bytes), clocks, randomness.

#![forbid(unsafe_code)]

pub mod admission;
mod change;
mod codec;
pub mod command;
pub mod name;
pub mod range;
mod state;
pub mod volume;
pub mod window;

pub use admission::{Admission, AdmitError, Step};
pub use command::{Command, DecodeError};
pub use name::Name;
pub use range::ReadRange;
pub use volume::{Applied, Keeping, Mutation, Outcome, Snapshot, Volume, VolumeSpec};
pub use window::Window;
