//! [`serve`]: the connections, and what is asked on them.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::page::Page;

/// Probes and scrapers; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 32;
/// For a request's head, and again for each of the next ones on the connection.
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
/// A request of a scraper has some hundred bytes; smaller than this the library does not go.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// A connection that is kept open is closed after this, so that none is held for ever.
const CONNECTION_MAX: Duration = Duration::from_secs(300);
/// Out of descriptors, as a rule: it passes, and accepting in a hot loop would not help.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the process says of itself. Both are asked often and bound their own time.
pub trait Source: Send + Sync + 'static {
    /// Why a restart of the process would help; `Ok` where it would not.
    fn health(&self) -> impl Future<Output = Result<(), String>> + Send;
    fn metrics(&self) -> impl Future<Output = Page> + Send;
}

/// For as long as the process lives.
pub async fn serve<S: Source>(listener: TcpListener, source: Arc<S>) -> Infallible {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            continue;
        };
        let source = Arc::clone(&source);
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let source = Arc::clone(&source);
                // What else is sent is nothing that a GET has.
                let (head, _) = request.into_parts();
                async move { Ok::<_, Infallible>(answer(&head, &*source).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_WITHIN)
                .max_buf_size(REQUEST_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), service);
            // Whoever asks badly or leaves early is nobody's news.
            let _ = tokio::time::timeout(CONNECTION_MAX, connection).await;
            drop(slot);
        });
    }
}

async fn answer<S: Source>(head: &Parts, source: &S) -> Response<Full<Bytes>> {
    match (&head.method, head.uri.path()) {
        (&Method::GET, "/healthz") => match source.health().await {
            Ok(()) => plain(StatusCode::OK, "ok\n".into()),
            Err(reason) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        },
        (&Method::GET, "/metrics") => {
            let mut response = plain(StatusCode::OK, source.metrics().await.text());
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(METRICS_TYPE));
            response
        }
        (&Method::GET, _) => plain(StatusCode::NOT_FOUND, "/healthz and /metrics are served\n".into()),
        _ => plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is understood\n".into()),
    }
}

fn plain(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    struct Ill;

    impl Source for Ill {
        async fn health(&self) -> Result<(), String> {
            Err("it hangs".into())
        }

        async fn metrics(&self) -> Page {
            let mut page = Page::new();
            page.gauge("holdfast_up", "Whether it is up", [(Vec::new(), 1.0)]);
            page
        }
    }

    async fn ask(request: &str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Arc::new(Ill)));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn health_and_metrics_are_told_and_nothing_else() {
        for (asked, status, part) in [
            ("GET /healthz", "503", "it hangs"),
            ("GET /metrics", "200", "# TYPE holdfast_up gauge"),
            ("GET /", "404", "served"),
            ("POST /healthz", "405", "GET"),
        ] {
            let answer = ask(&format!("{asked} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(part), "{asked}: {answer}");
        }
    }

    #[tokio::test]
    async fn what_is_no_request_is_answered_with_an_error() {
        assert!(ask("nonsense\r\n\r\n").await.starts_with("HTTP/1.1 400"));
    }
}
