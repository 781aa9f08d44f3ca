//! What an attachment asked for by the control API comes to. Pure: the state goes in, the answer or the command comes out.
//!
//! Unlike an `Attach` of the session protocol it is repeated by callers that keep nothing: whoever has the volume keeps
//! it under the same epoch, without an entry in the log. That is only true of a state at which this replica provably
//! led and on which no other attachment is under way; the group sees to both.

use holdfast_consensus::LogIndex;
use holdfast_protocol::session::Epoch;
use holdfast_protocol::session::Instance;
use holdfast_volume::{Command, Name, Outcome, Volume};

use crate::admin::{AdminError, AdminReply};

/// Asked for, and waiting for a state to look at.
pub(crate) struct Attaching {
    pub(crate) token: u64,
    pub(crate) holder: Name,
    pub(crate) instance: Instance,
    pub(crate) take_over: bool,
}

pub(crate) enum Decision {
    Answer(AdminReply),
    Propose(Command),
}

impl Attaching {
    pub(crate) fn decide(self, volume: &Volume) -> Decision {
        let epoch = volume.epoch();
        match volume.attachment() {
            Some(attachment) if attachment.holder == self.holder => {
                Decision::Answer(AdminReply::Attached { epoch, already: true })
            }
            Some(attachment) if !self.take_over => {
                let holder = attachment.holder.to_string();
                Decision::Answer(AdminReply::Failed(AdminError::Held { holder, epoch }))
            }
            _ => {
                let Attaching { holder, instance, take_over, .. } = self;
                Decision::Propose(Command::Attach { holder, instance, take_over })
            }
        }
    }
}

/// What is in the log for the control API.
pub(crate) enum Order {
    Attach,
    Detach { epoch: Epoch },
    Snapshot,
}

impl Order {
    pub(crate) fn is_attachment(&self) -> bool {
        matches!(self, Order::Attach | Order::Detach { .. })
    }

    pub(crate) fn reply(&self, outcome: &Outcome) -> AdminReply {
        match (self, outcome) {
            (Order::Attach, Outcome::Attached { epoch, .. }) => AdminReply::Attached { epoch: *epoch, already: false },
            (Order::Attach, Outcome::Held { holder, epoch }) => {
                AdminReply::Failed(AdminError::Held { holder: holder.to_string(), epoch: *epoch })
            }
            (Order::Detach { .. }, Outcome::Detached) => AdminReply::Detached,
            (Order::Detach { epoch }, Outcome::Stale { epoch: latest }) if *epoch > *latest => {
                AdminReply::Failed(AdminError::UnknownEpoch { epoch: *epoch, latest: *latest })
            }
            (Order::Detach { .. }, Outcome::Stale { .. }) => AdminReply::Detached,
            (Order::Snapshot, Outcome::SnapshotTaken { index }) => {
                AdminReply::SnapshotTaken { index: LogIndex(*index) }
            }
            (Order::Snapshot, Outcome::SnapshotDeleted) => AdminReply::SnapshotDeleted,
            (Order::Snapshot, Outcome::SnapshotConflict { snapshot, name }) => {
                AdminReply::Failed(AdminError::SnapshotConflict { snapshot: *snapshot, name: name.to_string() })
            }
            (Order::Snapshot, Outcome::TooManySnapshots) => AdminReply::Failed(AdminError::TooManySnapshots),
            // The instance is known already, which a random one is not: somebody repeats old entries.
            _ => AdminReply::Failed(AdminError::AttachmentUnderWay),
        }
    }
}
