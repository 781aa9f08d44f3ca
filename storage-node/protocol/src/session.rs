//! The session protocol: what an attached machine and a storage node say to each other about volumes.
//!
//! One connection carries any number of volumes. A request goes to every replica's node only where it says so;
//! normally to the volume's leader, whose node answers or says who leads.

mod encoding;
pub mod kind;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use holdfast_block::{Error, Geometry, Operation};
use holdfast_consensus::{Position, Term};
use holdfast_id::{NodeId, VolumeId};

/// Counts attachments of a volume; allocated by the volume's own log, rises with every `Attach`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

/// Counts sessions over the volume's whole life; one is open per epoch, a new one closes the former.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Session(pub u64);

/// A random value of one agent process's attempt: the same `instance` sent again gets the same answer again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instance(pub u128);

/// Makes a write take effect exactly once. `sequence` rises by one per mutation of the session, from 1;
/// `oldest` is the lowest sequence the client has no answer for, below it the replicas forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub epoch: Epoch,
    pub session: Session,
    pub sequence: u64,
    pub oldest: u64,
}

/// Longest name of a holder; a Kubernetes node name has at most 253 bytes.
pub const HOLDER_BYTES_MAX: usize = 256;
/// Longest text of a `NotAllowed`; longer ones are cut when encoded.
pub const REASON_BYTES_MAX: usize = 1024;

/// Mutations of a session that may be outstanding: `sequence < oldest + WINDOW`.
pub const SESSION_WINDOW: u64 = 1024;

/// Whether the volume carries a file system, as its log knows it; never guessed from its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Formatted {
    #[default]
    None,
    Formatting,
    Formatted,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Takes a new epoch and opens its first session. Refused while another holder is attached, unless `take_over`.
    Attach {
        volume: VolumeId,
        holder: String,
        instance: Instance,
        take_over: bool,
    },
    /// The holder's new process: same epoch, new session, the former one is closed before this is answered.
    OpenSession {
        volume: VolumeId,
        epoch: Epoch,
        instance: Instance,
    },
    /// Ends the attachment; the volume is free. Idempotent for the epoch that holds it.
    Detach {
        volume: VolumeId,
        epoch: Epoch,
    },
    SetFormatted {
        volume: VolumeId,
        epoch: Epoch,
        formatted: Formatted,
    },
    /// `seen` is the highest (term, index) this client has seen in a reply: a server behind it refuses.
    /// Reads and flushes carry a stamp too (their epoch and session are checked; their sequence is not recorded
    /// and may be any number the client uses to match the reply, with the top bit set).
    Io {
        volume: VolumeId,
        stamp: Stamp,
        seen: Position,
        operation: Operation,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Attached {
        volume: VolumeId,
        instance: Instance,
        epoch: Epoch,
        session: Session,
        geometry: Geometry,
        formatted: Formatted,
    },
    Detached {
        volume: VolumeId,
        epoch: Epoch,
    },
    FormattedSet {
        volume: VolumeId,
        epoch: Epoch,
    },
    /// An `Attach`, `OpenSession`, `Detach` or `SetFormatted` that will not succeed by trying again.
    Refused {
        volume: VolumeId,
        instance: Option<Instance>,
        reason: Refusal,
    },
    /// This node does not lead the volume (or is not sure to). `term` orders the hints: a lower one is out of date.
    /// A client that sent something to this node sends it to `leader`, or where that is `None`, tries each replica in turn.
    NotLeader {
        volume: VolumeId,
        term: Term,
        leader: Option<NodeId>,
    },
    /// Sent unasked to every connection that has used the volume: this node leads it now and serves.
    Leading {
        volume: VolumeId,
        term: Term,
    },
    /// Where the volume's replicas are, told by its leader, unasked, whenever that may be news: at first contact, when it
    /// begins to serve, and when members come or go. A higher or equal term replaces what was known. Term 0: told by
    /// a replica that does not lead, with `NotLeader`; some of them may have gone.
    Replicas {
        volume: VolumeId,
        term: Term,
        /// Node and `host:port`, 1 to 32.
        replicas: Vec<(NodeId, String)>,
    },
    /// `seen` is the (term, index) at which the result holds. Replies with a lower term than the client has seen are dropped.
    Io {
        volume: VolumeId,
        session: Session,
        sequence: u64,
        seen: Position,
        result: Result<Bytes, Error>,
    },
    /// The volume grew; told to the session's connection when the log entry is applied at the leader.
    Resized {
        volume: VolumeId,
        geometry: Geometry,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the node holds no replica of this volume")]
    UnknownVolume,
    #[error("attached by {holder} (epoch {}): detach it there, or take it over, which fences that holder for good", epoch.0)]
    Held { holder: String, epoch: Epoch },
    #[error("epoch {} is over: the volume was taken over or detached", epoch.0)]
    Stale { epoch: Epoch },
    #[error("the certificate does not allow this: {reason}")]
    NotAllowed { reason: String },
}
