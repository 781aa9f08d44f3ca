//! One command of the host, run to its end within a bound.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Of a command's words on stderr, the last ones.
const STDERR_BYTES_MAX: usize = 2000;
/// Of a command's output; the longest that is wanted is a superblock's description.
const STDOUT_BYTES_MAX: u64 = 1 << 20;
/// Commands that did not end when they were killed: they wait inside the kernel for a device. As many more would only
/// wait beside them, and each keeps memory and a process number.
const STUCK_MAX: usize = 16;

/// Killed and not ended yet.
static STUCK: Mutex<Vec<Child>> = Mutex::new(Vec::new());

#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("cannot run {command}")]
    Start { command: String, source: io::Error },
    #[error("{command} failed ({status}): {said}")]
    Failed { command: String, status: ExitStatus, said: String },
    #[error("{command} is not through after {} s: {stderr}", .within.as_secs())]
    TimedOut { command: String, within: Duration, stderr: String },
    #[error("{STUCK_MAX} commands hang in the kernel of this machine: no more are started before one ends")]
    Stuck,
}

/// Runs a command to its end and returns its output. An exit code not in `good` is a failure.
pub fn run(command: &mut Command, within: Duration, good: &[i32]) -> Result<String, CommandError> {
    if stuck() >= STUCK_MAX {
        return Err(CommandError::Stuck);
    }
    let name = format!("{command:?}");
    let start = |source| CommandError::Start { command: name.clone(), source };
    let mut out = tempfile::tempfile().map_err(start)?;
    let mut err = tempfile::tempfile().map_err(start)?;
    command.stdin(Stdio::null()).env("LC_ALL", "C").process_group(0);
    command.stdout(out.try_clone().map_err(start)?).stderr(err.try_clone().map_err(start)?);
    let mut child = command.spawn().map_err(start)?;
    let until = Instant::now() + within;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(start)? {
            break status;
        }
        if Instant::now() >= until {
            // One that waits inside the kernel for the device ends when that answers; it is not waited for.
            let _ = child.kill();
            STUCK.lock().unwrap_or_else(PoisonError::into_inner).push(child);
            return Err(CommandError::TimedOut { command: name, within, stderr: tail(&mut err) });
        }
        std::thread::sleep(LOOK_EVERY);
    };
    if !status.code().is_some_and(|code| good.contains(&code)) {
        // e2fsck says what it found on its output.
        let said = Some(tail(&mut err)).filter(|words| !words.is_empty()).unwrap_or_else(|| tail(&mut out));
        return Err(CommandError::Failed { command: name, status, said });
    }
    Ok(text(&mut out))
}

/// Commands that were given up and have not ended since.
pub fn stuck() -> usize {
    let mut stuck = STUCK.lock().unwrap_or_else(PoisonError::into_inner);
    stuck.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    stuck.len()
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // What cannot be read is only words for people.
    let _ = file.rewind().and_then(|()| file.take(STDOUT_BYTES_MAX).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn tail(file: &mut File) -> String {
    let text = text(file);
    let start = text.len().saturating_sub(STDERR_BYTES_MAX);
    let start = (start..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    text[start..].trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_failed_command_is_told_with_its_words_and_a_slow_one_is_ended() {
        let error = run(Command::new("sh").args(["-c", "echo no such thing >&2; exit 3"]), LONG, &[0]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("no such thing") && error.contains('3'), "{error}");
        assert_eq!(run(Command::new("sh").args(["-c", "echo out; exit 1"]), LONG, &[0, 1]).unwrap(), "out\n");
        let error = run(Command::new("sleep").arg("1000"), Duration::ZERO, &[0]).unwrap_err().to_string();
        assert!(error.contains("not through"), "{error}");
    }
}
