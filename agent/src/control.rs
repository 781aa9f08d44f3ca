//! The control socket: one JSON object per line in, one per line out, in order.
//!
//! `{"version":1,"command":"attach","volume":{...},"wait_ms":30000}` answers once the device is served or cannot be;
//! `{"version":1,"command":"detach","volume":"<id>","force":false,"keep":false,"wait_ms":30000}` once the volume is
//! free, or, with `keep`, once this machine has let go of it and still is its holder;
//! `{"version":1,"command":"set-formatted","volume":"<id>","formatted":"formatting"}` once a quorum has recorded it;
//! `{"version":1,"command":"status"}` and `{"version":1,"command":"shutdown"}` at once. An answer is
//! `{"version":1,"result":...}` or `{"version":1,"error":{"code":"...","message":"..."}}`. A command that is not
//! through after `wait_ms` goes on; the answer is then the error `pending`.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use holdfast_consensus::Timestamp;
use holdfast_id::{NodeId, VolumeId};
use holdfast_protocol::session::Formatted;
use mio::net::UnixStream;
use serde::{Deserialize, Serialize};

use crate::config::{Address, VolumeSpec};

pub const CONTROL_VERSION: u32 = 1;
/// Longest command; an `attach` with sixteen nodes takes three thousand bytes.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Longest `wait_ms`; a caller that has more patience asks again.
const WAIT_MAX: Duration = Duration::from_secs(300);
const WAIT_DEFAULT_MS: u64 = 30_000;

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Command {
    Attach {
        volume: VolumeSpec,
        #[serde(default = "wait_default")]
        wait_ms: u64,
    },
    Detach {
        volume: VolumeId,
        /// Also while a client uses the device; its requests fail from then on.
        #[serde(default)]
        force: bool,
        /// The cluster keeps the attachment, which can be resumed: whoever made it for this machine ends it.
        #[serde(default)]
        keep: bool,
        #[serde(default = "wait_default")]
        wait_ms: u64,
    },
    /// Records in the volume whether it carries a file system; the answer comes once a quorum has it.
    SetFormatted {
        volume: VolumeId,
        formatted: FormattedState,
        #[serde(default = "wait_default")]
        wait_ms: u64,
    },
    Status {},
    Shutdown {},
}

/// Why a command was not done, for programs; the message beside it is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    Malformed,
    Version,
    NotFound,
    /// A volume is attached already, otherwise than asked for.
    Exists,
    /// A client uses the device.
    InUse,
    Refused,
    Fenced,
    Failed,
    Pending,
    ShuttingDown,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Failure {
    pub code: Code,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// The epoch is asked for, or about to be recorded.
    Attaching,
    /// The device is served.
    Attached,
    Detaching,
    /// The epoch is lost; the device fails every request until the volume is detached by command.
    Fenced,
    /// The cluster said no; nothing is held.
    Refused,
    /// This machine could not do its part.
    Failed,
}

/// [`Formatted`] in the words of this socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FormattedState {
    None,
    /// A file system is being made; what is there is not one yet.
    Formatting,
    Formatted,
}

impl From<FormattedState> for Formatted {
    fn from(state: FormattedState) -> Formatted {
        match state {
            FormattedState::None => Formatted::None,
            FormattedState::Formatting => Formatted::Formatting,
            FormattedState::Formatted => Formatted::Formatted,
        }
    }
}

impl From<Formatted> for FormattedState {
    fn from(formatted: Formatted) -> FormattedState {
        match formatted {
            Formatted::None => FormattedState::None,
            Formatted::Formatting => FormattedState::Formatting,
            Formatted::Formatted => FormattedState::Formatted,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub node: NodeId,
    pub address: Address,
    pub connected: bool,
    /// Why there is no connection.
    pub reason: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    pub volume: VolumeId,
    pub state: VolumeState,
    /// Why it is not served, or does not answer.
    pub reason: Option<String>,
    pub epoch: Option<u64>,
    pub session: Option<u64>,
    pub leader: Option<NodeId>,
    pub term: u64,
    pub outstanding: u64,
    /// How long the oldest outstanding request waits.
    pub waiting_ms: u64,
    /// Longest time without a completion while requests were outstanding, the running one included.
    pub longest_gap_ms: u64,
    /// Clients of the device.
    pub connections: usize,
    /// Taken from users of the device since the agent began.
    pub requests: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub size_bytes: Option<u64>,
    pub nbd_socket: Option<PathBuf>,
    /// The loop device, once it is there.
    pub device: Option<PathBuf>,
    /// Known once the epoch is ours.
    pub formatted: Option<FormattedState>,
    pub nodes: Vec<NodeStatus>,
}

#[derive(Serialize)]
struct Answer<T> {
    version: u32,
    #[serde(flatten)]
    body: T,
}

fn wait_default() -> u64 {
    WAIT_DEFAULT_MS
}

pub(crate) fn wait_until(now: Timestamp, wait_ms: u64) -> Timestamp {
    now + Duration::from_millis(wait_ms).min(WAIT_MAX)
}

/// The version is looked at first: what else a later one contains is not ours to judge.
pub(crate) fn parse(line: &[u8]) -> Result<Command, Failure> {
    let malformed = |error: serde_json::Error| Failure { code: Code::Malformed, message: error.to_string() };
    let mut object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(line).map_err(malformed)?;
    match object.remove("version") {
        Some(version) if version == CONTROL_VERSION => {}
        version => {
            let version = version.unwrap_or_default();
            let message = format!("version {version} is not spoken here, {CONTROL_VERSION} is");
            return Err(Failure { code: Code::Version, message });
        }
    }
    serde_json::from_value(serde_json::Value::Object(object)).map_err(malformed)
}

pub(crate) struct ControlConnection {
    /// Tells connections apart that used the same slot.
    pub serial: u64,
    /// A command is not answered yet; the next one waits for it.
    pub waiting: bool,
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    readable: bool,
    writable: bool,
    /// No more commands; it goes when the output is out.
    closing: bool,
    ended: bool,
}

impl ControlConnection {
    pub fn new(stream: UnixStream, serial: u64) -> ControlConnection {
        ControlConnection {
            serial,
            waiting: false,
            stream,
            input: Vec::new(),
            output: Vec::new(),
            readable: true,
            writable: true,
            closing: false,
            ended: false,
        }
    }

    pub fn has_ended(&self) -> bool {
        self.ended
    }

    pub fn on_ready(&mut self, event: &mio::event::Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
    }

    pub fn answer<T: Serialize>(&mut self, result: Result<T, Failure>) {
        #[derive(Serialize)]
        #[serde(rename_all = "kebab-case")]
        enum Body<T> {
            Result(T),
            Error(Failure),
        }
        let body = match result {
            Ok(result) => Body::Result(result),
            Err(failure) => Body::Error(failure),
        };
        let answer = Answer { version: CONTROL_VERSION, body };
        serde_json::to_writer(&mut self.output, &answer).expect("answers have text keys and memory takes all");
        self.output.push(b'\n');
        self.waiting = false;
    }

    /// The next command, once the former is answered and the answer is out.
    pub fn next_line(&mut self) -> Option<Vec<u8>> {
        while !self.ended {
            self.write();
            if self.waiting || !self.output.is_empty() {
                return None;
            }
            if self.closing {
                self.ended = true;
                return None;
            }
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let rest = self.input.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.input, rest);
                line.pop();
                return Some(line);
            }
            if self.input.len() > LINE_BYTES_MAX {
                let message = format!("a command is at most {LINE_BYTES_MAX} bytes long");
                self.answer::<()>(Err(Failure { code: Code::Malformed, message }));
                self.closing = true;
                self.input = Vec::new();
                continue;
            }
            if !self.readable {
                return None;
            }
            self.read();
        }
        None
    }

    /// Writes what is answered, as far as the socket takes it.
    pub fn write(&mut self) {
        while self.writable && !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.ended = true,
            }
            if self.ended {
                return;
            }
        }
    }

    fn read(&mut self) {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk) {
            // It may still listen; what has no end of line is no command.
            Ok(0) => self.closing = true,
            Ok(length) => self.input.extend_from_slice(&chunk[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.ended = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AttachMode;

    const ID: &str = "00000000-0000-0000-0000-000000000001";

    #[test]
    fn commands_are_read_as_they_are_documented() {
        let line = format!(
            r#"{{"version":1,"command":"attach","volume":{{"volume":"{ID}","mode":"take-over","nbd_socket":"/s",
            "nodes":[{{"node":"{ID}","address":"127.0.0.1:7"}}]}}}}"#
        );
        let Ok(Command::Attach { volume, wait_ms }) = parse(line.as_bytes()) else { panic!("{line}") };
        assert_eq!((volume.mode, wait_ms), (AttachMode::TakeOver, WAIT_DEFAULT_MS));
        assert_eq!(volume.check(), Ok(()));
        let line = format!(r#"{{"version":1,"command":"detach","volume":"{ID}","wait_ms":5}}"#);
        let volume = ID.parse().unwrap();
        assert_eq!(parse(line.as_bytes()).unwrap(), Command::Detach { volume, force: false, keep: false, wait_ms: 5 });
        assert_eq!(parse(br#"{"command":"status","version":1}"#).unwrap(), Command::Status {});
        assert_eq!(parse(br#"{"version":1,"command":"shutdown"}"#).unwrap(), Command::Shutdown {});
    }

    #[test]
    fn anything_else_is_refused_with_its_reason() {
        let cases: [(&[u8], Code); 8] = [
            (b"", Code::Malformed),
            (b"status", Code::Malformed),
            (b"[1]", Code::Malformed),
            (br#"{"command":"status"}"#, Code::Version),
            (br#"{"version":2,"command":"from the future"}"#, Code::Version),
            (br#"{"version":1,"command":"format"}"#, Code::Malformed),
            (br#"{"version":1,"command":"status","more":1}"#, Code::Malformed),
            (br#"{"version":1,"command":"detach","volume":"../x"}"#, Code::Malformed),
        ];
        for (line, code) in cases {
            let failure = parse(line).expect_err("refused");
            assert_eq!(failure.code, code, "{}", String::from_utf8_lossy(line));
            assert!(!failure.message.is_empty());
        }
    }
}
