//! A whole cluster in one thread: network, disks, clocks, workloads, faults, checkers.
//!
//! Everything here is a value driven by one loop in simulated time. The same seed gives the same run: all randomness
//! comes from one [`prng::Prng`], and nothing depends on addresses, hashes, threads or real time.

#![forbid(unsafe_code)]

pub mod checker;
pub mod clock;
pub mod connections;
pub mod disk;
pub mod faults;
pub mod latency;
pub mod machine;
pub mod network;
#[cfg(feature = "planted")]
pub mod planted;
pub mod prng;
pub mod scenario;
pub mod stamp;
pub mod workload;
pub mod world;
