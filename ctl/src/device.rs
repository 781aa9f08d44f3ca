//! A volume as a device or a mounted file system of this machine: what `attach --device` and `--mount` do on the host.
//!
//! Every host command is bounded by a time-out and told with what it wrote to stderr. A file system is made only where
//! the volume itself says that it carries none, never by what its bytes look like.

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::args::FileSystem;

/// Making a file system writes little, but a cluster may be slow.
const MKFS_WITHIN: Duration = Duration::from_secs(600);
/// A check that only replays a journal takes seconds; a whole one of a large file system much longer.
const FSCK_WITHIN: Duration = Duration::from_secs(1800);
const MOUNT_WITHIN: Duration = Duration::from_secs(120);
/// Unmounting writes out what is cached.
const UMOUNT_WITHIN: Duration = Duration::from_secs(300);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Of a command's words on stderr, the last ones.
const STDERR_BYTES_MAX: usize = 2000;

/// Makes a file system where the volume has none, checks it, and mounts it. `agent` takes one command.
pub fn mount(
    status: &Value,
    directory: &Path,
    wanted: Option<FileSystem>,
    agent: impl Fn(Value) -> Result<Value>,
) -> Result<()> {
    let device = device_of(status)?;
    let present = mounted(&device)?;
    if present.iter().any(|target| target == directory) {
        return Ok(());
    }
    ensure!(present.is_empty(), "{} is mounted at {} already", device.display(), present[0].display());
    match status["formatted"].as_str() {
        Some("formatted") => {}
        Some("none" | "formatting") => {
            let set = |formatted: &str| {
                agent(json!({ "command": "set-formatted", "volume": status["volume"], "formatted": formatted }))
            };
            set("formatting")?;
            make(&device, wanted.unwrap_or(FileSystem::Ext4))?;
            set("formatted")?;
        }
        _ => bail!("the agent does not say whether the volume carries a file system"),
    }
    let found = type_of(&device)?;
    if let Some(wanted) = wanted {
        ensure!(found == wanted.name(), "the volume carries {found}, not {}", wanted.name());
    }
    if found == "ext4" {
        // 1 is: repaired. Anything above needs a person.
        host(Command::new("e2fsck").arg("-p").arg(&device), FSCK_WITHIN, &[0, 1])?;
    }
    host(Command::new("mount").args(["-t", &found, "--"]).arg(&device).arg(directory), MOUNT_WITHIN, &[0])?;
    Ok(())
}

/// Unmounts the device from `directory`, where it still is.
pub fn unmount(device: &Path, directory: &Path) -> Result<()> {
    if mounted(device)?.iter().any(|target| target == directory) {
        host(Command::new("umount").arg("--").arg(directory), UMOUNT_WITHIN, &[0])?;
    }
    Ok(())
}

pub fn device_of(status: &Value) -> Result<PathBuf> {
    status["device"].as_str().map(PathBuf::from).context("the volume is not attached as a device")
}

fn make(device: &Path, file_system: FileSystem) -> Result<()> {
    // Forced, for there may be the first half of one; that there is nothing else to lose the volume has said.
    let mut command = match file_system {
        FileSystem::Ext4 => Command::new("mkfs.ext4"),
        FileSystem::Xfs => Command::new("mkfs.xfs"),
    };
    match file_system {
        FileSystem::Ext4 => command.args(["-q", "-F"]),
        FileSystem::Xfs => command.args(["-q", "-f"]),
    };
    host(command.arg(device), MKFS_WITHIN, &[0]).map(drop)
}

fn type_of(device: &Path) -> Result<String> {
    let words = host(Command::new("blkid").args(["-p", "-o", "value", "-s", "TYPE"]).arg(device), MOUNT_WITHIN, &[0])
        .context("the volume says it carries a file system, and none is found on it")?;
    Ok(words.trim().to_owned())
}

/// Runs a command to its end and returns its output.
fn host(command: &mut Command, within: Duration, good: &[i32]) -> Result<String> {
    let name = format!("{command:?}");
    let mut out = tempfile::tempfile().context("a file for a command's output")?;
    let mut err = tempfile::tempfile().context("a file for a command's output")?;
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(err.try_clone()?).process_group(0);
    let mut child = command.spawn().with_context(|| format!("start {name}"))?;
    let until = Instant::now() + within;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= until {
            // One that waits inside the kernel for the device ends when that answers; it is not waited for.
            let _ = child.kill();
            bail!("{name} is not through after {} s: {}", within.as_secs(), tail(&mut err));
        }
        std::thread::sleep(LOOK_EVERY);
    };
    ensure!(status.code().is_some_and(|code| good.contains(&code)), "{name} failed ({status}): {}", tail(&mut err));
    Ok(text(&mut out))
}

fn text(file: &mut fs::File) -> String {
    use std::io::Seek;
    let mut bytes = Vec::new();
    // What cannot be read is only words for people.
    let _ = file.rewind().and_then(|()| file.take(1 << 20).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn tail(file: &mut fs::File) -> String {
    let text = text(file);
    let start = text.len().saturating_sub(STDERR_BYTES_MAX);
    let start = (start..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    text[start..].trim().to_owned()
}

/// Where the device is mounted.
pub fn mounted(device: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    Ok(table.lines().filter_map(|line| mount_of(line, device)).collect())
}

/// A line is `id parent major:minor root TARGET options [fields] - type SOURCE options`.
fn mount_of(line: &str, device: &Path) -> Option<PathBuf> {
    let (left, right) = line.split_once(" - ")?;
    let (target, source) = (left.split(' ').nth(4)?, right.split(' ').nth(1)?);
    // The kernel writes space, tab, line feed and backslash as three octal digits.
    let plain = target.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
    (Path::new(source) == device).then(|| PathBuf::from(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_told_with_its_words_and_a_slow_one_is_ended() {
        let error = host(Command::new("sh").args(["-c", "echo no such thing >&2; exit 3"]), MOUNT_WITHIN, &[0]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("no such thing") && error.contains("3"), "{error}");
        assert_eq!(host(Command::new("sh").args(["-c", "echo out; exit 1"]), MOUNT_WITHIN, &[0, 1]).unwrap(), "out\n");
        let error = host(Command::new("sleep").arg("1000"), Duration::ZERO, &[0]).unwrap_err().to_string();
        assert!(error.contains("not through"), "{error}");
    }

    #[test]
    fn mounts_of_other_devices_are_not_ours() {
        let line = r"36 35 7:1 / /mnt/a\040b rw,noatime shared:1 - ext4 /dev/loop1 rw";
        assert_eq!(mount_of(line, Path::new("/dev/loop1")), Some(PathBuf::from("/mnt/a b")));
        assert_eq!(mount_of(line, Path::new("/dev/loop11")), None);
    }
}
