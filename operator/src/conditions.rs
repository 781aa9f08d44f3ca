//! Conditions as values: what is true now, merged with what was true before.

use holdfast_crds::names::condition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// Longest message that the API server takes.
const MESSAGE_BYTES_MAX: usize = 4096;

/// What is to be said, in the order in which it was said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    entries: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    kind: &'static str,
    holds: Option<bool>,
    reason: String,
    message: String,
}

impl Conditions {
    pub fn set(&mut self, kind: &'static str, holds: bool, reason: &str, message: impl Into<String>) {
        self.put(kind, Some(holds), reason, message.into());
    }

    pub fn unknown(&mut self, kind: &'static str, reason: &str, message: impl Into<String>) {
        self.put(kind, None, reason, message.into());
    }

    /// Everything is as asked for.
    pub fn ready(&mut self, reason: &str, message: impl Into<String>) {
        self.set(condition::READY, true, reason, message);
    }

    /// On the way; time or other machines will do it.
    pub fn reconciling(&mut self, reason: &str, message: impl Into<String>) {
        let message = message.into();
        self.set(condition::READY, false, reason, message.clone());
        self.set(condition::RECONCILING, true, reason, message);
    }

    /// Only a person can help.
    pub fn stalled(&mut self, reason: &str, message: impl Into<String>) {
        let message = message.into();
        self.set(condition::READY, false, reason, message.clone());
        self.set(condition::STALLED, true, reason, message);
    }

    pub fn holds(&self, kind: &str) -> bool {
        self.entries.iter().any(|entry| entry.kind == kind && entry.holds == Some(true))
    }

    /// Whether Ready, Reconciling or Stalled was said.
    pub fn is_decided(&self) -> bool {
        self.entries.iter().any(|entry| entry.kind == condition::READY)
    }

    fn put(&mut self, kind: &'static str, holds: Option<bool>, reason: &str, message: String) {
        assert!(!reason.is_empty() && reason.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{reason:?}");
        let entry = Entry { kind, holds, reason: reason.to_owned(), message: shorten(message) };
        match self.entries.iter_mut().find(|existing| existing.kind == kind) {
            Some(existing) => *existing = entry,
            None => self.entries.push(entry),
        }
    }

    /// As the API has them: the time of a condition that did not change its status stays.
    pub fn merge(&self, before: &[Condition], generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
        self.entries
            .iter()
            .map(|entry| {
                let status = match entry.holds {
                    Some(true) => "True",
                    Some(false) => "False",
                    None => "Unknown",
                };
                let same = before.iter().find(|old| old.type_ == entry.kind && old.status == status);
                Condition {
                    type_: entry.kind.to_owned(),
                    status: status.to_owned(),
                    reason: entry.reason.clone(),
                    message: entry.message.clone(),
                    observed_generation: generation,
                    last_transition_time: same.map_or(Time(now), |old| old.last_transition_time.clone()),
                }
            })
            .collect()
    }
}

/// What is worth an event: conditions that changed their status or reason, but not those that merely went.
pub fn changed<'a>(before: &[Condition], after: &'a [Condition]) -> Vec<&'a Condition> {
    after
        .iter()
        .filter(|new| {
            !before.iter().any(|old| old.type_ == new.type_ && old.status == new.status && old.reason == new.reason)
        })
        .collect()
}

fn shorten(mut message: String) -> String {
    if message.len() > MESSAGE_BYTES_MAX {
        let mut end = MESSAGE_BYTES_MAX - 3;
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
        message.push_str("...");
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_time_is_that_of_the_last_change_of_status() {
        let mut conditions = Conditions::default();
        conditions.reconciling("Starting", "1 of 3");
        let first = conditions.merge(&[], Some(1), at(10));
        conditions.reconciling("Starting", "2 of 3");
        let second = conditions.merge(&first, Some(1), at(20));
        assert!(second.iter().all(|condition| condition.last_transition_time == Time(at(10))));
        assert!(changed(&first, &second).is_empty());
        let mut ready = Conditions::default();
        ready.ready("Ready", "");
        let third = ready.merge(&second, Some(1), at(30));
        assert_eq!(third.len(), 1, "what is no longer true is gone: {third:?}");
        assert_eq!(third[0].last_transition_time, Time(at(30)));
        assert_eq!(changed(&second, &third).len(), 1);
    }

    #[test]
    fn what_is_stalled_is_not_ready() {
        let mut conditions = Conditions::default();
        conditions.stalled("Foreign", "é".repeat(5000));
        assert!(conditions.holds(condition::STALLED) && !conditions.holds(condition::READY));
        assert!(
            conditions.merge(&[], None, at(0)).iter().all(|condition| condition.message.len() <= MESSAGE_BYTES_MAX)
        );
    }
}
