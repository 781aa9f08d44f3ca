//! An NBD server, fixed newstyle, as a value: bytes in, [`holdfast_block::Request`]s out, completions in, bytes out.
//!
//! It is not a socket and not a volume: the driver moves the bytes and serves the requests. One [`Session`] is one
//! connection to one export. After the public description of the protocol, `doc/proto.md` of NetworkBlockDevice/nbd;
//! sections are named where they decide something.
//!
//! Layers: `wire` knows bytes, `option` the haggling before transmission, `command` what a request means,
//! `session` the order of it all.
//!
//! What holds, whatever the peer sends:
//! 1. Every command that was accepted gets one reply, after all its parts are done; a failed part fails the command.
//! 2. Memory is bounded: see [`REQUESTS_MAX`], [`BYTES_MAX`] and [`PAYLOAD_BYTES_MAX`].
//! 3. Nothing is promised that the volume does not keep. Every completion is durable and linearizable, hence `FLUSH`,
//!    `FUA` and `CAN_MULTI_CONN`: there is no cache between two connections that could hide or lose anything.
//!    Allocation is not known here, hence no `base:allocation`; nor is a fast zero, nor a cache to fill.

#![forbid(unsafe_code)]

mod command;
mod option;
mod output;
mod session;
mod wire;

pub use session::{BYTES_MAX, End, Export, PAYLOAD_BYTES_MAX, REQUESTS_MAX, Session, Violation};
