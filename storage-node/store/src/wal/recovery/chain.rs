//! Links batches backwards from the last whole one, and tells a torn tail from damage.
//!
//! Every batch names the one before it, which was durable when it was written. So whatever the last whole batch, or
//! the mark, links to must be whole: where it is not, that is damage. A bad batch nobody links to is a torn tail.

use crate::wal::format::{BatchHeader, TableEntry};
use crate::wal::recovery::scan::{Found, Scan};

/// A stretch of the log.
pub(super) enum Node<'a> {
    Whole {
        found: &'a Found,
        table: &'a [TableEntry],
    },
    /// Unreadable, but its table says whose records are lost.
    Damaged {
        header: &'a BatchHeader,
        table: &'a [TableEntry],
    },
    /// One or more batches up to this sequence of which nothing is known.
    Lost {
        to: u64,
    },
}

impl Node<'_> {
    pub fn header(&self) -> Option<&BatchHeader> {
        match self {
            Node::Whole { found, .. } => Some(&found.header),
            Node::Damaged { header, .. } => Some(header),
            Node::Lost { .. } => None,
        }
    }
}

pub(super) struct Chain<'a> {
    /// Ascending by sequence.
    pub nodes: Vec<Node<'a>>,
    /// The last batch that was flushed or is whole. 0: none.
    pub flushed_sequence: u64,
    /// Where the next batch goes.
    pub end_generation: u64,
    pub end_offset: u64,
    /// Generations below may be overwritten.
    pub oldest_generation: u64,
}

impl<'a> Chain<'a> {
    pub fn link(scan: &'a Scan) -> Chain<'a> {
        let last = scan.found.values().rev().find(|found| found.whole).map(|found| &found.header);
        let mark = scan.mark().filter(|mark| mark.sequence > 0);
        let segment_offset = |header: &BatchHeader| scan.offset_in_segment(header);
        let mut chain = match (last, mark) {
            (None, None) => {
                let start = Chain {
                    nodes: Vec::new(),
                    flushed_sequence: 0,
                    end_generation: 1,
                    end_offset: 0,
                    oldest_generation: 1,
                };
                return start;
            }
            (Some(last), mark) if mark.is_none_or(|mark| mark.sequence <= last.sequence) => Chain {
                nodes: Vec::new(),
                flushed_sequence: last.sequence,
                end_generation: last.generation,
                end_offset: segment_offset(last) + u64::from(last.length),
                oldest_generation: last.oldest_generation.max(mark.map_or(0, |mark| mark.oldest_generation)),
            },
            (_, Some(mark)) => Chain {
                nodes: Vec::new(),
                flushed_sequence: mark.sequence,
                end_generation: mark.generation,
                end_offset: mark.end,
                oldest_generation: mark.oldest_generation,
            },
            (Some(_), None) => unreachable!("the guard above holds without a mark"),
        };
        let oldest = |header: &BatchHeader| header.oldest_sequence;
        let oldest_sequence = last.map_or(0, oldest).max(mark.map_or(0, |mark| mark.oldest_sequence));
        chain.walk(scan, oldest_sequence);
        chain
    }

    fn walk(&mut self, scan: &'a Scan, oldest_sequence: u64) {
        let mut expected = self.flushed_sequence;
        while expected != 0 && expected >= oldest_sequence {
            match scan.found.get(&expected) {
                Some(found @ Found { whole: true, table: Some(table), .. }) => {
                    self.nodes.push(Node::Whole { found, table });
                    expected = found.header.previous;
                }
                Some(Found { header, table: Some(table), .. }) => {
                    self.nodes.push(Node::Damaged { header, table });
                    expected = header.previous;
                }
                _ => {
                    self.nodes.push(Node::Lost { to: expected });
                    expected = scan.found.range(..expected).next_back().map_or(0, |(sequence, _)| *sequence);
                }
            }
        }
        self.nodes.reverse();
        if holdfast_planted::is(holdfast_planted::Bug::TruncateAtBadChecksum) {
            let intact = self.nodes.iter().position(|node| !matches!(node, Node::Whole { .. }));
            self.nodes.truncate(intact.unwrap_or(self.nodes.len()));
        }
    }
}
