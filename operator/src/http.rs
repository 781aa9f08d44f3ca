//! `/healthz` and `/metrics` over plain HTTP/1.1, for probes and scrapers inside the cluster.
//!
//! One request per connection, GET only, everything bounded. `/healthz` says that this process serves, whether it leads
//! or waits for the lease: a restart would mend nobody else's failure.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::context::Context;

/// A probe's request has some hundred bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
const CONNECTIONS_MAX: usize = 32;
/// Out of descriptors, as a rule: it passes, and accepting in a hot loop would not help.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Serves until the process ends.
///
/// # Errors
/// The address is taken.
pub async fn serve(address: SocketAddr, context: Arc<Context>) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    tokio::spawn(async move {
        loop {
            let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
                continue;
            };
            let context = Arc::clone(&context);
            tokio::spawn(async move {
                // Whoever asks badly or leaves early is nobody's news.
                let _ = tokio::time::timeout(REQUEST_WITHIN, one(stream, &context)).await;
                drop(slot);
            });
        }
    });
    Ok(())
}

async fn one(mut stream: TcpStream, context: &Context) -> io::Result<()> {
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < REQUEST_BYTES_MAX {
        let length = stream.read(&mut part).await?;
        if length == 0 {
            break;
        }
        request.extend_from_slice(&part[..length]);
    }
    let (status, body) = answer(&request, || context.metrics.render());
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

fn answer(request: &[u8], metrics: impl FnOnce() -> String) -> (&'static str, String) {
    let line = request.split(|byte| *byte == b'\r').next().and_then(|line| std::str::from_utf8(line).ok());
    let mut words = line.unwrap_or_default().split(' ');
    match (words.next(), words.next(), words.next()) {
        (Some("GET"), Some("/healthz"), Some(_)) => ("200 OK", "ok\n".to_owned()),
        (Some("GET"), Some("/metrics"), Some(_)) => ("200 OK", metrics()),
        (Some("GET"), Some(_), Some(_)) => ("404 Not Found", "/healthz and /metrics are served\n".to_owned()),
        _ => ("400 Bad Request", "only GET is understood\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_and_metrics_are_served_and_nothing_else() {
        for (request, status) in [
            ("GET /healthz HTTP/1.1\r\n\r\n", "200 OK"),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "200 OK"),
            ("GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
            ("POST /healthz HTTP/1.1\r\n\r\n", "400 Bad Request"),
            ("\u{0}", "400 Bad Request"),
            ("", "400 Bad Request"),
        ] {
            assert_eq!(
                answer(request.as_bytes(), || crate::metrics::Metrics::default().render()).0,
                status,
                "{request:?}"
            );
        }
    }
}
