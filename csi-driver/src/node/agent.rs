//! The attach agent of this machine, as its control socket speaks: one JSON object per line each way.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use holdfast_agent::{AttachMode, CONTROL_VERSION, Code, FormattedState, NodeAddress, VolumeSpec, VolumeStatus};
use holdfast_id::VolumeId;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// How long the agent may work on a command before it says `pending`. Kubelet gives an RPC two minutes, and comes
/// again.
const WAIT: Duration = Duration::from_secs(30);
/// Beyond [`WAIT`], for the answer to come.
const ANSWER_WITHIN: Duration = Duration::from_secs(40);
/// A status of every volume that an agent can have, with sixteen nodes each.
const ANSWER_BYTES_MAX: u64 = 8 << 20;
/// Connections at once: the agent takes sixteen, and people want one, too.
const CONNECTIONS_MAX: usize = 12;
const CONNECTION_WITHIN: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("the attach agent does not listen on {path}")]
    Unreachable { path: PathBuf, source: io::Error },
    #[error("the attach agent does not answer")]
    Silent(#[source] io::Error),
    #[error("the attach agent's answer cannot be read")]
    Garbled(#[source] serde_json::Error),
    #[error("{CONNECTIONS_MAX} requests to the attach agent are under way already")]
    Busy,
    #[error("the attach agent: {message}")]
    Refused { code: Code, message: String },
}

pub struct Agent {
    socket: PathBuf,
    connections: Mutex<usize>,
    freed: Condvar,
}

#[derive(Deserialize)]
struct Answer {
    result: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    code: Code,
    message: String,
}

#[derive(Deserialize)]
struct Status {
    volumes: Vec<VolumeStatus>,
}

impl Agent {
    pub fn new(socket: PathBuf) -> Agent {
        Agent { socket, connections: Mutex::new(0), freed: Condvar::new() }
    }

    /// Every volume that is attached here, or was and is not let go.
    pub fn status(&self) -> Result<Vec<VolumeStatus>, AgentError> {
        Ok(self.call::<Status>(json!({ "command": "status" }))?.volumes)
    }

    pub fn volume(&self, volume: VolumeId) -> Result<Option<VolumeStatus>, AgentError> {
        Ok(self.status()?.into_iter().find(|status| status.volume == volume))
    }

    /// Serves the volume as a device in an epoch that was granted to this machine.
    pub fn attach(&self, volume: VolumeId, epoch: u64, nodes: Vec<NodeAddress>) -> Result<VolumeStatus, AgentError> {
        let spec = VolumeSpec {
            volume,
            nodes,
            mode: AttachMode::Resume { epoch },
            nbd_socket: None,
            device: true,
            unavailable_after_ms: None,
        };
        self.call(json!({ "command": "attach", "volume": spec, "wait_ms": WAIT.as_millis() as u64 }))
    }

    /// Ends the device and keeps the epoch, which the controller ends. What is not there is let go of already.
    pub fn release(&self, volume: VolumeId, force: bool) -> Result<(), AgentError> {
        let wait_ms = WAIT.as_millis() as u64;
        let command =
            json!({ "command": "detach", "volume": volume, "force": force, "keep": true, "wait_ms": wait_ms });
        match self.call::<()>(command) {
            Err(AgentError::Refused { code: Code::NotFound, .. }) => Ok(()),
            result => result,
        }
    }

    pub fn set_formatted(&self, volume: VolumeId, formatted: FormattedState) -> Result<(), AgentError> {
        self.call(json!({
            "command": "set-formatted", "volume": volume, "formatted": formatted, "wait_ms": WAIT.as_millis() as u64
        }))
    }

    fn call<T: DeserializeOwned>(&self, mut command: Value) -> Result<T, AgentError> {
        let _slot = self.slot()?;
        let stream = UnixStream::connect(&self.socket);
        let mut stream = stream.map_err(|source| AgentError::Unreachable { path: self.socket.clone(), source })?;
        stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(AgentError::Silent)?;
        stream.set_write_timeout(Some(ANSWER_WITHIN)).map_err(AgentError::Silent)?;
        command["version"] = CONTROL_VERSION.into();
        writeln!(stream, "{command}").map_err(AgentError::Silent)?;
        let mut line = String::new();
        BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut line).map_err(AgentError::Silent)?;
        if line.is_empty() {
            return Err(AgentError::Silent(io::ErrorKind::UnexpectedEof.into()));
        }
        read(&line)
    }

    fn slot(&self) -> Result<Slot<'_>, AgentError> {
        let taken = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |taken: &mut usize| *taken >= CONNECTIONS_MAX;
        let waited = self.freed.wait_timeout_while(taken, CONNECTION_WITHIN, full);
        let (mut taken, result) = waited.unwrap_or_else(PoisonError::into_inner);
        if result.timed_out() {
            return Err(AgentError::Busy);
        }
        *taken += 1;
        Ok(Slot(self))
    }
}

struct Slot<'a>(&'a Agent);

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *self.0.connections.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

fn read<T: DeserializeOwned>(line: &str) -> Result<T, AgentError> {
    let answer: Answer = serde_json::from_str(line).map_err(AgentError::Garbled)?;
    match answer.error {
        Some(Refusal { code, message }) => Err(AgentError::Refused { code, message }),
        None => serde_json::from_value(answer.result.unwrap_or_default()).map_err(AgentError::Garbled),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_and_refusals_keep_their_code() {
        assert!(read::<()>(r#"{"version":1,"result":null}"#).is_ok());
        let refused = read::<()>(r#"{"version":1,"error":{"code":"in-use","message":"/dev/loop1 is in use"}}"#);
        assert!(matches!(refused, Err(AgentError::Refused { code: Code::InUse, .. })));
        assert!(read::<Status>(r#"{"version":1,"result":{"holder":"n","volumes":[]}}"#).unwrap().volumes.is_empty());
        for line in ["", "{", r#"{"version":1,"result":{}}"#] {
            assert!(matches!(read::<Status>(line), Err(AgentError::Garbled(_))), "{line}");
        }
    }
}
