//! The attach agent: holds this machine's attachments and serves each over NBD on a Unix socket, or as a loop device
//! over a FUSE file. Beside it the [`Keeper`], another process, lets such a device outlive the agent.
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
mod credentials;
mod device;
mod gap;
mod keeper;
mod keeper_link;
mod loop_device;
mod nbd;
mod packet;
mod peers;
mod record;
mod socket;
mod sys;
mod volume;

pub use agent::{Agent, AgentError};
pub use config::{Address, AgentConfig, AttachMode, IdentityPaths, KeeperConfig, NodeAddress, VolumeSpec};
pub use control::{CONTROL_VERSION, Code, FormattedState, NodeStatus, VolumeState, VolumeStatus};
pub use credentials::CredentialsError;
pub use keeper::{Keeper, KeeperError};
pub use keeper_link::KeeperLinkError;
pub use record::RecordError;
pub use socket::SocketError;
