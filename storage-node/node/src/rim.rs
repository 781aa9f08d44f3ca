//! [`Rim`]: the data thread. It samples the clock, moves bytes between sockets, disk and shard, and decides nothing.
//!
//! One `epoll` wakes it for everything: sockets (transport), the disk's completions (the driver's descriptor) and
//! control calls (a waker). Per wake-up it gathers what happened, steps the shard once, and carries out the effects.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_consensus::Timestamp;
use holdfast_id::NodeId;
use holdfast_protocol::{peer, session};
use holdfast_shard::{ClientId, Effects, Event, Shard};
use holdfast_store::{Device, Driver, FileDevice};
use holdfast_transport::{Class, ConnectionId, Frame, PeerIdentity, PeerRole, Transport, TransportEvent};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use tokio::sync::oneshot;

use crate::addresses::AddressBook;
use crate::clock;
use crate::config::Config;
use crate::control::{Answer, Call};

const WAKER: Token = Token(0);
const DISK: Token = Token(1);
/// Tokens from here on are the transport's.
const TRANSPORT: usize = 16;
const TRANSPORT_END: usize = 1 << 20;
/// Control calls that may wait for the data thread; one more is refused with a reason.
const CALLS_MAX: usize = 256;
/// Between two attempts to reach a peer; a connection that was just lost is tried at once.
const RECONNECT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_secs(2);

/// The control thread's end.
#[derive(Clone)]
pub(crate) struct Control {
    calls: SyncSender<(Call, oneshot::Sender<Answer>)>,
    waker: Arc<Waker>,
}
