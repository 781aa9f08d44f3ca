//! Heartbeats and promises between this node and each node that shares a group with it.
//!
//! Not a transport: the owner sends what is due and passes in what came. It maps replicas to nodes to answer
//! `Liveness`, passes suspicions to the groups, and where support changed lets every group led here ask anew.
//!
//! An idle node costs what its wake-ups cost, and these heartbeats are all of them. So a pair exchanges them together
//! (heartbeat, answer with a heartbeat, answer), and a node that wakes for one pair begins with its others too.
//!
//! Invariants:
//! 1. What a node promised ends, by its own clock, no earlier than the other counts: that one counts from the send
//!    time of the answered heartbeat, and less by the drift.
//! 2. An epoch is never used again once it was raised: it starts with this node's boot epoch.
//! 3. A promise never ends early; `withdraw` only makes later ones another epoch's.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use holdfast_id::NodeId;

use crate::liveness::SupportEpoch;
use crate::time::{Timestamp, without_drift};

/// Heartbeats to one node whose answer is waited for; older ones are given up.
const OUTSTANDING_MAX: usize = 8;
/// Of a pair, the node with the lower identifier begins. The other sends its heartbeat with its answer, and by itself
/// where nothing came for so many quarters of the interval, two of which are still shorter than a lease.
const ANSWERING_QUARTERS: u32 = 5;
/// An exchange that was begun less than this fraction of the interval ago is not begun again.
const JUST_BEGUN: u32 = 8;

#[derive(Clone, Debug)]
pub struct PairOptions {
    /// Whose pairs these are.
    pub node: NodeId,
    /// Between two heartbeats to one node; 100 ms.
    pub heartbeat: Duration,
    /// How long one heartbeat's promise lasts; 300 ms.
    pub lease: Duration,
    /// How far the clock of any node may run from true time, in millionths.
    pub drift_ppm: u32,
    /// This node's boot epoch: raised, durably, at every start.
    pub boot: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairEvent {
    /// The node may be gone, or started again, or its disk stalls: pass to `Raft::on_suspect`.
    Suspected(NodeId),
    /// The node answers again, or its support is of a new epoch: pass to `Raft::on_peer_connected`.
    SupportChanged(NodeId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DueHeartbeat {
    pub to: NodeId,
    pub sequence: u64,
}

#[derive(Debug)]
pub struct Pairs {
    options: PairOptions,
    pairs: BTreeMap<NodeId, Pair>,
    events: Vec<PairEvent>,
    /// Counts of withdrawn epochs go on over a node that leaves and comes back within one boot.
    retired_count: u64,
}

#[derive(Debug)]
struct Pair {
    next_heartbeat: Timestamp,
    /// When the last one went out.
    beat_at: Timestamp,
    sequence: u64,
    outstanding: VecDeque<(u64, Timestamp)>,
    /// The other's promise, newest send time first; `None` before the first.
    supported: Option<(SupportEpoch, Timestamp)>,
    /// Raised by every withdrawal.
    count: u64,
    promised: Timestamp,
    /// The boot epoch of the newest heartbeat.
    their_boot: u64,
    /// When the silence becomes a suspicion; `None` while suspected.
    suspect_at: Option<Timestamp>,
}

impl Pairs {
    pub fn new(options: PairOptions) -> Pairs {
        let longest = options.heartbeat * ANSWERING_QUARTERS / 4;
        assert!(longest * 2 < options.lease, "a lease outlives the loss of one heartbeat");
        Pairs { options, pairs: BTreeMap::new(), events: Vec::new(), retired_count: 0 }
    }

    pub fn deadline(&self) -> Option<Timestamp> {
        self.pairs.values().flat_map(|pair| [Some(pair.next_heartbeat), pair.suspect_at]).flatten().min()
    }

    /// See `Liveness`; counted by this node's clock.
    pub fn supported_by(&self, node: NodeId) -> Option<(SupportEpoch, Timestamp)> {
        self.pairs.get(&node)?.supported
    }

    /// See `Liveness`.
    pub fn promised_to(&self, node: NodeId) -> Timestamp {
        self.pairs.get(&node).map_or(Timestamp::ZERO, |pair| pair.promised)
    }

    /// See `Liveness`.
    pub fn epoch_for(&self, node: NodeId) -> SupportEpoch {
        let count = self.pairs.get(&node).map_or(self.retired_count, |pair| pair.count);
        SupportEpoch { boot: self.options.boot, count }
    }

    pub fn is_suspected(&self, node: NodeId) -> bool {
        self.pairs.get(&node).is_none_or(|pair| pair.suspect_at.is_none())
    }

    /// A heartbeat came; the epoch to answer with. `None`: the node is not watched, or it is an earlier life of it.
    pub fn on_heartbeat(
        &mut self,
        now: Timestamp,
        from: NodeId,
        boot: u64,
        disk_stalled: bool,
    ) -> Option<SupportEpoch> {
        let PairOptions { lease, heartbeat, .. } = self.options;
        let pair = self.pairs.get_mut(&from)?;
        if boot < pair.their_boot {
            return None;
        }
        let again = pair.their_boot != 0 && boot > pair.their_boot;
        pair.their_boot = boot;
        if again || disk_stalled {
            // Its leaders of before are gone, or should be: groups that followed one look for another.
            self.suspect(from);
        }
        let pair = self.pairs.get_mut(&from)?;
        if now >= pair.promised && pair.promised > Timestamp::ZERO {
            pair.count += 1;
        }
        pair.promised = pair.promised.max(now + lease);
        if pair.beat_at + heartbeat / 2 <= now {
            pair.next_heartbeat = pair.next_heartbeat.min(now);
        }
        if !disk_stalled && pair.suspect_at.replace(now + lease).is_none() {
            self.events.push(PairEvent::SupportChanged(from));
        }
        Some(self.epoch_for(from))
    }

    /// The answer to the heartbeat of that sequence.
    pub fn on_reply(&mut self, from: NodeId, sequence: u64, support: SupportEpoch) {
        let counted = without_drift(self.options.lease, self.options.drift_ppm);
        let Some(pair) = self.pairs.get_mut(&from) else { return };
        let Some(place) = pair.outstanding.iter().position(|(sent, _)| *sent == sequence) else { return };
        let (_, sent_at) = pair.outstanding[place];
        pair.outstanding.drain(..=place);
        let before = pair.supported.map(|(epoch, _)| epoch);
        if before > Some(support) {
            return;
        }
        pair.supported = Some((support, sent_at + counted));
        if before != Some(support) {
            self.events.push(PairEvent::SupportChanged(from));
        }
    }

    /// A connection to the node closed: a suspicion, no more.
    pub fn on_closed(&mut self, node: NodeId) {
        self.suspect(node);
    }

    /// Exchange heartbeats with this node: it shares a group with this one.
    pub fn watch(&mut self, now: Timestamp, node: NodeId) {
        let (count, lease) = (self.retired_count, self.options.lease);
        self.pairs.entry(node).or_insert_with(|| Pair {
            next_heartbeat: now,
            beat_at: Timestamp::ZERO,
            sequence: 0,
            outstanding: VecDeque::new(),
            supported: None,
            count,
            promised: Timestamp::ZERO,
            their_boot: 0,
            suspect_at: Some(now + lease),
        });
    }

    /// No group is shared any more. What was promised stays promised by `epoch_for` of another count later.
    pub fn forget(&mut self, node: NodeId) {
        if let Some(pair) = self.pairs.remove(&node) {
            self.retired_count = self.retired_count.max(pair.count + 1);
        }
    }

    /// See `Liveness`.
    pub fn withdraw(&mut self, node: NodeId) {
        match self.pairs.get_mut(&node) {
            Some(pair) => pair.count += 1,
            None => self.retired_count += 1,
        }
    }

    /// Heartbeats to send now, and suspicions that are due come out of `take_events`.
    pub fn on_deadline(&mut self, now: Timestamp) -> Vec<DueHeartbeat> {
        let mut due = Vec::new();
        let mut silent = Vec::new();
        let PairOptions { node: own, heartbeat, .. } = self.options;
        let awake = self.pairs.values().any(|pair| pair.next_heartbeat <= now);
        for (node, pair) in &mut self.pairs {
            if pair.suspect_at.is_some_and(|at| at <= now) {
                silent.push(*node);
            }
            let begins = own < *node;
            let with_others = awake && begins && pair.beat_at + heartbeat / JUST_BEGUN <= now;
            if pair.next_heartbeat <= now || with_others {
                pair.next_heartbeat = now + if begins { heartbeat } else { heartbeat * ANSWERING_QUARTERS / 4 };
                pair.beat_at = now;
                pair.sequence += 1;
                if pair.outstanding.len() == OUTSTANDING_MAX {
                    pair.outstanding.pop_front();
                }
                pair.outstanding.push_back((pair.sequence, now));
                due.push(DueHeartbeat { to: *node, sequence: pair.sequence });
            }
        }
        silent.into_iter().for_each(|node| self.suspect(node));
        due
    }

    pub fn take_events(&mut self) -> Vec<PairEvent> {
        std::mem::take(&mut self.events)
    }

    fn suspect(&mut self, node: NodeId) {
        if let Some(pair) = self.pairs.get_mut(&node)
            && pair.suspect_at.take().is_some()
        {
            self.events.push(PairEvent::Suspected(node));
        }
    }
}

#[cfg(test)]
mod tests;
