//! [`Session`]: requests of the kernel in, block requests and replies out.

use std::collections::BTreeMap;

use bytes::Bytes;
use holdfast_block::{
    Completion, Error, Geometry, Operation as Block, REQUEST_BYTES_MAX, Request, RequestId, ZEROES_BYTES_MAX,
};

use crate::wire::{
    Attributes, Errno, FILE_NODE, KERNEL_MINOR_VERSION, KERNEL_MINOR_VERSION_MIN, KERNEL_VERSION, Message, Operation,
    ROOT_NODE, Reply, WireError, Zeroes, init_flags,
};

/// What INIT asks for; [`init_flags::HAS_RESEND`] decides whether a successor can take over without shared buffers.
const WANTED: u64 = init_flags::ASYNC_READ
    | init_flags::BIG_WRITES
    | init_flags::ASYNC_DIO
    | init_flags::MAX_PAGES
    | init_flags::INIT_EXT
    | init_flags::HAS_RESEND;

const DIRECTORY: u32 = 0o040_700;
const FILE: u32 = 0o100_600;

/// What one request of the kernel comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    Reply(Reply),
    /// Its completion goes to [`Session::on_completion`].
    Requests(Vec<Request>),
    Nothing,
    /// The kernel has let go of the file system.
    End,
}

/// The kernel's request that a block request belongs to; longer ones are split and answered once.
struct Open {
    unique: u64,
    answer: Answer,
    parts_missing: usize,
    failed: Option<Errno>,
}

#[derive(Clone, Copy)]
enum Answer {
    Data,
    Written { size: u32 },
    Empty,
}

/// One volume's file. Bounded by the kernel: it keeps at most `max_background` and one per waiting thread in flight.
pub struct Session {
    /// The file's name; the loop device shows it as its backing file.
    name: String,
    geometry: Geometry,
    open: BTreeMap<u64, Open>,
    parts: BTreeMap<RequestId, u64>,
    next: u64,
    resends: bool,
}

impl Session {
    /// For a descriptor whose INIT is still to come, or that a predecessor has served.
    pub fn new(name: String, geometry: Geometry) -> Session {
        Session { name, geometry, open: BTreeMap::new(), parts: BTreeMap::new(), next: 0, resends: false }
    }

    pub fn set_geometry(&mut self, geometry: Geometry) {
        self.geometry = geometry;
    }

    /// Whether the kernel sends unanswered requests again on demand (Linux 6.9 and later); known after INIT.
    pub fn resends(&self) -> bool {
        self.resends
    }

    /// Requests of the kernel without an answer yet.
    pub fn outstanding(&self) -> usize {
        self.open.len()
    }

    /// # Errors
    /// The bytes break the protocol; the descriptor cannot be served on.
    pub fn on_request(&mut self, request: &Bytes) -> Result<Input, WireError> {
        let Message { unique, node, operation } = Message::decode(request)?;
        let reply = match operation {
            Operation::Init { major, minor, max_readahead, flags } => {
                if major != KERNEL_VERSION || minor < KERNEL_MINOR_VERSION_MIN {
                    return Ok(Input::Reply(Reply::error(unique, Errno::Einval)));
                }
                self.resends = flags & init_flags::HAS_RESEND != 0;
                let minor = minor.min(KERNEL_MINOR_VERSION);
                Reply::init(unique, minor, max_readahead, flags & WANTED, REQUEST_BYTES_MAX)
            }
            Operation::Lookup { name } if node == ROOT_NODE && name == self.name.as_bytes() => {
                Reply::entry(unique, &self.attributes(FILE_NODE))
            }
            Operation::Lookup { .. } => Reply::error(unique, Errno::Enoent),
            Operation::GetAttributes => Reply::attributes(unique, &self.attributes(node)),
            Operation::Open => Reply::open(unique, node),
            Operation::Read { offset, size } => return Ok(self.read(unique, offset, size)),
            Operation::Write { offset, data } => return Ok(self.write(unique, offset, data)),
            Operation::Synchronize => return Ok(self.start(unique, Answer::Empty, vec![Block::Flush])),
            Operation::Allocate { offset, length, zeroes } => return Ok(self.zero(unique, offset, length, zeroes)),
            Operation::FileSystemStatus => Reply::file_system_status(unique, self.geometry.size_bytes / 4096),
            Operation::Release => Reply::empty(unique),
            Operation::Forget | Operation::Interrupt => return Ok(Input::Nothing),
            Operation::Destroy => return Ok(Input::End),
            Operation::Other { .. } => Reply::error(unique, Errno::Enosys),
        };
        Ok(Input::Reply(reply))
    }

    /// `None` while other parts of the kernel's request are missing, or for a request this session does not know.
    pub fn on_completion(&mut self, completion: Completion) -> Option<Reply> {
        let key = self.parts.remove(&completion.id)?;
        let open = self.open.get_mut(&key).expect("a part belongs to an open request");
        open.parts_missing -= 1;
        let mut data = Bytes::new();
        match completion.result {
            Ok(bytes) => data = bytes,
            Err(error) => open.failed = Some(errno(error)),
        }
        if open.parts_missing > 0 {
            return None;
        }
        let open = self.open.remove(&key).expect("it was there a line ago");
        Some(match (open.failed, open.answer) {
            (Some(errno), _) => Reply::error(open.unique, errno),
            (None, Answer::Data) => Reply::data(open.unique, data),
            (None, Answer::Written { size }) => Reply::written(open.unique, size),
            (None, Answer::Empty) => Reply::empty(open.unique),
        })
    }

    fn attributes(&self, node: u64) -> Attributes {
        match node {
            FILE_NODE => Attributes { node, size_bytes: self.geometry.size_bytes, mode: FILE },
            _ => Attributes { node, size_bytes: 0, mode: DIRECTORY },
        }
    }

    /// Beyond the end a file gives less, down to nothing; a device is never asked for that.
    fn read(&mut self, unique: u64, offset: u64, size: u32) -> Input {
        let length = u64::from(size).min(self.geometry.size_bytes.saturating_sub(offset));
        match u32::try_from(length) {
            Ok(0) | Err(_) => Input::Reply(Reply::data(unique, Bytes::new())),
            Ok(length) => self.start(unique, Answer::Data, vec![Block::Read { offset, length }]),
        }
    }

    fn write(&mut self, unique: u64, offset: u64, data: Bytes) -> Input {
        let answer = Answer::Written { size: data.len() as u32 };
        self.start(unique, answer, vec![Block::Write { offset, data }])
    }

    fn zero(&mut self, unique: u64, offset: u64, length: u64, zeroes: Zeroes) -> Input {
        let end = offset.saturating_add(length).min(self.geometry.size_bytes);
        let mut parts = Vec::new();
        let mut at = offset;
        while at < end {
            let length = (end - at).min(ZEROES_BYTES_MAX);
            parts.push(match zeroes {
                Zeroes::Punch => Block::Discard { offset: at, length },
                Zeroes::Zero => Block::WriteZeroes { offset: at, length },
                Zeroes::Unsupported => return Input::Reply(Reply::error(unique, Errno::Eopnotsupp)),
            });
            at += length;
        }
        if parts.is_empty() {
            return Input::Reply(Reply::error(unique, Errno::Einval));
        }
        self.start(unique, Answer::Empty, parts)
    }

    fn start(&mut self, unique: u64, answer: Answer, operations: Vec<Block>) -> Input {
        for operation in &operations {
            if let Err(error) = self.geometry.check(operation) {
                return Input::Reply(Reply::error(unique, errno(error)));
            }
        }
        // `unique` of a resent request may meet its first copy here only if this process asked for it again.
        let key = self.next;
        self.open.insert(key, Open { unique, answer, parts_missing: operations.len(), failed: None });
        let requests = operations.into_iter().map(|operation| {
            let id = RequestId(self.next);
            self.next += 1;
            self.parts.insert(id, key);
            Request { id, operation }
        });
        Input::Requests(requests.collect())
    }
}

/// The one mapping of block errors to the kernel's numbers.
fn errno(error: Error) -> Errno {
    match error {
        Error::OutOfRange | Error::Misaligned | Error::TooLarge => Errno::Einval,
        Error::NoSpace => Errno::Enospc,
        Error::Fenced | Error::Corrupt => Errno::Eio,
        Error::Unavailable => Errno::Etimedout,
    }
}

#[cfg(test)]
mod tests;
