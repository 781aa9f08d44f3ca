//! `/healthz` and `/metrics` over plain HTTP/1.1, for probes and scrapers inside the cluster.
//!
//! One request per connection, GET only, everything bounded; whatever else is asked gets 404 or 400.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::metrics::Metrics;

/// A probe's request has some hundred bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
const CONNECTIONS_MAX: usize = 32;
/// Out of descriptors, as a rule: it passes, and accepting in a hot loop would not help.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Serves until the process ends. `/healthz` says that this process serves, and nothing about anybody else: a restart
/// would mend neither the agent nor the cluster.
pub async fn bind(address: SocketAddr, metrics: Arc<Metrics>) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    tokio::spawn(async move {
        loop {
            let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
                continue;
            };
            let metrics = metrics.clone();
            tokio::spawn(async move {
                // Whoever asks badly or leaves early is nobody's news.
                let _ = tokio::time::timeout(REQUEST_WITHIN, serve(stream, &metrics)).await;
                drop(slot);
            });
        }
    });
    Ok(bound)
}

async fn serve(mut stream: TcpStream, metrics: &Metrics) -> io::Result<()> {
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = stream.read(&mut part).await?;
        request.extend_from_slice(&part[..length]);
        if length == 0 || request.len() > REQUEST_BYTES_MAX {
            break;
        }
    }
    let (status, body) = answer(&request, metrics);
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

fn answer(request: &[u8], metrics: &Metrics) -> (&'static str, String) {
    let line = request.split(|byte| *byte == b'\r').next().and_then(|line| std::str::from_utf8(line).ok());
    let mut words = line.unwrap_or_default().split(' ');
    match (words.next(), words.next(), words.next()) {
        (Some("GET"), Some("/healthz"), Some(_)) => ("200 OK", "ok\n".to_owned()),
        (Some("GET"), Some("/metrics"), Some(_)) => ("200 OK", metrics.render()),
        (Some("GET"), Some(_), Some(_)) => ("404 Not Found", "/healthz and /metrics are served\n".to_owned()),
        _ => ("400 Bad Request", "only GET is understood\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn health_and_metrics_are_served_and_nothing_else() {
        let metrics = Arc::new(Metrics::default());
        let address = bind("127.0.0.1:0".parse().unwrap(), metrics).await.unwrap();
        for (request, status, part) in [
            ("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "200", "ok"),
            ("GET /metrics HTTP/1.1\r\n\r\n", "200", "holdfast_csi_build_info"),
            ("GET / HTTP/1.1\r\n\r\n", "404", "served"),
            ("POST /healthz HTTP/1.1\r\n\r\n", "400", "GET"),
            ("\r\n\r\n", "400", "GET"),
        ] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(part), "{request}: {answer}");
        }
    }
}
