//! Frames between the processes of Holdfast: mutually authenticated TLS, classes, backpressure; opaque bytes.
//!
//! The owner has a thread and a `mio::Poll`; [`Transport`] registers its sockets there and is told of events, of
//! time and of what to send. It never blocks, sleeps, starts a thread or reads a clock (only certificate validity is
//! judged by the system's wall clock, inside rustls). Names are resolved beside it, by [`resolver`], on threads. What a frame means, heartbeats, reconnecting and who may do
//! what belong to the layers above. The bytes are drawn in `docs/protocols/transport.md`.
//!
//! Invariants: no frame reaches the owner before both ends agreed on cluster, identity and version; a peer can make
//! this end hold a bounded number of bytes only; every end of a connection has a [`CloseReason`].

#![forbid(unsafe_code)]

mod close;
mod frame;
mod hello;
mod identity;
mod inbox;
mod link;
mod outbox;
mod outgoing;
pub mod pki;
pub mod resolver;
mod socket;
mod tls;
mod transport;

pub use close::{CertificateRefusal, CloseReason, Refusal};
pub use frame::{Class, Frame, FrameError, HEADER_BYTES, KIND_MIN, META_BYTES_MAX, PAYLOAD_BYTES_MAX};
pub use hello::Versions;
pub use identity::{Bearer, HOLDER_BYTES_MAX, ParseIdentityError, PeerIdentity, PeerRole};
pub use outbox::QueueBytes;
pub use tls::{TlsConfigs, stranger_client};
pub use transport::{ConnectionId, Options, SendError, Transport, TransportError, TransportEvent};
