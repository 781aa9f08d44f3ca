//! Who leads the volume, as far as this client can tell, and when to ask again.
//!
//! A leader is *proved* by its own word: an announcement or an answer. A hint of another node is followed at once, but
//! only once per term, so that nodes which point at each other do not make the client send its data in circles.

use std::collections::BTreeSet;
use std::time::Duration;

use holdfast_consensus::{Term, Timestamp};
use holdfast_id::NodeId;

/// Shortest time between two rounds of questions. A failover must not wait for the client.
const ROUND_MIN: Duration = Duration::from_millis(2);
/// Longest one: what an outage of hours costs per volume with requests waiting.
const ROUND_MAX: Duration = Duration::from_secs(1);
/// A round waits this part of the time the search has lasted: it lengthens an outage by an eighth at most.
const ROUND_PART: u32 = 8;
/// Replicas known at most while some are only rumoured: as many as a leader may tell of.
const RUMOURED_MAX: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leader {
    pub node: NodeId,
    pub term: Term,
    proved: bool,
}

#[derive(Debug)]
pub(crate) struct Search {
    replicas: Vec<NodeId>,
    connected: BTreeSet<NodeId>,
    leader: Option<Leader>,
    /// Answers of a lower term are void. Raised by leaders' own words only, never by hints.
    floor: Term,
    /// The highest term in which a leader was followed; a hint of that term has had its chance.
    followed: Option<Term>,
    /// The newest hint to a node that was not connected.
    hint: Option<(Term, NodeId)>,
    /// When something was last achieved, or began to be wanted.
    progress: Timestamp,
    round_last: Option<Timestamp>,
    round_wait: Duration,
    random: u64,
}

impl Search {
    /// Panics if `replicas` is empty: there would be nobody to ask, ever.
    pub fn new(replicas: Vec<NodeId>, seed: u64, now: Timestamp) -> Search {
        assert!(!replicas.is_empty(), "a volume has replicas");
        Search {
            replicas,
            connected: BTreeSet::new(),
            leader: None,
            floor: Term::default(),
            followed: None,
            hint: None,
            progress: now,
            round_last: None,
            round_wait: ROUND_MIN,
            random: seed,
        }
    }

    pub fn leader(&self) -> Option<NodeId> {
        self.leader.map(|leader| leader.node)
    }

    pub fn is_replica(&self, node: NodeId) -> bool {
        self.replicas.contains(&node)
    }

    pub fn replicas(&self) -> &[NodeId] {
        &self.replicas
    }

    pub fn is_connected(&self, node: NodeId) -> bool {
        self.connected.contains(&node)
    }

    pub fn connected(&self) -> impl Iterator<Item = NodeId> {
        self.connected.iter().copied()
    }

    pub fn term(&self) -> Term {
        self.floor
    }

    /// Returns whether this made `node` the leader.
    pub fn on_connected(&mut self, node: NodeId) -> bool {
        self.connected.insert(node);
        match self.hint {
            Some((term, hinted)) if hinted == node && self.leader.is_none() && self.followed < Some(term) => {
                self.follow(node, term, false);
                true
            }
            _ => false,
        }
    }

    /// Returns whether the leader was lost by this.
    pub fn on_closed(&mut self, now: Timestamp, node: NodeId) -> bool {
        self.connected.remove(&node);
        let lost = self.leader() == Some(node);
        if lost {
            self.leader = None;
            self.restart(now);
        }
        lost
    }

    /// A leader's announcement. Returns whether the leader changed.
    pub fn on_leading(&mut self, node: NodeId, term: Term) -> bool {
        if term < self.floor || !self.connected.contains(&node) {
            return false;
        }
        self.floor = term;
        let known = self.leader.is_some_and(|leader| leader.node == node && leader.term == term);
        self.follow(node, term, true);
        !known
    }

    /// A leader's word on where the replicas are. Returns whether that is news.
    pub fn on_replicas(&mut self, term: Term, mut nodes: Vec<NodeId>) -> bool {
        nodes.sort_unstable();
        nodes.dedup();
        let mut known = self.replicas.clone();
        known.sort_unstable();
        if term < self.floor || nodes.is_empty() || nodes == known {
            return false;
        }
        self.connected.retain(|node| nodes.contains(node));
        self.leader = self.leader.filter(|leader| nodes.contains(&leader.node));
        self.replicas = nodes;
        true
    }

    /// A replica that does not lead says that there is one on this node. Whether that is news, and worth a try: where a
    /// leader is known, it says better.
    pub fn on_rumour(&mut self, node: NodeId) -> bool {
        let news = self.leader.is_none() && !self.is_replica(node) && self.replicas.len() < RUMOURED_MAX;
        if news {
            self.replicas.push(node);
        }
        news
    }

    /// A leader's answer. `None` where it is void, else whether the leader changed.
    pub fn on_answer(&mut self, node: NodeId, term: Term) -> Option<bool> {
        if term < self.floor {
            return None;
        }
        self.floor = term;
        let changes = match self.leader {
            None => true,
            Some(leader) if leader.node == node => {
                self.follow(node, term.max(leader.term), true);
                false
            }
            Some(leader) => term > leader.term,
        };
        if changes && self.connected.contains(&node) {
            self.follow(node, term, true);
            return Some(true);
        }
        Some(false)
    }

    /// Returns whether the leader changed or was lost.
    pub fn on_not_leader(&mut self, node: NodeId, term: Term, hint: Option<NodeId>) -> bool {
        let mut changed = false;
        if let Some(leader) = self.leader
            && leader.node == node
            && (term >= leader.term || !leader.proved)
        {
            self.leader = None;
            changed = true;
        }
        let Some(hinted) = hint.filter(|hinted| *hinted != node && self.is_replica(*hinted)) else {
            return changed;
        };
        if term < self.floor || self.followed >= Some(term) {
            return changed;
        }
        if let Some(leader) = self.leader.as_mut().filter(|leader| leader.node == hinted) {
            leader.term = leader.term.max(term);
            self.followed = Some(term);
            return false;
        }
        if self.connected.contains(&hinted) {
            self.follow(hinted, term, false);
            return true;
        }
        if self.hint < Some((term, hinted)) {
            self.hint = Some((term, hinted));
        }
        changed
    }

    /// Whoever opened the session leads, by all appearances; the answer named no term.
    pub fn on_attached(&mut self, node: NodeId) {
        self.leader = Some(Leader { node, term: self.floor, proved: false });
    }

    /// The node holds no replica (any more). Returns whether the leader was lost by this.
    pub fn on_unknown(&mut self, node: NodeId) -> bool {
        let lost = self.leader() == Some(node);
        if lost {
            self.leader = None;
        }
        lost
    }

    /// Something was achieved, or begins to be wanted, or the leader is gone: the search starts afresh.
    pub fn restart(&mut self, now: Timestamp) {
        self.progress = now;
        self.round_wait = ROUND_MIN;
    }

    /// When the next round of questions is due, given that work waits; `None` while there is nobody to ask.
    pub fn round_due(&self, quiet: Duration) -> Option<Timestamp> {
        if self.connected.is_empty() {
            return None;
        }
        let start = match self.leader {
            None => self.progress,
            Some(_) => self.progress + quiet,
        };
        match self.round_last {
            Some(last) => Some(start.max(last + self.round_wait)),
            None => Some(start),
        }
    }

    /// A round is asked now.
    pub fn on_round(&mut self, now: Timestamp) {
        let wait = (now.since(self.progress) / ROUND_PART).clamp(ROUND_MIN, ROUND_MAX);
        self.round_last = Some(now);
        self.round_wait = wait + wait.mul_f64(self.jitter()) / 4;
    }

    fn follow(&mut self, node: NodeId, term: Term, proved: bool) {
        self.leader = Some(Leader { node, term, proved });
        self.followed = self.followed.max(Some(term));
        self.hint = None;
    }

    /// In [0, 1); a step of splitmix64, which is plenty to spread timers.
    fn jitter(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    }
}
