//! Calls to a cluster's control API. Any node will do: who does not lead says who does, and is asked no further.
//!
//! What it is: [`Client`] for the service `Cluster`, answered by the leader of the metadata plane, and for calls of the
//! service `Node` that only the leader of a volume answers. What it is not: policy; whoever calls decides what to ask
//! and what a refusal means. Used by the command line, the operator and the CSI driver.
//!
//! Invariants: every call ends within the client's times; a call may reach several nodes, and one node twice, so every
//! call of the API is made so that it may be repeated.

#![forbid(unsafe_code)]

mod client;
mod error;

use std::path::Path;

use holdfast_transport::TlsConfigs;
use holdfast_transport::pki::{Identity, PkiError, Roots};

pub use client::{Client, Times};
pub use error::CallError;

/// Why credentials make no client.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error("the certificates make no TLS configuration: {0}")]
    Tls(String),
}

/// From PEM texts, such as those of a Secret.
///
/// # Errors
/// A text that is not what it should be, or a key of another certificate.
pub fn tls_from_pem(certificate: &str, key: &str, roots: &str) -> Result<TlsConfigs, CredentialsError> {
    tls(&Identity::from_pem(certificate, key)?, &Roots::from_pem(roots)?)
}

/// From PEM files.
///
/// # Errors
/// As [`tls_from_pem`], or a file that cannot be read.
pub fn tls_from_files(certificate: &Path, key: &Path, roots: &Path) -> Result<TlsConfigs, CredentialsError> {
    tls(&Identity::load(certificate, key)?, &Roots::load(roots)?)
}

fn tls(identity: &Identity, roots: &Roots) -> Result<TlsConfigs, CredentialsError> {
    TlsConfigs::new(identity, roots).map_err(|error| CredentialsError::Tls(error.to_string()))
}
