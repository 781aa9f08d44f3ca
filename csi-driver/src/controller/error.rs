//! Why an RPC of the controller service was not done, and the gRPC code for each reason.

use std::time::Duration;

use holdfast_cluster_client::CallError;
use tonic::{Code, Status};

use super::cluster::ClusterError;
use super::page::PageError;
use super::spec::SpecError;
use crate::capability::CapabilityError;
use crate::locks::Locked;
use crate::rpc;

#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    #[error(transparent)]
    Page(#[from] PageError),
    #[error(transparent)]
    Locked(#[from] Locked),
    #[error("there is no volume {0:?}")]
    UnknownVolume(String),
    #[error("there is no node {0:?}")]
    UnknownNode(String),
    #[error("there is a volume {name} already, and {how}")]
    Differs { name: String, how: String },
    #[error("volume {name}: {message}")]
    Refused { name: String, code: Code, message: String },
    #[error("volume {name} is not through after {} s: {why}", .within.as_secs())]
    Pending { name: String, within: Duration, why: String },
    #[error("volume {name} is attached to node {node}")]
    Attached { name: String, node: String },
    #[error("volume {0} has not been made yet")]
    NotMade(String),
    #[error("a volume cannot shrink: it has {now} bytes, and at most {limit} are asked for")]
    Shrink { now: u64, limit: u64 },
    #[error("disk {disk} of node {node} holds a copy and has {room} bytes left for it, {growth} are needed")]
    NoRoom { node: String, disk: String, room: u64, growth: u64 },
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("the Kubernetes API does not do it")]
    Kubernetes(#[from] Box<kube::Error>),
    #[error("the Kubernetes API does not answer within {} s", .0.as_secs())]
    Silent(Duration),
}

impl From<kube::Error> for ControllerError {
    fn from(error: kube::Error) -> ControllerError {
        ControllerError::Kubernetes(Box::new(error))
    }
}

impl ControllerError {
    fn code(&self) -> Code {
        match self {
            ControllerError::Missing(_) | ControllerError::Capability(_) => Code::InvalidArgument,
            ControllerError::Spec(error) => match error {
                SpecError::Range | SpecError::Size => Code::OutOfRange,
                SpecError::NoName
                | SpecError::Capability(_)
                | SpecError::Parameter { .. }
                | SpecError::UnknownParameter(_)
                | SpecError::OtherCluster { .. }
                | SpecError::Source
                | SpecError::Mutable => Code::InvalidArgument,
            },
            ControllerError::Page(PageError::Negative) => Code::InvalidArgument,
            ControllerError::Page(PageError::Token(_)) | ControllerError::Locked(_) => Code::Aborted,
            ControllerError::UnknownVolume(_) | ControllerError::UnknownNode(_) => Code::NotFound,
            ControllerError::Differs { .. } => Code::AlreadyExists,
            ControllerError::Refused { code, .. } => *code,
            ControllerError::Pending { .. } | ControllerError::Silent(_) => Code::DeadlineExceeded,
            ControllerError::Attached { .. } => Code::FailedPrecondition,
            ControllerError::NotMade(_) => Code::Unavailable,
            // The resizer takes it for final, and says so in the claim.
            ControllerError::Shrink { .. } | ControllerError::NoRoom { .. } => Code::OutOfRange,
            ControllerError::Cluster(error) => match error {
                ClusterError::File { .. } | ClusterError::Credentials(_) => Code::Unavailable,
                ClusterError::Call(CallError::Refused { code, reason, .. }) => match reason.as_str() {
                    "UnknownVolume" => Code::NotFound,
                    _ => *code,
                },
                ClusterError::Call(error) => error.code(),
            },
            ControllerError::Kubernetes(error) => match &**error {
                kube::Error::Api(status) if status.code == 404 => Code::NotFound,
                kube::Error::Api(status) if status.code == 409 => Code::Aborted,
                // Refused by the rules of the object.
                kube::Error::Api(status) if status.code == 422 => Code::InvalidArgument,
                kube::Error::Api(status) if status.code == 403 => Code::PermissionDenied,
                _ => Code::Unavailable,
            },
        }
    }
}

impl From<ControllerError> for Status {
    fn from(error: ControllerError) -> Status {
        Status::new(error.code(), rpc::text(&error))
    }
}
