//! What is mounted where, as the kernel tells it, and the changing of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::command::{self, CommandError};

const MOUNT_WITHIN: Duration = Duration::from_secs(120);
/// Unmounting writes out what is cached.
const UMOUNT_WITHIN: Duration = Duration::from_secs(300);

#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    #[error("the mounts of this machine cannot be read")]
    Read(#[source] io::Error),
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// One mount that this process sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// What of the file system is mounted: `/`, a directory, or one file.
    pub root: PathBuf,
    pub target: PathBuf,
    pub file_system: String,
    /// The device, for a file system on one.
    pub source: PathBuf,
    /// This mount takes no writes.
    pub read_only: bool,
    /// The file system itself takes none, as after an error on it.
    pub file_system_read_only: bool,
}

/// Every mount, in the order of their making: of several at one target the last is what is seen.
pub fn all() -> Result<Vec<Mount>, MountsError> {
    let table = fs::read_to_string("/proc/self/mountinfo").map_err(MountsError::Read)?;
    Ok(table.lines().filter_map(parse).collect())
}

/// The mount seen at `target`.
pub fn at(target: &Path) -> Result<Option<Mount>, MountsError> {
    Ok(all()?.into_iter().rfind(|mount| mount.target == target))
}

/// Where the device is mounted.
pub fn of_device(device: &Path) -> Result<Vec<PathBuf>, MountsError> {
    Ok(all()?.into_iter().filter(|mount| mount.source == device).map(|mount| mount.target).collect())
}

/// Mounts a file system; `options` as `mount -o` takes them.
pub fn mount(file_system: &str, device: &Path, target: &Path, options: &[String]) -> Result<(), MountsError> {
    let mut command = Command::new("mount");
    command.args(["-t", file_system]);
    if !options.is_empty() {
        command.arg("-o").arg(options.join(","));
    }
    command::run(command.arg("--").arg(device).arg(target), MOUNT_WITHIN, &[0])?;
    Ok(())
}

/// Makes `source`, a directory or a file, appear at `target`, which is one of the same kind.
pub fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), MountsError> {
    let options = if read_only { "bind,ro" } else { "bind" };
    command::run(Command::new("mount").args(["-o", options, "--"]).arg(source).arg(target), MOUNT_WITHIN, &[0])?;
    Ok(())
}

/// Takes the right to write from what is bound at `target`.
pub fn make_read_only(target: &Path) -> Result<(), MountsError> {
    command::run(Command::new("mount").args(["-o", "remount,bind,ro", "--"]).arg(target), MOUNT_WITHIN, &[0])?;
    Ok(())
}

/// Unmounts whatever is mounted at `target`, also several one over the other.
pub fn unmount(target: &Path) -> Result<(), MountsError> {
    let present = all()?.into_iter().filter(|mount| mount.target == target).count();
    for _ in 0..present {
        command::run(Command::new("umount").arg("--").arg(target), UMOUNT_WITHIN, &[0])?;
    }
    Ok(())
}

/// Takes the mounts at `target` out of sight at once; they end when their last user does. For a device that is gone for
/// good: nothing can be written out any more.
pub fn unmount_lazily(target: &Path) -> Result<(), MountsError> {
    let present = all()?.into_iter().filter(|mount| mount.target == target).count();
    for _ in 0..present {
        command::run(Command::new("umount").args(["-l", "--"]).arg(target), MOUNT_WITHIN, &[0])?;
    }
    Ok(())
}

/// A line is `id parent major:minor ROOT TARGET OPTIONS [fields] - TYPE SOURCE SUPEROPTIONS`.
fn parse(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (root, target, options) = (left.next()?, left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (file_system, source, super_options) = (right.next()?, right.next()?, right.next().unwrap_or_default());
    let is_read_only = |options: &str| options.split(',').any(|option| option == "ro");
    Some(Mount {
        root: unescape(root),
        target: unescape(target),
        file_system: file_system.to_owned(),
        source: unescape(source),
        read_only: is_read_only(options),
        file_system_read_only: super_options.split(',').any(|option| matches!(option, "ro" | "emergency_ro")),
    })
}

/// The kernel writes space, tab, line feed and backslash as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let plain = text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
    PathBuf::from(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_read() {
        let line = r"36 35 7:1 / /mnt/a\040b rw,noatime shared:1 - ext4 /dev/loop1 rw,errors=remount-ro";
        let mount = parse(line).unwrap();
        assert_eq!((mount.target.as_path(), mount.source.as_path()), (Path::new("/mnt/a b"), Path::new("/dev/loop1")));
        assert_eq!((mount.file_system.as_str(), mount.root.as_path()), ("ext4", Path::new("/")));
        assert!(!mount.read_only && !mount.file_system_read_only, "errors=remount-ro is no ro");
        let mount = parse("36 35 0:6 /loop1 /target ro,nosuid - devtmpfs udev rw,size=10k").unwrap();
        assert_eq!(mount.root, Path::new("/loop1"));
        assert!(mount.read_only && !mount.file_system_read_only);
        assert!(parse("36 35 7:1 / /a rw - ext4 /dev/loop1 ro").unwrap().file_system_read_only);
        assert_eq!(parse("36 35 7:1 / /mnt"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn this_process_sees_its_own_root() {
        assert!(at(Path::new("/")).unwrap().is_some());
        assert_eq!(at(Path::new("/no/such/target")).unwrap(), None);
    }
}
