//! [`CallError`]: what a call came to where it did not succeed.

use holdfast_api::refusal;
use tonic::{Code, Status};

#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// Somebody who may say so has refused; asking again changes nothing unless the world does.
    #[error("{message}{}", parenthesis(reason))]
    Refused {
        code: Code,
        /// The stable word, such as `NoPlacement`; empty where the refusal did not come from a Holdfast process.
        reason: String,
        message: String,
    },
    /// Nobody has answered for what leads within the time; it may well succeed later.
    #[error("no node answers for {what}: {last}")]
    NoLeader {
        /// `the metadata plane`, or a volume.
        what: String,
        /// The last refusal or failure, in words.
        last: String,
    },
    /// No node accepts our certificate, or we accept none of theirs: waiting mends nothing.
    #[error("no node answers for {what}: {last}")]
    CertificateRefused { what: String, last: String },
    #[error("{address} cannot be reached: {detail}")]
    Unreachable { address: String, detail: String },
}

fn parenthesis(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(" ({reason})") }
}

impl CallError {
    /// The status in which it travels on, to callers of gRPC.
    pub fn code(&self) -> Code {
        match self {
            CallError::Refused { code, .. } => *code,
            CallError::NoLeader { .. } | CallError::Unreachable { .. } => Code::Unavailable,
            CallError::CertificateRefused { .. } => Code::Unauthenticated,
        }
    }

    /// The stable word of a refusal; empty where there was none.
    pub fn reason(&self) -> &str {
        match self {
            CallError::Refused { reason, .. } => reason,
            _ => "",
        }
    }

    pub(crate) fn refused(status: &Status) -> CallError {
        CallError::Refused {
            code: status.code(),
            reason: refusal::reason(status).unwrap_or_default().to_owned(),
            message: message(status),
        }
    }
}

/// Of a connection that was not made, the innermost cause says why.
pub(crate) fn unreachable(address: &str, error: &(dyn std::error::Error + 'static)) -> CallError {
    let mut innermost = error;
    while let Some(next) = innermost.source() {
        innermost = next;
    }
    CallError::Unreachable { address: address.to_owned(), detail: innermost.to_string() }
}

/// Where the connection broke under the call, only the innermost cause says why.
pub(crate) fn message(status: &Status) -> String {
    if refusal::reason(status).is_some() {
        return status.message().to_owned();
    }
    let mut innermost = std::error::Error::source(status);
    while let Some(next) = innermost.and_then(std::error::Error::source) {
        innermost = Some(next);
    }
    match innermost {
        Some(cause) => format!("{cause}; a node that always hangs up does not accept the certificate"),
        None => status.message().to_owned(),
    }
}

/// Also where the connection broke under the call, as when that node is killed: every call may be repeated.
pub(crate) fn is_worth_another_try(status: &Status) -> bool {
    // A remembered connection that cannot be made again has no source: tonic says UNKNOWN, before anything was sent.
    let unready = status.code() == Code::Unknown && refusal::reason(status).is_none();
    let broken = std::error::Error::source(status).is_some() || unready;
    broken || status.code() == Code::Unavailable || matches!(refusal::reason(status), Some("NotReady" | "NoReplica"))
}
