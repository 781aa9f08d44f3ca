//! `holdfast dev`: a local cluster of real storage nodes on loopback, under one foreground supervisor.

pub mod control;
pub mod layout;
pub mod supervisor;
