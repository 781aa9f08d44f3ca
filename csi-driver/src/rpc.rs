//! The way of every RPC through the driver: it runs to its end whatever its caller does, is timed, and told once.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use tonic::{Code, Response, Status};

use crate::metrics::Metrics;

/// Runs `work` on a task of its own: a caller that gives up leaves no half-done step behind, and the volume's lock is
/// held until the work has ended.
pub async fn run<T: Send + 'static>(
    metrics: &Arc<Metrics>,
    method: &'static str,
    subject: String,
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<Response<T>, Status> {
    let metrics = metrics.clone();
    let task = tokio::spawn(async move {
        let begun = Instant::now();
        let result = work.await;
        let took = begun.elapsed();
        let code = result.as_ref().err().map_or(Code::Ok, Status::code);
        metrics.on_call(method, code, took);
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        match &result {
            Ok(_) => tracing::debug!(method, subject, took_ms, "done"),
            Err(status) => tracing::warn!(method, subject, took_ms, ?code, message = status.message(), "refused"),
        }
        result
    });
    task.await
        .unwrap_or_else(|error| Err(Status::internal(format!("{method} ended early: {error}"))))
        .map(Response::new)
}

/// The text of an error with its causes, for a status that carries only text.
pub fn text(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Some errors repeat their cause in their own words.
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = cause.source();
    }
    text
}
