//! What the leader knows of one peer, and what it may send to it.
//!
//! Probe: where the logs meet is unknown; one empty append at a time. Replicate: entries are sent ahead of the
//! answers, up to a window of bytes. NeedsDelta: the entries it needs were compacted; probed slowly until it is back.
//!
//! Invariant: `flushed <= submitted < next`. Only `flushed` counts for commit.

use std::collections::VecDeque;
use std::time::Duration;

use crate::entry::LogIndex;
use crate::liveness::SupportEpoch;
use crate::time::Timestamp;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgressState {
    Probe,
    Replicate,
    NeedsDelta,
}

#[derive(Debug)]
pub(crate) struct Progress {
    pub(crate) state: ProgressState,
    /// The first index not sent yet.
    pub(crate) next: LogIndex,
    pub(crate) submitted: LogIndex,
    pub(crate) flushed: LogIndex,
    /// The peer's support epoch for this node as of its newest reply in this term.
    pub(crate) epoch: Option<SupportEpoch>,
    /// The round that the next append to this peer carries.
    pub(crate) round_due: u64,
    pub(crate) round_sent: u64,
    pub(crate) round_acknowledged: u64,
    /// The commit index that the newest append told.
    pub(crate) commit_sent: LogIndex,
    /// Sent and not yet submitted there: the last index of each append and its bytes.
    in_flight: VecDeque<(LogIndex, usize)>,
    in_flight_bytes: usize,
    /// False from a suspicion until the peer is connected or heard: nothing is sent, nothing wakes the leader for it.
    pub(crate) reachable: bool,
    /// When to try again where an answer is due.
    pub(crate) resend_at: Option<Timestamp>,
    retries: u32,
    /// It declined what was sent last, for want of room for data.
    pub(crate) full: bool,
    /// Proposals are paced for it until it was sent everything.
    pub(crate) lags: bool,
    /// `NeedsDelta` was raised and the peer has not caught up since.
    pub(crate) delta_raised: bool,
    /// The furthest that its log was heard to reach, or known to, while it lagged behind the base.
    delta_hint: LogIndex,
}

impl Progress {
    pub(crate) fn new(next: LogIndex) -> Progress {
        Progress {
            state: ProgressState::Probe,
            next,
            submitted: LogIndex(0),
            flushed: LogIndex(0),
            full: false,
            lags: false,
            epoch: None,
            round_due: 0,
            round_sent: 0,
            round_acknowledged: 0,
            commit_sent: LogIndex(0),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            reachable: true,
            resend_at: None,
            retries: 0,
            delta_raised: false,
            delta_hint: LogIndex(0),
        }
    }

    pub(crate) fn window_open(&self, inflight_bytes_max: usize) -> bool {
        self.in_flight_bytes < inflight_bytes_max
    }

    /// Whether an answer is due that was not heard.
    pub(crate) fn awaits(&self) -> bool {
        self.round_acknowledged < self.round_sent
            || (self.state == ProgressState::Replicate && LogIndex(self.next.0 - 1) > self.flushed)
    }

    pub(crate) fn on_sent(&mut self, last: LogIndex, bytes: usize) {
        self.next = last.next();
        self.in_flight.push_back((last, bytes));
        self.in_flight_bytes += bytes;
    }

    pub(crate) fn on_submitted(&mut self, submitted: LogIndex, flushed: LogIndex) {
        let found = self.state != ProgressState::Replicate && submitted.next() >= self.next;
        if submitted > self.submitted || flushed > self.flushed || found {
            self.on_heard();
            self.resend_at = None;
        }
        self.submitted = self.submitted.max(submitted);
        self.flushed = self.flushed.max(flushed);
        self.next = self.next.max(self.submitted.next());
        while self.in_flight.front().is_some_and(|(last, _)| *last <= self.submitted) {
            let (_, bytes) = self.in_flight.pop_front().expect("looked at");
            self.in_flight_bytes -= bytes;
        }
        if found {
            self.state = ProgressState::Replicate;
            self.delta_raised = false;
            self.delta_hint = LogIndex(0);
        }
    }

    /// The logs meet at `meeting` or below. Asked again at once while the search goes down, else only once before a
    /// wait, so that no answer can keep two replicas busy.
    pub(crate) fn on_mismatch(&mut self, meeting: LogIndex, now: Timestamp, first: Duration, most: Duration) {
        let down = meeting.next() < self.next;
        if self.state == ProgressState::NeedsDelta {
            self.on_heard();
        }
        self.probe(meeting.next());
        if !down {
            if self.retries > 0 {
                self.resend_at = Some(now + self.wait(first, most));
            }
            self.retries = self.retries.saturating_add(1);
        }
    }

    pub(crate) fn lags_behind_base(&mut self, base: LogIndex) {
        let waiting = self.resend_at.filter(|_| self.state == ProgressState::NeedsDelta);
        self.probe(base.next());
        self.resend_at = waiting;
        self.state = ProgressState::NeedsDelta;
    }

    /// The peer's log ends at `hint`, below the base. If that is further than before, the delta that came was not
    /// enough: the base has moved meanwhile.
    pub(crate) fn on_hint_below_base(&mut self, hint: LogIndex, base: LogIndex) {
        self.lags_behind_base(base);
        if hint > self.delta_hint.max(self.submitted) {
            self.delta_raised = false;
        }
        self.delta_hint = self.delta_hint.max(hint);
    }

    /// The answer did not come in time.
    pub(crate) fn on_silence(&mut self) {
        self.retries = self.retries.saturating_add(1);
        self.resend_at = None;
        if self.state == ProgressState::Replicate {
            self.probe(self.submitted.next());
        }
    }

    /// The peer cannot take more for now.
    pub(crate) fn retry_later(&mut self, now: Timestamp, first: Duration, most: Duration) {
        self.resend_at = Some(now + self.wait(first, most));
        self.retries = self.retries.saturating_add(1);
    }

    /// Brings `resend_at` in line with whether an answer is due, after something was sent or heard.
    pub(crate) fn rearm(&mut self, sent: bool, now: Timestamp, first: Duration, most: Duration) {
        let due = match self.state {
            ProgressState::Replicate if self.awaits() => Some(now + self.wait(first, most)),
            ProgressState::Replicate => {
                self.resend_at = None;
                None
            }
            ProgressState::Probe => sent.then(|| now + self.wait(first, most)),
            ProgressState::NeedsDelta => sent.then(|| now + most),
        };
        self.resend_at = self.resend_at.or(due);
    }

    /// The next retry is due soon again.
    pub(crate) fn on_heard(&mut self) {
        self.retries = 0;
    }

    /// Back to asking where the logs meet, at `next` at the latest.
    pub(crate) fn probe(&mut self, next: LogIndex) {
        self.state = ProgressState::Probe;
        self.lags = false;
        self.next = next.max(self.flushed.next());
        self.submitted = self.submitted.min(LogIndex(self.next.0 - 1));
        self.in_flight.clear();
        self.in_flight_bytes = 0;
        self.resend_at = None;
    }

    /// The peer lost what was not durable, or more: it started again.
    pub(crate) fn restart(&mut self) {
        self.flushed = LogIndex(0);
        self.submitted = LogIndex(0);
        self.probe(self.next);
    }

    /// Until the next try: doubling from `first` to `most`.
    pub(crate) fn wait(&self, first: Duration, most: Duration) -> Duration {
        first.saturating_mul(1 << self.retries.min(16)).min(most)
    }
}
