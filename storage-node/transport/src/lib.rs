//! Frames, mutually authenticated TLS sessions, classes and backpressure; opaque bytes.
