//! Kubernetes quantities as bytes, and bytes as quantities.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Why a text is no number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("{text:?} is no quantity, such as 10Gi")]
    Malformed { text: String },
    #[error("{text:?} is more than 2^63 bytes")]
    TooLarge { text: String },
}

/// Suffixes of integers and what they multiply by.
const SUFFIXES: [(&str, u128); 13] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
    ("", 1),
];

/// Whole bytes, a fraction rounded up, as Kubernetes rounds.
///
/// # Errors
/// Not a quantity, or more than a disk can have.
pub fn bytes(quantity: &Quantity) -> Result<u64, QuantityError> {
    let text = quantity.0.trim();
    let malformed = || QuantityError::Malformed { text: text.chars().take(40).collect() };
    let too_large = || QuantityError::TooLarge { text: text.chars().take(40).collect() };
    // `Ei` and `E` are suffixes.
    let number = |(_, rest): &(&str, &str)| rest.starts_with(|first: char| first == '+' || first.is_ascii_digit());
    if let Some((mantissa, exponent)) = text.split_once(['e', 'E']).filter(number) {
        let exponent: u32 = exponent.trim_start_matches('+').parse().map_err(|_| malformed())?;
        let power = 10u128.checked_pow(exponent).ok_or_else(too_large)?;
        return scaled(mantissa, power, 1).ok_or_else(malformed)?.ok_or_else(too_large);
    }
    if let Some(milli) = text.strip_suffix('m') {
        return scaled(milli, 1, 1_000).ok_or_else(malformed)?.ok_or_else(too_large);
    }
    let (suffix, multiplier) =
        SUFFIXES.into_iter().find(|(suffix, _)| text.ends_with(suffix)).expect("the empty suffix ends every text");
    scaled(&text[..text.len() - suffix.len()], multiplier, 1).ok_or_else(malformed)?.ok_or_else(too_large)
}

/// `None`: no decimal number. `Some(None)`: too large.
fn scaled(number: &str, multiplier: u128, divisor: u128) -> Option<Option<u64>> {
    let number = number.strip_prefix('+').unwrap_or(number);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !digits(whole) || !digits(fraction) || fraction.len() > 18 {
        return None;
    }
    let places = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let compute = || {
        let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
        let scaled = whole.checked_mul(places)?.checked_add(fraction)?.checked_mul(multiplier)?;
        u64::try_from(scaled.div_ceil(places * divisor)).ok().filter(|bytes| *bytes <= i64::MAX as u64)
    };
    Some(compute())
}

/// In the largest binary unit that keeps at least three digits before the point, rounded down to a whole number of it:
/// what people read, and what does not change with every block.
pub fn readable(bytes: u64) -> Quantity {
    let units = [("Ei", 60), ("Pi", 50), ("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
    for (suffix, shift) in units {
        let whole = bytes >> shift;
        if whole >= 100 || (whole > 0 && bytes.is_multiple_of(1 << shift)) {
            return Quantity(format!("{whole}{suffix}"));
        }
    }
    Quantity(bytes.to_string())
}

/// To the byte.
pub fn exact(bytes: u64) -> Quantity {
    for (suffix, shift) in [("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)] {
        if bytes > 0 && bytes.is_multiple_of(1u64 << shift) {
            return Quantity(format!("{}{suffix}", bytes >> shift));
        }
    }
    Quantity(bytes.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, expected) in [
            ("0", 0),
            ("4096", 4096),
            ("10Gi", 10 << 30),
            ("1.5Gi", 3 << 29),
            ("1G", 1_000_000_000),
            ("1e3", 1000),
            ("1E3", 1000),
            ("2E", 2_000_000_000_000_000_000),
            ("1500m", 2),
            ("+1Ki", 1024),
            (".5Ki", 512),
            ("1Ei", 1 << 60),
        ] {
            assert_eq!(bytes(&Quantity(text.into())), Ok(expected), "{text}");
        }
        for text in ["", "Gi", "-1", "1.2.3", "1 Gi", "1GiB", "1e", "0x10"] {
            assert!(matches!(bytes(&Quantity(text.into())), Err(QuantityError::Malformed { .. })), "{text}");
        }
        for text in ["16Ei", "1e30", "9223372036854775808"] {
            assert!(matches!(bytes(&Quantity(text.into())), Err(QuantityError::TooLarge { .. })), "{text}");
        }
    }

    #[test]
    fn bytes_are_written_so_that_they_are_read_back() {
        for value in [0, 1, 4096, 1 << 20, (1 << 30) + 4096, 3 << 29, 5 << 40] {
            assert_eq!(bytes(&exact(value)), Ok(value));
            assert!(bytes(&readable(value)).unwrap() <= value);
        }
        assert_eq!(readable((18 << 30) + 12345).0, "18432Mi");
        assert_eq!(readable(20 << 30).0, "20Gi");
    }
}
