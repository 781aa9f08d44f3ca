//! The greeting: the first frame of each end, and what both make of the two.
//!
//! Meta of a hello, little-endian, identifiers as their 16 bytes:
//! ```text
//!  0             2             4      5          8            24          40      48       49
//!  +-------------+-------------+------+----------+------------+-----------+-------+--------+--------+
//!  | version min | version max | role | reserved | cluster    | id        | boot  | length | holder |
//!  +-------------+-------------+------+----------+------------+-----------+-------+--------+--------+
//! ```
//! A longer one is accepted and its rest ignored, so that later versions can add fields. Cluster is zero where the
//! sender does not know it. The holder is UTF-8, 1 to 253 bytes of a `node-agent` and none of any other role; it must
//! be what the certificate says, as the role and the identifier must.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};
use holdfast_id::ClusterId;

use crate::close::{CertificateRefusal, CloseReason};
use crate::frame::{Frame, FrameError, KIND_CLOSE, KIND_HELLO, OWN_META_BYTES_MAX};
use crate::identity::{Bearer, HOLDER_BYTES_MAX, PeerIdentity, PeerRole};

const HELLO_BYTES: usize = 49;
const _: () = assert!(HELLO_BYTES + HOLDER_BYTES_MAX <= OWN_META_BYTES_MAX && HOLDER_BYTES_MAX <= u8::MAX as usize);

/// The protocol versions of the layers above that this end speaks, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    pub min: u16,
    pub max: u16,
}

impl Versions {
    /// The highest version both speak.
    fn agree(self, other: Versions) -> Option<u16> {
        let version = self.max.min(other.max);
        (version >= self.min.max(other.min)).then_some(version)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.min, self.max)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub versions: Versions,
    pub bearer: Bearer,
    pub cluster: Option<ClusterId>,
    pub boot: u64,
}

impl Hello {
    pub fn encode(&self) -> Frame {
        let holder = self.bearer.holder.as_deref().unwrap_or_default();
        let mut meta = BytesMut::with_capacity(HELLO_BYTES + holder.len());
        meta.put_u16_le(self.versions.min);
        meta.put_u16_le(self.versions.max);
        meta.put_u8(self.bearer.peer.role.code());
        meta.put_bytes(0, 3);
        meta.put_slice(&self.cluster.map_or([0; 16], ClusterId::to_bytes));
        meta.put_slice(&self.bearer.peer.id.to_be_bytes());
        meta.put_u64_le(self.boot);
        meta.put_u8(u8::try_from(holder.len()).expect("a certificate's holder has at most 253 bytes"));
        assert_eq!(meta.len(), HELLO_BYTES);
        meta.put_slice(holder.as_bytes());
        Frame { kind: KIND_HELLO, meta: meta.freeze(), payload: Bytes::new() }
    }

    pub fn decode(meta: &[u8]) -> Result<Hello, FrameError> {
        fn field<const N: usize>(meta: &[u8], at: usize) -> Result<[u8; N], FrameError> {
            meta.get(at..).and_then(<[u8]>::first_chunk::<N>).copied().ok_or(FrameError::Malformed)
        }
        let versions = Versions { min: u16::from_le_bytes(field(meta, 0)?), max: u16::from_le_bytes(field(meta, 2)?) };
        let [role] = field(meta, 4)?;
        let role = PeerRole::from_code(role).ok_or(FrameError::Malformed)?;
        let cluster = ClusterId::from_bytes(field(meta, 8)?);
        let id = u128::from_be_bytes(field(meta, 24)?);
        let boot = u64::from_le_bytes(field(meta, 40)?);
        let [length] = field(meta, 48)?;
        let holder = meta.get(HELLO_BYTES..HELLO_BYTES + usize::from(length)).ok_or(FrameError::Malformed)?;
        let holder = std::str::from_utf8(holder).map_err(|_| FrameError::Malformed)?;
        let named = (1..=HOLDER_BYTES_MAX).contains(&holder.len());
        if versions.min > versions.max || id == 0 || named != (role == PeerRole::NodeAgent) {
            return Err(FrameError::Malformed);
        }
        let bearer = Bearer { peer: PeerIdentity { role, id }, holder: named.then(|| holder.into()) };
        Ok(Hello { versions, bearer, cluster, boot })
    }
}

/// What this end demands of a peer beside a common cluster and version.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demands {
    /// Who must be there; `None`: anyone whose role is allowed.
    pub expected: Option<PeerIdentity>,
    /// On a Unix socket nothing proves an identity, so that only these may connect to it.
    pub agents_and_admins_only: bool,
}

impl Demands {
    /// Judges the peer's hello; `certified` is what its certificate says, `None` on a Unix socket.
    pub fn judge(
        &self,
        ours: &Hello,
        theirs: &Hello,
        certified: Option<Result<Bearer, CertificateRefusal>>,
    ) -> Result<u16, CloseReason> {
        let found = theirs.bearer.peer;
        if let Some(certified) = certified {
            let certified = certified?;
            if theirs.bearer != certified {
                return Err(CloseReason::FalseIdentity { claimed: found, certified: certified.peer });
            }
        }
        if let Some(expected) = self.expected.filter(|expected| *expected != found) {
            return Err(CloseReason::WrongIdentity { expected, found });
        }
        if self.agents_and_admins_only && found.role == PeerRole::Node {
            return Err(CloseReason::RoleNotAllowed { role: found.role });
        }
        if let (Some(ours), Some(theirs)) = (ours.cluster, theirs.cluster)
            && ours != theirs
        {
            return Err(CloseReason::WrongCluster { ours, theirs });
        }
        ours.versions
            .agree(theirs.versions)
            .ok_or(CloseReason::NoCommonVersion { ours: ours.versions, theirs: theirs.versions })
    }
}

pub(crate) fn close_frame(code: u16) -> Frame {
    Frame { kind: KIND_CLOSE, meta: Bytes::copy_from_slice(&code.to_le_bytes()), payload: Bytes::new() }
}

/// As with a hello, bytes after the code are for later versions.
pub(crate) fn close_code(meta: &[u8]) -> Result<u16, FrameError> {
    meta.first_chunk().map(|bytes| u16::from_le_bytes(*bytes)).ok_or(FrameError::Malformed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello(role: PeerRole, id: u128) -> Hello {
        Hello {
            versions: Versions { min: 1, max: 3 },
            bearer: Bearer {
                peer: PeerIdentity { role, id },
                holder: (role == PeerRole::NodeAgent).then(|| "machine-1".into()),
            },
            cluster: ClusterId::from_bytes([0xcc; 16]),
            boot: 0x0405,
        }
    }

    #[test]
    fn a_hello_has_these_bytes() {
        let frame = hello(PeerRole::Agent, 0x0a0b).encode();
        let hex: String = frame.meta.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = format!("0100030001000000{}{:032x}050400000000000000", "cc".repeat(16), 0x0a0b);
        assert_eq!((frame.kind, hex), (KIND_HELLO, expected));
        assert_eq!(Hello::decode(&frame.meta), Ok(hello(PeerRole::Agent, 0x0a0b)));
        let longer = [&frame.meta[..], b"later"].concat();
        assert_eq!(Hello::decode(&longer), Ok(hello(PeerRole::Agent, 0x0a0b)));
        let holder = hello(PeerRole::NodeAgent, 0x0a0b);
        let named = holder.encode().meta;
        assert_eq!((&named[4..5], &named[48..]), (&[3][..], b"\x09machine-1".as_slice()));
        assert_eq!(Hello::decode(&named), Ok(holder));
        let nameless = [&named[..48], &[0]].concat();
        assert_eq!(Hello::decode(&nameless), Err(FrameError::Malformed));
        let node = [&named[..4], &[0], &named[5..]].concat();
        assert_eq!(Hello::decode(&node), Err(FrameError::Malformed), "a node is no holder");
        for length in 0..HELLO_BYTES {
            assert_eq!(Hello::decode(&frame.meta[..length]), Err(FrameError::Malformed), "{length}");
        }
    }

    #[test]
    fn versions_agree_on_the_highest_common_one() {
        let versions = |min, max| Versions { min, max };
        assert_eq!(versions(1, 3).agree(versions(2, 5)), Some(3));
        assert_eq!(versions(2, 5).agree(versions(1, 3)), Some(3));
        assert_eq!(versions(1, 1).agree(versions(1, 1)), Some(1));
        assert_eq!(versions(1, 2).agree(versions(3, 4)), None);
        assert_eq!(versions(3, 4).agree(versions(1, 2)), None);
    }

    #[test]
    fn every_refusal_has_its_reason() {
        let ours = hello(PeerRole::Node, 1);
        let theirs = hello(PeerRole::Node, 2);
        let anyone = Demands { expected: None, agents_and_admins_only: false };
        assert_eq!(anyone.judge(&ours, &theirs, None), Ok(3));
        assert_eq!(anyone.judge(&ours, &theirs, Some(Ok(theirs.bearer.clone()))), Ok(3));
        assert_eq!(
            anyone.judge(&ours, &theirs, Some(Ok(ours.bearer.clone()))),
            Err(CloseReason::FalseIdentity { claimed: theirs.bearer.peer, certified: ours.bearer.peer })
        );
        assert_eq!(
            anyone.judge(&ours, &theirs, Some(Err(CertificateRefusal::Missing))),
            Err(CloseReason::Certificate(CertificateRefusal::Missing))
        );
        let expected = PeerIdentity { role: PeerRole::Node, id: 3 };
        let demands = Demands { expected: Some(expected), agents_and_admins_only: false };
        assert_eq!(
            demands.judge(&ours, &theirs, None),
            Err(CloseReason::WrongIdentity { expected, found: theirs.bearer.peer })
        );
        let local = Demands { expected: None, agents_and_admins_only: true };
        assert_eq!(local.judge(&ours, &theirs, None), Err(CloseReason::RoleNotAllowed { role: PeerRole::Node }));
        assert_eq!(local.judge(&ours, &hello(PeerRole::Admin, 2), None), Ok(3));
        let agent = hello(PeerRole::NodeAgent, 2);
        let other = Bearer { holder: Some("machine-2".into()), ..agent.bearer.clone() };
        assert_eq!(anyone.judge(&ours, &agent, Some(Ok(agent.bearer.clone()))), Ok(3));
        let judged = anyone.judge(&ours, &agent, Some(Ok(other)));
        assert!(matches!(judged, Err(CloseReason::FalseIdentity { .. })), "another machine's certificate: {judged:?}");
        let foreign = Hello { cluster: ClusterId::from_bytes([1; 16]), ..theirs.clone() };
        assert!(matches!(anyone.judge(&ours, &foreign, None), Err(CloseReason::WrongCluster { .. })));
        let unaware = Hello { cluster: None, ..theirs.clone() };
        assert_eq!(anyone.judge(&ours, &unaware, None), Ok(3));
        let newer = Hello { versions: Versions { min: 4, max: 4 }, ..theirs };
        assert!(matches!(anyone.judge(&ours, &newer, None), Err(CloseReason::NoCommonVersion { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(meta in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(hello) = Hello::decode(&meta) {
                prop_assert_eq!(Hello::decode(&hello.encode().meta), Ok(hello));
            }
            let _ = close_code(&meta);
        }
    }
}
