//! Why connections end, in words for people, and the codes in which one end tells the other.

use std::io;

use holdfast_id::ClusterId;

use crate::frame::FrameError;
use crate::hello::Versions;
use crate::identity::{PeerIdentity, PeerRole};

/// Why a connection ended or never came to be. "We" is this end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    #[error("cannot connect: {}", io::Error::from(*kind))]
    ConnectFailed { kind: io::ErrorKind },
    #[error("the peer did not take the connection in time")]
    ConnectTimeout,
    #[error("the peer did not finish the handshake in time")]
    HandshakeTimeout,
    #[error("no socket is left: all tokens of this transport are in use")]
    Exhausted,
    #[error("so many accepted connections were unfinished that the oldest of them, this one, gave way")]
    Crowded,
    #[error("the connection broke: {}", io::Error::from(*kind))]
    Lost { kind: io::ErrorKind },
    /// The process died or was killed; a cut network shows as `Lost` or not at all.
    #[error("the peer ended the connection without a farewell")]
    Vanished,
    #[error("the peer closed the connection")]
    Goodbye,
    #[error("we refused the peer's certificate: {0}")]
    Certificate(#[from] CertificateRefusal),
    #[error("the TLS handshake or session failed: {detail}")]
    Tls { detail: String },
    #[error("the peer is {found}, not {expected}: the address leads elsewhere, or the peer's certificate was swapped")]
    WrongIdentity { expected: PeerIdentity, found: PeerIdentity },
    #[error("the peer calls itself {claimed}, but its certificate says {certified}")]
    FalseIdentity { claimed: PeerIdentity, certified: PeerIdentity },
    #[error("the peer belongs to cluster {theirs}, we to {ours}")]
    WrongCluster { ours: ClusterId, theirs: ClusterId },
    #[error("the peer speaks protocol versions {theirs}, we {ours}: upgrade the older side")]
    NoCommonVersion { ours: Versions, theirs: Versions },
    #[error("the role {role} may not connect here")]
    RoleNotAllowed { role: PeerRole },
    #[error("the process at the other end of the Unix socket belongs to user {uid}; only our own user and root may")]
    ForeignUser { uid: u32 },
    #[error("the peer sent what is no frame: {0}")]
    Frame(#[from] FrameError),
    #[error("the peer refused us: {0}")]
    Refused(Refusal),
}

/// What is wrong with a peer's certificate, and what helps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateRefusal {
    #[error("it was issued by no authority we trust: give both ends the same roots, or issue it anew")]
    UnknownAuthority,
    #[error("it has expired: issue a new one, and check both clocks")]
    Expired,
    #[error("it is not valid yet: check both clocks")]
    NotYetValid,
    #[error("it is not meant for this side of a connection: only nodes accept connections")]
    WrongPurpose,
    #[error("there is none")]
    Missing,
    #[error("it names no Holdfast identity: {detail}")]
    NoIdentity { detail: String },
    #[error("{detail}")]
    Other { detail: String },
}

/// Why the other end would not go on with us, as far as it said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("it belongs to another cluster")]
    WrongCluster,
    #[error("it speaks no protocol version that we speak: upgrade the older side")]
    NoCommonVersion,
    #[error("we are not who it expected, or not who our certificate says")]
    WrongIdentity,
    #[error("our role or user may not connect there")]
    NotAllowed,
    #[error("we sent what it does not take for a frame")]
    Malformed,
    #[error("we did not finish the handshake in time")]
    TooSlow,
    #[error("it trusts no authority that issued our certificate: give both ends the same roots")]
    UnknownAuthority,
    #[error("our certificate is expired or not valid yet: issue a new one, and check both clocks")]
    CertificateExpired,
    #[error("it does not accept our certificate")]
    CertificateRefused,
    #[error("TLS alert {0}")]
    Alert(u8),
    #[error("close code {0}, which is unknown here")]
    Unknown(u16),
}

pub(crate) const CODE_GOODBYE: u16 = 0;

impl Refusal {
    /// In a close frame; `None` for what only TLS alerts say.
    pub(crate) fn code(self) -> Option<u16> {
        Some(match self {
            Refusal::WrongCluster => 1,
            Refusal::NoCommonVersion => 2,
            Refusal::WrongIdentity => 3,
            Refusal::NotAllowed => 4,
            Refusal::Malformed => 5,
            Refusal::TooSlow => 6,
            Refusal::UnknownAuthority
            | Refusal::CertificateExpired
            | Refusal::CertificateRefused
            | Refusal::Alert(_)
            | Refusal::Unknown(_) => return None,
        })
    }

    fn from_code(code: u16) -> Refusal {
        match code {
            1 => Refusal::WrongCluster,
            2 => Refusal::NoCommonVersion,
            3 => Refusal::WrongIdentity,
            4 => Refusal::NotAllowed,
            5 => Refusal::Malformed,
            6 => Refusal::TooSlow,
            code => Refusal::Unknown(code),
        }
    }
}

impl CloseReason {
    /// What the other end said in a close frame.
    pub(crate) fn from_code(code: u16) -> CloseReason {
        if code == CODE_GOODBYE { CloseReason::Goodbye } else { CloseReason::Refused(Refusal::from_code(code)) }
    }

    /// What to tell the other end, where it is there to be told and TLS has not told it already.
    pub(crate) fn told_as(&self) -> Option<Refusal> {
        Some(match self {
            CloseReason::WrongCluster { .. } => Refusal::WrongCluster,
            CloseReason::NoCommonVersion { .. } => Refusal::NoCommonVersion,
            CloseReason::WrongIdentity { .. }
            | CloseReason::FalseIdentity { .. }
            | CloseReason::Certificate(CertificateRefusal::NoIdentity { .. }) => Refusal::WrongIdentity,
            CloseReason::RoleNotAllowed { .. } | CloseReason::ForeignUser { .. } => Refusal::NotAllowed,
            CloseReason::Frame(_) => Refusal::Malformed,
            CloseReason::HandshakeTimeout => Refusal::TooSlow,
            CloseReason::ConnectFailed { .. }
            | CloseReason::ConnectTimeout
            | CloseReason::Exhausted
            | CloseReason::Crowded
            | CloseReason::Lost { .. }
            | CloseReason::Vanished
            | CloseReason::Goodbye
            | CloseReason::Certificate(_)
            | CloseReason::Tls { .. }
            | CloseReason::Refused(_) => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip_and_unknown_ones_are_kept() {
        for code in 1..=6 {
            assert_eq!(Refusal::from_code(code).code(), Some(code));
        }
        assert_eq!(CloseReason::from_code(CODE_GOODBYE), CloseReason::Goodbye);
        assert_eq!(CloseReason::from_code(7), CloseReason::Refused(Refusal::Unknown(7)));
    }
}
