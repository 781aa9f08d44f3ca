//! The file system on a device: made, recognised, checked, grown.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use crate::command::{self, CommandError};

/// Making a file system writes little, but a cluster may be slow.
const MKFS_WITHIN: Duration = Duration::from_secs(600);
/// A check that only replays a journal takes seconds; a whole one of a large file system much longer.
const FSCK_WITHIN: Duration = Duration::from_secs(1800);
const GROW_WITHIN: Duration = Duration::from_secs(600);
const LOOK_WITHIN: Duration = Duration::from_secs(120);
/// mke2fs and resize2fs leave the end of a device alone where a last block group would have no room for data after its
/// own tables; those take less than this.
const EXT4_REST_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum FileSystemError {
    #[error("{0:?} is no file system that is made here: ext4 and xfs are")]
    Unknown(String),
    #[error("the volume says it carries a file system, and none is found on {0}")]
    Missing(PathBuf),
    #[error("{device} carries {found}, not {wanted}")]
    Other { device: PathBuf, found: String, wanted: &'static str },
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("{path} cannot be looked at")]
    Io { path: PathBuf, source: io::Error },
    #[error("dumpe2fs does not say how large the file system on {0} is")]
    Size(PathBuf),
    #[error(
        "this kernel does not let a mounted ext4 file system grow (it asks for CAP_SYS_RESOURCE): it grows when {0} is \
         mounted next"
    )]
    NotWhileMounted(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    Ext4,
    Xfs,
}

/// What the device may hold before a file system is made on it. To be wrong about it costs room and harms nothing: a
/// table that must be zeroed is zeroed either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// Nothing was ever written: there is nothing to discard, which would be an entry of the log for each MiB.
    Zeroes,
    /// What an earlier attempt has left.
    Anything,
}

impl FileSystem {
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        }
    }

    /// Options that every mount of it has.
    pub fn mount_options(self) -> &'static [&'static str] {
        match self {
            FileSystem::Ext4 => &[],
            // A fenced device of the same volume may still be mounted somewhere until its last user ends.
            FileSystem::Xfs => &["nouuid"],
        }
    }
}

impl FromStr for FileSystem {
    type Err = FileSystemError;

    fn from_str(text: &str) -> Result<FileSystem, FileSystemError> {
        match text {
            "ext4" => Ok(FileSystem::Ext4),
            "xfs" => Ok(FileSystem::Xfs),
            _ => Err(FileSystemError::Unknown(text.chars().take(60).collect())),
        }
    }
}

/// Makes one, over whatever is there: the caller has the volume's word that nothing is lost. `options` go to mkfs as
/// they are.
pub fn make(device: &Path, kind: FileSystem, before: Before, options: &[String]) -> Result<(), FileSystemError> {
    let mut command = match kind {
        FileSystem::Ext4 => Command::new("mkfs.ext4"),
        FileSystem::Xfs => Command::new("mkfs.xfs"),
    };
    match kind {
        // No blocks kept for root, which no pod runs as; and a damaged file system is better read than written.
        FileSystem::Ext4 => command.args(["-q", "-F", "-m", "0", "-e", "remount-ro"]),
        FileSystem::Xfs => command.args(["-q", "-f"]),
    };
    match (kind, before) {
        (FileSystem::Ext4, Before::Zeroes) => command.args(["-E", "nodiscard"]),
        (FileSystem::Xfs, Before::Zeroes) => command.arg("-K"),
        (_, Before::Anything) => &mut command,
    };
    command::run(command.args(options).arg(device), MKFS_WITHIN, &[0])?;
    Ok(())
}

/// What the device carries; an error where that is nothing, or not what is wanted.
pub fn recognise(device: &Path, wanted: Option<FileSystem>) -> Result<FileSystem, FileSystemError> {
    let mut blkid = Command::new("blkid");
    // 2: nothing was found.
    let words = command::run(blkid.args(["-p", "-o", "value", "-s", "TYPE"]).arg(device), LOOK_WITHIN, &[0, 2])?;
    let found = words.trim();
    if found.is_empty() {
        return Err(FileSystemError::Missing(device.to_owned()));
    }
    match wanted {
        Some(wanted) if wanted.name() != found => {
            Err(FileSystemError::Other { device: device.to_owned(), found: found.to_owned(), wanted: wanted.name() })
        }
        _ => found.parse(),
    }
}

/// Repairs what can be repaired without a person. The file system is not mounted.
pub fn check(device: &Path, kind: FileSystem) -> Result<(), FileSystemError> {
    match kind {
        // 1 is: repaired. Anything above needs a person.
        FileSystem::Ext4 => {
            command::run(Command::new("e2fsck").arg("-p").arg(device), FSCK_WITHIN, &[0, 1]).map(drop)?
        }
        // Its mount replays the log; there is nothing else that may be done unasked.
        FileSystem::Xfs => {}
    }
    Ok(())
}

/// Grows a file system that is not mounted to its device, where that needs to be and can be done.
pub fn grow_unmounted(device: &Path, kind: FileSystem) -> Result<(), FileSystemError> {
    match kind {
        FileSystem::Ext4 if ext4_lacks(ext4_bytes(device)?, size(device)?) => {
            // resize2fs asks for a whole check first.
            command::run(Command::new("e2fsck").args(["-f", "-p"]).arg(device), FSCK_WITHIN, &[0, 1])?;
            command::run(Command::new("resize2fs").arg(device), GROW_WITHIN, &[0])?;
        }
        // XFS grows only while it is mounted.
        FileSystem::Ext4 | FileSystem::Xfs => {}
    }
    Ok(())
}

/// Grows a mounted file system to its device.
pub fn grow_mounted(device: &Path, target: &Path, kind: FileSystem) -> Result<(), FileSystemError> {
    match kind {
        FileSystem::Ext4 => {
            let (now, room) = (ext4_bytes(device)?, size(device)?);
            if now >= room {
                return Ok(());
            }
            match command::run(Command::new("resize2fs").arg(device), GROW_WITHIN, &[0]) {
                Ok(_) => {}
                Err(CommandError::Failed { .. }) if !ext4_lacks(now, room) => {}
                Err(CommandError::Failed { said, .. }) if said.contains("Permission denied") => {
                    return Err(FileSystemError::NotWhileMounted(device.to_owned()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        // Does nothing where there is nothing to do.
        FileSystem::Xfs => {
            command::run(Command::new("xfs_growfs").arg("-d").arg(target), GROW_WITHIN, &[0]).map(drop)?
        }
    }
    Ok(())
}

/// Bytes of a block device.
pub fn size(device: &Path) -> Result<u64, FileSystemError> {
    let io = |source| FileSystemError::Io { path: device.to_owned(), source };
    // A device reports its size to nobody but whoever looks for its end.
    io::Seek::seek(&mut File::open(device).map_err(io)?, io::SeekFrom::End(0)).map_err(io)
}

/// Whether two paths are the same block device.
pub fn is_same_device(path: &Path, device: &Path) -> Result<bool, FileSystemError> {
    let look = |path: &Path| match fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata).filter(|m| m.file_type().is_block_device()).map(|m| m.rdev())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FileSystemError::Io { path: path.to_owned(), source }),
    };
    Ok(look(path)?.is_some_and(|number| look(device).is_ok_and(|other| other == Some(number))))
}

/// What a file system has and has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub total_bytes: u64,
    pub available_bytes: u64,
    pub used_bytes: u64,
    /// Zero where the file system makes them as it goes and has no bound.
    pub total_inodes: u64,
    pub free_inodes: u64,
}

pub fn usage(path: &Path) -> Result<Usage, FileSystemError> {
    let io = |error: rustix::io::Errno| FileSystemError::Io { path: path.to_owned(), source: error.into() };
    let stat = rustix::fs::statvfs(path).map_err(io)?;
    Ok(Usage {
        total_bytes: stat.f_blocks * stat.f_frsize,
        available_bytes: stat.f_bavail * stat.f_frsize,
        used_bytes: stat.f_blocks.saturating_sub(stat.f_bfree) * stat.f_frsize,
        total_inodes: stat.f_files,
        free_inodes: stat.f_ffree,
    })
}

/// Whether a file system of `now` bytes should grow on a device of `room`.
fn ext4_lacks(now: u64, room: u64) -> bool {
    room.saturating_sub(now) > EXT4_REST_BYTES_MAX
}

fn ext4_bytes(device: &Path) -> Result<u64, FileSystemError> {
    let words = command::run(Command::new("dumpe2fs").arg("-h").arg(device), LOOK_WITHIN, &[0])?;
    ext4_size(&words).ok_or_else(|| FileSystemError::Size(device.to_owned()))
}

fn ext4_size(description: &str) -> Option<u64> {
    let field = |name: &str| {
        let line = description.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u64>().ok()
    };
    field("Block count:")?.checked_mul(field("Block size:")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_an_ext4_file_system_is_read() {
        let words = "dumpe2fs 1.47\nInode count:      65536\nBlock count:      262144\nBlock size:       4096\n";
        assert_eq!(ext4_size(words), Some(1 << 30));
        assert_eq!(ext4_size("Block count: 1\n"), None);
        assert_eq!(ext4_size("Block count: many\nBlock size: 4096\n"), None);
    }

    #[test]
    fn a_rest_that_ext4_cannot_use_is_no_reason_to_grow() {
        let gib = 1 << 30;
        assert!(!ext4_lacks(gib, gib));
        assert!(!ext4_lacks(gib - EXT4_REST_BYTES_MAX, gib));
        assert!(ext4_lacks(gib, gib + EXT4_REST_BYTES_MAX + 1));
        assert!(!ext4_lacks(2 * gib, gib), "a device smaller than its file system does not grow it");
    }

    /// The tools themselves, on a file: what they accept, print and return is what the code above believes.
    #[test]
    fn a_file_system_is_made_recognised_checked_and_grown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let device = file.path();
        for kind in [FileSystem::Ext4, FileSystem::Xfs] {
            file.as_file().set_len(0).unwrap();
            file.as_file().set_len(400 << 20).unwrap();
            assert!(matches!(recognise(device, None), Err(FileSystemError::Missing(_))));
            make(device, kind, Before::Zeroes, &[]).unwrap();
            assert_eq!(recognise(device, None).unwrap(), kind);
            make(device, kind, Before::Anything, &["-L".into(), "data".into()]).unwrap();
            assert_eq!(recognise(device, Some(kind)).unwrap(), kind);
            let other = if kind == FileSystem::Ext4 { FileSystem::Xfs } else { FileSystem::Ext4 };
            assert!(matches!(recognise(device, Some(other)), Err(FileSystemError::Other { .. })));
            check(device, kind).unwrap();
            file.as_file().set_len(600 << 20).unwrap();
            grow_unmounted(device, kind).unwrap();
            if kind == FileSystem::Ext4 {
                assert_eq!(ext4_bytes(device).unwrap(), 600 << 20);
                check(device, kind).unwrap();
            }
        }
    }
}
