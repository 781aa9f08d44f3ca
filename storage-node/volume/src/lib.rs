//! The state machine of a volume.
