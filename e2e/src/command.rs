//! Programs on the host, each with a bound on its time, and their output.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::process::Command;
use tokio::time::timeout;

/// For programs that ask and answer.
pub const SHORT: Duration = Duration::from_secs(60);

/// Runs a program to its end and returns what it printed; fails with both of its outputs where it fails.
pub async fn run(program: &str, arguments: &[&str], limit: Duration) -> Result<String> {
    let line = format!("{program} {}", arguments.join(" "));
    let child = Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(limit, child).await.with_context(|| format!("{line}: not done after {limit:?}"))?;
    let output = output.with_context(|| line.clone())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{line}: {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(text)
}

pub async fn kubectl(arguments: &[&str]) -> Result<String> {
    run("kubectl", arguments, SHORT).await
}

/// Runs a shell script in a node of the kind cluster, which is a container.
pub async fn on_node(node: &str, script: &str) -> Result<String> {
    run("docker", &["exec", node, "sh", "-c", script], SHORT).await
}
