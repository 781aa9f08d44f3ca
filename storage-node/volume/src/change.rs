//! A mutation as its client asked for it, and how it becomes an entry of whole physical blocks.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use holdfast_block::Operation;
use holdfast_protocol::session::Stamp;

use crate::command::Command;
use crate::range::{BLOCK, BLOCK_U64, BlockRange};

/// A mutation in logical blocks.
#[derive(Debug)]
pub(crate) struct Change {
    offset: u64,
    length: u64,
    kind: ChangeKind,
}

#[derive(Debug)]
enum ChangeKind {
    Write(Bytes),
    Zeroes { discard: bool },
}

/// The blocks that a change covers in part: its first, its last, or both where they are one and the same or adjacent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Edge {
    Head,
    Tail,
    Both,
}

impl Change {
    /// `None` for an operation that changes nothing.
    pub fn from_operation(operation: Operation) -> Option<Change> {
        match operation {
            Operation::Write { offset, data } => {
                Some(Change { offset, length: data.len() as u64, kind: ChangeKind::Write(data) })
            }
            Operation::WriteZeroes { offset, length } => {
                Some(Change { offset, length, kind: ChangeKind::Zeroes { discard: false } })
            }
            Operation::Discard { offset, length } => {
                Some(Change { offset, length, kind: ChangeKind::Zeroes { discard: true } })
            }
            Operation::Read { .. } | Operation::Flush => None,
        }
    }

    /// Not empty: `Geometry::check` refuses that, before anybody asks for the blocks.
    pub fn blocks(&self) -> BlockRange {
        BlockRange::touching(self.offset, self.length)
    }

    pub fn data_bytes(&self) -> usize {
        match &self.kind {
            ChangeKind::Write(data) => data.len(),
            ChangeKind::Zeroes { .. } => 0,
        }
    }

    pub fn edge(&self) -> Option<Edge> {
        let end = self.offset + self.length;
        match (!self.offset.is_multiple_of(BLOCK_U64), !end.is_multiple_of(BLOCK_U64)) {
            (false, false) => None,
            (true, false) => Some(Edge::Head),
            (false, true) => Some(Edge::Tail),
            (true, true) => Some(Edge::Both),
        }
    }

    /// `head` is the content of the first block where the change starts within it, `tail` of the last where it ends
    /// within it; with one block only, both are that block.
    pub fn into_entry(
        self,
        stamp: Stamp,
        blocks: BlockRange,
        head: Option<Bytes>,
        tail: Option<Bytes>,
    ) -> (Command, Bytes) {
        let (has_head, has_tail) = (head.is_some(), tail.is_some());
        let skip = (self.offset % BLOCK_U64) as usize;
        match self.kind {
            ChangeKind::Write(data) => {
                let payload = if has_head || has_tail { merge(blocks.count, head, tail, skip, &data) } else { data };
                (write(stamp, blocks.first, &payload), payload)
            }
            ChangeKind::Zeroes { discard } => {
                let edges = u64::from(has_head) + u64::from(has_tail);
                if blocks.count <= edges {
                    let zeroes = vec![0; self.length as usize];
                    let payload = merge(blocks.count, head, tail, skip, &zeroes);
                    return (write(stamp, blocks.first, &payload), payload);
                }
                let cut = ((self.offset + self.length) % BLOCK_U64) as usize;
                let mut payload = BytesMut::with_capacity(edges as usize * BLOCK);
                let head = head.map(|block| {
                    payload.extend_from_slice(&block[..skip]);
                    payload.resize(BLOCK, 0);
                    holdfast_block::checksum(&payload)
                });
                let tail = tail.map(|block| {
                    let start = payload.len();
                    payload.resize(start + cut, 0);
                    payload.extend_from_slice(&block[cut..]);
                    holdfast_block::checksum(&payload[start..])
                });
                let first_block = blocks.first + u64::from(has_head);
                let count = blocks.count - edges;
                (Command::Zero { stamp, first_block, count, discard, head, tail }, payload.freeze())
            }
        }
    }
}

/// `count` blocks: the first is `head` and the last is `tail` where given, with `data` laid over them from `skip` on.
fn merge(count: u64, head: Option<Bytes>, tail: Option<Bytes>, skip: usize, data: &[u8]) -> Bytes {
    let length = count as usize * BLOCK;
    let mut merged = BytesMut::with_capacity(length);
    if let Some(head) = head {
        merged.extend_from_slice(&head[..skip]);
    }
    merged.extend_from_slice(data);
    if let Some(tail) = tail {
        let within = merged.len() - (count as usize - 1) * BLOCK;
        merged.extend_from_slice(&tail[within..]);
    }
    assert_eq!(merged.len(), length, "a part of an edge block is missing");
    merged.freeze()
}

fn write(stamp: Stamp, first_block: u64, payload: &Bytes) -> Command {
    let checksums: Arc<[u32]> = payload.chunks(BLOCK).map(holdfast_block::checksum).collect();
    Command::Write { stamp, first_block, checksums }
}
