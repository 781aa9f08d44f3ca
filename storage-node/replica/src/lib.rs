//! Consensus and store together: the order in which things become durable.
