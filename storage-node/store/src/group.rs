//! The words between a store and its caller: records, appends, checkpoints, mutations, events and refusals.
//!
//! A *group* is one replicated log with one state machine. The store knows neither terms nor votes: hard states,
//! positions and states are the caller's bytes.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use holdfast_id::{ClusterId, DiskId, GroupId, ReplicaId};

/// Longest header of a record.
pub const HEADER_BYTES_MAX: usize = 64 << 10;
/// Longest payload of a record: 1 MiB that is not aligned touches one block more.
pub const PAYLOAD_BYTES_MAX: usize = (1 << 20) + 4096;
/// Longest hard state.
pub const HARD_STATE_BYTES_MAX: usize = 256;
/// Longest position.
pub const POSITION_BYTES_MAX: usize = 64;
/// Longest checkpointed state.
pub const STATE_BYTES_MAX: usize = 16 << 20;
/// Most records in one append.
pub const RECORDS_MAX: usize = 1024;
/// Most bytes of headers and payloads in one append.
pub const APPEND_BYTES_MAX: usize = 2 << 20;
/// Payloads from this length on leave the log where they cover whole slots: below it, two writes cost more than the
/// second copy that a checkpoint makes.
pub const OUT_OF_PLACE_BYTES_MIN: usize = 64 << 10;

/// One entry of a group's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub index: u64,
    /// At most [`HEADER_BYTES_MAX`].
    pub header: Bytes,
    /// Empty, or whole blocks of 4096 bytes, at most [`PAYLOAD_BYTES_MAX`].
    pub payload: Bytes,
    /// Lets a long payload go straight to its place on the disk. `None`: not known; recovered records have none.
    pub at: Option<PayloadAt>,
}

/// Where applying a record writes its payload, if it writes anything: all of it, in one mutation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PayloadAt {
    pub first_block: u64,
    /// Checksum of every block of the payload, as the mutation will have them.
    pub checksums: Arc<[u32]>,
}

/// What becomes durable in this order: the hard state, the truncation, the records. A crash before `Flushed` may leave
/// it without its last records, where the payloads of those did not reach the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Append {
    pub group: GroupId,
    /// The caller's, rising per group since open; named by [`StoreEvent::Flushed`].
    pub sequence: u64,
    /// At most [`HARD_STATE_BYTES_MAX`].
    pub hard_state: Option<Bytes>,
    /// Records at this index and above are gone; at or below the checkpoint's index all of them, for the checkpoint did
    /// not come of them.
    pub truncate_from: Option<u64>,
    /// Contiguous; the first follows what is left after the truncation. At most [`RECORDS_MAX`] of them and
    /// [`APPEND_BYTES_MAX`] bytes.
    pub records: Vec<Record>,
}

/// What a checkpoint keeps of a group beside its blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupState {
    /// As of the call of `checkpoint`, at most [`HARD_STATE_BYTES_MAX`].
    pub hard_state: Bytes,
    /// The caller's name of the entry at the checkpoint's index, at most [`POSITION_BYTES_MAX`].
    pub position: Bytes,
    /// State machine and configuration, at most [`STATE_BYTES_MAX`].
    pub state: Bytes,
}

/// A change of a group's blocks; block numbers count 4096 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// `checksums`: `holdfast_block::checksum` of every 4096 bytes of `data`, as long as `data` has blocks.
    Write { first_block: u64, data: Bytes, checksums: Arc<[u32]> },
    /// The blocks read as zeroes; `discard` gives the space back.
    Zero { first_block: u64, count: u64, discard: bool },
}

/// Sixteen blocks of a group as another replica holds them; part of a delta.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledSlot {
    /// It covers blocks `[16 slot, 16 (slot + 1))`.
    pub slot: u64,
    /// Log index that last changed it; zero: the sender knows nothing of it.
    pub index: u64,
    /// Bit i: block `16 slot + i` holds data; the others are zero.
    pub present: u16,
    /// The present blocks, in order.
    pub data: Bytes,
    /// Checksum of each of them.
    pub checksums: Arc<[u32]>,
}

/// A group as found on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveredGroup {
    pub group: GroupId,
    pub replica: ReplicaId,
    pub checkpoint_index: u64,
    pub checkpoint: GroupState,
    /// Records up to here were committed, and blocks are not readable before they are applied again. At or below
    /// `checkpoint_index`: nothing of that kind.
    pub committed_to: u64,
    /// Above zero: a delta was being installed, towards this index at most. The blocks are of no single index: nothing
    /// is to be applied or read before an install ends.
    pub installing: u64,
    /// Newer than the checkpoint's, where the WAL has one.
    pub hard_state: Option<Bytes>,
    /// Contiguous; starts anywhere at or below `checkpoint_index + 1`, all durable.
    pub records: Vec<Record>,
    pub damage: Option<Damage>,
}

/// What of a group the disk can no longer tell. A damaged group neither votes nor stands for election until it has
/// followed an elected leader.
///
/// The caller notes the damage in the next hard state it appends or checkpoints: damage of the log is reported at
/// every open until such a hard state is durable, and not afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// WAL batches that held records or a hard state of this group, or may have, are unreadable. Every record up to
    /// `intact_to` is there; later ones were left out, and the hard state may be older than one told to be durable.
    Log { intact_to: u64 },
    /// The checkpoint or the map is unreadable: nothing of this replica can be used but its identity.
    Checkpoint { reason: String },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreEvent {
    /// Every append of the group up to `sequence` is durable.
    Flushed {
        group: GroupId,
        sequence: u64,
    },
    GroupCreated {
        group: GroupId,
        replica: ReplicaId,
    },
    GroupDeleted {
        group: GroupId,
        replica: ReplicaId,
    },
    CheckpointDone {
        group: GroupId,
        index: u64,
    },
    /// The WAL or memory needs what this group holds; told once until its next `CheckpointDone`.
    CheckpointWanted {
        group: GroupId,
    },
    Read {
        token: u64,
        result: Result<Bytes, ReadError>,
    },
    /// The whole disk, for good: everything later is refused, nothing is retried.
    Failed {
        reason: String,
    },
}

/// Why blocks could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("{count} blocks from block {first_block} do not match their checksums")]
    Corrupt { first_block: u64, count: u32 },
    #[error("the disk has failed")]
    Failed,
    #[error("the disk does not hold this group")]
    UnknownGroup,
    /// A checkpoint was under way when the disk was last closed: blocks hold the changes of records up to `needed`,
    /// which were committed and have to be applied again first.
    #[error("the records up to {needed} have to be applied again first")]
    Behind { needed: u64 },
    #[error("the blocks are being brought up from another replica")]
    Installing,
}

/// Why an append was refused; nothing of it was kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    #[error("the WAL is full until checkpoints and releases free segments")]
    Full,
    #[error("the disk has no space for what the records would write")]
    NoSpace,
    #[error("the disk has failed")]
    Failed,
    #[error("the append breaks the limit of {limit} {what}")]
    TooLarge { what: &'static str, limit: usize },
    #[error("the disk does not hold this group")]
    UnknownGroup,
}

/// Why a command other than an append was refused; nothing of it was kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("the disk has no space left")]
    Full,
    #[error("the disk has failed")]
    Failed,
    #[error("the state breaks the limit of {limit} bytes of {what}")]
    TooLarge { what: &'static str, limit: usize },
    #[error("the disk does not hold this group, or holds another replica of it")]
    UnknownGroup,
    #[error("the disk already holds a replica of this group")]
    GroupExists,
    #[error("the group already has a checkpoint or a deletion under way")]
    Busy,
    #[error("the checkpoint of the group is damaged: only deleting the group is left")]
    Damaged,
    #[error("the blocks of the group are being brought up from another replica")]
    Installing,
    #[error("the group has as many snapshots as it can")]
    TooManySnapshots,
}

/// Why a delta was not taken for complete; nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    /// Slots that should be here are missing, or others are still here.
    #[error("the map's hash is {found:032x}, the sender's is {expected:032x}")]
    Hash { found: u128, expected: u128 },
    #[error("parts of the map are lost: its hash is not known")]
    MapLost,
    #[error("{count} of the sender's snapshots are not here, the first of them {first}")]
    Snapshots { first: u64, count: usize },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a disk was not formatted.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("the disk is formatted already, as {disk} of cluster {cluster}")]
    AlreadyFormatted { disk: DiskId, cluster: ClusterId },
    #[error("the disk holds data of something else; erase its first MiB to use it")]
    Foreign,
    #[error("the disk has {actual_bytes} bytes, at least {needed_bytes} are needed")]
    TooSmall { actual_bytes: u64, needed_bytes: u64 },
    #[error("option {option} must be {expected}")]
    InvalidOption { option: &'static str, expected: String },
    #[error("the disk cannot be formatted")]
    Io(#[from] io::Error),
}

/// Why a disk was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the disk is not formatted")]
    NotFormatted,
    #[error("the disk holds data of something else")]
    Foreign,
    #[error("the disk's format has features this program does not know (incompatible bits {unknown_bits:#x})")]
    NewerFormat { unknown_bits: u64 },
    #[error("the disk has {actual_bytes} bytes, its superblock speaks of {needed_bytes}")]
    TooSmall { actual_bytes: u64, needed_bytes: u64 },
    #[error("both copies of the superblock are damaged")]
    SuperblockDamaged,
    #[error("{what} at byte {offset} is damaged: {reason}")]
    Damaged { what: &'static str, offset: u64, reason: String },
    #[error("the disk cannot be opened")]
    Io(#[from] io::Error),
}

/// How full the disk is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub data_total: u64,
    pub data_used: u64,
    /// Promised to appends that are not yet written back.
    pub data_reserved: u64,
    pub wal_total: u64,
    pub wal_used: u64,
}
