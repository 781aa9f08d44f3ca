//! The attach agent: holds this machine's attachments and serves each as a device over NBD on a Unix socket.
//!
//! It composes what decides elsewhere: a [`holdfast_client::Client`] per volume, one [`holdfast_transport`] to the
//! nodes, a [`holdfast_nbd::Session`] per connection of a user, on one thread with one `mio::Poll`. It decides no more
//! than when to reconnect, whom to let in, and what to remember across its own restart. It is not a Kubernetes
//! component: the CSI driver and people speak to it through its control socket.
//!
//! What holds:
//! 1. A restart of the agent resumes the epoch that the state directory records, with a new session; it takes no epoch
//!    that it was not told to take. A volume that was fenced stays fenced until it is detached by command.
//! 2. A device is served only once its epoch is durably recorded.
//! 3. Ending the agent never detaches.
//! 4. No wait is without an end but that of a device for its volume, which is the point of it.

#![deny(unsafe_code)]

mod agent;
mod clock;
mod config;
mod control;
mod gap;
mod nbd;
mod peers;
mod record;
mod socket;
mod volume;

pub use agent::{Agent, AgentError};
pub use config::{Address, AgentConfig, AttachMode, IdentityPaths, NodeAddress, VolumeSpec};
pub use control::{CONTROL_VERSION, NodeStatus, VolumeState, VolumeStatus};
pub use record::RecordError;
pub use socket::SocketError;
