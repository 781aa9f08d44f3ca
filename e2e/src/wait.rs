//! Waiting for something to become true: asked again and again, with a limit, and with what was seen last where the limit
//! is reached.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::time::sleep;

const PERIOD: Duration = Duration::from_millis(500);

/// What a question found.
pub enum Seen<T> {
    Done(T),
    /// Not yet, and this is how it is.
    Not(String),
}

/// Asks until the answer is `Done`. An error of the question counts as not yet: API servers go away in these tests.
pub async fn until<T>(what: &str, limit: Duration, mut ask: impl AsyncFnMut() -> Result<Seen<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        let seen = match ask().await {
            Ok(Seen::Done(value)) => return Ok(value),
            Ok(Seen::Not(seen)) => seen,
            Err(error) => format!("{error:#}"),
        };
        if started.elapsed() >= limit {
            bail!("{what}: not so after {limit:?}; last seen: {seen}");
        }
        sleep(PERIOD).await;
    }
}
