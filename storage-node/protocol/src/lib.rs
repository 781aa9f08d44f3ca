//! The messages between nodes and between attached machines and nodes, and their encoding.

pub mod peer;
pub mod session;
