//! Consensus and store together: one replica of one group.
//!
//! A [`Replica`] carries what the Raft core decides to the disk and back: it appends what must be durable, holds every
//! message until what it depends on is, applies what is committed to its state machine and to the store's map, and
//! takes checkpoints. It has no clock, no socket and no thread; the shard drives it and executes what it puts out.
//! No protocol word and no Kubernetes word belongs here.

#![forbid(unsafe_code)]

mod change;
pub mod codec;
pub mod rebuild;
pub mod replica;
pub mod wire;

pub use change::Change;
pub use codec::{DecodeError, Directory, LogCommand};
pub use replica::{Applied, Context, Keeping, Output, Replica, StateMachine};
