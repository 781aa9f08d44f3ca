//! The state machine of the catalogue and its pure planner.
