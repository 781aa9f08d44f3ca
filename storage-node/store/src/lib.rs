//! The store of one disk: write-ahead log, chunks, map, checkpoints and recovery, for many groups.
//!
//! Synchronous and without I/O at run time: calls and completions go in, [`ops::DeviceOp`]s and events come out.
//! Only `format`, `open`, the offline tools and the drivers touch a [`device::Device`].
//! Not here: terms, votes, peers, what a record means.

mod bytes_at;
pub mod chunk;
pub mod device;
pub mod driver;
pub mod group;
pub mod inspect;
pub mod ops;
pub mod store;
pub mod superblock;
mod wal;
