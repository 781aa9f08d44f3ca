//! How a refusal travels in a gRPC status: a stable word for programs, and where to ask instead.
//!
//! The words stand in the metadata, as text, so that any client can read them without our messages.

use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Code, Status};

/// Metadata key of the stable word, such as `NoPlacement`; the codes are those of `Reason.code`.
pub const REASON_KEY: &str = "holdfast-reason";
/// Metadata key of the leader hint: node id, a space, API address.
pub const LEADER_KEY: &str = "holdfast-leader";
/// The reason beside every [`LEADER_KEY`], also where the leader is not known.
pub const NOT_LEADER: &str = "NotLeader";

/// Longest message put into a status. Headers are bounded by the peers (16 KiB by default) and percent-encoding may
/// treble a text.
const MESSAGE_BYTES_MAX: usize = 2048;

/// Who leads what was asked for, as far as the refusing node knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaderHint {
    /// Textual node id.
    pub node_id: String,
    pub api_address: String,
}

/// A status with the machine-readable reason. A `reason` that is not printable ASCII is left out.
pub fn refuse(code: Code, reason: &str, message: &str) -> Status {
    let mut status = Status::new(code, shorten(message));
    if let Ok(value) = MetadataValue::<Ascii>::try_from(reason) {
        status.metadata_mut().insert(REASON_KEY, value);
    }
    status
}

/// This node is not the one to ask. UNAVAILABLE, so that clients which know nothing of hints try again. `what` is led
/// elsewhere: `the metadata plane`, `the volume`.
pub fn not_leader(what: &str, leader: Option<&LeaderHint>) -> Status {
    let Some(hint) = leader else {
        return refuse(Code::Unavailable, NOT_LEADER, &format!("{what} has no leader that this node knows"));
    };
    let message = format!("{what} is led by node {} at {}", hint.node_id, hint.api_address);
    let mut status = refuse(Code::Unavailable, NOT_LEADER, &message);
    if let Ok(value) = MetadataValue::<Ascii>::try_from(format!("{} {}", hint.node_id, hint.api_address)) {
        status.metadata_mut().insert(LEADER_KEY, value);
    }
    status
}

/// The machine-readable reason; `None` where the status did not come from a storage node.
pub fn reason(status: &Status) -> Option<&str> {
    status.metadata().get(REASON_KEY)?.to_str().ok()
}

/// Where to ask instead; `None` where the refusal is another one, or the leader is not known.
pub fn leader(status: &Status) -> Option<LeaderHint> {
    let (node_id, api_address) = status.metadata().get(LEADER_KEY)?.to_str().ok()?.split_once(' ')?;
    if node_id.is_empty() || api_address.is_empty() {
        return None;
    }
    Some(LeaderHint { node_id: node_id.to_owned(), api_address: api_address.to_owned() })
}

fn shorten(message: &str) -> String {
    if message.len() <= MESSAGE_BYTES_MAX {
        return message.to_owned();
    }
    let mut end = MESSAGE_BYTES_MAX;
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}...", &message[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Through the header map, as a client would see it.
    fn over_the_wire(status: Status) -> Status {
        let response: tonic::codegen::http::Response<()> = status.into_http();
        Status::from_header_map(response.headers()).expect("a status is in the headers")
    }

    #[test]
    fn reason_and_leader_survive_the_wire() {
        let hint = LeaderHint { node_id: "00000000-0000-0000-0000-000000000001".into(), api_address: "n1:7001".into() };
        let status = over_the_wire(not_leader("the volume", Some(&hint)));
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(reason(&status), Some(NOT_LEADER));
        assert_eq!(leader(&status), Some(hint));
        assert_eq!(leader(&over_the_wire(not_leader("the volume", None))), None);
        assert_eq!(reason(&Status::internal("not ours")), None);
    }

    #[test]
    fn long_messages_and_bad_reasons_do_no_harm() {
        let status = over_the_wire(refuse(Code::ResourceExhausted, "not\nascii", &"é".repeat(5000)));
        assert_eq!(reason(&status), None);
        assert!(status.message().len() <= MESSAGE_BYTES_MAX + 3);
        assert!(status.message().ends_with("..."));
    }

    #[test]
    fn a_malformed_hint_is_none() {
        for text in ["", " ", "id", "id ", " n1:1"] {
            let mut status = Status::unavailable("x");
            status.metadata_mut().insert(LEADER_KEY, text.parse().expect("ascii"));
            assert_eq!(leader(&status), None, "{text:?}");
        }
    }
}
