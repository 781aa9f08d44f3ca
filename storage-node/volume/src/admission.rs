//! The leader's admission of writes: order of overlapping requests, and requests smaller than a physical block.
//!
//! What it is: volatile state of the leader, empty at the start of every leadership. A request whose edges lie on
//! physical blocks is proposed at once, behind earlier overlapping ones. A request with an edge within a block is a
//! read-modify-write: it waits until every earlier admitted request that overlaps it has been *applied*, reads the
//! edge blocks, and is proposed as whole blocks; what is admitted later and overlaps queues behind it. It never merges
//! from the data of an entry not yet applied: that entry may turn out to be a duplicate or fenced, and then its data is
//! not what the blocks hold. What it is not: a fence or a guard against repeated effects; those are decided at apply.
//! The early checks here only save log entries.
//!
//! Who drives it: the shard. It
//! * admits only while its replica leads, and only once everything up to the leader's own first entry is *applied*
//!   (else a read-modify-write could read beneath a committed entry that is still to come, and undo it);
//! * proposes in the order of the [`Step::Propose`]s, with nothing overlapping proposed from elsewhere;
//! * serves [`Step::Read`] from the state with every applied entry in it;
//! * calls [`Admission::on_applied`] after it gave the entry's mutations to the store, [`Admission::on_refused`] for a
//!   proposal that did not enter the log, and [`Admission::clear`] when leadership is lost or renounced.
//!
//! Invariants:
//! 1. Of two overlapping requests the one admitted first is proposed first, if both are.
//! 2. A read of an edge is issued only while no earlier overlapping request is unapplied, and no later one is proposed
//!    before the entry that the read goes into.
//! 3. A ticket is completed at most once, and a stamp has at most one entry here.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use holdfast_block::{Error, Operation};
use holdfast_planted::Bug;
use holdfast_protocol::session::{Epoch, SESSION_WINDOW, Session, Stamp};

use crate::change::{Change, Edge};
use crate::range::{BLOCK, BlockRange};
use crate::volume::{Outcome, Volume};
use crate::window::{Known, well_formed};

/// Requests admitted and not applied: a session's window, and once more for stragglers of a session just closed.
pub const REQUESTS_MAX: usize = 2 * SESSION_WINDOW as usize;
/// Data of requests that wait for others or for their edges; it is kept only until the request is proposed.
pub const WAITING_BYTES_MAX: usize = 64 << 20;
/// Tickets that wait for one stamp: a client resends once per connection, and to few nodes.
pub const TICKETS_PER_STAMP_MAX: usize = 8;

/// What the shard does next, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Propose this entry; the ticket comes back with its outcome.
    Propose {
        ticket: u64,
        header: Bytes,
        payload: Bytes,
    },
    /// Read these blocks as applied here; the answer goes to [`Admission::on_read`].
    Read {
        read: u64,
        first_block: u64,
        count: u32,
    },
    Complete {
        ticket: u64,
        result: Result<(), Error>,
    },
}

/// The request was not admitted and nothing is remembered of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// Try again once something completed. The caller takes no later request of the session before this one.
    #[error("too many requests or bytes wait")]
    Busy,
    /// The client breaks the protocol: no honest one sends such a stamp.
    #[error("the stamp breaks 1 <= oldest <= sequence < oldest + 1024")]
    MalformedStamp,
    /// Reads and flushes are served from committed state, not admitted.
    #[error("not a mutation")]
    NotAMutation,
}

/// Rises with every request admitted; the order of overlapping requests.
type Order = u64;

#[derive(Debug, Default)]
pub struct Admission {
    requests: BTreeMap<Order, Request>,
    by_stamp: BTreeMap<(Epoch, Session, u64), Order>,
    /// The first ticket of each request: the one it is proposed under.
    by_ticket: BTreeMap<u64, Order>,
    reads: BTreeMap<u64, (Order, Edge)>,
    /// Requests that wait for earlier ones.
    waiting: BTreeSet<Order>,
    waiting_bytes: usize,
    next_order: Order,
    /// Never used twice, also not after [`Admission::clear`]: a late answer must find nobody.
    next_read: u64,
}

#[derive(Debug)]
struct Request {
    stamp: Stamp,
    /// Every block it touches.
    blocks: BlockRange,
    /// At least one.
    tickets: Vec<u64>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// `blockers`: earlier overlapping requests that must be proposed (whole blocks) or applied (edges) first, > 0.
    Waiting { change: Change, blockers: usize },
    /// `missing`: edge blocks still to be read, > 0.
    Reading { change: Change, missing: usize, head: Option<Bytes>, tail: Option<Bytes> },
    /// In the caller's hands; the data is forgotten.
    Proposed,
}

impl Admission {
    pub fn new() -> Admission {
        Admission::default()
    }

    /// Requests admitted and not yet applied.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// `volume` is this replica's, as applied now. `ticket` is one never used before, also not before a `clear`: an
    /// entry of an earlier leadership may still be applied under it.
    pub fn admit(
        &mut self,
        volume: &Volume,
        ticket: u64,
        stamp: Stamp,
        operation: Operation,
    ) -> Result<Vec<Step>, AdmitError> {
        if !well_formed(&stamp) {
            return Err(AdmitError::MalformedStamp);
        }
        let checked = volume.geometry().check(&operation);
        let change = Change::from_operation(operation).ok_or(AdmitError::NotAMutation)?;
        if let Some(result) = early_answer(volume, &stamp, checked) {
            return Ok(vec![Step::Complete { ticket, result }]);
        }
        if let Some(order) = self.by_stamp.get(&key(&stamp)) {
            let request = self.requests.get_mut(order).expect("by_stamp names requests");
            if request.tickets.len() == TICKETS_PER_STAMP_MAX {
                return Err(AdmitError::Busy);
            }
            request.tickets.push(ticket);
            return Ok(Vec::new());
        }
        let data_bytes = change.data_bytes();
        if self.requests.len() == REQUESTS_MAX || self.waiting_bytes + data_bytes > WAITING_BYTES_MAX {
            return Err(AdmitError::Busy);
        }

        let order = self.next_order;
        self.next_order += 1;
        let blocks = change.blocks();
        let blockers = self.blockers(blocks, change.edge().is_some());
        self.by_stamp.insert(key(&stamp), order);
        let clash = self.by_ticket.insert(ticket, order);
        assert!(clash.is_none(), "ticket {ticket} is in use");
        let phase = Phase::Waiting { change, blockers };
        self.requests.insert(order, Request { stamp, blocks, tickets: vec![ticket], phase });
        self.waiting.insert(order);
        self.waiting_bytes += data_bytes;
        let mut steps = Vec::new();
        if blockers == 0 {
            self.start(BTreeSet::from([order]), &mut steps);
        }
        Ok(steps)
    }

    /// The answer to [`Step::Read`]; one that nobody waits for any more is ignored.
    ///
    /// # Panics
    /// Where the data has another length than was asked for.
    pub fn on_read(&mut self, read: u64, data: Result<Bytes, Error>) -> Vec<Step> {
        let mut steps = Vec::new();
        let Some((order, edge)) = self.reads.remove(&read) else { return steps };
        let Some(request) = self.requests.get_mut(&order) else { return steps };
        let Phase::Reading { missing, head, tail, .. } = &mut request.phase else {
            unreachable!("a request with a read outstanding is reading")
        };
        match data {
            Err(error) => self.fail(order, error, &mut steps),
            Ok(data) => {
                match edge {
                    Edge::Head => *head = Some(data),
                    Edge::Tail => *tail = Some(data),
                    Edge::Both => {
                        *head = Some(data.slice(..BLOCK));
                        *tail = Some(data.slice(data.len() - BLOCK..));
                    }
                }
                *missing -= 1;
                if *missing == 0 {
                    self.start(BTreeSet::from([order]), &mut steps);
                }
            }
        }
        steps
    }

    /// The entry proposed under `ticket` was applied here; one that is not known any more is ignored.
    pub fn on_applied(&mut self, ticket: u64, outcome: &Outcome) -> Vec<Step> {
        self.end_proposal(ticket, || result_of(outcome))
    }

    /// The proposal of `ticket` did not enter the log, and this leadership goes on.
    pub fn on_refused(&mut self, ticket: u64, error: Error) -> Vec<Step> {
        self.end_proposal(ticket, || Err(error))
    }

    /// Forgets everything and completes nothing: the fate of what was proposed is the next leader's to tell.
    pub fn clear(&mut self) {
        *self = Admission { next_order: self.next_order, next_read: self.next_read, ..Admission::default() };
    }

    /// Earlier requests that must be applied (for a read-modify-write) or proposed (for whole blocks) first.
    fn blockers(&self, blocks: BlockRange, edges: bool) -> usize {
        if edges && holdfast_planted::is(Bug::ReadBeforeApplied)
            || !edges && holdfast_planted::is(Bug::OvertakesReadModifyWrite)
        {
            return 0;
        }
        let blocks_it = |request: &&Request| {
            request.blocks.overlaps(blocks) && (edges || !matches!(request.phase, Phase::Proposed))
        };
        self.requests.values().filter(blocks_it).count()
    }

    fn end_proposal(&mut self, ticket: u64, result: impl FnOnce() -> Result<(), Error>) -> Vec<Step> {
        let mut steps = Vec::new();
        if let Some(&order) = self.by_ticket.get(&ticket) {
            assert!(matches!(self.requests[&order].phase, Phase::Proposed), "ticket {ticket} was not proposed");
            self.finish(order, result(), &mut steps);
        }
        steps
    }

    /// Takes each of `ready` one step on, and those that get ready by it, in the order of admission.
    fn start(&mut self, mut ready: BTreeSet<Order>, steps: &mut Vec<Step>) {
        while let Some(order) = ready.pop_first() {
            let request = self.requests.get_mut(&order).expect("only requests get ready");
            let (stamp, ticket, blocks) = (request.stamp, request.tickets[0], request.blocks);
            let (change, head, tail) = match std::mem::replace(&mut request.phase, Phase::Proposed) {
                Phase::Waiting { change, .. } => {
                    self.waiting.remove(&order);
                    if let Some(edge) = change.edge() {
                        self.read_edges(order, blocks, edge, change, steps);
                        continue;
                    }
                    (change, None, None)
                }
                Phase::Reading { change, head, tail, .. } => (change, head, tail),
                Phase::Proposed => unreachable!("proposed twice"),
            };
            self.waiting_bytes -= change.data_bytes();
            let (command, payload) = change.into_entry(stamp, blocks, head, tail);
            steps.push(Step::Propose { ticket, header: command.encode(), payload });
            self.release(order, blocks, Released::Proposed, &mut ready);
        }
    }

    fn read_edges(&mut self, order: Order, blocks: BlockRange, edge: Edge, change: Change, steps: &mut Vec<Step>) {
        let mut read = |edge: Edge, first_block: u64, count: u32| {
            let read = self.next_read;
            self.next_read += 1;
            self.reads.insert(read, (order, edge));
            steps.push(Step::Read { read, first_block, count });
        };
        let last = blocks.end() - 1;
        let missing = match edge {
            Edge::Head => {
                read(Edge::Head, blocks.first, 1);
                1
            }
            Edge::Tail => {
                read(Edge::Tail, last, 1);
                1
            }
            Edge::Both if blocks.count <= 2 => {
                read(Edge::Both, blocks.first, u32::try_from(blocks.count).expect("one or two"));
                1
            }
            Edge::Both => {
                read(Edge::Head, blocks.first, 1);
                read(Edge::Tail, last, 1);
                2
            }
        };
        let request = self.requests.get_mut(&order).expect("it is reading");
        request.phase = Phase::Reading { change, missing, head: None, tail: None };
    }

    /// A request that was not proposed ends with an error.
    fn fail(&mut self, order: Order, error: Error, steps: &mut Vec<Step>) {
        self.reads.retain(|_, (reader, _)| *reader != order);
        self.finish(order, Err(error), steps);
    }

    /// Completes every ticket of the request, forgets it, and starts what waited for it.
    fn finish(&mut self, order: Order, result: Result<(), Error>, steps: &mut Vec<Step>) {
        let request = self.requests.remove(&order).expect("by_ticket and reads name requests");
        self.by_stamp.remove(&key(&request.stamp));
        self.by_ticket.remove(&request.tickets[0]);
        let released = match request.phase {
            Phase::Proposed => Released::Applied,
            Phase::Reading { change, .. } => {
                self.waiting_bytes -= change.data_bytes();
                Released::Dropped
            }
            Phase::Waiting { .. } => unreachable!("a waiting request has no proposal and no read to end it"),
        };
        steps.extend(request.tickets.iter().map(|&ticket| Step::Complete { ticket, result }));
        let mut ready = BTreeSet::new();
        self.release(order, request.blocks, released, &mut ready);
        self.start(ready, steps);
    }

    /// Tells the later overlapping requests that wait; collects those that wait for nothing more.
    fn release(&mut self, order: Order, blocks: BlockRange, released: Released, ready: &mut BTreeSet<Order>) {
        for &later in self.waiting.range(order + 1..) {
            let request = self.requests.get_mut(&later).expect("waiting names requests");
            let Phase::Waiting { change, blockers } = &mut request.phase else {
                unreachable!("waiting names requests that wait")
            };
            let counted = match (released, change.edge().is_some()) {
                (Released::Proposed, edges) => !edges,
                (Released::Applied, edges) => edges,
                (Released::Dropped, _) => true,
            };
            if counted && request.blocks.overlaps(blocks) {
                *blockers -= 1;
                if *blockers == 0 {
                    ready.insert(later);
                }
            }
        }
    }
}

/// How a request stops to block later ones.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Released {
    Proposed,
    /// After it was proposed: applied, or kept out of the log.
    Applied,
    /// Never proposed.
    Dropped,
}

fn key(stamp: &Stamp) -> (Epoch, Session, u64) {
    (stamp.epoch, stamp.session, stamp.sequence)
}

/// What needs no entry, because no later entry can change the answer: epochs and sessions that are over stay over, what
/// has taken effect has, and volumes never shrink.
fn early_answer(volume: &Volume, stamp: &Stamp, checked: Result<(), Error>) -> Option<Result<(), Error>> {
    let (epoch, session) = (volume.epoch(), volume.session());
    if stamp.epoch < epoch || stamp.session < session {
        return Some(Err(Error::Fenced));
    }
    if stamp.epoch == epoch && stamp.session == session {
        match volume.attachment().map(|attachment| attachment.window.known(stamp)) {
            None => return Some(Err(Error::Fenced)),
            Some(Known::Applied) => return Some(Ok(())),
            Some(Known::Forgotten) => return Some(result_of(&Outcome::Forgotten)),
            Some(Known::New) => {}
        }
    }
    checked.err().map(Err)
}

/// The client's answer to a write or zero.
fn result_of(outcome: &Outcome) -> Result<(), Error> {
    match outcome {
        Outcome::Done | Outcome::Duplicate => Ok(()),
        Outcome::Fenced => Err(Error::Fenced),
        Outcome::OutOfRange => Err(Error::OutOfRange),
        Outcome::Forgotten => Err(Error::Unavailable),
        Outcome::Malformed
        | Outcome::Attached { .. }
        | Outcome::Held { .. }
        | Outcome::Stale { .. }
        | Outcome::Detached
        | Outcome::Resized
        | Outcome::SizeRefused { .. }
        | Outcome::FormattedSet
        | Outcome::FormattedRefused { .. }
        | Outcome::SnapshotTaken { .. }
        | Outcome::SnapshotConflict { .. }
        | Outcome::TooManySnapshots
        | Outcome::SnapshotDeleted => unreachable!("admission proposes well-formed writes and zeroes only"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;
    use crate::name::Name;
    use crate::volume::VolumeSpec;
    use holdfast_block::{Geometry, REQUEST_BYTES_MAX};
    use holdfast_id::VolumeId;
    use holdfast_protocol::session::Instance;

    fn attached() -> Volume {
        let geometry = Geometry::new(1 << 30, 512).unwrap();
        let id = VolumeId::from_bytes([1; 16]).unwrap();
        let mut volume = Volume::new(VolumeSpec { id, name: Name::new("data").unwrap(), geometry });
        let attach = Command::Attach { holder: Name::new("a").unwrap(), instance: Instance(1), take_over: false };
        volume.apply(1, &attach.encode(), &Bytes::new()).unwrap();
        volume
    }

    /// A session's window of stamps fits once; `session` names the window.
    fn stamp(number: u64) -> Stamp {
        let (session, sequence) = (1 + number / SESSION_WINDOW, 1 + number % SESSION_WINDOW);
        Stamp { epoch: Epoch(1), session: Session(session), sequence, oldest: 1 }
    }

    fn write(offset: u64, length: u32) -> Operation {
        Operation::Write { offset, data: Bytes::from(vec![1; length as usize]) }
    }

    #[test]
    fn requests_are_bounded() {
        let (volume, mut admission) = (attached(), Admission::new());
        for number in 0..REQUESTS_MAX as u64 {
            admission.admit(&volume, number, stamp(number), write(0, 4096)).unwrap();
        }
        let more = REQUESTS_MAX as u64;
        assert_eq!(admission.admit(&volume, more, stamp(more), write(0, 4096)), Err(AdmitError::Busy));
        admission.on_applied(0, &Outcome::Done);
        assert!(admission.admit(&volume, more, stamp(more), write(0, 4096)).is_ok());
        assert_eq!(admission.len(), REQUESTS_MAX);
    }

    #[test]
    fn waiting_data_is_bounded_and_accounted_for() {
        let (volume, mut admission) = (attached(), Admission::new());
        let long = REQUEST_BYTES_MAX;
        let fit = WAITING_BYTES_MAX as u64 / u64::from(long);
        for number in 0..fit {
            admission.admit(&volume, number, stamp(number), write(512, long)).unwrap();
        }
        assert_eq!(admission.admit(&volume, fit, stamp(fit), write(1 << 29, 4096)), Err(AdmitError::Busy));
        // One after the other: reads answered, proposed, applied.
        let mut reads = 0;
        for number in 0..fit {
            admission.on_read(reads, Ok(Bytes::from(vec![0; BLOCK])));
            let steps = admission.on_read(reads + 1, Ok(Bytes::from(vec![0; BLOCK])));
            reads += 2;
            let [Step::Propose { ticket, payload, .. }] = &steps[..] else { panic!("{steps:?}") };
            assert_eq!((*ticket, payload.len()), (number, crate::command::PAYLOAD_BYTES_MAX));
            admission.on_applied(number, &Outcome::Done);
        }
        assert!(admission.is_empty() && admission.waiting.is_empty() && admission.reads.is_empty());
        assert_eq!((admission.waiting_bytes, admission.by_stamp.len(), admission.by_ticket.len()), (0, 0, 0));
    }

    #[test]
    fn reads_are_never_numbered_twice() {
        let (volume, mut admission) = (attached(), Admission::new());
        let first = admission.admit(&volume, 1, stamp(0), write(0, 512)).unwrap();
        admission.clear();
        let second = admission.admit(&volume, 2, stamp(0), write(0, 512)).unwrap();
        let [Step::Read { read: first, .. }, Step::Read { read: second, .. }] = [&first[0], &second[0]] else {
            panic!("{first:?} {second:?}")
        };
        assert_ne!(first, second);
        assert_eq!(admission.on_read(*first, Ok(Bytes::from(vec![0; BLOCK]))), []);
    }
}
