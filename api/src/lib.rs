//! The protobuf API between our own processes: services, messages and the words that travel beside an error.
//!
//! `proto/` is the source. [`v1`] is generated from it and checked in; the test `generated` fails when they differ, and
//! `HOLDFAST_REGENERATE=1 cargo test -p holdfast-api --test generated` writes it anew. No policy and no I/O here:
//! whoever serves or calls the API decides what to say.

#![forbid(unsafe_code)]

pub mod channel;
pub mod refusal;

/// Package `holdfast.v1`. Included rather than declared, so that the formatter leaves generated text alone.
#[allow(clippy::all)]
pub mod v1 {
    include!("generated/holdfast.v1.rs");
}
