//! Identifiers of clusters, nodes, disks, volumes, replicas and groups.
//!
//! Every identifier is a random 128-bit value that is never reused: a wiped disk is a new `DiskId`, a replica
//! that is created again is a new `ReplicaId`. Nothing here makes randomness; the rim passes 16 random bytes in.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes of an encoded identifier, big-endian.
pub const ID_BYTES: usize = 16;

/// Why a text is not an identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an identifier: 32 hexadecimal digits, hyphens allowed, not all zero")]
pub struct ParseIdError {
    pub text: String,
}

fn parse(text: &str) -> Result<u128, ParseIdError> {
    let refused = || ParseIdError { text: text.chars().take(80).collect() };
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    if digits.len() != 2 * ID_BYTES || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(refused());
    }
    match u128::from_str_radix(&digits, 16) {
        Ok(value) if value != 0 => Ok(value),
        _ => Err(refused()),
    }
}

fn format(value: u128, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let hex = format!("{value:032x}");
    write!(f, "{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u128);

        impl $name {
            /// Makes the identifier from 16 random bytes; `None` for all zeroes, which means "no identifier" on disk.
            pub const fn from_bytes(bytes: [u8; ID_BYTES]) -> Option<Self> {
                match u128::from_be_bytes(bytes) {
                    0 => None,
                    value => Some(Self(value)),
                }
            }

            pub const fn to_bytes(self) -> [u8; ID_BYTES] {
                self.0.to_be_bytes()
            }

            pub const fn as_u128(self) -> u128 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                format(self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}(", stringify!($name))?;
                format(self.0, f)?;
                f.write_str(")")
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                parse(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

identifier!(
    /// A cluster, minted once by `init`.
    ClusterId
);
identifier!(
    /// A storage node, minted with its certificate.
    NodeId
);
identifier!(
    /// A formatted disk; formatting again mints a new one.
    DiskId
);
identifier!(
    /// A replicated volume.
    VolumeId
);
identifier!(
    /// One replica of one group on one disk.
    ReplicaId
);

identifier!(
    /// A snapshot of one volume, named by whoever asks for it, so that asking again is harmless.
    SnapshotId
);

/// A consensus group: one shard of one volume, or the metadata plane.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId {
    pub volume: VolumeId,
    pub shard: u16,
}

impl GroupId {
    /// Bytes of an encoded group: the volume, then the shard, big-endian.
    pub const BYTES: usize = ID_BYTES + 2;

    /// Shard number that no volume uses; it marks the metadata plane's group.
    const METADATA_SHARD: u16 = u16::MAX;

    /// The first shard of a volume; it owns the attachment epoch.
    pub const fn first(volume: VolumeId) -> Self {
        GroupId { volume, shard: 0 }
    }

    /// The group of the metadata plane: every cluster has one, named after the cluster.
    pub const fn metadata(cluster: ClusterId) -> Self {
        GroupId { volume: VolumeId(cluster.0), shard: Self::METADATA_SHARD }
    }

    pub const fn is_metadata(self) -> bool {
        self.shard == Self::METADATA_SHARD
    }

    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..ID_BYTES].copy_from_slice(&self.volume.to_bytes());
        bytes[ID_BYTES..].copy_from_slice(&self.shard.to_be_bytes());
        bytes
    }

    /// `None` where the volume is all zeroes.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Option<Self> {
        let mut volume = [0; ID_BYTES];
        volume.copy_from_slice(&bytes[..ID_BYTES]);
        let shard = u16::from_be_bytes([bytes[ID_BYTES], bytes[ID_BYTES + 1]]);
        VolumeId::from_bytes(volume).map(|volume| GroupId { volume, shard })
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_metadata() { f.write_str("metadata") } else { write!(f, "{}/{}", self.volume, self.shard) }
    }
}

impl fmt::Debug for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GroupId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_round_trip() {
        let id = VolumeId::from_bytes(*b"0123456789abcdef").expect("not zero");
        assert_eq!(id.to_string().parse::<VolumeId>(), Ok(id));
        assert_eq!(id.to_string(), "30313233-3435-3637-3839-616263646566");
        let group = GroupId { volume: id, shard: 7 };
        assert_eq!(GroupId::from_bytes(group.to_bytes()), Some(group));
    }

    #[test]
    fn zero_and_hostile_texts_are_refused() {
        assert_eq!(VolumeId::from_bytes([0; 16]), None);
        for text in ["", "../../etc", "00000000000000000000000000000000", "+1234567890123456789012345678901", "é"] {
            assert!(text.parse::<VolumeId>().is_err(), "{text}");
        }
    }
}
