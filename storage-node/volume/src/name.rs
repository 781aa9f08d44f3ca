//! The bounded text by which people know a volume or a holder.

use std::fmt;

/// Longest name in bytes: that of a Kubernetes object.
pub const NAME_BYTES_MAX: usize = 253;

/// UTF-8, 1 to [`NAME_BYTES_MAX`] bytes. Shown to people, compared for equality, never interpreted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to {NAME_BYTES_MAX} bytes, not {length}")]
pub struct NameError {
    pub length: usize,
}

impl Name {
    pub fn new(text: impl Into<String>) -> Result<Name, NameError> {
        let text = text.into();
        match text.len() {
            1..=NAME_BYTES_MAX => Ok(Name(text)),
            length => Err(NameError { length }),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
