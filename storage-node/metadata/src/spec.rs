//! What may be asked for: names, addresses, sizes, numbers of copies. Every refusal says what to do instead.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest name, as a DNS label, so that it can be a host name or an object name wherever it shows up.
pub const NAME_BYTES_MAX: usize = 63;
/// Longest `host:port` or zone: a DNS name and a port.
pub const TEXT_BYTES_MAX: usize = 261;
/// Smaller volumes are refused: below one map leaf they would only waste a group.
pub const SIZE_BYTES_MIN: u64 = 1 << 20;
/// Largest volume, as the block layer has it.
pub const SIZE_BYTES_MAX: u64 = 64 << 40;
/// Unit of a volume's size, the block in which it is stored and replicated.
pub const SIZE_UNIT_BYTES: u64 = 4096;
/// More copies than this add latency and no safety that a person could want.
pub const REPLICAS_MAX: u8 = 5;

/// Labels of one volume, and bytes of their keys and values together: with those of every volume the catalogue still fits.
pub const LABELS_MAX: usize = 8;
pub const LABELS_BYTES_MAX: usize = 640;

/// Why a wish is refused before anything is looked up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("{name:?} is not a name: use 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit")]
    Name { name: String },
    #[error("{text:?} is not an address: use host:port with a port from 1 to 65535")]
    Address { text: String },
    #[error("{text:?} is not a zone: use 1 to 261 printable ASCII characters without spaces")]
    Zone { text: String },
    #[error("{size} bytes are less than the smallest volume, 1 MiB (1048576 bytes)")]
    TooSmall { size: u64 },
    #[error("{size} bytes are more than the largest volume, 64 TiB (70368744177664 bytes)")]
    TooLarge { size: u64 },
    #[error("{size} bytes are no multiple of 4096; ask for {up} bytes instead")]
    Unaligned { size: u64, up: u64 },
    #[error("logical blocks of {block} bytes are not supported; use 512 or 4096")]
    LogicalBlock { block: u32 },
    #[error("{replicas} copies are not supported; use 1 to 5")]
    Replicas { replicas: u8 },
    #[error("{count} labels are more than the 8 that a volume may have")]
    LabelCount { count: usize },
    #[error("the labels have {bytes} bytes together, more than the 640 that a volume may have")]
    LabelBytes { bytes: usize },
    #[error("{text:?} is not a label's text: use printable ASCII characters without quotes and backslashes")]
    Label { text: String },
}

const _: () = assert!(LABELS_MAX == 8 && LABELS_BYTES_MAX == 640, "the texts of SpecError name both");

/// A DNS label: the name of a volume or a node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    pub fn new(name: &str) -> Result<Name, SpecError> {
        let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let bytes = name.as_bytes();
        let fits = bytes.len() <= NAME_BYTES_MAX
            && edge(bytes.first())
            && edge(bytes.last())
            && bytes.iter().all(|b| edge(Some(b)) || *b == b'-');
        if fits { Ok(Name(name.to_owned())) } else { Err(SpecError::Name { name: name.chars().take(80).collect() }) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = SpecError;
    fn try_from(text: String) -> Result<Name, SpecError> {
        Name::new(&text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// `host:port`; an IPv6 address stands in brackets. Whether it resolves is the caller's to find out.
pub fn check_address(text: &str) -> Result<(), SpecError> {
    let refused = || SpecError::Address { text: text.chars().take(80).collect() };
    let (host, port) = text.rsplit_once(':').ok_or_else(refused)?;
    let plain_host = !host.is_empty() && (!host.contains(':') || (host.starts_with('[') && host.ends_with(']')));
    let plain_port = port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port != 0);
    if plain_host && plain_port && is_plain_text(text) { Ok(()) } else { Err(refused()) }
}

pub fn check_zone(text: &str) -> Result<(), SpecError> {
    if is_plain_text(text) { Ok(()) } else { Err(SpecError::Zone { text: text.chars().take(80).collect() }) }
}

fn is_plain_text(text: &str) -> bool {
    (1..=TEXT_BYTES_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\')
}

/// What people and programs note about a volume; it decides nothing.
pub type Labels = BTreeMap<String, String>;

/// Escaped, other characters would be longer in the catalogue than they are.
pub fn check_labels(labels: &Labels) -> Result<(), SpecError> {
    if labels.len() > LABELS_MAX {
        return Err(SpecError::LabelCount { count: labels.len() });
    }
    let bytes = labels.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > LABELS_BYTES_MAX {
        return Err(SpecError::LabelBytes { bytes });
    }
    let plain = |text: &str| text.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'"' && b != b'\\');
    let bad = labels.iter().find_map(|(key, value)| match (plain(key) && !key.is_empty(), plain(value)) {
        (false, _) => Some(key),
        (true, false) => Some(value),
        (true, true) => None,
    });
    bad.map_or(Ok(()), |text| Err(SpecError::Label { text: text.chars().take(80).collect() }))
}

/// What the copies of a volume must not share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spread {
    /// A node. They lie in as many zones as there are all the same.
    #[default]
    Node,
    /// Nor a zone; nodes without one take no copy.
    Zone,
}

impl Spread {
    fn is_node(&self) -> bool {
        *self == Spread::Node
    }
}

/// What a volume is to be, apart from its name. The fields are as asked; [`VolumeSpec::check`] says whether they may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    pub size_bytes: u64,
    /// 512 or 4096; for ever.
    pub logical_block_bytes: u32,
    /// Copies wanted, each on its own node.
    pub replicas: u8,
    #[serde(default, skip_serializing_if = "Spread::is_node")]
    pub spread: Spread,
}

impl VolumeSpec {
    pub fn check(&self) -> Result<(), SpecError> {
        check_size(self.size_bytes)?;
        if !matches!(self.logical_block_bytes, 512 | 4096) {
            return Err(SpecError::LogicalBlock { block: self.logical_block_bytes });
        }
        check_replicas(self.replicas)
    }
}

pub fn check_replicas(replicas: u8) -> Result<(), SpecError> {
    if (1..=REPLICAS_MAX).contains(&replicas) { Ok(()) } else { Err(SpecError::Replicas { replicas }) }
}

pub fn check_size(size: u64) -> Result<(), SpecError> {
    if size < SIZE_BYTES_MIN {
        Err(SpecError::TooSmall { size })
    } else if size > SIZE_BYTES_MAX {
        Err(SpecError::TooLarge { size })
    } else if !size.is_multiple_of(SIZE_UNIT_BYTES) {
        Err(SpecError::Unaligned { size, up: size.next_multiple_of(SIZE_UNIT_BYTES) })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        let longest = "a".repeat(NAME_BYTES_MAX);
        for name in ["a", "0", "pvc-1", "a--b", longest.as_str()] {
            assert_eq!(Name::new(name).map(|n| n.to_string()), Ok(name.to_owned()));
        }
        let too_long = "a".repeat(NAME_BYTES_MAX + 1);
        for name in ["", "-a", "a-", "A", "a.b", "a b", "é", "a/../b", "a\n", too_long.as_str()] {
            assert!(Name::new(name).is_err(), "{name:?}");
            assert!(serde_json::from_str::<Name>(&serde_json::to_string(name).expect("json")).is_err());
        }
    }

    #[test]
    fn sizes_are_bounded_and_the_refusal_says_what_to_ask_for() {
        assert_eq!(check_size(SIZE_BYTES_MIN), Ok(()));
        assert_eq!(check_size(SIZE_BYTES_MAX), Ok(()));
        assert_eq!(check_size(SIZE_BYTES_MIN - 1), Err(SpecError::TooSmall { size: SIZE_BYTES_MIN - 1 }));
        assert_eq!(check_size(u64::MAX), Err(SpecError::TooLarge { size: u64::MAX }));
        let refused = check_size((1 << 30) + 1).expect_err("unaligned");
        assert_eq!(refused, SpecError::Unaligned { size: (1 << 30) + 1, up: (1 << 30) + 4096 });
    }

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for text in ["node-0:7000", "10.0.0.1:1", "[::1]:65535", "n.svc.cluster.local:7000"] {
            assert_eq!(check_address(text), Ok(()), "{text}");
        }
        for text in ["", "node", ":1", "n:0", "n:65536", "n:+1", "::1:80", "a b:1", "n:1\n", "\"n:1"] {
            assert!(check_address(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn labels_are_few_short_and_plain() {
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect::<Labels>();
        assert_eq!(check_labels(&labels(&[("kubernetes.io/pv", "pvc-1"), ("a", ""), ("b", "a name")])), Ok(()));
        for (key, value) in [("", "v"), ("k", "\""), ("k", "\\"), ("k\n", "v"), ("k", "\u{e9}")] {
            assert!(matches!(check_labels(&labels(&[(key, value)])), Err(SpecError::Label { .. })), "{key:?}");
        }
        let longest = "v".repeat(LABELS_BYTES_MAX - 1);
        assert_eq!(check_labels(&labels(&[("k", &longest)])), Ok(()));
        assert!(matches!(check_labels(&labels(&[("kk", &longest)])), Err(SpecError::LabelBytes { .. })));
        let many = (0..9).map(|n| (n.to_string(), String::new())).collect();
        assert_eq!(check_labels(&many), Err(SpecError::LabelCount { count: 9 }));
    }

    #[test]
    fn blocks_and_copies_are_checked() {
        let good = VolumeSpec { size_bytes: 1 << 30, logical_block_bytes: 512, replicas: 3, spread: Spread::Node };
        assert_eq!(good.check(), Ok(()));
        assert!(VolumeSpec { logical_block_bytes: 1024, ..good }.check().is_err());
        assert!(VolumeSpec { replicas: 0, ..good }.check().is_err());
        assert!(VolumeSpec { replicas: REPLICAS_MAX + 1, ..good }.check().is_err());
    }
}
