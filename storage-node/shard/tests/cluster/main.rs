//! Three shards of one cluster in one thread.

#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

mod attaching;
mod hostile;
mod snapshots;
mod world;
