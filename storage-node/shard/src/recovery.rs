//! Logs that were damaged when the disk was opened: who still has to follow a leader before it may vote again.
//!
//! Not here: the rule itself, which is consensus', and finding the damage, which is the store's.

use std::collections::BTreeSet;

use holdfast_consensus::Timestamp;
use holdfast_id::GroupId;

use crate::admin::LogDamageReport;
use crate::shard::Shard;

#[derive(Default)]
pub(crate) struct LogRecovery {
    /// Groups whose log this start found damaged.
    pub(crate) found: BTreeSet<GroupId>,
    /// Groups that were not whole at this start: found now, or at an earlier one and not healed since.
    groups: u64,
    /// Of them, those that are not whole yet.
    following: BTreeSet<GroupId>,
    whole_at: Option<Timestamp>,
}

impl LogRecovery {
    pub(crate) fn follow(&mut self, group: GroupId) {
        self.groups += 1;
        self.following.insert(group);
    }

    pub(crate) fn report(&self, now: Timestamp) -> LogDamageReport {
        LogDamageReport {
            found: self.found.iter().copied().collect(),
            groups: self.groups,
            following: self.following.iter().copied().collect(),
            whole_ago: self.whole_at.map(|at| now.since(at)),
        }
    }
}

impl Shard {
    /// Notes who has become whole.
    pub(crate) fn watch_recovery(&mut self) {
        if self.recovery.following.is_empty() {
            return;
        }
        let mut following = std::mem::take(&mut self.recovery.following);
        following.retain(|group| !self.is_whole(*group));
        if following.is_empty() {
            self.recovery.whole_at = Some(self.core.now);
        }
        self.recovery.following = following;
    }
}
