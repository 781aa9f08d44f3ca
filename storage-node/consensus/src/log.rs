//! The part of the log that is in memory, and which of it is durable.
//!
//! Not a store: it gathers what must be written into `Persist` steps and is told when they are durable. Driven by
//! `Raft` alone.
//!
//! Invariants: entries are contiguous from `base.index + 1`, terms never fall; `flushed <= last`; a step in flight
//! vouches only for entries that were not truncated after it was issued, so an acknowledgement for an index never
//! counts for another entry that took its place.

use std::collections::VecDeque;

use crate::effect::{Persist, PersistSequence};
use crate::entry::{Body, Command, Configuration, Entry, HardState, LogIndex, Position, Term};

/// Entries of one append: bounds what a decoder of messages believes.
pub const APPEND_ENTRIES_MAX: usize = 4096;

#[derive(Debug)]
pub(crate) struct Log<C> {
    base: Position,
    entries: VecDeque<Entry<C>>,
    /// Where each configuration was appended; rising, never empty, the first one at or below `base`.
    configurations: Vec<(LogIndex, Configuration)>,
    flushed: LogIndex,
    /// The last sequence given to a step, gathered or in flight.
    sequence: PersistSequence,
    persisted: PersistSequence,
    gathering: Option<Persist<C>>,
    /// Steps handed out: the last index each one vouches for.
    in_flight: VecDeque<(PersistSequence, LogIndex)>,
}

impl<C: Command> Log<C> {
    /// Everything given is durable already.
    pub(crate) fn new(base: Position, configuration: Configuration, entries: Vec<Entry<C>>) -> Log<C> {
        let mut log = Log {
            base,
            entries: VecDeque::with_capacity(entries.len()),
            configurations: vec![(base.index, configuration)],
            flushed: base.index,
            sequence: PersistSequence(0),
            persisted: PersistSequence(0),
            gathering: None,
            in_flight: VecDeque::new(),
        };
        for entry in entries {
            log.push(entry);
        }
        log.flushed = log.last().index;
        log
    }

    pub(crate) fn base(&self) -> Position {
        self.base
    }

    pub(crate) fn last(&self) -> Position {
        self.entries.back().map_or(self.base, |entry| entry.position)
    }

    /// The highest index up to which everything is durable here.
    pub(crate) fn flushed(&self) -> LogIndex {
        self.flushed
    }

    pub(crate) fn persisted(&self) -> PersistSequence {
        self.persisted
    }

    /// `None` below the base and above the end.
    pub(crate) fn term_at(&self, index: LogIndex) -> Option<Term> {
        if index == self.base.index { Some(self.base.term) } else { self.entry(index).map(|entry| entry.position.term) }
    }

    pub(crate) fn position_at(&self, index: LogIndex) -> Option<Position> {
        self.term_at(index).map(|term| Position { term, index })
    }

    pub(crate) fn entry(&self, index: LogIndex) -> Option<&Entry<C>> {
        let offset = index.0.checked_sub(self.base.index.0)?.checked_sub(1)?;
        self.entries.get(usize::try_from(offset).ok()?)
    }

    /// The greatest position at or below `index` whose term is at most `term`; `None` if that lies below the base.
    pub(crate) fn last_at_or_before(&self, index: LogIndex, term: Term) -> Option<Position> {
        let index = index.min(self.last().index);
        if index < self.base.index {
            return None;
        }
        let length = (index.0 - self.base.index.0) as usize;
        // Terms never fall, so those at most `term` are a prefix.
        let (head, tail) = self.entries.as_slices();
        let within = |slice: &[Entry<C>]| slice.partition_point(|entry| entry.position.term <= term);
        let older = if within(head) < head.len() { within(head) } else { head.len() + within(tail) };
        match length.min(older) {
            0 if self.base.term <= term => Some(self.base),
            0 => None,
            n => Some(self.entries[n - 1].position),
        }
    }

    /// Entries from `from` on, at least one if there is any, and no more than `bytes_max` beyond that.
    pub(crate) fn slice(&self, from: LogIndex, bytes_max: usize) -> (Vec<Entry<C>>, usize) {
        assert!(from > self.base.index, "entries below the base left memory");
        let skip = (from.0 - self.base.index.0 - 1) as usize;
        let mut bytes = 0usize;
        let mut taken = Vec::new();
        for entry in self.entries.iter().skip(skip).take(APPEND_ENTRIES_MAX) {
            let size = entry_bytes(entry);
            if !taken.is_empty() && bytes.saturating_add(size) > bytes_max {
                break;
            }
            bytes = bytes.saturating_add(size);
            taken.push(entry.clone());
        }
        (taken, bytes)
    }

    pub(crate) fn bytes_between(&self, above: LogIndex, to: LogIndex) -> usize {
        let skip = above.0.saturating_sub(self.base.index.0) as usize;
        let through = to.0.saturating_sub(self.base.index.0) as usize;
        self.entries.iter().take(through).skip(skip).map(entry_bytes).sum()
    }

    /// Whether the entries from `from` on have so many bytes.
    pub(crate) fn bytes_reach(&self, from: LogIndex, bytes: usize) -> bool {
        let skip = (from.0.saturating_sub(self.base.index.0) as usize).saturating_sub(1);
        let mut sum = 0usize;
        self.entries.iter().skip(skip).any(|entry| {
            sum = sum.saturating_add(entry_bytes(entry));
            sum >= bytes
        })
    }

    /// The configuration in force: the last one appended, committed or not.
    pub(crate) fn configuration(&self) -> &Configuration {
        &self.configurations.last().expect("never empty").1
    }

    pub(crate) fn configuration_index(&self) -> LogIndex {
        self.configurations.last().expect("never empty").0
    }

    /// The configuration as of `index`, which must not lie below the base.
    pub(crate) fn configuration_at(&self, index: LogIndex) -> &Configuration {
        let older = self.configurations.partition_point(|(at, _)| *at <= index);
        &self.configurations[older.max(1) - 1].1
    }

    pub(crate) fn append(&mut self, entry: Entry<C>) {
        self.gather().entries.push(entry.clone());
        self.push(entry);
    }

    /// Drops everything at and above `from`.
    pub(crate) fn truncate_from(&mut self, from: LogIndex) {
        assert!(from > self.base.index, "what was compacted is committed and stays");
        if from > self.last().index {
            return;
        }
        self.entries.truncate((from.0 - self.base.index.0 - 1) as usize);
        self.forget_from(from);
    }

    /// The sequence whose durability makes `hard_state` durable.
    pub(crate) fn save_hard_state(&mut self, hard_state: HardState) -> PersistSequence {
        let step = self.gather();
        step.hard_state = Some(hard_state);
        step.sequence
    }

    pub(crate) fn on_persisted(&mut self, sequence: PersistSequence) {
        assert!(
            self.gathering.as_ref().map_or(sequence <= self.sequence, |step| sequence < step.sequence),
            "a step is durable that was never handed out"
        );
        self.persisted = self.persisted.max(sequence);
        while self.in_flight.front().is_some_and(|(step, _)| *step <= sequence) {
            let (_, last) = self.in_flight.pop_front().expect("looked at");
            self.flushed = self.flushed.max(last);
        }
        assert!(self.flushed <= self.last().index);
    }

    /// The next step to make durable, if there is anything in it.
    pub(crate) fn take_persist(&mut self) -> Option<Persist<C>> {
        let step = self.gathering.take()?;
        self.in_flight.push_back((step.sequence, self.last().index));
        Some(step)
    }

    /// Entries up to and with `to` leave memory.
    pub(crate) fn compact(&mut self, to: LogIndex) {
        if to <= self.base.index {
            return;
        }
        assert!(to <= self.flushed, "only durable entries are compacted");
        self.base = self.position_at(to).expect("at or below flushed");
        while self.entries.front().is_some_and(|entry| entry.position.index <= to) {
            self.entries.pop_front();
        }
        let older = self.configurations.partition_point(|(at, _)| *at <= to);
        self.configurations.drain(..older.saturating_sub(1));
    }

    /// The state up to `base` was installed durably beside the log. Entries above it stay only if they follow it.
    pub(crate) fn install(&mut self, base: Position, configuration: Configuration) {
        let follows = self.term_at(base.index) == Some(base.term);
        if follows {
            self.flushed = self.flushed.max(base.index);
            self.in_flight.iter_mut().for_each(|(_, last)| *last = (*last).max(base.index));
            self.compact(base.index);
            self.configurations[0] = (base.index, configuration);
            return;
        }
        let stale = base.index.next().min(self.base.index.next());
        if !self.entries.is_empty() {
            self.entries.clear();
            self.forget_from(stale);
        }
        self.in_flight.iter_mut().for_each(|(_, last)| *last = base.index);
        self.base = base;
        self.flushed = base.index;
        self.configurations = vec![(base.index, configuration)];
    }

    fn forget_from(&mut self, from: LogIndex) {
        let before = LogIndex(from.0 - 1);
        let step = self.gather();
        if let Some(cut) = step.entries.iter().position(|entry| entry.position.index >= from) {
            step.entries.truncate(cut);
        }
        // What was only gathered is gone with the line above; what may be on disk needs the mark.
        step.truncate_from = Some(step.truncate_from.map_or(from, |at| at.min(from)));
        self.flushed = self.flushed.min(before);
        self.in_flight.iter_mut().for_each(|(_, last)| *last = (*last).min(before));
        self.configurations.retain(|(at, _)| *at < from);
        assert!(!self.configurations.is_empty(), "the configuration of the base stays");
    }

    fn gather(&mut self) -> &mut Persist<C> {
        if self.gathering.is_none() {
            self.sequence = PersistSequence(self.sequence.0 + 1);
        }
        let sequence = self.sequence;
        self.gathering.get_or_insert_with(|| Persist {
            sequence,
            hard_state: None,
            truncate_from: None,
            entries: Vec::new(),
        })
    }

    fn push(&mut self, entry: Entry<C>) {
        let last = self.last();
        assert!(entry.position.index == last.index.next() && entry.position.term >= last.term, "the log has no gap");
        if let Body::Configuration(configuration) = &entry.body {
            self.configurations.push((entry.position.index, configuration.clone()));
        }
        self.entries.push_back(entry);
    }
}

/// Fixed bytes that an entry counts in windows beside its command.
const ENTRY_OVERHEAD_BYTES: usize = 64;

pub(crate) fn entry_bytes<C: Command>(entry: &Entry<C>) -> usize {
    ENTRY_OVERHEAD_BYTES
        + match &entry.body {
            Body::Noop | Body::Configuration(_) => 0,
            Body::Command(command) => command.size_bytes(),
        }
}
