//! One core's worth of storage node: owns groups, events in, effects out.
