//! Two models, checked exhaustively within small bounds: what counts as flushed, and why a lease excludes another leader.
//!
//! They are not the code but its argument: each rule that the code follows can be left out, and the checker must then
//! find a trace that breaks safety. A rule whose absence breaks nothing would be a rule without a reason.

use stateright::{Checker, Model, Property};

/// Replica 0 leads term 1 and holds one entry; 1 and 2 stand for term 2. Any two of the three decide.
mod flushed {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Omitted {
        Nothing,
        /// An entry counts for commit when it is submitted.
        EntryFlush,
        /// A vote is told before it is flushed.
        VoteFlush,
    }

    pub struct Voting {
        pub omitted: Omitted,
    }

    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Replica {
        has_entry: bool,
        entry_flushed: bool,
        vote: Option<usize>,
        vote_flushed: bool,
        crashed: bool,
    }

    #[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
    pub struct State {
        replicas: [Replica; 3],
        acknowledged: [bool; 3],
        committed: bool,
        /// Votes told to each candidate of term 2.
        votes: [[bool; 3]; 3],
        /// Whether each leader of term 2 had the entry when it was elected.
        elected: [Option<bool>; 3],
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum Action {
        Append(usize),
        FlushEntry(usize),
        Acknowledge(usize),
        Commit,
        Vote(usize, usize),
        FlushVote(usize),
        TellVote(usize),
        Win(usize),
        /// Once for each replica.
        Crash(usize),
    }

    impl Model for Voting {
        type State = State;
        type Action = Action;

        fn init_states(&self) -> Vec<State> {
            let mut state = State::default();
            state.replicas[0].has_entry = true;
            vec![state]
        }

        fn actions(&self, _: &State, actions: &mut Vec<Action>) {
            for n in 0..3 {
                actions.extend([
                    Action::Append(n),
                    Action::FlushEntry(n),
                    Action::Acknowledge(n),
                    Action::FlushVote(n),
                    Action::TellVote(n),
                    Action::Crash(n),
                ]);
                actions.extend([1, 2].map(|candidate| Action::Vote(n, candidate)));
            }
            actions.extend([Action::Commit, Action::Win(1), Action::Win(2)]);
        }

        fn next_state(&self, last: &State, action: Action) -> Option<State> {
            let mut state = last.clone();
            let replicas = &mut state.replicas;
            match action {
                // In term 1 only: a replica that voted in term 2 knows that this leader is one of the past.
                Action::Append(n) if replicas[n].vote.is_none() && replicas[0].has_entry => {
                    replicas[n].has_entry = true
                }
                Action::FlushEntry(n) if replicas[n].has_entry => replicas[n].entry_flushed = true,
                Action::Acknowledge(n) if replicas[n].vote.is_none() && replicas[n].has_entry => {
                    state.acknowledged[n] = replicas[n].entry_flushed || self.omitted == Omitted::EntryFlush;
                }
                Action::Commit if replicas[0].vote.is_none() && majority(state.acknowledged) => state.committed = true,
                Action::Vote(n, candidate) => {
                    let up_to_date = replicas[candidate].has_entry >= replicas[n].has_entry;
                    let stands = n == candidate || replicas[candidate].vote == Some(candidate);
                    if replicas[n].vote.is_some() || !up_to_date || !stands {
                        return None;
                    }
                    replicas[n].vote = Some(candidate);
                }
                Action::FlushVote(n) if replicas[n].vote.is_some() => replicas[n].vote_flushed = true,
                Action::TellVote(n) => {
                    let candidate = replicas[n].vote?;
                    if !replicas[n].vote_flushed && self.omitted != Omitted::VoteFlush {
                        return None;
                    }
                    state.votes[candidate][n] = true;
                }
                // A candidacy does not outlive a crash.
                Action::Win(candidate) if majority(state.votes[candidate]) && !replicas[candidate].crashed => {
                    let had = *state.elected[candidate].get_or_insert(replicas[candidate].has_entry);
                    state.elected[candidate] = Some(had);
                }
                Action::Crash(n) if !replicas[n].crashed => {
                    let before = replicas[n];
                    replicas[n] = Replica {
                        has_entry: before.entry_flushed,
                        vote: before.vote.filter(|_| before.vote_flushed),
                        crashed: true,
                        ..before
                    };
                }
                _ => return None,
            }
            (state != *last).then_some(state)
        }

        fn properties(&self) -> Vec<Property<Self>> {
            vec![
                Property::always("election safety", |_, state: &State| {
                    state.elected.iter().filter(|elected| elected.is_some()).count() <= 1
                }),
                Property::always("leader completeness", |_, state: &State| {
                    !state.committed || !state.elected.contains(&Some(false))
                }),
                Property::sometimes("commits", |_, state: &State| state.committed),
                Property::sometimes("elects", |_, state: &State| state.elected.iter().any(Option::is_some)),
            ]
        }
    }

    fn majority(said: [bool; 3]) -> bool {
        said.iter().filter(|yes| **yes).count() >= 2
    }
}

/// Node 0 leads term 1; its lease needs one of nodes 1 and 2, which may elect one of themselves together.
mod lease {
    use super::*;

    /// Ticks of a lease, and of the whole story: long enough for a lease, a restart and another lease.
    const LEASE: u8 = 2;
    const END: u8 = 5;
    /// Withdrawals and restarts of each node.
    const TIMES_MAX: u8 = 1;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Omitted {
        Nothing,
        /// A node that started again votes at once.
        BootWait,
        /// Support goes on in the same epoch when a replica stops following.
        Withdrawal,
        /// A leader counts support of any epoch.
        EpochMatch,
        /// A replica that doubts its leader still tells it its epoch.
        SilenceInDoubt,
        /// A vote is given while a promise lasts.
        Guard,
        /// The leader counts from when the answer came.
        SendTime,
    }

    pub struct Leasing {
        pub omitted: Omitted,
    }

    type Epoch = (u8, u8);

    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Supporter {
        boot: u8,
        count: u8,
        promised: u8,
        follows: bool,
        guard: u8,
        wait_until: u8,
        vote: Option<usize>,
        /// On the way.
        heartbeat: Option<u8>,
        reply: Option<(u8, Epoch)>,
        append_reply: Option<Epoch>,
        /// What the leader knows.
        supported: Option<(Epoch, u8)>,
        recorded: Option<Epoch>,
    }

    #[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
    pub struct State {
        now: u8,
        /// Of nodes 1 and 2.
        supporters: [Supporter; 2],
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum Action {
        Tick,
        Beat(usize),
        BeatArrives(usize),
        ReplyArrives(usize),
        AppendArrives(usize),
        AppendReplyArrives(usize),
        Doubt(usize),
        Vote(usize, usize),
        Restart(usize),
    }

    impl Model for Leasing {
        type State = State;
        type Action = Action;

        fn init_states(&self) -> Vec<State> {
            vec![State::default()]
        }

        fn actions(&self, _: &State, actions: &mut Vec<Action>) {
            // One supporter makes the lease and both make the election, so the other only has to be free to vote.
            let n = 0;
            actions.extend([
                Action::Tick,
                Action::Beat(n),
                Action::BeatArrives(n),
                Action::ReplyArrives(n),
                Action::AppendArrives(n),
                Action::AppendReplyArrives(n),
                Action::Doubt(n),
                Action::Restart(n),
                Action::Vote(0, 1),
                Action::Vote(1, 1),
            ]);
        }

        fn next_state(&self, last: &State, action: Action) -> Option<State> {
            let mut state = last.clone();
            let now = state.now;
            match action {
                Action::Tick if now < END => state.now += 1,
                Action::Tick => return None,
                Action::Beat(n) if state.supporters[n].heartbeat.is_none() => state.supporters[n].heartbeat = Some(now),
                Action::BeatArrives(n) => {
                    let supporter = &mut state.supporters[n];
                    let sent = supporter.heartbeat.take()?;
                    supporter.promised = supporter.promised.max(now + LEASE);
                    supporter.reply = Some((sent, (supporter.boot, supporter.count)));
                }
                Action::ReplyArrives(n) => {
                    let (sent, epoch) = state.supporters[n].reply.take()?;
                    let from = if self.omitted == Omitted::SendTime { now } else { sent };
                    state.supporters[n].supported = Some((epoch, from + LEASE));
                }
                Action::AppendArrives(n) if state.supporters[n].vote.is_none() => {
                    let supporter = &mut state.supporters[n];
                    supporter.follows = true;
                    supporter.append_reply = Some((supporter.boot, supporter.count));
                }
                Action::AppendReplyArrives(n) => {
                    let epoch = state.supporters[n].append_reply.take()?;
                    state.supporters[n].recorded = state.supporters[n].recorded.max(Some(epoch));
                }
                Action::Doubt(n) if state.supporters[n].follows && state.supporters[n].count < TIMES_MAX => {
                    self.stop_following(&mut state.supporters[n]);
                    if self.omitted == Omitted::SilenceInDoubt {
                        let supporter = &mut state.supporters[n];
                        supporter.append_reply = Some((supporter.boot, supporter.count));
                    }
                }
                Action::Vote(n, candidate) => {
                    let supporter = &mut state.supporters[n];
                    let guarded = if supporter.follows { supporter.promised } else { supporter.guard };
                    let allowed = supporter.vote.is_none()
                        && (now >= guarded || self.omitted == Omitted::Guard)
                        && (now >= supporter.wait_until || self.omitted == Omitted::BootWait);
                    if !allowed {
                        return None;
                    }
                    self.stop_following(supporter);
                    supporter.vote = Some(candidate);
                }
                Action::Restart(n) if state.supporters[n].boot < TIMES_MAX => {
                    let supporter = &mut state.supporters[n];
                    *supporter = Supporter {
                        boot: supporter.boot + 1,
                        count: 0,
                        promised: 0,
                        follows: false,
                        guard: 0,
                        wait_until: now + LEASE,
                        ..*supporter
                    };
                }
                _ => return None,
            }
            (state != *last).then_some(state)
        }

        fn properties(&self) -> Vec<Property<Self>> {
            vec![
                Property::always("nobody is elected under a lease", |model: &Leasing, state| {
                    !(elected(state) && model.leased(state))
                }),
                Property::sometimes("a lease is held", |model: &Leasing, state| model.leased(state)),
                Property::sometimes("somebody is elected after a lease", |_, state: &State| {
                    elected(state) && state.supporters.iter().any(|supporter| supporter.supported.is_some())
                }),
            ]
        }
    }

    impl Leasing {
        fn stop_following(&self, supporter: &mut Supporter) {
            if std::mem::take(&mut supporter.follows) {
                supporter.guard = supporter.promised;
                if self.omitted != Omitted::Withdrawal {
                    supporter.count += 1;
                }
            }
        }

        fn leased(&self, state: &State) -> bool {
            state.supporters.iter().any(|supporter| {
                supporter.supported.is_some_and(|(epoch, until)| {
                    let counts = supporter.recorded == Some(epoch)
                        || (self.omitted == Omitted::EpochMatch && supporter.recorded.is_some());
                    counts && until > state.now
                })
            })
        }
    }

    fn elected(state: &State) -> bool {
        let [one, two] = &state.supporters;
        one.vote.is_some() && one.vote == two.vote
    }
}

#[test]
fn flushed_progress_and_votes_keep_the_promises_of_raft() {
    flushed::Voting { omitted: flushed::Omitted::Nothing }.checker().spawn_bfs().join().assert_properties();
}

#[test]
fn without_a_flush_before_the_acknowledgement_a_committed_entry_is_lost() {
    let checker = flushed::Voting { omitted: flushed::Omitted::EntryFlush }.checker().spawn_bfs().join();
    assert!(checker.discovery("leader completeness").is_some());
}

#[test]
fn without_a_flush_before_the_vote_two_lead_one_term() {
    let checker = flushed::Voting { omitted: flushed::Omitted::VoteFlush }.checker().spawn_bfs().join();
    assert!(checker.discovery("election safety").is_some());
}

#[test]
fn a_lease_excludes_another_leader_over_doubts_and_restarts() {
    lease::Leasing { omitted: lease::Omitted::Nothing }.checker().spawn_bfs().join().assert_properties();
}

#[test]
fn every_rule_of_the_lease_is_needed() {
    use lease::Omitted;
    for omitted in [
        Omitted::BootWait,
        Omitted::Withdrawal,
        Omitted::EpochMatch,
        Omitted::SilenceInDoubt,
        Omitted::Guard,
        Omitted::SendTime,
    ] {
        let checker = lease::Leasing { omitted }.checker().spawn_bfs().join();
        assert!(checker.discovery("nobody is elected under a lease").is_some(), "{omitted:?} could be left out");
    }
}
