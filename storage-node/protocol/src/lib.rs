//! The messages between nodes and between agents and nodes, and their encoding.
