//! One file per volume over the FUSE protocol: wire and session, without I/O.
//!
//! A FUSE file under a loop device is a block device on any kernel. This crate turns the kernel's requests into block
//! requests and completions into replies; whoever owns the descriptor (the attach agent) moves the bytes. Node ids are
//! fixed (root 1, file 2, handle = node id), so a successor process needs nothing of its predecessor but the
//! descriptor, and no second INIT.
//!
//! Absent on purpose: mounting, loop devices, descriptors, and every file-system operation a block device needs not.

#![forbid(unsafe_code)]

pub mod session;
pub mod wire;

pub use session::{Input, Session};
pub use wire::WireError;
