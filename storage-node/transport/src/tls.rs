//! TLS 1.3 over buffers: configuration from an identity and roots, and one session driven by hand.
//!
//! Both ends show a certificate of a trusted authority. Names and addresses mean nothing here: who the peer is stands
//! in its certificate and is judged with its hello, so that a refusal can be told in words. Sessions are never
//! resumed: resumption would carry an old certificate's standing past its replacement.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    Resumption, UnbufferedClientConnection, WantsClientCert, verify_server_cert_signed_by_trust_anchor,
};
use rustls::crypto::ring::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{
    NoServerSessionStorage, ParsedCertificate, UnbufferedServerConnection, WantsServerCert, WebPkiClientVerifier,
};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, InsufficientSizeError, UnbufferedStatus, WriteTraffic,
};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};

use crate::close::{CertificateRefusal, CloseReason, Refusal};
use crate::identity::Bearer;
use crate::outgoing::Outgoing;
use crate::pki::{self, Identity, Roots};

/// Plaintext of the largest TLS record.
pub(crate) const RECORD_BYTES: usize = 16 << 10;
/// What handshake messages and alerts need at most at once, to size buffers; asked for more, they grow.
const HANDSHAKE_BYTES: usize = 4 << 10;

/// Every connection begins with the configuration of its time.
#[derive(Clone)]
pub struct TlsConfigs {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    stranger_server: Arc<ServerConfig>,
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    // AES-128-GCM first: with the processor's help it is the fastest, and the client's order decides.
    let cipher_suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..rustls::crypto::ring::default_provider() })
}

impl TlsConfigs {
    pub fn new(identity: &Identity, roots: &Roots) -> Result<TlsConfigs, Error> {
        let provider = provider();
        let client = trusting(roots)?.with_client_auth_cert(identity.chain().to_vec(), identity.key())?;
        let client = without_names(client);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.store(), Arc::clone(&provider))
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        let server = || {
            ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_protocol_versions(&[&rustls::version::TLS13])
        };
        let server_for = |clients: ConfigBuilder<ServerConfig, WantsServerCert>| {
            let mut server = clients.with_single_cert(identity.chain().to_vec(), identity.key())?;
            server.session_storage = Arc::new(NoServerSessionStorage {});
            server.send_tls13_tickets = 0;
            Ok::<_, Error>(Arc::new(server))
        };
        Ok(TlsConfigs {
            client: Arc::new(client),
            server: server_for(server()?.with_client_cert_verifier(verifier))?,
            stranger_server: server_for(server()?.with_no_client_auth())?,
        })
    }

    /// For the side of [`stranger_client`] that accepts: it proves itself and asks for no certificate.
    pub fn stranger_server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.stranger_server)
    }

    /// For other protocols over the same trust, such as the control API.
    pub fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }

    /// As [`TlsConfigs::client`], for the side that accepts.
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    pub(crate) fn connect(&self) -> Result<TlsSession, Error> {
        // Required by the interface, never sent nor checked.
        let name = ServerName::try_from("holdfast").expect("a valid name");
        Ok(TlsSession { side: Side::Client(UnbufferedClientConnection::new(Arc::clone(&self.client), name)?) })
    }

    pub(crate) fn accept(&self) -> Result<TlsSession, Error> {
        TlsSession::accept_with(Arc::clone(&self.server))
    }
}

/// For a process that has no certificate yet, to ask for one: it shows none, and trusts as others do.
pub fn stranger_client(roots: &Roots) -> Result<Arc<ClientConfig>, Error> {
    Ok(Arc::new(without_names(trusting(roots)?.with_no_client_auth())))
}

fn trusting(roots: &Roots) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, Error> {
    let provider = provider();
    let verifier = AuthorityVerifier { roots: roots.store(), provider: Arc::clone(&provider) };
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier)))
}

fn without_names(mut client: ClientConfig) -> ClientConfig {
    client.resumption = Resumption::disabled();
    client.enable_sni = false;
    client
}

/// Accepts a server whose certificate a trusted authority issued for servers, under whatever name.
#[derive(Debug)]
struct AuthorityVerifier {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AuthorityVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is never offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

enum Side {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// One end of one TLS session; no sockets, no queues.
pub(crate) struct TlsSession {
    side: Side,
}

/// How far [`TlsSession::decrypt`] came.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Decrypted {
    /// Bytes at the front of the input that are done with.
    pub consumed: usize,
    /// The peer said that it sends nothing more.
    pub ended: bool,
}

/// What one call of the state machine of rustls asks for.
enum Step {
    Again,
    Rest,
    Ended,
}

impl TlsSession {
    pub fn accept_with(config: Arc<ServerConfig>) -> Result<TlsSession, Error> {
        Ok(TlsSession { side: Side::Server(UnbufferedServerConnection::new(config)?) })
    }

    pub fn is_handshaking(&self) -> bool {
        match &self.side {
            Side::Client(connection) => connection.is_handshaking(),
            Side::Server(connection) => connection.is_handshaking(),
        }
    }

    /// Who the peer's certificate says it is; only after the handshake.
    pub fn peer(&self) -> Result<Bearer, CertificateRefusal> {
        let certificates = match &self.side {
            Side::Client(connection) => connection.peer_certificates(),
            Side::Server(connection) => connection.peer_certificates(),
        };
        let certificate = certificates.and_then(<[_]>::first).ok_or(CertificateRefusal::Missing)?;
        pki::bearer_of(certificate).map_err(|error| CertificateRefusal::NoIdentity { detail: error.to_string() })
    }

    /// Takes what came from the socket, in place; answers of the handshake go to `out`, plaintext to `plain`.
    /// On an error the alert that tells the peer is in `out`, and `plain` has seen what came before it.
    pub fn decrypt(
        &mut self,
        input: &mut [u8],
        out: &mut Outgoing,
        plain: &mut dyn FnMut(&[u8]),
    ) -> Result<Decrypted, CloseReason> {
        let mut decrypted = Decrypted { consumed: 0, ended: false };
        loop {
            let rest = &mut input[decrypted.consumed..];
            let (discard, step) = match &mut self.side {
                Side::Client(connection) => advance(connection.process_tls_records(rest), out, plain),
                Side::Server(connection) => advance(connection.process_tls_records(rest), out, plain),
            };
            decrypted.consumed += discard;
            match step {
                Ok(Step::Again) => {}
                Ok(Step::Rest) => return Ok(decrypted),
                Ok(Step::Ended) => decrypted.ended = true,
                Err(error) => {
                    self.take_alert(&mut input[decrypted.consumed..], out, plain);
                    return Err(reason(error));
                }
            }
        }
    }

    /// The input must stay the same: the session remembers places in it. It must not be asked once more than it has
    /// alerts to give: it would look at the broken input again.
    fn take_alert(&mut self, rest: &mut [u8], out: &mut Outgoing, plain: &mut dyn FnMut(&[u8])) {
        loop {
            let (_, step) = match &mut self.side {
                Side::Client(connection) if connection.wants_write() => {
                    advance(connection.process_tls_records(rest), out, plain)
                }
                Side::Server(connection) if connection.wants_write() => {
                    advance(connection.process_tls_records(rest), out, plain)
                }
                _ => return,
            };
            if step.is_err() {
                return;
            }
        }
    }

    /// Appends `plaintext` to `out` as one or more records. `leftover` is received input that is not yet a record.
    pub fn encrypt(&mut self, plaintext: &[u8], leftover: &mut [u8], out: &mut Outgoing) -> Result<(), CloseReason> {
        self.write(leftover, out, record_bytes(plaintext.len()), |traffic, space| traffic.encrypt(plaintext, space))
    }

    /// Says that nothing more will be sent.
    pub fn end(&mut self, leftover: &mut [u8], out: &mut Outgoing) -> Result<(), CloseReason> {
        self.write(leftover, out, record_bytes(2), |traffic, space| traffic.queue_close_notify(space))
    }

    fn write(
        &mut self,
        leftover: &mut [u8],
        out: &mut Outgoing,
        guess: usize,
        mut write: impl FnMut(&mut dyn Traffic, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<(), CloseReason> {
        loop {
            let written = match &mut self.side {
                Side::Client(connection) => {
                    write_with(connection.process_tls_records(leftover), out, guess, &mut write)
                }
                Side::Server(connection) => {
                    write_with(connection.process_tls_records(leftover), out, guess, &mut write)
                }
            };
            if written? {
                return Ok(());
            }
        }
    }
}

/// What `length` bytes of plaintext need at most: per record a header of 5, a type of 1 and a tag of 16; and room for
/// a key update in front.
fn record_bytes(length: usize) -> usize {
    length + (length / RECORD_BYTES + 1) * 22 + 64
}

/// The one thing the two sides' types do not share.
trait Traffic {
    fn encrypt(&mut self, plaintext: &[u8], out: &mut [u8]) -> Result<usize, EncryptError>;
    fn queue_close_notify(&mut self, out: &mut [u8]) -> Result<usize, EncryptError>;
}

impl<Data> Traffic for WriteTraffic<'_, Data> {
    fn encrypt(&mut self, plaintext: &[u8], out: &mut [u8]) -> Result<usize, EncryptError> {
        WriteTraffic::encrypt(self, plaintext, out)
    }

    fn queue_close_notify(&mut self, out: &mut [u8]) -> Result<usize, EncryptError> {
        WriteTraffic::queue_close_notify(self, out)
    }
}

/// Whether `write` could be called; else something of TLS itself was in front, a key update for one.
fn write_with<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    out: &mut Outgoing,
    guess: usize,
    write: &mut impl FnMut(&mut dyn Traffic, &mut [u8]) -> Result<usize, EncryptError>,
) -> Result<bool, CloseReason> {
    let mut traffic = match status.state.map_err(reason)? {
        ConnectionState::WriteTraffic(traffic) => traffic,
        ConnectionState::EncodeTlsData(data) => return encode(data, out).map(|()| false).map_err(reason),
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            return Ok(false);
        }
        other => return Err(CloseReason::Tls { detail: format!("cannot write in the state {other:?}") }),
    };
    let mut needed = guess;
    loop {
        match write(&mut traffic, out.spare(needed)) {
            Ok(written) => {
                out.filled(written);
                return Ok(true);
            }
            Err(EncryptError::InsufficientSize(InsufficientSizeError { required_size })) if required_size > needed => {
                needed = required_size;
            }
            Err(error) => return Err(CloseReason::Tls { detail: error.to_string() }),
        }
    }
}

fn encode<Data>(mut data: EncodeTlsData<'_, Data>, out: &mut Outgoing) -> Result<(), Error> {
    let mut needed = HANDSHAKE_BYTES;
    loop {
        match data.encode(out.spare(needed)) {
            Ok(written) => {
                out.filled(written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) if required_size > needed => {
                needed = required_size;
            }
            Err(error) => return Err(Error::General(error.to_string())),
        }
    }
}

fn advance<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    out: &mut Outgoing,
    plain: &mut dyn FnMut(&[u8]),
) -> (usize, Result<Step, Error>) {
    let mut discard = status.discard;
    let step = match status.state {
        Err(error) => Err(error),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
            match traffic.next_record() {
                Some(Ok(record)) => {
                    discard += record.discard;
                    plain(record.payload);
                }
                Some(Err(error)) => break Err(error),
                None => break Ok(Step::Again),
            }
        },
        Ok(ConnectionState::EncodeTlsData(data)) => encode(data, out).map(|()| Step::Again),
        // Whatever is in `out` is written by the owner before anything else of this connection.
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::PeerClosed) => Ok(Step::Ended),
        Ok(ConnectionState::WriteTraffic(_) | ConnectionState::BlockedHandshake | ConnectionState::Closed) => {
            Ok(Step::Rest)
        }
        Ok(other) => Err(Error::General(format!("unexpected state {other:?}"))),
    };
    (discard, step)
}

fn reason(error: Error) -> CloseReason {
    match error {
        Error::InvalidCertificate(error) => CloseReason::Certificate(certificate_refusal(error)),
        Error::NoCertificatesPresented => CloseReason::Certificate(CertificateRefusal::Missing),
        Error::AlertReceived(alert) => CloseReason::Refused(match alert {
            // The latter where an authority of theirs has the name of our issuer, but another key.
            AlertDescription::UnknownCA | AlertDescription::DecryptError => Refusal::UnknownAuthority,
            AlertDescription::CertificateExpired => Refusal::CertificateExpired,
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired
            | AlertDescription::AccessDenied => Refusal::CertificateRefused,
            other => Refusal::Alert(other.into()),
        }),
        other => CloseReason::Tls { detail: other.to_string() },
    }
}

pub(crate) fn certificate_refusal(error: CertificateError) -> CertificateRefusal {
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => CertificateRefusal::UnknownAuthority,
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => CertificateRefusal::Expired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => CertificateRefusal::NotYetValid,
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            CertificateRefusal::WrongPurpose
        }
        other => CertificateRefusal::Other { detail: other.to_string() },
    }
}

#[cfg(test)]
mod tests;
