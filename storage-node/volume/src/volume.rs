//! The replicated state machine of one volume.
//!
//! What it is: the state every replica holds alike, and [`Volume::apply`], which takes one committed entry to its
//! outcome and to the changes of blocks it makes. What it is not: the bytes of the volume (the store has them), the
//! order of overlapping requests (the leader's admission has decided it before the entry was proposed).
//! Who drives it: the shard, once per committed command, in log order, on every replica.
//!
//! Invariants:
//! 1. State and outcomes are a function of the entries applied, by index. Nothing else goes in.
//! 2. The log position decides: an entry whose epoch or session is not the current one *at its position* changes
//!    nothing ([`Outcome::Fenced`]), whatever its proposer believed.
//! 3. A sequence of a session takes effect at most once; once it has, a later entry with it is a [`Outcome::Duplicate`].
//! 4. `epoch` and `session` only rise. A session is open exactly while a holder is attached.
//! 5. A snapshot is named by its entry's index, and is listed exactly while the store is to keep it.
//! 6. The encoded state is bounded by [`crate::volume::STATE_BYTES_MAX`].

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use holdfast_block::Geometry;
use holdfast_id::{SnapshotId, VolumeId};
use holdfast_planted::Bug;
use holdfast_protocol::session::{Epoch, Formatted, Instance, Session, Stamp};

use crate::command::{Command, DecodeError};
use crate::name::Name;
use crate::range::{BLOCK, BLOCK_U64};
pub use crate::state::STATE_BYTES_MAX;
use crate::window::{Known, Window, well_formed};

/// Instances remembered after their session closed, so that a late copy of their `Attach` or `OpenSession` is not
/// taken for a new one. A copy that outlives this many later sessions would be; a client resends within seconds, a
/// session lives for the life of a process.
pub const FORMER_INSTANCES_MAX: usize = 16;

/// Most snapshots of one volume: each is a map that open walks, and its name travels with every state.
pub const SNAPSHOTS_MAX: usize = 64;

/// What a volume is created with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    pub id: VolumeId,
    /// Kept in every replica so that a catalogue can be rebuilt from the disks; decides nothing.
    pub name: Name,
    pub geometry: Geometry,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    pub(crate) id: VolumeId,
    pub(crate) name: Name,
    pub(crate) geometry: Geometry,
    /// Index of the last entry applied; 0 before the first.
    pub(crate) applied: u64,
    pub(crate) formatted: Formatted,
    /// The latest granted; 0 before the first.
    pub(crate) epoch: Epoch,
    /// The latest opened; 0 before the first.
    pub(crate) session: Session,
    pub(crate) attachment: Option<Attachment>,
    /// Instances of closed sessions, the latest last, none twice.
    pub(crate) former: VecDeque<Instance>,
    /// The oldest first; no name and no identifier twice.
    pub(crate) snapshots: Vec<Snapshot>,
}

/// The volume's blocks as of one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub id: SnapshotId,
    pub name: Name,
    /// Of its entry: what the store calls it.
    pub index: u64,
    /// Of the volume at that index.
    pub size_bytes: u64,
}

/// What an entry does to the blocks that the store keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// As of this entry.
    Keep,
    /// Those of an earlier entry go.
    Drop { index: u64 },
}

/// Who holds the volume in the current epoch, and its open session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    pub holder: Name,
    /// Whose session is open.
    pub instance: Instance,
    pub window: Window,
}

/// What an entry came to, the same on every replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A write or zero took effect here.
    Done,
    /// A write or zero took effect at an earlier index: a success without a change.
    Duplicate,
    /// A write or zero below the session's low-water mark: the client has its answer or gave up on it. Nothing
    /// changed now, and whether it ever took effect is not known any more, so it must not be reported as a success.
    Forgotten,
    /// Of an epoch or session that is not the current one at this index.
    Fenced,
    /// Lies beyond the end at this index. Not recorded: the same stamp may succeed after a resize.
    OutOfRange,
    /// The stamp breaks `1 <= oldest <= sequence < oldest + SESSION_WINDOW`. Admission refuses those; one that gets
    /// here changes nothing, and does not stop the replicas as undecodable bytes would.
    Malformed,
    /// `Attach` or `OpenSession` succeeded, now or before.
    Attached {
        epoch: Epoch,
        session: Session,
    },
    /// Another holder is attached.
    Held {
        holder: Name,
        epoch: Epoch,
    },
    /// The epoch named is not the current attachment's, or the instance's session has been closed by a later one.
    /// `epoch` is the latest granted.
    Stale {
        epoch: Epoch,
    },
    Detached,
    Resized,
    /// Smaller than it is, not whole physical blocks, or larger than volumes may be.
    SizeRefused {
        size_bytes: u64,
    },
    FormattedSet,
    /// Backwards, or past `Formatting`.
    FormattedRefused {
        formatted: Formatted,
    },
    /// There is a snapshot of this identifier and name, taken now or before.
    SnapshotTaken {
        index: u64,
    },
    /// Another snapshot has the name, or another name has the identifier.
    SnapshotConflict {
        snapshot: SnapshotId,
        name: Name,
    },
    TooManySnapshots,
    /// There is no such snapshot, now or already before.
    SnapshotDeleted,
}

/// A change of whole physical blocks that the replica hands to its store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// `data` has `checksums.len()` blocks; each checksum is that of its block.
    Write { first_block: u64, data: Bytes, checksums: Arc<[u32]> },
    /// Reads as zeroes from now on; `discard` gives the space back.
    Zero { first_block: u64, count: u64, discard: bool },
}

/// What one entry did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    pub outcome: Outcome,
    /// Disjoint, in rising order of blocks; empty where the outcome is not [`Outcome::Done`].
    pub mutations: Vec<Mutation>,
    /// Only without mutations.
    pub keeping: Option<Keeping>,
}

impl Volume {
    pub fn new(spec: VolumeSpec) -> Volume {
        Volume {
            id: spec.id,
            name: spec.name,
            geometry: spec.geometry,
            applied: 0,
            formatted: Formatted::None,
            epoch: Epoch(0),
            session: Session(0),
            attachment: None,
            former: VecDeque::new(),
            snapshots: Vec::new(),
        }
    }

    pub fn id(&self) -> VolumeId {
        self.id
    }

    pub fn name(&self) -> &Name {
        &self.name
    }

    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Index of the last command applied; 0 before the first. Entries that are no commands do not count.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    pub fn formatted(&self) -> Formatted {
        self.formatted
    }

    /// The latest epoch granted, also after it ended; 0 before the first.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The latest session opened, also after it was closed; 0 before the first.
    pub fn session(&self) -> Session {
        self.session
    }

    /// `None` while the volume is free.
    pub fn attachment(&self) -> Option<&Attachment> {
        self.attachment.as_ref()
    }

    /// The oldest first.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// Whether requests of this epoch and session may read and write as of the last entry applied.
    pub fn serves(&self, epoch: Epoch, session: Session) -> bool {
        self.attachment.is_some() && self.epoch == epoch && self.session == session
    }

    /// Applies the command at `index`. On an error nothing has changed and the replica must stop.
    ///
    /// # Panics
    /// Where `index` does not lie above the last one applied: an entry applied twice is a bug of the caller.
    pub fn apply(&mut self, index: u64, header: &[u8], payload: &Bytes) -> Result<Applied, DecodeError> {
        assert!(index > self.applied, "entry {index} comes after entry {} was applied", self.applied);
        let command = Command::decode(header)?;
        let (expected, actual) = (command.payload_bytes(), payload.len());
        if expected != actual {
            return Err(DecodeError::PayloadLength { expected, actual });
        }
        self.applied = index;
        let mut mutations = Vec::new();
        let mut keeping = None;
        let outcome = match command {
            Command::Write { stamp, first_block, checksums } => {
                let outcome = self.apply_stamped(&stamp, first_block + checksums.len() as u64);
                if outcome == Outcome::Done {
                    mutations.push(Mutation::Write { first_block, data: payload.clone(), checksums });
                }
                outcome
            }
            Command::Zero { stamp, first_block, count, discard, head, tail } => {
                let end = first_block + count + u64::from(tail.is_some());
                let outcome = self.apply_stamped(&stamp, end);
                if outcome == Outcome::Done {
                    let edge = |first_block, at: usize, checksum| Mutation::Write {
                        first_block,
                        data: payload.slice(at..at + BLOCK),
                        checksums: Arc::from([checksum]),
                    };
                    mutations.extend(head.map(|checksum| edge(first_block - 1, 0, checksum)));
                    mutations.push(Mutation::Zero { first_block, count, discard });
                    let tail_at = if head.is_some() { BLOCK } else { 0 };
                    mutations.extend(tail.map(|checksum| edge(first_block + count, tail_at, checksum)));
                }
                outcome
            }
            Command::Attach { holder, instance, take_over } => self.apply_attach(holder, instance, take_over),
            Command::OpenSession { epoch, instance } => self.apply_open_session(epoch, instance),
            Command::Detach { epoch } => self.apply_detach(epoch),
            Command::Resize { size_bytes } => self.apply_resize(size_bytes),
            Command::SetFormatted { epoch, formatted } => self.apply_set_formatted(epoch, formatted),
            Command::TakeSnapshot { snapshot, name } => {
                let outcome = self.apply_take_snapshot(snapshot, name);
                keeping = (outcome == Outcome::SnapshotTaken { index }).then_some(Keeping::Keep);
                outcome
            }
            Command::DeleteSnapshot { snapshot } => {
                let at = self.snapshots.iter().position(|held| held.id == snapshot);
                keeping = at.map(|at| Keeping::Drop { index: self.snapshots.remove(at).index });
                Outcome::SnapshotDeleted
            }
        };
        self.check_invariants();
        Ok(Applied { outcome, mutations, keeping })
    }

    /// Fence, exactly-once and range, in this order; records the sequence where the answer is `Done`.
    fn apply_stamped(&mut self, stamp: &Stamp, end_block: u64) -> Outcome {
        if !well_formed(stamp) {
            return Outcome::Malformed;
        }
        let current = self.epoch == stamp.epoch && self.session == stamp.session;
        if !current && !holdfast_planted::is(Bug::FenceOnlyAtAdmission) {
            return Outcome::Fenced;
        }
        let Some(attachment) = &mut self.attachment else { return Outcome::Fenced };
        attachment.window.advance(stamp);
        match attachment.window.known(stamp) {
            Known::Forgotten => return Outcome::Forgotten,
            Known::Applied if !holdfast_planted::is(Bug::DuplicateApplied) => return Outcome::Duplicate,
            Known::Applied | Known::New => {}
        }
        if end_block > self.geometry.size_bytes / BLOCK_U64 {
            return Outcome::OutOfRange;
        }
        attachment.window.record(stamp);
        Outcome::Done
    }

    /// A holder that lost its own state (its machine restarted) takes its volume again without asking a person: the
    /// former epoch is fenced all the same. Only *another* holder needs `take_over`.
    fn apply_attach(&mut self, holder: Name, instance: Instance, take_over: bool) -> Outcome {
        if let Some(answer) = self.known_instance(instance) {
            return answer;
        }
        if let Some(attachment) = &self.attachment
            && attachment.holder != holder
            && !take_over
        {
            return Outcome::Held { holder: attachment.holder.clone(), epoch: self.epoch };
        }
        self.close_session();
        self.epoch.0 += 1;
        self.open_session(holder, instance)
    }

    fn apply_open_session(&mut self, epoch: Epoch, instance: Instance) -> Outcome {
        if epoch != self.epoch {
            return Outcome::Stale { epoch: self.epoch };
        }
        if let Some(answer) = self.known_instance(instance) {
            return answer;
        }
        match self.close_session() {
            Some(closed) => self.open_session(closed.holder, instance),
            None => Outcome::Stale { epoch: self.epoch },
        }
    }

    fn apply_detach(&mut self, epoch: Epoch) -> Outcome {
        if epoch != self.epoch || epoch == Epoch(0) {
            return Outcome::Stale { epoch: self.epoch };
        }
        self.close_session();
        Outcome::Detached
    }

    fn apply_resize(&mut self, size_bytes: u64) -> Outcome {
        let current = self.geometry.size_bytes;
        match Geometry::new(size_bytes, self.geometry.logical_block_bytes) {
            Some(geometry) if size_bytes >= current => {
                self.geometry = geometry;
                Outcome::Resized
            }
            _ => Outcome::SizeRefused { size_bytes: current },
        }
    }

    fn apply_set_formatted(&mut self, epoch: Epoch, formatted: Formatted) -> Outcome {
        if epoch != self.epoch || self.attachment.is_none() {
            return Outcome::Stale { epoch: self.epoch };
        }
        match (self.formatted, formatted) {
            (Formatted::None, Formatted::Formatting) | (Formatted::Formatting, Formatted::Formatted) => {
                self.formatted = formatted;
                Outcome::FormattedSet
            }
            (current, asked) if current == asked => Outcome::FormattedSet,
            (current, _) => Outcome::FormattedRefused { formatted: current },
        }
    }

    fn apply_take_snapshot(&mut self, id: SnapshotId, name: Name) -> Outcome {
        if let Some(held) = self.snapshots.iter().find(|held| held.id == id || held.name == name) {
            if held.id == id && held.name == name {
                return Outcome::SnapshotTaken { index: held.index };
            }
            return Outcome::SnapshotConflict { snapshot: held.id, name: held.name.clone() };
        }
        if self.snapshots.len() >= SNAPSHOTS_MAX {
            return Outcome::TooManySnapshots;
        }
        let (index, size_bytes) = (self.applied, self.geometry.size_bytes);
        self.snapshots.push(Snapshot { id, name, index, size_bytes });
        Outcome::SnapshotTaken { index }
    }

    /// The answer to an instance that was answered before; `None` for a new one.
    fn known_instance(&self, instance: Instance) -> Option<Outcome> {
        match &self.attachment {
            Some(attachment) if attachment.instance == instance => {
                Some(Outcome::Attached { epoch: self.epoch, session: self.session })
            }
            _ if self.former.contains(&instance) => Some(Outcome::Stale { epoch: self.epoch }),
            _ => None,
        }
    }

    fn open_session(&mut self, holder: Name, instance: Instance) -> Outcome {
        self.session.0 += 1;
        self.attachment = Some(Attachment { holder, instance, window: Window::new() });
        Outcome::Attached { epoch: self.epoch, session: self.session }
    }

    /// The closed attachment; `None` where there was none.
    fn close_session(&mut self) -> Option<Attachment> {
        let closed = self.attachment.take()?;
        if self.former.len() == FORMER_INSTANCES_MAX {
            self.former.pop_front();
        }
        self.former.push_back(closed.instance);
        Some(closed)
    }

    fn check_invariants(&self) {
        assert!(self.former.len() <= FORMER_INSTANCES_MAX);
        assert!(self.snapshots.len() <= SNAPSHOTS_MAX);
        assert!(self.session.0 >= self.epoch.0, "every epoch opens a session");
        assert!(self.attachment.is_none() || self.epoch.0 > 0, "an attachment has an epoch");
    }
}
