//! The messages between nodes and between attached machines and nodes, and their encoding.
//!
//! A message becomes three parts, a kind, meta and payload, which `transport` carries as one frame without looking
//! inside. Bulk data is only ever the payload and is passed on by reference count, never copied. The layouts are
//! drawn in `docs/protocols/session.md` and `docs/protocols/peer.md`. Nothing here decides: what an answer means to
//! its receiver is written beside the types, and obeyed by `client`, `shard` and `replica`.

pub mod peer;
pub mod session;
pub mod wire;

/// The version this build speaks; the transport's hello agrees on the highest one both ends speak.
pub const PROTOCOL_VERSION: u16 = 1;
/// The lowest version this build still speaks.
pub const PROTOCOL_VERSION_MIN: u16 = 1;

const _: () = assert!(PROTOCOL_VERSION_MIN <= PROTOCOL_VERSION && PROTOCOL_VERSION_MIN > 0);

/// The name of a node's Unix socket in the folder that nodes and agents of one machine share.
pub fn socket_name(node: holdfast_id::NodeId) -> String {
    format!("{node}.sock")
}
