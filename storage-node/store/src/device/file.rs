//! A file or a block device as a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{BLOCK_BYTES, Device, check_range};
use crate::ops::AlignedBuffer;

/// Why a disk was not opened as a device.
#[derive(Debug, thiserror::Error)]
pub enum FileDeviceError {
    #[error("{path} is in use by another process")]
    Locked { path: PathBuf },
    #[error("{path} is neither a file nor a block device")]
    NotADisk { path: PathBuf },
    #[error("{path} exists already")]
    Exists { path: PathBuf },
    #[error("cannot {action} {path}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

/// Holds an exclusive lock on the disk as long as it lives, also through operations of a dead process in flight:
/// the kernel keeps the lock with the last reference to the open file.
///
/// Direct where the file system can do it; elsewhere through the page cache. Either way only `flush` makes durable.
///
/// Reads that may be served from memory have a second descriptor, with the page cache and without read-ahead: memory
/// that the system takes back when it needs it, and that never holds anything unwritten. The kernel drops from it what
/// a direct write changes, and nobody reads blocks while they are written.
#[derive(Debug)]
pub struct FileDevice {
    file: File,
    /// `None`: `file` is not direct.
    cached: Option<File>,
    bytes: u64,
    direct: bool,
}

impl FileDevice {
    /// Opens and locks what exists.
    pub fn open(path: &Path) -> Result<FileDevice, FileDeviceError> {
        let failed = |action| move |source| FileDeviceError::Io { action, path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let direct = options.clone().custom_flags(libc::O_DIRECT).open(path);
        let (file, direct) = match direct {
            Ok(file) => (file, true),
            // EINVAL: the file system has no direct I/O.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (options.open(path).map_err(failed("open"))?, false)
            }
            Err(error) => return Err(failed("open")(error)),
        };
        let kind = file.metadata().map_err(failed("inspect"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(FileDeviceError::NotADisk { path: path.to_owned() });
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(FileDeviceError::Locked { path: path.to_owned() }),
            Err(std::fs::TryLockError::Error(error)) => return Err(failed("lock")(error)),
        }
        // The size of a block device is where seeking to its end leads; its metadata says 0.
        let bytes = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(failed("measure"))?;
        let cached = if direct { Some(open_cached(path).map_err(failed("open"))?) } else { None };
        Ok(FileDevice { file, cached, bytes: bytes - bytes % BLOCK_BYTES as u64, direct })
    }

    /// Makes a file of `bytes`, its space reserved, and opens it. Never touches one that exists.
    pub fn create(path: &Path, bytes: u64) -> Result<FileDevice, FileDeviceError> {
        let failed = |action| move |source| FileDeviceError::Io { action, path: path.to_owned(), source };
        let file = match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(FileDeviceError::Exists { path: path.to_owned() });
            }
            opened => opened.map_err(failed("create"))?,
        };
        reserve(&file, bytes).map_err(failed("reserve the space of"))?;
        file.sync_all().map_err(failed("flush"))?;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("flush the folder of"))?;
        drop(file);
        Self::open(path)
    }

    /// For reads that may be served from memory.
    pub(crate) fn cached_fd(&self) -> RawFd {
        self.cached.as_ref().unwrap_or(&self.file).as_raw_fd()
    }

    /// Whether the page cache is bypassed.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// `data` itself, or an aligned copy where direct I/O cannot take its address.
    fn aligned<T>(&self, data: &[u8], work: impl FnOnce(&[u8]) -> T) -> T {
        if self.direct && !(data.as_ptr() as usize).is_multiple_of(BLOCK_BYTES) {
            work(&AlignedBuffer::padded(data))
        } else {
            work(data)
        }
    }
}

impl AsRawFd for FileDevice {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Device for FileDevice {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        check_range(offset, buffer.len(), self.bytes)?;
        if self.direct && !(buffer.as_ptr() as usize).is_multiple_of(BLOCK_BYTES) {
            let mut aligned = AlignedBuffer::zeroed(buffer.len());
            self.file.read_exact_at(&mut aligned, offset)?;
            buffer.copy_from_slice(&aligned);
            return Ok(());
        }
        self.file.read_exact_at(buffer, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len(), self.bytes)?;
        self.aligned(data, |data| self.file.write_all_at(data, offset))
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Reads nothing ahead: what is read together was asked for together.
fn open_cached(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open for the length of the call; no memory is passed.
    let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
    if error == 0 { Ok(file) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// Reserves space, so that a full file system is found now. A file system that cannot gets a sparse file.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    let length = i64::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the descriptor is open for the length of the call; no memory is passed.
    if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EOPNOTSUPP) { file.set_len(bytes) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_opened_once_at_a_time_and_keeps_its_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let device = FileDevice::create(&path, 1 << 20).unwrap();
        assert!(matches!(FileDevice::create(&path, 1 << 20), Err(FileDeviceError::Exists { .. })));
        assert!(matches!(FileDevice::open(&path), Err(FileDeviceError::Locked { .. })));
        // An address direct I/O cannot take.
        let data = vec![7; BLOCK_BYTES + 1];
        device.write_at(8192, &data[1..]).unwrap();
        device.flush().unwrap();
        drop(device);
        let device = FileDevice::open(&path).unwrap();
        assert_eq!(device.len().unwrap(), 1 << 20);
        let mut back = vec![0; BLOCK_BYTES + 1];
        device.read_at(8192, &mut back[1..]).unwrap();
        assert_eq!(back[1..], data[1..]);
        assert_eq!(device.read_at(1 << 20, &mut back[1..]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(device.write_at(1, &data[1..]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(FileDevice::open(Path::new("/dev/null")), Err(FileDeviceError::NotADisk { .. })));
        assert!(matches!(FileDevice::open(&folder.path().join("absent")), Err(FileDeviceError::Io { .. })));
    }
}
