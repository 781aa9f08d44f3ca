//! Who a peer is: a role and an identifier, told by its certificate as `holdfast://<role>/<id>`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use holdfast_id::NodeId;

/// What a certificate allows its bearer to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerRole {
    /// A storage node: accepts connections and makes them.
    Node,
    /// The agent of a machine that attaches volumes; only connects.
    Agent,
    /// A person's tool or the operator; only connects.
    Admin,
    /// The agent of one machine of a Kubernetes cluster, which attaches nothing by itself; only connects. Its holder's
    /// name is part of its identity.
    NodeAgent,
}

impl PeerRole {
    const ALL: [PeerRole; 4] = [PeerRole::Node, PeerRole::Agent, PeerRole::Admin, PeerRole::NodeAgent];

    pub(crate) fn code(self) -> u8 {
        match self {
            PeerRole::Node => 0,
            PeerRole::Agent => 1,
            PeerRole::Admin => 2,
            PeerRole::NodeAgent => 3,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<PeerRole> {
        Self::ALL.into_iter().find(|role| role.code() == code)
    }

    fn word(self) -> &'static str {
        match self {
            PeerRole::Node => "node",
            PeerRole::Agent => "agent",
            PeerRole::Admin => "admin",
            PeerRole::NodeAgent => "node-agent",
        }
    }
}

impl fmt::Display for PeerRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// `id` is never zero in a parsed identity; its text form is that of the identifiers of `holdfast_id`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIdentity {
    pub role: PeerRole,
    pub id: u128,
}

/// Longest name of a holder in a certificate: that of a Kubernetes node.
pub const HOLDER_BYTES_MAX: usize = 253;

/// All that a certificate says of its bearer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bearer {
    pub peer: PeerIdentity,
    /// Of a `node-agent`, and of no other: the only holder of volumes that it may be.
    pub holder: Option<Arc<str>>,
}

pub(crate) const URI_SCHEME: &str = "holdfast://";

impl PeerIdentity {
    pub fn uri(&self) -> String {
        format!("{URI_SCHEME}{self}")
    }

    pub fn from_uri(uri: &str) -> Result<PeerIdentity, ParseIdentityError> {
        uri.strip_prefix(URI_SCHEME).ok_or_else(|| ParseIdentityError::of(uri))?.parse()
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = format!("{:032x}", self.id);
        let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        write!(f, "{}/{}", self.role, parts.join("-"))
    }
}

impl fmt::Debug for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerIdentity({self})")
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} names no peer: holdfast://<node|agent|admin|node-agent>/<32 hexadecimal digits> is expected")]
pub struct ParseIdentityError {
    pub text: String,
}

impl ParseIdentityError {
    fn of(text: &str) -> ParseIdentityError {
        ParseIdentityError { text: text.chars().take(120).collect() }
    }
}

impl FromStr for PeerIdentity {
    type Err = ParseIdentityError;

    fn from_str(text: &str) -> Result<PeerIdentity, ParseIdentityError> {
        let parse = || {
            let (role, id) = text.split_once('/')?;
            let role = PeerRole::ALL.into_iter().find(|candidate| candidate.word() == role)?;
            // All identifiers share one text form; which kind this one is follows from the role.
            let id: NodeId = id.parse().ok()?;
            Some(PeerIdentity { role, id: id.as_u128() })
        };
        parse().ok_or_else(|| ParseIdentityError::of(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_round_trip() {
        for role in PeerRole::ALL {
            let identity = PeerIdentity { role, id: 0x0123_4567_89ab_cdef_0011_2233_4455_6677 };
            assert_eq!(PeerIdentity::from_uri(&identity.uri()), Ok(identity));
            assert_eq!(PeerRole::from_code(role.code()), Some(role));
        }
        let identity = PeerIdentity { role: PeerRole::Node, id: 1 };
        assert_eq!(identity.uri(), "holdfast://node/00000000-0000-0000-0000-000000000001");
    }

    #[test]
    fn other_uris_are_refused() {
        for text in [
            "",
            "holdfast://",
            "holdfast://node",
            "holdfast://node/",
            "holdfast://node/00000000-0000-0000-0000-000000000000",
            "holdfast://root/00000000-0000-0000-0000-000000000001",
            "holdfast://Node/00000000-0000-0000-0000-000000000001",
            "https://node/00000000-0000-0000-0000-000000000001",
            "holdfast://node/00000000-0000-0000-0000-000000000001/x",
        ] {
            assert!(PeerIdentity::from_uri(text).is_err(), "{text}");
        }
    }
}
