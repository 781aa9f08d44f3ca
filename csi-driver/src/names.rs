//! Names of volumes: from what a CO calls one to the name of its object.

/// Longest DNS label.
const LABEL_BYTES_MAX: usize = 63;
/// Hexadecimal digits that stand for a name that is no label: 128 bits, as many as keep accidents out.
const DIGITS: usize = 32;

/// The object's name: the CO's where that is a DNS label, else one made of its SHA-256.
pub fn object_name(name: &str) -> String {
    if is_label(name) {
        return name.to_owned();
    }
    let digest = ring::digest::digest(&ring::digest::SHA256, name.as_bytes());
    let mut hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    hex.truncate(DIGITS);
    format!("csi-{hex}")
}

/// Whether it is a DNS label: 1 to 63 of `a-z`, `0-9` and `-`, starting and ending with a letter or digit.
pub fn is_label(name: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = name.as_bytes();
    (1..=LABEL_BYTES_MAX).contains(&bytes.len())
        && bytes.iter().all(|byte| good(*byte) || *byte == b'-')
        && bytes.first().is_some_and(|byte| good(*byte))
        && bytes.last().is_some_and(|byte| good(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_kept_and_anything_else_is_hashed() {
        let pvc = "pvc-6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        assert_eq!(object_name(pvc), pvc);
        assert_eq!(object_name(&"a".repeat(63)), "a".repeat(63));
        for name in ["", "A", "a.b", "-a", "a-", "a/../b", "ä", &"a".repeat(64)] {
            let object = object_name(name);
            assert!(is_label(&object) && object.starts_with("csi-") && object.len() == 36, "{name}: {object}");
        }
        assert_ne!(object_name("A"), object_name("B"));
        assert_eq!(object_name("a b"), object_name("a b"), "the same name is the same volume");
    }
}
