//! Chunks against a naive oracle, on a disk that crashes and rots.

mod crash;
mod damage;
mod golden;
mod harness;
mod install;
mod oracle;
mod payload;
mod readers;
mod repair;
mod snapshot;
mod space;
