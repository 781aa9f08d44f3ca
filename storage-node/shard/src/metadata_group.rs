//! [`MetadataGroup`]: this node's replica of the catalogue and, while it leads, the carrying out of its plans.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_consensus::{LogIndex, Options as RaftOptions, Position, Refusal, Term, Timestamp};
use holdfast_id::{GroupId, NodeId};
use holdfast_metadata::command::{Command, CreateVolume};
use holdfast_metadata::intent::{Action, Control, Intent, IntentReply};
use holdfast_metadata::{Catalogue, Outcome, executor, planner, upkeep};
use holdfast_replica::replica::RestoreError;
use holdfast_replica::{LogCommand, Output, Replica};
use holdfast_store::group::RecoveredGroup;

use crate::admin::{AdminError, AdminReply, AdminRequest, NewVolume};
use crate::core::{Core, NodeAddress};
use crate::machine::CatalogueMachine;

/// Until an intent that brought no answer is sent again.
const INTENT_AGAIN_AFTER: Duration = Duration::from_secs(1);

enum Proposal {
    Admin(u64),
    /// Records what a node answered; nobody waits.
    Answer,
    /// What is due by itself; the next is looked for when this one is done.
    Upkeep,
}

/// What waits for the right to read.
enum Read {
    Admin(u64),
    Create {
        token: u64,
        new: NewVolume,
    },
    /// Only a leader that holds its lease tells nodes what to do.
    Intents,
}

pub(crate) struct MetadataGroup {
    pub(crate) replica: Replica<CatalogueMachine>,
    serving: bool,
    proposals: BTreeMap<LogIndex, (Term, Proposal)>,
    reads: BTreeMap<u64, Read>,
    /// When each due intent was last sent: by node and the group or replica it is about.
    sent: BTreeMap<(NodeId, Vec<u8>), Timestamp>,
    /// Something may be due that was not looked at.
    look: bool,
    looking: bool,
    retry_at: Option<Timestamp>,
    keeping_up: bool,
    stopped: Option<String>,
    /// Node addresses as last passed on to the rim.
    addresses: Vec<NodeAddress>,
}

impl MetadataGroup {
    pub(crate) fn restore(
        recovered: RecoveredGroup,
        catalogue: Catalogue,
        options: RaftOptions,
        now: Timestamp,
    ) -> Result<MetadataGroup, RestoreError> {
        let replica = Replica::restore(recovered, CatalogueMachine { catalogue: Arc::new(catalogue) }, options, now)?;
        Ok(MetadataGroup {
            replica,
            serving: false,
            proposals: BTreeMap::new(),
            reads: BTreeMap::new(),
            sent: BTreeMap::new(),
            look: true,
            looking: false,
            retry_at: None,
            keeping_up: false,
            stopped: None,
            addresses: Vec::new(),
        })
    }

    pub(crate) fn group(&self) -> GroupId {
        self.replica.group()
    }

    pub(crate) fn catalogue(&self) -> &Catalogue {
        &self.replica.machine().catalogue
    }

    pub(crate) fn serving(&self) -> bool {
        self.serving
    }

    pub(crate) fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    pub(crate) fn retry_at(&self) -> Option<Timestamp> {
        self.retry_at
    }

    /// A node is there again: what it has to be told need not wait.
    pub(crate) fn on_peer_connected(&mut self, node: NodeId) {
        self.sent.retain(|(to, _), _| *to != node);
        self.look = true;
    }

    pub(crate) fn on_retry(&mut self) {
        self.retry_at = None;
        self.look = true;
    }

    pub(crate) fn on_admin(&mut self, core: &mut Core, token: u64, request: AdminRequest) {
        if !self.serving {
            return self.refuse(core, token);
        }
        match request {
            AdminRequest::Change(command) => self.propose(core, &command, Proposal::Admin(token)),
            AdminRequest::CreateVolume(new) => self.read(core, Read::Create { token, new }),
            AdminRequest::Catalogue => self.read(core, Read::Admin(token)),
            AdminRequest::Found { .. } | AdminRequest::Report | AdminRequest::Volumes { .. } | AdminRequest::Usage => {
                unreachable!("answered by the shard itself")
            }
            AdminRequest::Attach(_)
            | AdminRequest::Detach { .. }
            | AdminRequest::TakeSnapshot { .. }
            | AdminRequest::DeleteSnapshot { .. } => unreachable!("answered by the volume's replica"),
        }
    }

    /// This replica is not wanted any more and its data goes.
    pub(crate) fn on_deleted(&mut self, core: &mut Core) {
        self.stop_serving(core);
    }

    /// A node has answered an intent.
    pub(crate) fn on_reply(&mut self, core: &mut Core, from: NodeId, reply: &IntentReply) {
        self.sent.remove(&key(from, &reply.action));
        if !self.serving {
            return;
        }
        if let Some(command) = executor::on_reply(self.catalogue(), from, reply) {
            self.propose(core, &command, Proposal::Answer);
        }
    }

    fn propose(&mut self, core: &mut Core, command: &Command, proposal: Proposal) {
        let command = LogCommand { header: Bytes::from(command.encode()), payload: Bytes::new() };
        match (self.replica.propose(&mut core.context(), command), proposal) {
            (Ok(position), proposal) => {
                self.proposals.insert(position.index, (position.term, proposal));
            }
            (Err(Refusal::NoLease | Refusal::Busy), Proposal::Admin(token)) => {
                core.effects.admin.push((token, AdminReply::Failed(AdminError::NotLeader { leader: None })));
            }
            (Err(_), Proposal::Admin(token)) => self.refuse(core, token),
            // The node is asked again, and answers again.
            (Err(_), Proposal::Answer) => {}
            // Looked for again when the intents are.
            (Err(_), Proposal::Upkeep) => {
                self.keeping_up = false;
                self.note_retry(core.now + INTENT_AGAIN_AFTER);
            }
        }
    }

    fn read(&mut self, core: &mut Core, read: Read) {
        let token = core.next_token();
        self.reads.insert(token, read);
        if self.replica.read(&mut core.context(), token).is_err() {
            self.on_read_failed(core, token);
        }
    }

    fn on_read_failed(&mut self, core: &mut Core, token: u64) {
        match self.reads.remove(&token) {
            Some(Read::Admin(token) | Read::Create { token, .. }) => self.refuse(core, token),
            Some(Read::Intents) => {
                self.looking = false;
                self.retry_at = Some(core.now + INTENT_AGAIN_AFTER);
            }
            None => {}
        }
    }

    fn on_read_ready(&mut self, core: &mut Core, token: u64) {
        match self.reads.remove(&token) {
            Some(Read::Admin(token)) => {
                let catalogue = Arc::clone(&self.replica.machine().catalogue);
                core.effects.admin.push((token, AdminReply::Catalogue(catalogue)));
            }
            Some(Read::Create { token, new }) => self.create(core, token, new),
            Some(Read::Intents) => {
                self.looking = false;
                self.send_due(core);
                self.keep_up(core);
            }
            None => {}
        }
    }

    fn create(&mut self, core: &mut Core, token: u64, new: NewVolume) {
        let catalogue = self.catalogue();
        if let Some((volume, existing)) = catalogue.volume_named(new.name.as_str()) {
            let same = existing.spec == new.spec;
            core.effects.admin.push((token, AdminReply::Exists { volume, same }));
            return;
        }
        match planner::plan_volume(catalogue, &new.spec, &new.preferred, &new.replicas) {
            Ok(members) => {
                let planned_at = catalogue.revision();
                let NewVolume { volume, name, spec, labels, .. } = new;
                let command = CreateVolume { volume, name, spec, labels, members, planned_at };
                self.propose(core, &Command::CreateVolume(command), Proposal::Admin(token));
            }
            Err(error) => core.effects.admin.push((token, AdminReply::NotPlaced(error))),
        }
    }

    /// Carries out what this step's events asked of the replica, until it asks for nothing more.
    pub(crate) fn settle(&mut self, core: &mut Core) {
        loop {
            if self.serving && self.look && !self.looking {
                self.look = false;
                self.looking = true;
                self.read(core, Read::Intents);
            }
            let mut outputs = Vec::new();
            self.replica.settle(&mut core.context(), &mut outputs);
            if outputs.is_empty() {
                return self.pass_on_addresses(core);
            }
            for output in outputs {
                self.on_output(core, output);
            }
        }
    }

    fn on_output(&mut self, core: &mut Core, output: Output<Outcome>) {
        match output {
            Output::Send { to, message } => {
                if let Some(node) = self.replica.node_of(to) {
                    core.send_raft(node, self.group(), self.replica.id(), to, &message);
                }
            }
            Output::Applied { position, outcome } => self.on_applied(core, position, outcome),
            Output::BecameLeader(_) => {
                core.elected_in_joint_change += u64::from(self.replica.configuration().is_joint());
            }
            Output::DirectoryChanged => core.members_changed = true,
            Output::SendRebuild { to, message } => {
                if let Some(node) = self.replica.node_of(to) {
                    core.send_rebuild(node, self.group(), self.replica.id(), to, &message);
                }
            }
            Output::Fetch { request, fetch } => core.fetch(self.group(), request, fetch),
            Output::Serving(_) => {
                self.serving = true;
                self.look = true;
                self.sent.clear();
            }
            Output::LostLeadership(_) => self.stop_serving(core),
            Output::ReadReady { token } => self.on_read_ready(core, token),
            Output::ReadFailed { token } => self.on_read_failed(core, token),
            Output::Stopped { reason } => {
                self.stopped = Some(reason);
                self.stop_serving(core);
            }
        }
    }

    fn on_applied(&mut self, core: &mut Core, position: Position, outcome: Outcome) {
        self.look = true;
        match self.proposals.remove(&position.index) {
            Some((_, Proposal::Upkeep)) => self.keeping_up = false,
            Some((term, Proposal::Admin(token))) if term == position.term => {
                core.effects.admin.push((token, AdminReply::Changed(outcome)));
            }
            _ => {}
        }
    }

    fn stop_serving(&mut self, core: &mut Core) {
        self.serving = false;
        self.looking = false;
        self.keeping_up = false;
        self.retry_at = None;
        for (_, proposal) in std::mem::take(&mut self.proposals).into_values() {
            if let Proposal::Admin(token) = proposal {
                self.refuse(core, token);
            }
        }
        let reads: BTreeSet<u64> = self.reads.keys().copied().collect();
        for token in reads {
            self.on_read_failed(core, token);
        }
        self.retry_at = None;
    }

    fn refuse(&self, core: &mut Core, token: u64) {
        let leader = self.replica.leader().filter(|leader| *leader != self.replica.id());
        let leader = leader.and_then(|leader| self.replica.node_of(leader));
        core.effects.admin.push((token, AdminReply::Failed(AdminError::NotLeader { leader })));
    }

    fn send_due(&mut self, core: &mut Core) {
        let due = executor::due(self.catalogue());
        let keys: BTreeSet<(NodeId, Vec<u8>)> = due.iter().map(|intent| key(intent.node, &intent.action)).collect();
        self.sent.retain(|key, _| keys.contains(key));
        self.retry_at = None;
        for intent in due {
            let key = key(intent.node, &intent.action);
            let sent = self.sent.get(&key).copied();
            let again_at = sent.map_or(core.now, |sent| sent + INTENT_AGAIN_AFTER);
            if again_at <= core.now {
                self.sent.insert(key, core.now);
                self.send(core, intent);
                self.note_retry(core.now + INTENT_AGAIN_AFTER);
            } else {
                self.note_retry(again_at);
            }
        }
    }

    /// Moves what is to be moved; one command after the other.
    fn keep_up(&mut self, core: &mut Core) {
        if self.keeping_up || !self.serving {
            return;
        }
        if let Some(command) = upkeep::next(self.catalogue(), core.next_replica()) {
            self.keeping_up = true;
            self.propose(core, &command, Proposal::Upkeep);
        }
    }

    fn note_retry(&mut self, at: Timestamp) {
        self.retry_at = Some(self.retry_at.map_or(at, |earlier| earlier.min(at)));
    }

    fn send(&self, core: &mut Core, intent: Intent) {
        if intent.node == core.node {
            core.own_intents.push(intent);
        } else {
            let node = intent.node;
            core.send_control(node, Bytes::from(Control::Intent(intent).encode()));
        }
    }

    fn pass_on_addresses(&mut self, core: &mut Core) {
        let known: Vec<NodeAddress> = self
            .catalogue()
            .peers()
            .into_iter()
            .map(|(node, peer)| NodeAddress {
                node,
                peer: peer.peer_address.to_owned(),
                api: peer.api_address.to_owned(),
            })
            .collect();
        if known != self.addresses {
            core.effects.addresses.clone_from(&known);
            self.addresses = known;
        }
    }
}

/// What an intent is about: two intents with one key to one node are the same order, perhaps from two revisions.
fn key(node: NodeId, action: &Action) -> (NodeId, Vec<u8>) {
    let (tag, group, replica) = match action {
        Action::CreateReplica(create) => (0, create.group, Some(create.replica)),
        Action::DeleteReplica(delete) => (1, delete.group, Some(delete.replica)),
        Action::ResizeGroup(resize) => (2, resize.group, None),
        Action::CreateMetadataReplica(create) => (3, create.group, Some(create.replica)),
        Action::ChangeMembers(change) => (4, change.group, None),
    };
    let mut bytes = vec![tag];
    bytes.extend(group.to_bytes());
    bytes.extend(replica.map_or([0; 16], |replica| replica.to_bytes()));
    (node, bytes)
}
