//! Waiting for something to become true: asked again and again, with a limit, and with what was seen last where the limit
//! is reached.

use std::time::{Duration, Instant};

use tokio::time::sleep;

const PERIOD: Duration = Duration::from_millis(200);
/// For anything that must come true on a machine as slow as a loaded runner; no test passes by its being long.
const LIMIT: Duration = Duration::from_secs(180);

/// Asks until the answer is `Ok`.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Result<T, String>) -> T {
    let started = Instant::now();
    loop {
        match ask().await {
            Ok(value) => return value,
            Err(seen) if started.elapsed() >= LIMIT => panic!("{what}: not within {LIMIT:?}; last seen: {seen}"),
            Err(_) => sleep(PERIOD).await,
        }
    }
}
