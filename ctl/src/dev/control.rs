//! How `holdfast dev node …` talks to the running supervisor: one JSON line each way over a Unix socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// A longer line is no command of ours.
pub const LINE_BYTES_MAX: u64 = 4096;
/// Stopping a node waits for its process to end; it is killed after five seconds.
const WAIT: Duration = Duration::from_secs(20);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    Stop(String),
    Start(String),
    /// A node that was never there: it is given an identity, started, and joins.
    Add(String),
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    pub error: Option<String>,
}

pub fn socket(dir: &Path) -> PathBuf {
    dir.join("dev.sock")
}

pub fn call(dir: &Path, command: &Command) -> Result<()> {
    let path = socket(dir);
    let mut stream = UnixStream::connect(&path)
        .with_context(|| format!("{}: is `holdfast dev up --dir {}` running?", path.display(), dir.display()))?;
    stream.set_read_timeout(Some(WAIT))?;
    stream.set_write_timeout(Some(WAIT))?;
    let mut line = serde_json::to_vec(command)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut answer).context("no answer from the supervisor")?;
    match serde_json::from_str::<Answer>(&answer).context("an answer that cannot be read")?.error {
        Some(error) => bail!(error),
        None => Ok(()),
    }
}
