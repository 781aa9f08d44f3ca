//! One connection: the order of greeting, haggling, transmission and end.

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use holdfast_block::{Completion, Error, Geometry, Operation, REQUEST_BYTES_MAX, Request, RequestId};

use crate::command::{self, Kind, Rejected};
use crate::option::{Negotiated, Next, OPTION_BYTES_MAX};
use crate::output::Output;
use crate::wire::{self, OptionHeader, RequestHeader, STRING_BYTES_MAX, chunk, command_code, handshake_flag};

/// Requests to the volume that one connection may have outstanding before no further command is looked at.
/// One command adds at most 64 (zeroes of 4 GiB in parts of 64 MiB), so this is overstepped by 63 at most.
pub const REQUESTS_MAX: usize = 1024;
/// Data of accepted commands and of unsent replies before no further command is looked at; overstepped by one command.
pub const BYTES_MAX: usize = 64 << 20;
/// Longest read or write: what the protocol asks of a portable server. Longer ones than a request to the volume
/// may be are split, and completed as one.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Options one client may send; an honest one needs fewer than ten.
const OPTIONS_MAX: u32 = 256;
/// What is made ready for the next read from the peer: many small commands fit.
const INPUT_BYTES: usize = 64 << 10;
/// Less room than this left, and a new buffer is taken.
const INPUT_BYTES_MIN: usize = 4 << 10;
const CLIENT_FLAGS_BYTES: usize = 4;

/// What a connection is a connection to.
#[derive(Clone, Debug)]
pub struct Export {
    name: String,
    geometry: Geometry,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client said goodbye, and everything it had asked is answered.
    Disconnected,
    /// The client gave up before transmission.
    Aborted,
    /// The client's end of the stream came without a goodbye.
    Closed,
    Violation(Violation),
}

/// What a peer did that the protocol answers with a hard disconnect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("unknown client flags {0:#010x}")]
    ClientFlags(u32),
    #[error("an option does not begin with its magic number")]
    OptionMagic,
    #[error("more than {OPTIONS_MAX} options")]
    TooManyOptions,
    #[error("no export of that name, and EXPORT_NAME leaves no way to say so")]
    UnknownExport,
    #[error("a request does not begin with its magic number")]
    RequestMagic,
    #[error("a write of {0} bytes")]
    WriteTooLong(u32),
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Option,
    OptionData {
        option: u32,
        length: usize,
    },
    /// An option too long to look at.
    OptionSkip {
        option: u32,
        remaining: usize,
    },
    Request,
    Payload {
        command: u64,
        offset: u64,
        remaining: usize,
    },
    /// The payload of a write that is already refused.
    PayloadSkip {
        cookie: u64,
        rejected: Rejected,
        remaining: usize,
    },
    /// Nothing is read any more; what is outstanding is answered.
    Draining(End),
    Ended(End),
}

#[derive(Debug)]
struct Command {
    cookie: u64,
    kind: Kind,
    offset: u64,
    length: u32,
    /// The data of a read, where the reply must be in one piece; in the order of the parts.
    gathered: Option<Vec<Bytes>>,
    parts_open: u32,
    /// The payload is not complete: more parts will come.
    growing: bool,
    error: Option<Error>,
}

#[derive(Debug)]
struct Part {
    command: u64,
    /// Which part of its command, from 0.
    number: usize,
    offset: u64,
    length: u32,
}

/// The server's side of one connection.
#[derive(Debug)]
pub struct Session {
    export: Export,
    negotiated: Negotiated,
    state: State,
    options: u32,
    input: BytesMut,
    output: Output,
    commands: BTreeMap<u64, Command>,
    command_next: u64,
    /// Parts given out or about to be, by the number of their request.
    parts: BTreeMap<u64, Part>,
    part_next: u64,
    ready: VecDeque<Request>,
    /// Bytes of all `commands`.
    held: usize,
}

impl Export {
    /// `None` where the name is longer than 4096 bytes, which the protocol cannot carry.
    pub fn new(name: String, geometry: Geometry) -> Option<Export> {
        (name.len() <= STRING_BYTES_MAX).then_some(Export { name, geometry })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The empty name is the default export, and this is the only one.
    pub(crate) fn is_named(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

impl Session {
    /// The greeting is ready to be sent at once.
    pub fn new(export: Export) -> Session {
        let mut output = Output::default();
        wire::put_greeting(output.tail());
        Session {
            export,
            negotiated: Negotiated::default(),
            state: State::ClientFlags,
            options: 0,
            input: BytesMut::new(),
            output,
            commands: BTreeMap::new(),
            command_next: 0,
            parts: BTreeMap::new(),
            part_next: 0,
            ready: VecDeque::new(),
            held: 0,
        }
    }

    /// Set once the connection is to be closed: nothing more is to be read, sent or served.
    pub fn end(&self) -> Option<End> {
        match self.state {
            State::Ended(end) => Some(end),
            _ => None,
        }
    }

    /// Whether the peer may use the export by now.
    pub fn is_transmitting(&self) -> bool {
        matches!(self.state, State::Request | State::Payload { .. } | State::PayloadSkip { .. })
    }

    /// Whether to read from the peer; while false, leave its bytes where they are.
    pub fn wants_input(&self) -> bool {
        match self.state {
            State::Request => self.accepts_commands(),
            State::Draining(_) | State::Ended(_) => false,
            _ => true,
        }
    }

    /// Where to read the peer's bytes to, with room made; call [`Session::on_input`] after each read.
    pub fn input(&mut self) -> &mut BytesMut {
        let missing = match self.state {
            State::Payload { remaining, .. } => {
                remaining.min(REQUEST_BYTES_MAX as usize).saturating_sub(self.input.len())
            }
            _ => 0,
        };
        let room = self.input.capacity() - self.input.len();
        if missing > room {
            self.input.reserve(missing);
        } else if room < INPUT_BYTES_MIN && missing == 0 {
            self.input.reserve(INPUT_BYTES);
        }
        &mut self.input
    }

    /// Bytes were appended to [`Session::input`].
    pub fn on_input(&mut self) {
        while self.parse() {}
        self.settle();
    }

    /// As `input` and `on_input`, by copy.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
        self.on_input();
    }

    /// The peer sends no more. What it asked is still served; a payload that ends too early is dropped.
    pub fn on_end_of_input(&mut self) {
        match self.state {
            State::Draining(_) | State::Ended(_) => return,
            State::Payload { command, .. } => self.forget(command),
            _ => {}
        }
        self.state = State::Draining(End::Closed);
        self.settle();
    }

    /// The volume grew. What the client was told stays; requests beyond it are served.
    pub fn on_resized(&mut self, geometry: Geometry) {
        self.export.geometry = geometry;
    }

    /// The next request to the volume.
    pub fn poll_request(&mut self) -> Option<Request> {
        self.ready.pop_front()
    }

    /// An answer to a request of [`Session::poll_request`]; one that is not outstanding is ignored, as after the end.
    pub fn on_completion(&mut self, completion: Completion) {
        let Some(part) = self.parts.remove(&completion.id.0) else { return };
        if let Some(command) = self.commands.get_mut(&part.command) {
            command.parts_open -= 1;
            match completion.result {
                Err(error) => command.error = command.error.or(Some(error)),
                Ok(data) if command.kind == Kind::Read => {
                    if data.len() != part.length as usize {
                        command.error = command.error.or(Some(Error::Corrupt));
                    } else if let Some(gathered) = &mut command.gathered {
                        gathered[part.number] = data;
                    } else {
                        let last = command.parts_open == 0 && command.error.is_none();
                        let flags = if last { chunk::FLAG_DONE } else { 0 };
                        let length = part.length + wire::OFFSET_DATA_OVERHEAD;
                        let tail = self.output.tail();
                        wire::put_chunk(tail, flags, chunk::OFFSET_DATA, command.cookie, length);
                        tail.put_u64(part.offset);
                        self.output.put_data(data);
                    }
                }
                Ok(_) => {}
            }
            self.finish_if_done(part.command);
        }
        // There may be room for commands that were read already.
        self.on_input();
    }

    /// Fills `slices` with the front of what is to be sent; returns how many. Zero: there is nothing to send.
    pub fn output<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        self.output.slices(slices)
    }

    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// So many bytes of [`Session::output`] are sent.
    pub fn on_sent(&mut self, bytes: usize) {
        self.output.advance(bytes);
        self.on_input();
    }

    fn accepts_commands(&self) -> bool {
        self.parts.len() < REQUESTS_MAX && self.held + self.output.len() < BYTES_MAX
    }

    /// Takes one step over the input; false where more bytes or more room are needed.
    fn parse(&mut self) -> bool {
        let have = self.input.len();
        match self.state {
            State::ClientFlags => have >= CLIENT_FLAGS_BYTES && self.parse_client_flags(),
            State::Option => have >= wire::OPTION_HEADER_BYTES && self.parse_option_header(),
            State::OptionData { option, length } => {
                have >= length && {
                    let data = self.input.split_to(length);
                    self.on_option(option, &data);
                    true
                }
            }
            State::OptionSkip { option, ref mut remaining } => {
                let skipped = have.min(*remaining);
                self.input.advance(skipped);
                *remaining -= skipped;
                let done = *remaining == 0;
                if done {
                    wire::put_option_reply(self.output.tail(), option, wire::reply_code::ERR_TOO_BIG, &[]);
                    self.state = State::Option;
                }
                done
            }
            State::Request => {
                have >= wire::REQUEST_HEADER_BYTES && self.accepts_commands() && self.parse_request_header()
            }
            State::Payload { command, offset, remaining } => self.parse_payload(command, offset, remaining),
            State::PayloadSkip { cookie, rejected, ref mut remaining } => {
                let skipped = have.min(*remaining);
                self.input.advance(skipped);
                *remaining -= skipped;
                let done = *remaining == 0;
                if done {
                    self.state = State::Request;
                    self.reply_rejected(cookie, rejected);
                }
                done
            }
            State::Draining(_) | State::Ended(_) => {
                self.input.clear();
                false
            }
        }
    }

    fn parse_client_flags(&mut self) -> bool {
        let flags = self.input.get_u32();
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags & !known != 0 {
            self.violate(Violation::ClientFlags(flags));
            return false;
        }
        self.negotiated.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.state = State::Option;
        true
    }

    fn parse_option_header(&mut self) -> bool {
        let header = OptionHeader::decode(&self.input.split_to(wire::OPTION_HEADER_BYTES));
        let Some(OptionHeader { option, length }) = header else {
            self.violate(Violation::OptionMagic);
            return false;
        };
        self.options += 1;
        if self.options > OPTIONS_MAX {
            self.violate(Violation::TooManyOptions);
            return false;
        }
        let remaining = length as usize;
        self.state = if length <= OPTION_BYTES_MAX {
            State::OptionData { option, length: remaining }
        } else if option == wire::option_code::EXPORT_NAME {
            self.violate(Violation::UnknownExport);
            return false;
        } else {
            State::OptionSkip { option, remaining }
        };
        true
    }

    fn on_option(&mut self, option: u32, data: &[u8]) {
        match self.negotiated.on_option(&self.export, option, data, self.output.tail()) {
            Next::Haggle => self.state = State::Option,
            Next::Transmit => self.state = State::Request,
            Next::Abort => self.state = State::Draining(End::Aborted),
            Next::UnknownExport => self.violate(Violation::UnknownExport),
        }
    }

    fn parse_request_header(&mut self) -> bool {
        let Some(header) = RequestHeader::decode(&self.input.split_to(wire::REQUEST_HEADER_BYTES)) else {
            self.violate(Violation::RequestMagic);
            return false;
        };
        if header.command == command_code::DISC {
            self.state = State::Draining(End::Disconnected);
            return false;
        }
        let is_write = header.command == command_code::WRITE;
        if is_write && header.length > PAYLOAD_BYTES_MAX {
            self.violate(Violation::WriteTooLong(header.length));
            return false;
        }
        match command::check(&header, self.export.geometry, self.negotiated) {
            Ok(kind) => self.start(&header, kind),
            Err(rejected) if is_write => {
                let remaining = header.length as usize;
                self.state = State::PayloadSkip { cookie: header.cookie, rejected, remaining };
            }
            Err(rejected) => self.reply_rejected(header.cookie, rejected),
        }
        true
    }

    fn start(&mut self, header: &RequestHeader, kind: Kind) {
        let id = self.command_next;
        self.command_next += 1;
        let in_one_piece = !self.negotiated.structured || header.flags & wire::command_flag::DF != 0;
        let command = Command {
            cookie: header.cookie,
            kind,
            offset: header.offset,
            length: header.length,
            gathered: (kind == Kind::Read && in_one_piece).then(Vec::new),
            parts_open: 0,
            growing: kind == Kind::Write,
            error: None,
        };
        self.held += command.held();
        self.commands.insert(id, command);
        if kind == Kind::Write {
            let (offset, remaining) = (header.offset, header.length as usize);
            self.state = State::Payload { command: id, offset, remaining };
            return;
        }
        let (mut offset, mut remaining) = (header.offset, u64::from(header.length));
        loop {
            let length = remaining.min(kind.part_bytes_max());
            let operation = match kind {
                Kind::Read => Operation::Read { offset, length: length as u32 },
                Kind::WriteZeroes => Operation::WriteZeroes { offset, length },
                Kind::Trim => Operation::Discard { offset, length },
                Kind::Flush => Operation::Flush,
                Kind::Write => unreachable!("a write's parts come with its payload"),
            };
            self.add_part(id, offset, length as u32, operation);
            offset += length;
            remaining -= length;
            if remaining == 0 {
                break;
            }
        }
    }

    fn parse_payload(&mut self, command: u64, offset: u64, remaining: usize) -> bool {
        let length = remaining.min(REQUEST_BYTES_MAX as usize);
        if self.input.len() < length {
            return false;
        }
        let data = self.input.split_to(length).freeze();
        self.add_part(command, offset, length as u32, Operation::Write { offset, data });
        let remaining = remaining - length;
        if remaining > 0 {
            self.state = State::Payload { command, offset: offset + length as u64, remaining };
        } else {
            self.state = State::Request;
            self.commands.get_mut(&command).expect("its payload was awaited").growing = false;
            self.finish_if_done(command);
        }
        true
    }

    fn add_part(&mut self, id: u64, offset: u64, length: u32, operation: Operation) {
        let command = self.commands.get_mut(&id).expect("parts are added to a command that is there");
        let mut number = 0;
        if let Some(gathered) = &mut command.gathered {
            number = gathered.len();
            gathered.push(Bytes::new());
        }
        command.parts_open += 1;
        let part = self.part_next;
        self.part_next += 1;
        self.parts.insert(part, Part { command: id, number, offset, length });
        self.ready.push_back(Request { id: RequestId(part), operation });
    }

    fn finish_if_done(&mut self, id: u64) {
        let Some(command) = self.commands.get(&id) else { return };
        if command.parts_open > 0 || command.growing {
            return;
        }
        let command = self.commands.remove(&id).expect("it was just found");
        self.held -= command.held();
        let Command { cookie, kind, offset, length, error, gathered, .. } = command;
        let tail = self.output.tail();
        match (error, self.negotiated.structured) {
            (Some(error), true) => {
                wire::put_error_chunk(tail, command::errno(error, kind), &error.to_string(), cookie);
            }
            (Some(error), false) => wire::put_simple_reply(tail, Some(command::errno(error, kind)), cookie),
            (None, structured) => match gathered {
                Some(parts) => {
                    if structured {
                        let length = length + wire::OFFSET_DATA_OVERHEAD;
                        wire::put_chunk(tail, chunk::FLAG_DONE, chunk::OFFSET_DATA, cookie, length);
                        tail.put_u64(offset);
                    } else {
                        wire::put_simple_reply(tail, None, cookie);
                    }
                    parts.into_iter().for_each(|data| self.output.put_data(data));
                }
                // The last chunk of data was the final one.
                None if kind == Kind::Read => {}
                None if structured => wire::put_chunk(tail, chunk::FLAG_DONE, chunk::NONE, cookie, 0),
                None => wire::put_simple_reply(tail, None, cookie),
            },
        }
    }

    fn reply_rejected(&mut self, cookie: u64, rejected: Rejected) {
        let Rejected { errno, message } = rejected;
        if self.negotiated.structured {
            wire::put_error_chunk(self.output.tail(), errno, message, cookie);
        } else {
            wire::put_simple_reply(self.output.tail(), Some(errno), cookie);
        }
    }

    /// Drops a command that can never be answered; its parts' completions are taken and forgotten.
    fn forget(&mut self, id: u64) {
        if let Some(command) = self.commands.remove(&id) {
            self.held -= command.held();
        }
    }

    fn violate(&mut self, violation: Violation) {
        self.state = State::Ended(End::Violation(violation));
        self.input.clear();
        self.output.clear();
        self.commands.clear();
        self.parts.clear();
        self.ready.clear();
        self.held = 0;
    }

    fn settle(&mut self) {
        if let State::Draining(end) = self.state
            && self.parts.is_empty()
            && self.output.is_empty()
        {
            assert!(self.commands.is_empty() && self.held == 0, "a command without parts is answered");
            self.state = State::Ended(end);
        }
    }
}

impl Command {
    /// Bytes it may keep in memory until it is answered.
    fn held(&self) -> usize {
        match self.kind {
            Kind::Read | Kind::Write => self.length as usize,
            Kind::WriteZeroes | Kind::Trim | Kind::Flush => 0,
        }
    }
}
