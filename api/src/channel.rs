//! gRPC over the cluster's own mutual TLS: who is at the other end stands in its certificate, not in its name.

use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use holdfast_transport::pki::Roots;
use holdfast_transport::{PeerIdentity, PeerRole, TlsConfigs, pki, stranger_client};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, AlertDescription, ClientConfig, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector, server};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};

/// For TCP and TLS together, on either side.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(3);
/// Accepted connections whose greeting is not finished; more wait in the kernel's queue.
const GREETINGS_MAX: usize = 64;

/// Read of a connection after it was refused.
const REFUSED_BYTES_MAX: u64 = 64 << 10;

/// Until accepting is tried again after it failed.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{address:?} is no address")]
    Address { address: String },
    #[error("{address} cannot be reached: {source}")]
    Unreachable { address: String, source: tonic::transport::Error },
    #[error("the trusted authorities make no TLS configuration: {0}")]
    Tls(#[source] rustls::Error),
}

/// Connects to a storage node's control API. `deadline` bounds every call on the channel.
///
/// # Errors
/// Nobody listens there, or it is no storage node of the authority we trust.
pub async fn connect(address: &str, tls: &TlsConfigs, deadline: Duration) -> Result<Channel, ConnectError> {
    connect_to(address, PeerRole::Node, tls.client(), deadline).await
}

/// Connects to who enrols machines, without showing a certificate. `deadline` bounds every call on the channel.
///
/// # Errors
/// Nobody listens there, or it is no administrator of the authority we trust.
pub async fn connect_as_stranger(address: &str, roots: &Roots, deadline: Duration) -> Result<Channel, ConnectError> {
    let tls = stranger_client(roots).map_err(ConnectError::Tls)?;
    connect_to(address, PeerRole::Admin, tls, deadline).await
}

async fn connect_to(
    address: &str,
    role: PeerRole,
    tls: Arc<ClientConfig>,
    deadline: Duration,
) -> Result<Channel, ConnectError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| ConnectError::Address { address: address.to_owned() })?
        .connect_timeout(HANDSHAKE_WITHIN)
        .timeout(deadline);
    let target = address.to_owned();
    let connector = tower::service_fn(move |_| {
        let (tls, target) = (Arc::clone(&tls), target.clone());
        async move { tokio::time::timeout(HANDSHAKE_WITHIN, dial(&target, role, tls)).await? }
    });
    endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|source| ConnectError::Unreachable { address: address.to_owned(), source })
}

/// Whether one end does not accept the other's certificate: no time will mend that.
pub fn is_certificate_refused(error: &(dyn Error + 'static)) -> bool {
    let tls = match error.downcast_ref::<io::Error>() {
        // What an `io::Error` holds is not among its sources.
        Some(error) => error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()),
        None => error.downcast_ref::<rustls::Error>(),
    };
    match tls {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => true,
        Some(rustls::Error::AlertReceived(alert)) => matches!(
            alert,
            AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied
                | AlertDescription::DecryptError
        ),
        _ => error.source().is_some_and(is_certificate_refused),
    }
}

async fn dial(
    address: &str,
    expected: PeerRole,
    tls: Arc<ClientConfig>,
) -> io::Result<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    // Required by the interface, never sent nor checked.
    let name = ServerName::try_from("holdfast").expect("a valid name");
    let stream = TlsConnector::from(tls).connect(name, stream).await?;
    let PeerIdentity { role, .. } = identity(stream.get_ref().1.peer_certificates())?;
    if role == expected {
        return Ok(TokioIo::new(stream));
    }
    let refusal = format!("{address} is of role {role}, not {expected}");
    Err(io::Error::new(io::ErrorKind::PermissionDenied, refusal))
}

fn identity(certificates: Option<&[CertificateDer<'_>]>) -> io::Result<PeerIdentity> {
    let refused = |reason: String| io::Error::new(io::ErrorKind::PermissionDenied, reason);
    let certificate = certificates.and_then(<[_]>::first).ok_or_else(|| refused("no certificate".into()))?;
    pki::identity_of(certificate).map_err(|error| refused(error.to_string()))
}

/// One accepted connection; [`Connected::connect_info`] tells every request who asks: a [`PeerIdentity`], or `()` of
/// strangers.
pub struct Accepted<P> {
    stream: server::TlsStream<TcpStream>,
    peer: P,
}

impl<P: Clone + Send + Sync + 'static> Connected for Accepted<P> {
    type ConnectInfo = P;

    fn connect_info(&self) -> P {
        self.peer.clone()
    }
}

impl<P: Unpin> AsyncRead for Accepted<P> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<P: Unpin> AsyncWrite for Accepted<P> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Greets connections side by side, so that one that never finishes holds nobody up. Agents have no business here. Each
/// begins with the configuration of its time.
pub fn incoming(
    listener: TcpListener,
    tls: watch::Receiver<TlsConfigs>,
) -> ReceiverStream<io::Result<Accepted<PeerIdentity>>> {
    accept(listener, move || tls.borrow().server(), judge)
}

/// As [`incoming`], of callers that show no certificate and have to prove otherwise who they are.
pub fn incoming_strangers(
    listener: TcpListener,
    tls: watch::Receiver<TlsConfigs>,
) -> ReceiverStream<io::Result<Accepted<()>>> {
    accept(listener, move || tls.borrow().stranger_server(), |_| Ok(()))
}

type Certificates<'a> = Option<&'a [CertificateDer<'a>]>;

fn judge(certificates: Certificates<'_>) -> io::Result<PeerIdentity> {
    let peer = identity(certificates)?;
    match peer.role {
        PeerRole::Node | PeerRole::Admin => Ok(peer),
        PeerRole::Agent | PeerRole::NodeAgent => {
            Err(io::Error::new(io::ErrorKind::PermissionDenied, "agents do not use the control API"))
        }
    }
}

fn accept<P: Send + 'static>(
    listener: TcpListener,
    tls: impl Fn() -> Arc<ServerConfig> + Send + 'static,
    judge: fn(Certificates<'_>) -> io::Result<P>,
) -> ReceiverStream<io::Result<Accepted<P>>> {
    let (sender, receiver) = mpsc::channel(GREETINGS_MAX);
    tokio::spawn(async move {
        loop {
            let Ok(permit) = sender.clone().reserve_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(_) => {
                    // Out of descriptors, as a rule: it passes, and accepting in a hot loop would not help.
                    tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
                    continue;
                }
            };
            let acceptor = TlsAcceptor::from(tls());
            tokio::spawn(async move {
                let greeted = tokio::time::timeout(HANDSHAKE_WITHIN, greet(acceptor, stream)).await;
                if let Ok(Ok(stream)) = greeted
                    && let Ok(peer) = judge(stream.get_ref().1.peer_certificates())
                {
                    permit.send(Ok(Accepted { stream, peer }));
                }
            });
        }
    });
    ReceiverStream::new(receiver)
}

async fn greet(acceptor: TlsAcceptor, stream: TcpStream) -> io::Result<server::TlsStream<TcpStream>> {
    stream.set_nodelay(true)?;
    match acceptor.accept(stream).into_fallible().await {
        Ok(stream) => Ok(stream),
        Err((error, mut stream)) => {
            // A socket closed with unread input is reset, and why it was refused is lost on the way.
            stream.shutdown().await?;
            tokio::io::copy(&mut stream.take(REFUSED_BYTES_MAX), &mut tokio::io::sink()).await?;
            Err(error)
        }
    }
}
