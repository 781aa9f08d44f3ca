//! What a process tells probes and scrapers: `/healthz` and `/metrics`, over plain HTTP and nothing else.
//!
//! What is told is the process's own to say, by [`Source`]; [`Page`] writes it in the text format of OpenMetrics, which
//! Prometheus reads. Not here: secrets, changes, anything a stranger in the cluster must not see or do.
//!
//! Invariants: every connection, request and answer is bounded; nobody who asks holds up the process.

#![forbid(unsafe_code)]

mod page;
mod server;

pub use page::{Labels, Page};
pub use server::{Source, serve};
