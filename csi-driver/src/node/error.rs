//! Why an RPC of the node service was not done, and the gRPC code for each reason.

use std::io;
use std::path::PathBuf;

use holdfast_agent::Code as AgentCode;
use holdfast_host::command::CommandError;
use holdfast_host::file_system::FileSystemError;
use holdfast_host::mounts::MountsError;
use tonic::{Code, Status};

use super::agent::AgentError;
use super::plan::Refusal;
use super::record::RecordError;
use crate::capability::CapabilityError;
use crate::locks::Locked;
use crate::rpc;

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{what} is not understood: {detail}")]
    Malformed { what: &'static str, detail: String },
    #[error("{what} is no absolute path: {path:?}")]
    NotAbsolute { what: &'static str, path: PathBuf },
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    #[error(transparent)]
    Locked(#[from] Locked),
    #[error("no volume can be named {0:?}")]
    NotOurs(String),
    #[error("volume {0} is not staged on this node")]
    NotStaged(String),
    #[error("volume {name} is not at {path}")]
    NotThere { name: String, path: PathBuf },
    #[error("volume {name} is staged at {path} already, otherwise than asked for: unstage it first")]
    StagedOtherwise { name: String, path: PathBuf },
    #[error("volume {name} is published at {path} already, and its access mode allows one place only")]
    PublishedElsewhere { name: String, path: PathBuf },
    #[error("volume {name} is published at {path} already, read-only")]
    PublishedOtherwise { name: String, path: PathBuf },
    #[error("{path} is in the way")]
    Path { path: PathBuf, source: io::Error },
    #[error("the device has {now} bytes, and {wanted} are asked for: the volume has not grown that far yet")]
    NotGrown { now: u64, wanted: u64 },
    #[error("the device has {now} bytes, more than the {limit} that are allowed")]
    TooLarge { now: u64, limit: u64 },
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the device changes under the request")]
    Unsettled,
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Mounts(#[from] MountsError),
    #[error(transparent)]
    FileSystem(#[from] FileSystemError),
}

impl NodeError {
    fn code(&self) -> Code {
        match self {
            NodeError::Missing(_)
            | NodeError::Malformed { .. }
            | NodeError::NotAbsolute { .. }
            | NodeError::Capability(_) => Code::InvalidArgument,
            NodeError::Locked(_) | NodeError::Unsettled | NodeError::Refused(Refusal::Detaching) => Code::Aborted,
            NodeError::NotOurs(_) | NodeError::NotThere { .. } => Code::NotFound,
            NodeError::StagedOtherwise { .. } | NodeError::PublishedOtherwise { .. } => Code::AlreadyExists,
            NodeError::NotStaged(_)
            | NodeError::PublishedElsewhere { .. }
            | NodeError::Refused(Refusal::Fenced { .. } | Refusal::Stale { .. }) => Code::FailedPrecondition,
            NodeError::Path { .. } | NodeError::Record(_) => Code::Internal,
            NodeError::NotGrown { .. } => Code::Unavailable,
            NodeError::TooLarge { .. } => Code::OutOfRange,
            NodeError::Agent(error) => agent_code(error),
            NodeError::Mounts(MountsError::Read(_)) => Code::Internal,
            NodeError::Mounts(MountsError::Command(error)) => command_code(error),
            NodeError::FileSystem(error) => match error {
                FileSystemError::Unknown(_) => Code::InvalidArgument,
                FileSystemError::Missing(_) | FileSystemError::Other { .. } | FileSystemError::NotWhileMounted(_) => {
                    Code::FailedPrecondition
                }
                FileSystemError::Command(error) => command_code(error),
                FileSystemError::Io { .. } | FileSystemError::Size(_) => Code::Internal,
            },
        }
    }
}

impl From<NodeError> for Status {
    fn from(error: NodeError) -> Status {
        Status::new(error.code(), rpc::text(&error))
    }
}

fn agent_code(error: &AgentError) -> Code {
    match error {
        AgentError::Unreachable { .. } | AgentError::Silent(_) | AgentError::Busy => Code::Unavailable,
        AgentError::Garbled(_) => Code::Internal,
        AgentError::Refused { code, .. } => match code {
            AgentCode::Malformed | AgentCode::Version => Code::Internal,
            AgentCode::NotFound => Code::NotFound,
            // Another attachment stands in the way, is used, or was taken over.
            AgentCode::Exists | AgentCode::InUse | AgentCode::Refused | AgentCode::Fenced => Code::FailedPrecondition,
            AgentCode::Failed => Code::Internal,
            AgentCode::Pending | AgentCode::ShuttingDown => Code::Unavailable,
        },
    }
}

fn command_code(error: &CommandError) -> Code {
    match error {
        CommandError::Start { .. } | CommandError::Failed { .. } => Code::Internal,
        CommandError::TimedOut { .. } => Code::DeadlineExceeded,
        CommandError::Stuck => Code::Unavailable,
    }
}
