//! Certificates: an authority of one cluster, what it issues, and what a process shows and trusts.
//!
//! A certificate says who its bearer is by a URI among its alternative names, `holdfast://<role>/<id>`; only nodes
//! get one that may accept connections. Keys are ECDSA P-256. The caller gives validity: nothing here reads a clock.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::close::CertificateRefusal;
use crate::identity::{Bearer, HOLDER_BYTES_MAX, ParseIdentityError, PeerIdentity, PeerRole, URI_SCHEME};
use crate::tls::{certificate_refusal, provider};

/// Longest file read: a bundle of a hundred authorities has less.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// Longest signing request read; one with a key of ours has some 400 bytes.
const REQUEST_BYTES_MAX: u64 = 16 << 10;

/// An uncompressed point of P-256.
const POINT_BYTES: usize = 65;

/// What is wrong with a certificate, key or root, and what helps.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: longer than 1 MiB, which no certificate or key is", path = path.display())]
    TooLong { path: PathBuf },
    #[error("{what} is not in PEM form: {detail}")]
    Pem { what: &'static str, detail: String },
    #[error("the bundle of trusted authorities holds no certificate")]
    NoRoots,
    #[error("a certificate is not well formed: {detail}")]
    Malformed { detail: String },
    #[error("the certificate names no Holdfast identity; issue it with the name holdfast://<role>/<id>")]
    NoIdentity,
    #[error("the certificate names several Holdfast identities; issue one per process")]
    SeveralIdentities,
    #[error(transparent)]
    Identity(#[from] ParseIdentityError),
    #[error("the certificate of a node-agent names no machine: its common name must have 1 to 253 bytes")]
    NoHolder,
    #[error("the certificate is that of {found}, but this process is {expected}: configure the right files")]
    WrongRole { expected: PeerRole, found: PeerRole },
    #[error("our own certificate: {0}")]
    Refused(#[from] CertificateRefusal),
    #[error("the private key does not belong to the certificate: configure the right pair of files")]
    KeyMismatch,
    #[error("cannot issue: {detail}")]
    Issue { detail: String },
    #[error("the signing request is refused: {detail}")]
    Request { detail: String },
}

/// When a certificate counts, by the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

/// Authorities that are trusted; several while one replaces another.
#[derive(Clone, Debug)]
pub struct Roots {
    store: Arc<RootCertStore>,
}

impl Roots {
    /// Every certificate of the bundle is trusted.
    pub fn from_pem(pem: &str) -> Result<Roots, PkiError> {
        let mut store = RootCertStore::empty();
        for certificate in certificates(pem)? {
            store.add(certificate).map_err(|error| PkiError::Malformed { detail: error.to_string() })?;
        }
        if store.is_empty() { Err(PkiError::NoRoots) } else { Ok(Roots { store: Arc::new(store) }) }
    }

    pub fn load(path: &Path) -> Result<Roots, PkiError> {
        Roots::from_pem(&read(path)?)
    }

    pub(crate) fn store(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.store)
    }
}

/// What a process shows to its peers: a certificate chain, its own first, and the private key.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    bearer: Bearer,
    validity: Validity,
    certificate_pem: String,
    key_pem: String,
}

impl Clone for Identity {
    fn clone(&self) -> Identity {
        Identity {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            bearer: self.bearer.clone(),
            validity: self.validity,
            certificate_pem: self.certificate_pem.clone(),
            key_pem: self.key_pem.clone(),
        }
    }
}

impl Identity {
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Identity, PkiError> {
        let chain = certificates(certificate_pem)?;
        let own = chain.first().ok_or(PkiError::Pem { what: "the certificate", detail: "it is empty".into() })?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|error| PkiError::Pem { what: "the private key", detail: error.to_string() })?;
        let signing = provider()
            .key_provider
            .load_private_key(key.clone_key())
            .map_err(|error| PkiError::Pem { what: "the private key", detail: error.to_string() })?;
        let public = signing.public_key().ok_or(PkiError::KeyMismatch)?;
        let parsed = parse(own)?;
        if parsed.public_key().raw != &public[..] {
            return Err(PkiError::KeyMismatch);
        }
        let (bearer, validity) = (bearer_in(&parsed)?, validity_of(&parsed));
        Ok(Identity {
            bearer,
            validity,
            key,
            certificate_pem: certificate_pem.to_owned(),
            key_pem: key_pem.to_owned(),
            chain,
        })
    }

    pub fn load(certificate: &Path, key: &Path) -> Result<Identity, PkiError> {
        Identity::from_pem(&read(certificate)?, &read(key)?)
    }

    /// Each file is replaced at once; the key is readable by its owner only.
    pub fn save(&self, certificate: &Path, key: &Path) -> Result<(), PkiError> {
        write(key, &self.key_pem, 0o600)?;
        write(certificate, &self.certificate_pem, 0o644)
    }

    pub fn peer(&self) -> PeerIdentity {
        self.bearer.peer
    }

    pub fn bearer(&self) -> &Bearer {
        &self.bearer
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// What the peers would find wrong, told before they do: to be called at start and before `set_identity`.
    pub fn check(&self, role: PeerRole, roots: &Roots, now: SystemTime) -> Result<(), PkiError> {
        if self.peer().role != role {
            return Err(PkiError::WrongRole { expected: role, found: self.peer().role });
        }
        let other = |detail: String| PkiError::Refused(CertificateRefusal::Other { detail });
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.store(), provider())
            .build()
            .map_err(|error| other(error.to_string()))?;
        let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
        match verifier.verify_client_cert(&self.chain[0], &self.chain[1..], now) {
            Ok(_) => Ok(()),
            Err(rustls::Error::InvalidCertificate(error)) => Err(PkiError::Refused(certificate_refusal(error))),
            Err(error) => Err(other(error.to_string())),
        }
    }

    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

/// The issuer of a cluster's certificates: its own certificate and private key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    validity: Validity,
    certificate_pem: String,
    key_pem: String,
}

impl Authority {
    /// `name` is for people: it stands in the certificate as its subject.
    pub fn create(name: &str, validity: Validity) -> Result<Authority, PkiError> {
        let key = new_key()?;
        let mut params = params(name, validity);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(issue_error)?;
        let (certificate_pem, key_pem) = (certificate.pem(), key.serialize_pem());
        Ok(Authority { issuer: Issuer::new(params, key), validity, certificate_pem, key_pem })
    }

    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Authority, PkiError> {
        let key = KeyPair::from_pem(key_pem)
            .map_err(|error| PkiError::Pem { what: "the authority's private key", detail: error.to_string() })?;
        let chain = certificates(certificate_pem)?;
        let own = chain.first().ok_or(PkiError::NoRoots)?;
        let parsed = parse(own)?;
        if parsed.public_key().subject_public_key.data != key.der_bytes() {
            return Err(PkiError::KeyMismatch);
        }
        let validity = validity_of(&parsed);
        let issuer =
            Issuer::from_ca_cert_der(own, key).map_err(|error| PkiError::Malformed { detail: error.to_string() })?;
        Ok(Authority { issuer, validity, certificate_pem: certificate_pem.to_owned(), key_pem: key_pem.to_owned() })
    }

    pub fn load(certificate: &Path, key: &Path) -> Result<Authority, PkiError> {
        Authority::from_pem(&read(certificate)?, &read(key)?)
    }

    /// As [`Identity::save`].
    pub fn save(&self, certificate: &Path, key: &Path) -> Result<(), PkiError> {
        write(key, &self.key_pem, 0o600)?;
        write(certificate, &self.certificate_pem, 0o644)
    }

    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// What those who trust this authority put into their roots.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// For those who keep it elsewhere than in files.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Makes a new private key and its certificate.
    pub fn issue(&self, peer: PeerIdentity, validity: Validity) -> Result<Identity, PkiError> {
        self.sign(subject(peer, &peer.to_string(), validity)?)
    }

    /// As [`Authority::issue`], for the agent of the machine that is `holder`.
    pub fn issue_node_agent(&self, id: u128, holder: &str, validity: Validity) -> Result<Identity, PkiError> {
        self.sign(subject(PeerIdentity { role: PeerRole::NodeAgent, id }, holder, validity)?)
    }

    /// As [`Authority::issue`], for a process that is no storage node and accepts connections all the same.
    pub fn issue_server(&self, peer: PeerIdentity, validity: Validity) -> Result<Identity, PkiError> {
        let mut params = subject(peer, &peer.to_string(), validity)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(params)
    }

    fn sign(&self, params: CertificateParams) -> Result<Identity, PkiError> {
        let key = new_key()?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(issue_error)?;
        Identity::from_pem(&certificate.pem(), &key.serialize_pem())
    }
}

/// A certificate for the key of a signing request, PEM. Only the key counts of what the request says; it must be signed
/// with that key. `name` becomes the common name, which of a `node-agent` is the holder that it may be.
///
/// # Errors
/// The request is malformed, of another kind of key than ours, or not signed with its own key.
pub fn sign_request(
    ca: &Authority,
    csr_pem: &str,
    role: PeerRole,
    id: u128,
    name: &str,
    validity: Validity,
) -> Result<String, PkiError> {
    let refused = |error: rcgen::Error| PkiError::Request { detail: error.to_string() };
    if csr_pem.len() as u64 > REQUEST_BYTES_MAX {
        return Err(PkiError::Request { detail: "it is longer than 16 KiB".into() });
    }
    let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(refused)?;
    let key = &request.public_key;
    if key.algorithm() != &PKCS_ECDSA_P256_SHA256 || key.der_bytes().len() != POINT_BYTES {
        return Err(PkiError::Request { detail: "its key is none of ECDSA P-256".into() });
    }
    let params = subject(PeerIdentity { role, id }, name, validity)?;
    let certificate = params.signed_by(key, &ca.issuer).map_err(issue_error)?;
    Ok(certificate.pem())
}

/// A new private key, PEM.
pub fn generate_key() -> Result<String, PkiError> {
    Ok(new_key()?.serialize_pem())
}

/// The request, PEM, to sign a certificate for this key. Who the bearer is to be, the signer decides.
pub fn request(key_pem: &str) -> Result<String, PkiError> {
    let key = KeyPair::from_pem(key_pem)
        .map_err(|error| PkiError::Pem { what: "the private key", detail: error.to_string() })?;
    let request = CertificateParams::default().serialize_request(&key).map_err(issue_error)?;
    request.pem().map_err(issue_error)
}

fn subject(peer: PeerIdentity, name: &str, validity: Validity) -> Result<CertificateParams, PkiError> {
    if peer.role == PeerRole::NodeAgent && !(1..=HOLDER_BYTES_MAX).contains(&name.len()) {
        return Err(PkiError::NoHolder);
    }
    let mut params = params(name, validity);
    let uri = peer.uri().try_into().map_err(issue_error)?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if peer.role == PeerRole::Node {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn issue_error(error: rcgen::Error) -> PkiError {
    PkiError::Issue { detail: error.to_string() }
}

fn new_key() -> Result<KeyPair, PkiError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(issue_error)
}

fn params(name: &str, validity: Validity) -> CertificateParams {
    let since_epoch = |time: SystemTime| {
        let whole_seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(whole_seconds)
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = since_epoch(validity.not_before);
    params.not_after = since_epoch(validity.not_after);
    params
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| PkiError::Pem { what: "a certificate", detail: error.to_string() })
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PkiError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|error| PkiError::Malformed { detail: error.to_string() })?;
    Ok(parsed)
}

/// Who a certificate says its bearer is; whether to believe it is for TLS to check.
///
/// # Errors
/// It cannot be read, or names no Holdfast identity.
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<PeerIdentity, PkiError> {
    identity_in(&parse(certificate)?)
}

/// As [`identity_of`], with the holder that a `node-agent` may be.
///
/// # Errors
/// As [`identity_of`], or a `node-agent` without a name.
pub fn bearer_of(certificate: &CertificateDer<'_>) -> Result<Bearer, PkiError> {
    bearer_in(&parse(certificate)?)
}

fn bearer_in(certificate: &X509Certificate<'_>) -> Result<Bearer, PkiError> {
    let peer = identity_in(certificate)?;
    if peer.role != PeerRole::NodeAgent {
        return Ok(Bearer { peer, holder: None });
    }
    let mut names = certificate.subject().iter_common_name();
    match (names.next().and_then(|name| name.as_str().ok()), names.next()) {
        (Some(name), None) if (1..=HOLDER_BYTES_MAX).contains(&name.len()) => {
            Ok(Bearer { peer, holder: Some(name.into()) })
        }
        _ => Err(PkiError::NoHolder),
    }
}

fn identity_in(certificate: &X509Certificate<'_>) -> Result<PeerIdentity, PkiError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| PkiError::Malformed { detail: error.to_string() })?
        .ok_or(PkiError::NoIdentity)?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) if uri.starts_with(URI_SCHEME) => Some(*uri),
        _ => None,
    });
    let uri = uris.next().ok_or(PkiError::NoIdentity)?;
    match uris.next() {
        Some(_) => Err(PkiError::SeveralIdentities),
        None => Ok(PeerIdentity::from_uri(uri)?),
    }
}

fn validity_of(certificate: &X509Certificate<'_>) -> Validity {
    // A certificate from before 1970 counts as one from 1970: neither is valid now.
    let at = |timestamp: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(timestamp).unwrap_or(0));
    let validity = certificate.validity();
    Validity { not_before: at(validity.not_before.timestamp()), not_after: at(validity.not_after.timestamp()) }
}

/// A text of at most 1 MiB, as PEM files are.
pub fn read(path: &Path) -> Result<String, PkiError> {
    let failed = |source| PkiError::File { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > PEM_BYTES_MAX {
        return Err(PkiError::TooLong { path: path.to_owned() });
    }
    fs::read_to_string(path).map_err(failed)
}

/// Replaces the file at once, with these rights, so that nobody ever reads half of it.
pub fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let failed = |source| PkiError::File { path: path.to_owned(), source };
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    // `create_new` so that the mode holds: an existing file would keep its own.
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&new).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&new, path).map_err(failed)
}

#[cfg(test)]
mod tests;
