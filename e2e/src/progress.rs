//! What writers report, and what can be told from the reports of several writers of the same volume.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::writer::now_ms;

/// One line of a writer's log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Milliseconds since 1970.
    pub at: u64,
    #[serde(flatten)]
    pub event: Event,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// A writer began: all blocks are as write `number` left them.
    Verified { number: u64 },
    /// Writes up to `number` are durable, `writes` of them since the line before, between `first` and `last`; `gap_ms`
    /// is the longest wait of this writer for one of them.
    Acknowledged { number: u64, writes: u64, first: u64, last: u64, gap_ms: u64 },
    /// A writer ended in good order after write `number`; all blocks were verified.
    Stopped { number: u64 },
    /// A request failed, or a block did not hold what it must.
    Failed { why: String },
}

impl Line {
    pub fn now(event: Event) -> Line {
        Line { at: now_ms(), event }
    }
}

/// The reports on one volume, in the order of time.
#[derive(Debug, Default)]
pub struct Progress {
    lines: Vec<Line>,
}

/// What happened in a span of time.
#[derive(Debug, PartialEq, Eq)]
pub struct Span {
    pub writes: u64,
    /// The longest time between two acknowledgements, as one writer saw it or from one writer to the next.
    pub gap_ms: u64,
}

impl Progress {
    /// From the logs of all nodes.
    pub fn parse(logs: &str) -> Progress {
        // A node that is taken away may leave the last line of its log unfinished.
        let mut lines: Vec<Line> = logs.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        lines.sort_by_key(|line| line.at);
        Progress { lines }
    }

    pub fn acknowledged(&self) -> u64 {
        self.lines
            .iter()
            .filter_map(|line| match line.event {
                Event::Acknowledged { number, .. } => Some(number),
                _ => None,
            })
            .max()
            .unwrap_or(0)
    }

    /// The last write that the last writer found when it began.
    pub fn verified(&self) -> Option<u64> {
        self.lines.iter().rev().find_map(|line| match line.event {
            Event::Verified { number } => Some(number),
            _ => None,
        })
    }

    /// How often a writer began on what others had written.
    pub fn starts(&self) -> usize {
        self.lines.iter().filter(|line| matches!(line.event, Event::Verified { .. })).count()
    }

    /// No request failed, and each writer found all that was acknowledged before it began.
    pub fn check(&self) -> Result<()> {
        let mut acknowledged = 0;
        for line in &self.lines {
            match &line.event {
                Event::Failed { why } => bail!("a writer failed at {}: {why}", line.at),
                Event::Acknowledged { number, .. } => acknowledged = acknowledged.max(*number),
                Event::Verified { number } | Event::Stopped { number } => ensure!(
                    *number >= acknowledged,
                    "write {acknowledged} was acknowledged, but {number} is the last one found at {}",
                    line.at
                ),
            }
        }
        Ok(())
    }

    /// What happened in `[from, to]`, in milliseconds since 1970, with the gap that was open at its end.
    pub fn span(&self, from: u64, to: u64) -> Span {
        let mut span = Span { writes: 0, gap_ms: 0 };
        let mut previous = from;
        for line in &self.lines {
            let Event::Acknowledged { writes, first, last, gap_ms, .. } = line.event else { continue };
            if last < from {
                continue;
            }
            // From one writer to the next; within one, `gap_ms` says it better.
            span.gap_ms = span.gap_ms.max(gap_ms).max(first.saturating_sub(previous));
            span.writes += writes;
            previous = last;
            if last > to {
                return span;
            }
        }
        span.gap_ms = span.gap_ms.max(to.saturating_sub(previous));
        span
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(events: &[(u64, Event)]) -> Progress {
        let text: Vec<String> = events
            .iter()
            .map(|(at, event)| serde_json::to_string(&Line { at: *at, event: event.clone() }).unwrap())
            .collect();
        Progress::parse(&text.join("\n"))
    }

    fn acknowledged(number: u64, first: u64, last: u64, gap_ms: u64) -> (u64, Event) {
        (last, Event::Acknowledged { number, writes: 10, first, last, gap_ms })
    }

    #[test]
    fn a_successor_that_finds_less_than_was_acknowledged_is_an_error() {
        let lost = progress(&[acknowledged(10, 100, 200, 5), (900, Event::Verified { number: 9 })]);
        assert!(lost.check().unwrap_err().to_string().starts_with("write 10 was acknowledged, but 9"));
        let kept = progress(&[acknowledged(10, 100, 200, 5), (900, Event::Verified { number: 11 })]);
        kept.check().unwrap();
        assert_eq!(kept.acknowledged(), 10);
        assert_eq!(kept.starts(), 1);
    }

    #[test]
    fn a_failed_request_is_an_error() {
        assert!(progress(&[(1, Event::Failed { why: "write 3".into() })]).check().is_err());
    }

    #[test]
    fn the_gap_between_two_writers_counts() {
        let moved = progress(&[acknowledged(10, 100, 350, 5), acknowledged(20, 4_350, 4_600, 7)]);
        assert_eq!(moved.span(300, 4_500), Span { writes: 20, gap_ms: 4_000 });
    }

    #[test]
    fn a_gap_that_nobody_ended_counts() {
        let stuck = progress(&[acknowledged(10, 100, 350, 5)]);
        assert_eq!(stuck.span(100, 10_350), Span { writes: 10, gap_ms: 10_000 });
    }
}
