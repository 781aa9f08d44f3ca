//! The rules of the workspace that no other tool knows. Each is a function from what was read to its violations, in
//! an order that does not depend on the machine.

pub mod layers;
pub mod links;
pub mod manifests;
