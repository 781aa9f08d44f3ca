//! A real cluster of processes under real faults: every test starts `holdfast dev up` in a folder of its own and talks
//! to it as a user does, through the command line and the NBD socket of the agent.
//!
//! The workload knows exactly what was acknowledged, and checks every read against it while the faults go on.

mod attachments;
mod certificates;
mod failover;
mod harness;
mod hostile;
mod machines;
mod membership;
mod model;
mod nbd;
mod power_loss;
mod rebuild;
mod refusals;
mod rot;
mod workload;
