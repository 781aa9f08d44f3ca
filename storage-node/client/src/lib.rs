//! The client of one volume: it takes the epoch or resumes it, opens a session, sends every request to the leader,
//! resends what is unanswered to the next one, and fails for good once fenced.
//!
//! It is not a connection, a clock or a device: whoever drives it (the agent, the simulator's workload) owns the
//! connections, samples the time, and executes the [`ClientEffect`]s in order. The same calls give the same effects.
//!
//! What holds:
//! 1. A mutation keeps its sequence number for life. A resend repeats it, so it takes effect at most once.
//! 2. At most [`holdfast_protocol::session::SESSION_WINDOW`] sequences lie between the oldest unanswered mutation
//!    and the newest.
//! 3. Every submitted request is completed exactly once: by an answer, by fencing, by the end of the attachment, or by
//!    the time limit where one is configured.
//! 4. An answer of a lower term than one already seen changes nothing.
//! 5. Nothing outstanding means no deadline: an idle volume costs nothing.

#![forbid(unsafe_code)]

mod client;
mod effect;
mod options;
mod outstanding;
mod search;

pub use client::{Client, FormattedBusy, Phase, Status};
pub use effect::ClientEffect;
pub use options::{ClientOptions, Mode};
