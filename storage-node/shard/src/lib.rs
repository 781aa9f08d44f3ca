//! One core's worth of storage node: it owns the groups of one disk; events in, effects out.
//!
//! The binary and the simulator run this same code: it has no clock, no socket, no thread and no randomness but its
//! seed. The rim gives it what happened together with the time sampled afterwards, and carries out what comes back.
//! Policy is not here (the metadata plane plans), nor are async runtimes.

#![forbid(unsafe_code)]

mod access;
mod admin;
mod attaching;
mod core;
mod intents;
mod machine;
mod metadata_group;
mod recovery;
mod repair;
mod report;
mod scrub;
mod shard;
mod volume_group;

pub use access::ClientRole;
pub use admin::{
    AdminError, AdminReply, AdminRequest, AttachVolume, HeldSnapshot, LastRepair, LogDamageReport, NewVolume,
    RepairReport, ReplicaReport, ScrubReport, ShardReport, SnapshotReport, VolumeReport,
};
pub use core::{ClientId, Effects, NodeAddress, ReplicaNodes};
pub use scrub::ScrubOptions;
pub use shard::{Event, Shard, ShardError, ShardOptions};
