//! A device of this machine as its users want it: a file system made, checked, grown, and mounted where it is wanted.
//!
//! Not the device itself, which the agent makes, and no decision about a volume: whether a file system may be made at
//! all is the volume's own word, and the caller has asked it. Callers are the command line and the CSI driver;
//! everything here waits for the host, so an asynchronous caller gives it a thread.
//!
//! What holds: every host command ends within a named time or is given up, and is told with what it wrote to stderr;
//! commands that were given up and sit in the kernel are counted, and with too many of them no further one is started.

#![forbid(unsafe_code)]

pub mod command;
pub mod file_system;
pub mod mounts;
