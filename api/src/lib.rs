//! The protobuf API between our own processes.
