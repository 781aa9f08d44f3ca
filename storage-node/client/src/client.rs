//! The client: phases, what is sent when, and what an answer means.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use holdfast_block::{Completion, Error, Geometry, Operation, Request as BlockRequest};
use holdfast_consensus::{Position, Term, Timestamp};
use holdfast_id::{NodeId, VolumeId};
use holdfast_protocol::session::{Epoch, Formatted, Instance, Refusal, Reply, Request, SESSION_WINDOW, Session, Stamp};

use crate::effect::ClientEffect;
use crate::options::{ClientOptions, Mode};
use crate::outstanding::{Outstanding, UNRECORDED};
use crate::search::Search;

/// The wait before another resend to the same leader doubles this often.
const RESEND_DOUBLINGS: u32 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The session is not open yet; requests queue.
    Opening,
    Serving,
    /// No new requests; what is outstanding is completed, then the epoch is given back.
    Detaching,
    Fenced,
    Refused,
    Detached,
}

/// What a person asks a client.
#[derive(Clone, Debug)]
pub struct Status {
    pub phase: Phase,
    pub epoch: Option<Epoch>,
    pub session: Option<Session>,
    pub leader: Option<NodeId>,
    pub term: Term,
    pub outstanding: u64,
    /// Since when the oldest outstanding request waits.
    pub waiting_since: Option<Timestamp>,
    /// The last refusal, also one that was not final.
    pub refusal: Option<Refusal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the session is not open, or the former mark is not answered yet")]
pub struct FormattedBusy;

#[derive(Debug)]
struct Opened {
    epoch: Epoch,
    session: Session,
    geometry: Geometry,
}

/// A request about the attachment itself; one at a time.
#[derive(Debug)]
struct Control {
    body: ControlBody,
    sent: Option<Timestamp>,
    sends: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ControlBody {
    SetFormatted(Formatted),
    Detach,
}

/// One attached volume.
#[derive(Debug)]
pub struct Client {
    volume: VolumeId,
    holder: String,
    instance: Instance,
    mode: Mode,
    window: u64,
    quiet: Duration,
    resend: Duration,
    unavailable_after: Option<Duration>,
    phase: Phase,
    opened: Option<Opened>,
    search: Search,
    outstanding: Outstanding,
    control: Option<Control>,
    detach_wanted: bool,
    seen: Position,
    /// Replicas' nodes that say they hold no replica; only when all say so is the opening refused.
    unknown_at: BTreeSet<NodeId>,
    refusal: Option<Refusal>,
    /// No request is overdue before this; exact only after a scan.
    overdue_from: Option<Timestamp>,
    effects: Vec<ClientEffect>,
}

impl Client {
    /// Starts to open the session as soon as a replica's node is connected.
    ///
    /// Panics if there are no replicas or the window is out of its bounds.
    pub fn new(options: ClientOptions, now: Timestamp) -> Client {
        assert!((1..=SESSION_WINDOW).contains(&options.window), "the window is 1 to SESSION_WINDOW requests");
        Client {
            volume: options.volume,
            holder: options.holder,
            instance: options.instance,
            mode: options.mode,
            window: options.window,
            quiet: options.quiet,
            resend: options.resend,
            unavailable_after: options.unavailable_after,
            phase: Phase::Opening,
            opened: None,
            search: Search::new(options.replicas, options.seed, now),
            outstanding: Outstanding::new(),
            control: None,
            detach_wanted: false,
            seen: Position::default(),
            unknown_at: BTreeSet::new(),
            refusal: None,
            overdue_from: None,
            effects: Vec::new(),
        }
    }

    pub fn status(&self) -> Status {
        Status {
            phase: self.phase,
            epoch: self.opened.as_ref().map(|opened| opened.epoch),
            session: self.opened.as_ref().map(|opened| opened.session),
            leader: self.search.leader(),
            term: self.search.term(),
            outstanding: self.outstanding.len(),
            waiting_since: self.outstanding.waiting_since(),
            refusal: self.refusal.clone(),
        }
    }

    /// Whether [`Client::submit`] may be called. A client that has ended takes any number: it fails them at once.
    pub fn can_submit(&self) -> bool {
        self.has_ended() || (self.outstanding.len() < self.window && self.outstanding.window_open())
    }

    /// When [`Client::on_deadline`] is to be called; `None` while nothing waits.
    pub fn deadline(&self) -> Option<Timestamp> {
        if !self.has_work() {
            return None;
        }
        let limit = self.outstanding.waiting_since().zip(self.unavailable_after).map(|(since, limit)| since + limit);
        [self.search.round_due(self.quiet), self.overdue_from, limit].into_iter().flatten().min()
    }

    pub fn on_connected(&mut self, now: Timestamp, node: NodeId) {
        if !self.search.is_replica(node) || self.has_ended() {
            return;
        }
        if self.search.on_connected(node) {
            self.send_everything(now);
        } else {
            // Also introduces the connection: a node announces its leadership only to connections it has heard.
            self.ask(node);
        }
        self.settle(now);
    }

    pub fn on_closed(&mut self, now: Timestamp, node: NodeId) {
        self.search.on_closed(now, node);
        self.settle(now);
    }

    pub fn on_reply(&mut self, now: Timestamp, from: NodeId, reply: Reply) {
        if self.has_ended() || !self.search.is_replica(from) {
            return;
        }
        match reply {
            Reply::Attached { volume, instance, epoch, session, geometry, formatted } => {
                if volume == self.volume && instance == self.instance && self.phase == Phase::Opening {
                    self.on_attached(now, from, Opened { epoch, session, geometry }, formatted);
                }
            }
            Reply::Detached { volume, epoch } => {
                let sent = self.control_sent() == Some(ControlBody::Detach);
                if volume == self.volume && self.is_epoch(epoch) && sent {
                    self.end(Phase::Detached, Error::Unavailable, ClientEffect::Detached);
                }
            }
            Reply::FormattedSet { volume, epoch } => {
                if let Some(ControlBody::SetFormatted(formatted)) = self.control_sent()
                    && volume == self.volume
                    && self.is_epoch(epoch)
                {
                    self.control = None;
                    self.search.restart(now);
                    self.effects.push(ClientEffect::FormattedSet(formatted));
                }
            }
            Reply::Refused { volume, instance, reason } => {
                if volume == self.volume && instance.is_none_or(|instance| instance == self.instance) {
                    self.on_refused(from, reason);
                }
            }
            Reply::NotLeader { volume, term, leader } => {
                if volume == self.volume && self.search.on_not_leader(from, term, leader) {
                    self.send_everything(now);
                }
            }
            Reply::Leading { volume, term } => {
                if volume == self.volume && self.search.on_leading(from, term) {
                    self.search.restart(now);
                    self.send_everything(now);
                }
            }
            Reply::Replicas { volume, term, mut replicas } if term == Term::default() => {
                replicas.retain(|(node, _)| volume == self.volume && self.search.on_rumour(*node));
                if !replicas.is_empty() {
                    self.effects.push(ClientEffect::MoreReplicas(replicas));
                }
            }
            Reply::Replicas { volume, term, replicas } => {
                let nodes: Vec<NodeId> = replicas.iter().map(|(node, _)| *node).collect();
                if volume == self.volume && self.search.on_replicas(term, nodes) {
                    self.unknown_at.retain(|node| self.search.is_replica(*node));
                    self.effects.push(ClientEffect::Replicas(replicas));
                    self.search.restart(now);
                }
            }
            Reply::Io { volume, session, sequence, seen, result } => {
                if volume == self.volume && self.opened.as_ref().is_some_and(|opened| opened.session == session) {
                    self.on_answer(now, from, sequence, seen, result);
                }
            }
            Reply::Resized { volume, geometry } => {
                if volume == self.volume
                    && let Some(opened) = &mut self.opened
                    && geometry.size_bytes > opened.geometry.size_bytes
                {
                    opened.geometry = geometry;
                    self.effects.push(ClientEffect::Resized(geometry));
                }
            }
        }
        self.settle(now);
    }

    /// Does nothing before [`Client::deadline`].
    pub fn on_deadline(&mut self, now: Timestamp) {
        self.settle(now);
    }

    /// Takes a request; it is completed exactly once. Requests that overlap while outstanding take effect in any order.
    ///
    /// Panics unless [`Client::can_submit`]: a driver that ignores it would grow without bound.
    pub fn submit(&mut self, now: Timestamp, request: BlockRequest) {
        assert!(self.can_submit(), "the window is full");
        if self.has_ended() || self.detach_wanted {
            let error = if self.phase == Phase::Fenced { Error::Fenced } else { Error::Unavailable };
            self.effects.push(ClientEffect::Complete(Completion { id: request.id, result: Err(error) }));
            return;
        }
        if !self.has_work() {
            self.search.restart(now);
        }
        let order = self.outstanding.insert(now, request);
        if let (Some(leader), Phase::Serving) = (self.search.leader(), self.phase) {
            self.send(now, leader, order);
        }
        self.settle(now);
    }

    /// Records in the volume's log whether it carries a file system; told by [`ClientEffect::FormattedSet`].
    pub fn set_formatted(&mut self, now: Timestamp, formatted: Formatted) -> Result<(), FormattedBusy> {
        if self.phase != Phase::Serving || self.control.is_some() {
            return Err(FormattedBusy);
        }
        self.start_control(now, ControlBody::SetFormatted(formatted));
        self.settle(now);
        Ok(())
    }

    /// Gives the epoch back once everything outstanding is answered; later requests fail with `Unavailable`.
    /// A client that has ended stays as it is.
    pub fn detach(&mut self, now: Timestamp) {
        self.detach_wanted = true;
        if self.phase == Phase::Serving {
            self.phase = Phase::Detaching;
        }
        self.settle(now);
    }

    pub fn take_effects(&mut self) -> Vec<ClientEffect> {
        std::mem::take(&mut self.effects)
    }

    fn has_ended(&self) -> bool {
        match self.phase {
            Phase::Opening | Phase::Serving | Phase::Detaching => false,
            Phase::Fenced | Phase::Refused | Phase::Detached => true,
        }
    }

    /// Whether anything waits for an answer.
    fn has_work(&self) -> bool {
        !self.has_ended() && (self.phase == Phase::Opening || !self.outstanding.is_empty() || self.control.is_some())
    }

    fn is_epoch(&self, epoch: Epoch) -> bool {
        self.opened.as_ref().is_some_and(|opened| opened.epoch == epoch)
    }

    fn control_sent(&self) -> Option<ControlBody> {
        self.control.as_ref().filter(|control| control.sends > 0).map(|control| control.body)
    }

    fn on_attached(&mut self, now: Timestamp, from: NodeId, opened: Opened, formatted: Formatted) {
        let Opened { epoch, session, geometry } = opened;
        if let Mode::Resume { epoch: held } = self.mode {
            // A node that answers with another epoch is not answering this request.
            if held != epoch {
                return;
            }
        }
        self.opened = Some(opened);
        self.refusal = None;
        self.phase = if self.detach_wanted { Phase::Detaching } else { Phase::Serving };
        self.effects.push(ClientEffect::Attached { epoch, session, geometry, formatted });
        self.search.restart(now);
        if self.search.is_connected(from) {
            self.search.on_attached(from);
        }
        self.send_everything(now);
    }

    fn on_refused(&mut self, from: NodeId, reason: Refusal) {
        self.refusal = Some(reason.clone());
        match (&reason, self.phase) {
            (Refusal::UnknownVolume, phase) => {
                // One node may only have lost its replica; the others decide.
                self.unknown_at.insert(from);
                self.search.on_unknown(from);
                if phase == Phase::Opening && self.search.replicas().iter().all(|node| self.unknown_at.contains(node)) {
                    self.end(Phase::Refused, Error::Unavailable, ClientEffect::Refused(reason));
                }
            }
            (Refusal::Stale { epoch }, Phase::Opening) => {
                if self.mode == (Mode::Resume { epoch: *epoch }) {
                    self.end(Phase::Refused, Error::Fenced, ClientEffect::Refused(reason));
                }
            }
            (Refusal::Held { .. } | Refusal::NotAllowed { .. }, Phase::Opening) => {
                self.end(Phase::Refused, Error::Unavailable, ClientEffect::Refused(reason));
            }
            (Refusal::Stale { epoch }, _) => {
                if self.is_epoch(*epoch) {
                    self.on_fenced();
                }
            }
            // An answer to a copy of the opening request that came late; or a right that was withdrawn, which the
            // status shows and giving it back heals.
            (Refusal::Held { .. } | Refusal::NotAllowed { .. }, _) => {}
        }
    }

    fn on_answer(&mut self, now: Timestamp, from: NodeId, sequence: u64, seen: Position, result: Result<Bytes, Error>) {
        let Some(changed) = self.search.on_answer(from, seen.term) else { return };
        if changed {
            self.send_everything(now);
        }
        self.seen = self.seen.max(seen);
        if self.search.leader() == Some(from) {
            self.search.restart(now);
        }
        let pending = self.outstanding.remove(sequence);
        if result == Err(Error::Fenced) && (pending.is_some() || self.outstanding.was_issued(sequence)) {
            if let Some(pending) = pending {
                self.complete(pending.request, Err(Error::Fenced));
            }
            self.on_fenced();
            return;
        }
        if let Some(pending) = pending {
            self.complete(pending.request, result);
        }
    }

    /// Our epoch or session is over. Where a sent `Detach` had no answer yet, that is what was asked for.
    fn on_fenced(&mut self) {
        if self.control_sent() == Some(ControlBody::Detach) {
            self.end(Phase::Detached, Error::Unavailable, ClientEffect::Detached);
        } else {
            self.end(Phase::Fenced, Error::Fenced, ClientEffect::Fenced);
        }
    }

    fn end(&mut self, phase: Phase, error: Error, effect: ClientEffect) {
        // A holder whose epoch is over must look fenced to its users, also when it learns that at its start.
        self.phase = if phase == Phase::Refused && error == Error::Fenced { Phase::Fenced } else { phase };
        for pending in self.outstanding.drain() {
            let completion = Completion { id: pending.request.id, result: Err(error) };
            self.effects.push(ClientEffect::Complete(completion));
        }
        self.control = None;
        self.overdue_from = None;
        self.effects.push(effect);
    }

    fn complete(&mut self, request: BlockRequest, result: Result<Bytes, Error>) {
        let length_expected = match request.operation {
            Operation::Read { length, .. } => length as usize,
            _ => 0,
        };
        let result = match result {
            // An answer of another length can only be another request's bytes.
            Ok(data) if data.len() != length_expected => Err(Error::Corrupt),
            result => result,
        };
        self.effects.push(ClientEffect::Complete(Completion { id: request.id, result }));
    }

    /// Restores what every event may have disturbed: limits, the next control request, resends, the search.
    fn settle(&mut self, now: Timestamp) {
        self.give_up_overdue(now);
        if self.phase == Phase::Detaching && self.outstanding.is_empty() && self.control.is_none() {
            self.start_control(now, ControlBody::Detach);
        }
        if !self.has_work() {
            self.overdue_from = None;
            return;
        }
        if self.overdue_from.is_some_and(|from| from <= now) {
            self.resend_overdue(now);
        }
        if self.search.round_due(self.quiet).is_some_and(|due| due <= now) {
            self.search.on_round(now);
            for node in self.search.connected().collect::<Vec<_>>() {
                self.ask(node);
            }
        }
    }

    fn give_up_overdue(&mut self, now: Timestamp) {
        let Some(limit) = self.unavailable_after else { return };
        // `oldest` rises past what is given up: a copy that lands after any later mutation of ours has no effect.
        while self.outstanding.waiting_since().is_some_and(|since| since + limit <= now) {
            let pending = self.outstanding.remove_first().expect("something waits");
            self.complete(pending.request, Err(Error::Unavailable));
        }
    }

    fn resend_overdue(&mut self, now: Timestamp) {
        self.overdue_from = None;
        let Some(leader) = self.search.leader() else { return };
        let (resend, mut next) = (self.resend, None::<Timestamp>);
        let mut due_now = Vec::new();
        for (order, pending) in self.outstanding.iter() {
            if let Some(sent) = pending.sent {
                let due = sent + resend_wait(resend, pending.sends);
                if due <= now {
                    due_now.push(order);
                } else {
                    next = Some(next.map_or(due, |next| next.min(due)));
                }
            }
        }
        if let Some(Control { sent: Some(sent), sends, .. }) = self.control {
            let due = sent + resend_wait(resend, sends);
            if due <= now {
                self.send_control(now, leader);
            } else {
                next = Some(next.map_or(due, |next| next.min(due)));
            }
        }
        self.overdue_from = match (self.overdue_from, next) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        for order in due_now {
            self.send(now, leader, order);
        }
    }

    fn start_control(&mut self, now: Timestamp, body: ControlBody) {
        if !self.has_work() {
            self.search.restart(now);
        }
        self.control = Some(Control { body, sent: None, sends: 0 });
        if let Some(leader) = self.search.leader() {
            self.send_control(now, leader);
        }
    }

    /// A new leader, or none: everything without an answer counts as unsent, and goes out in order.
    fn send_everything(&mut self, now: Timestamp) {
        self.outstanding.mark_unsent();
        self.overdue_from = None;
        if let Some(control) = &mut self.control {
            control.sent = None;
        }
        let Some(leader) = self.search.leader() else { return };
        if self.phase == Phase::Opening {
            self.ask(leader);
            return;
        }
        for order in self.outstanding.iter().map(|(order, _)| order).collect::<Vec<_>>() {
            self.send(now, leader, order);
        }
        if self.control.is_some() {
            self.send_control(now, leader);
        }
    }

    fn send(&mut self, now: Timestamp, to: NodeId, order: u64) {
        let oldest = self.outstanding.oldest();
        let Some(pending) = self.outstanding.get_mut(order) else { return };
        pending.sent = Some(now);
        pending.sends += 1;
        let overdue = now + resend_wait(self.resend, pending.sends);
        let (sequence, operation) = (pending.sequence, pending.request.operation.clone());
        self.overdue_from = Some(self.overdue_from.map_or(overdue, |from| from.min(overdue)));
        self.send_io(to, sequence, oldest, operation);
    }

    fn send_control(&mut self, now: Timestamp, to: NodeId) {
        let opened = self.opened.as_ref().expect("control requests start in an open session");
        let control = self.control.as_mut().expect("called only while one waits");
        control.sent = Some(now);
        control.sends += 1;
        let overdue = now + resend_wait(self.resend, control.sends);
        self.overdue_from = Some(self.overdue_from.map_or(overdue, |from| from.min(overdue)));
        let (volume, epoch) = (self.volume, opened.epoch);
        let request = match control.body {
            ControlBody::SetFormatted(formatted) => Request::SetFormatted { volume, epoch, formatted },
            ControlBody::Detach => Request::Detach { volume, epoch },
        };
        self.effects.push(ClientEffect::Send { to, request });
    }

    /// Asks a node whether it leads: by the opening request, or by a flush, which only its leader answers.
    fn ask(&mut self, to: NodeId) {
        if self.opened.is_some() {
            let (sequence, oldest) = (self.outstanding.unrecorded(), self.outstanding.oldest());
            self.send_io(to, sequence, oldest, Operation::Flush);
            return;
        }
        let (volume, instance) = (self.volume, self.instance);
        let request = match self.mode {
            Mode::Attach { take_over } => Request::Attach { volume, holder: self.holder.clone(), instance, take_over },
            Mode::Resume { epoch } => Request::OpenSession { volume, epoch, instance },
        };
        self.effects.push(ClientEffect::Send { to, request });
    }

    fn send_io(&mut self, to: NodeId, sequence: u64, oldest: u64, operation: Operation) {
        debug_assert!(sequence >= UNRECORDED || sequence < oldest + SESSION_WINDOW);
        let opened = self.opened.as_ref().expect("I/O starts in an open session");
        let stamp = Stamp { epoch: opened.epoch, session: opened.session, sequence, oldest };
        let request = Request::Io { volume: self.volume, stamp, seen: self.seen, operation };
        self.effects.push(ClientEffect::Send { to, request });
    }
}

fn resend_wait(resend: Duration, sends: u32) -> Duration {
    resend.saturating_mul(1 << sends.saturating_sub(1).min(RESEND_DOUBLINGS))
}
