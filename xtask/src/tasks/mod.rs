//! The tasks, one file each: `run` does the work and returns an error that names the step that failed.

pub mod bench;
pub mod chart;
pub mod cluster;
pub mod e2e;
pub mod fix;
pub mod image;
pub mod sim;
pub mod test;
pub mod tools;
pub mod verify;
