//! A loop device over a FUSE file that no path leads to: made, found again, taken away.
//!
//! Everything here may wait for requests that the agent's own loop answers, so it runs on threads of its own, except
//! what is said to be done before that loop begins.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdfast_id::VolumeId;
use rustix::fs::{CWD, Dev, FileType, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags};

use crate::sys;

/// Another process may take the free device first; as many in a row are no accident.
const TRIES: usize = 16;
/// For others to close the device after it was told to go.
const CLOSED_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// `MISC_MAJOR`, `FUSE_MINOR` and `LOOP_CTRL_MINOR` of Linux `include/uapi/linux/major.h` and `include/linux/miscdevice.h`.
const MISC_MAJOR: u32 = 10;
const FUSE_MINOR: u32 = 229;
const LOOP_CONTROL_MINOR: u32 = 237;
/// The first kernel that sends unanswered requests again to the next agent.
const KERNEL_MIN: (u32, u32) = (6, 9);

#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    #[error("{0}")]
    Machine(String),
    #[error("{step} failed")]
    Step { step: &'static str, source: io::Error },
    #[error("{0} is in use")]
    InUse(PathBuf),
    #[error("{0} has no direct I/O on its file")]
    NoDirectIo(PathBuf),
}

impl DeviceError {
    /// With its cause, for those who see only text.
    pub fn text(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> DeviceError {
    move |source| DeviceError::Step { step, source: source.into() }
}

/// The file's name under the loop device. An epoch belongs to one agent, so what carries it is that agent's own.
pub(crate) fn name(volume: VolumeId, epoch: u64) -> String {
    format!("holdfast-{volume}-{epoch}")
}

pub(crate) fn path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// Whether this machine can have such devices at all; asked before an epoch is taken.
pub(crate) fn check_machine() -> Result<(), DeviceError> {
    let refuse = |text: String| Err(DeviceError::Machine(text));
    if !rustix::process::geteuid().is_root() {
        return refuse("a device needs an agent that runs as root; NBD on a socket does not".into());
    }
    for (path, minor) in [("/dev/fuse", FUSE_MINOR), ("/dev/loop-control", LOOP_CONTROL_MINOR)] {
        // A container's /dev may lack what the kernel has; opening it has the kernel load what it does not have yet.
        make_node(Path::new(path), FileType::CharacterDevice, rustix::fs::makedev(MISC_MAJOR, minor))?;
        if let Err(error) = OpenOptions::new().read(true).write(true).open(path) {
            return refuse(format!("{path} cannot be opened on this machine: {error}"));
        }
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").map_err(step("reading the kernel's release"))?;
    if version(&release).is_none_or(|version| version < KERNEL_MIN) {
        let (major, minor) = KERNEL_MIN;
        return refuse(format!(
            "a device that outlives its agent needs Linux {major}.{minor}, this is {}",
            release.trim()
        ));
    }
    for limit in ["default_request_timeout", "max_request_timeout"] {
        let path = Path::new("/proc/sys/fs/fuse").join(limit);
        match fs::read_to_string(&path) {
            Ok(value) if value.trim() == "0" => {}
            // Kernels before 6.14 have no such limit.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(value) => {
                let (path, value) = (path.display(), value.trim());
                return refuse(format!(
                    "{path} is {value}: the kernel would give up requests that wait for a quorum; set it to 0"
                ));
            }
            Err(error) => return Err(step("reading the kernel's request time-outs")(error)),
        }
    }
    Ok(())
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Makes the file system of `fuse`; waits for none of its requests. Only from here on can `fuse` be watched.
///
/// The mount is attached nowhere: the loop device alone is to keep it, so nothing propagates and no path hangs.
pub(crate) fn mount(fuse: impl AsFd) -> Result<OwnedFd, DeviceError> {
    let fs = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("fsopen"))?;
    let descriptor = fuse.as_fd().as_raw_fd().to_string();
    let options = [
        ("source", "holdfast"),
        ("fd", descriptor.as_str()),
        ("rootmode", "40000"),
        ("user_id", "0"),
        ("group_id", "0"),
    ];
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(&fs, key, value).map_err(step("fsconfig"))?;
    }
    rustix::mount::fsconfig_create(&fs).map_err(step("creating the FUSE file system"))?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(step("fsmount"))
}

/// Makes a loop device over the one file of the file system; returns the device's number.
pub(crate) fn make(mount: OwnedFd, name: &str, block_bytes: u32) -> Result<u32, DeviceError> {
    let file = rustix::fs::openat(&mount, name, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(step("opening the FUSE file"))?;
    let control = File::open("/dev/loop-control").map_err(step("opening /dev/loop-control"))?;
    for _ in 0..TRIES {
        let number = sys::loop_free(&control).map_err(step("asking for a free loop device"))?;
        let path = path(number);
        make_node(&path, FileType::BlockDevice, sys::loop_number(number))?;
        let device = OpenOptions::new().read(true).write(true).open(&path).map_err(step("opening the loop device"))?;
        match sys::loop_configure(&device, &file, block_bytes) {
            Ok(()) if has_direct_io(number) => return Ok(number),
            Ok(()) => {
                sys::loop_clear(&device).map_err(step("clearing the loop device"))?;
                return Err(DeviceError::NoDirectIo(path));
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(step("configuring the loop device")(error)),
        }
    }
    Err(DeviceError::Machine("others take every free loop device first".into()))
}

/// Where no udev makes the node, as in a container, it is made here.
fn make_node(path: &Path, kind: FileType, number: Dev) -> Result<(), DeviceError> {
    match rustix::fs::mknodat(CWD, path, kind, Mode::RUSR | Mode::WUSR, number) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(step("making the node of a device")(error)),
    }
}

fn sysfs(number: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/loop{number}/loop"))
}

fn has_direct_io(number: u32) -> bool {
    fs::read_to_string(sysfs(number).join("dio")).is_ok_and(|value| value.trim() == "1")
}

/// Whether the device still is over the file of that name.
fn carries(number: u32, name: &str) -> bool {
    fs::read_to_string(sysfs(number).join("backing_file")).is_ok_and(|file| file.trim_end() == format!("/{name}"))
}

/// The device over the file of that name.
pub(crate) fn find(name: &str) -> Option<u32> {
    let numbers = fs::read_dir("/sys/block")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("loop")?.parse::<u32>().ok());
    numbers.into_iter().find(|number| carries(*number, name))
}

/// How a device is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// Not while anything uses it, and only after its writes are out.
    Orderly,
    /// Not while anything uses it; what was not written cannot be any more.
    Unused,
    /// At once for new users; those there are see errors.
    Force,
}

pub(crate) fn remove(number: u32, name: &str, removal: Removal) -> Result<(), DeviceError> {
    let path = path(number);
    if !carries(number, name) {
        return Ok(());
    }
    // Another container's /dev may have it, and this one not.
    make_node(&path, FileType::BlockDevice, sys::loop_number(number))?;
    let force = removal == Removal::Force;
    let exclusive = if force { 0 } else { libc::O_EXCL };
    let device = match OpenOptions::new().read(true).custom_flags(exclusive).open(&path) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(DeviceError::InUse(path)),
        result => result.map_err(step("opening the loop device"))?,
    };
    if removal == Removal::Orderly {
        device.sync_all().map_err(step("flushing the loop device"))?;
    }
    match sys::loop_clear(&device) {
        Err(error) if error.raw_os_error() != Some(libc::ENXIO) => return Err(step("clearing the loop device")(error)),
        _ => drop(device),
    }
    if force {
        return Ok(());
    }
    let until = Instant::now() + CLOSED_WITHIN;
    while carries(number, name) {
        if Instant::now() >= until {
            return Err(DeviceError::InUse(path));
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// Lets the device see that its file has grown.
pub(crate) fn grow(number: u32) -> Result<(), DeviceError> {
    let device = File::open(path(number)).map_err(step("opening the loop device"))?;
    sys::loop_resize(&device).map_err(step("growing the loop device"))
}

/// Clears a device whose file's server is gone for good: its requests fail at once, so nothing here waits.
pub(crate) fn remove_leftover(name: &str) -> Result<(), DeviceError> {
    let Some(number) = find(name) else { return Ok(()) };
    let path = path(number);
    tracing::warn!(device = %path.display(), "left behind by an agent and a keeper that are both gone; it is cleared");
    for target in mounts_of(&path).map_err(step("reading the mounts"))? {
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        rustix::mount::unmount(&target, flags).map_err(step("unmounting a dead file system"))?;
    }
    remove(number, name, Removal::Force)
}

/// Where the device is mounted, the last mount first.
fn mounts_of(device: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let mut targets: Vec<PathBuf> = table.lines().filter_map(|line| mount_of(line, device)).collect();
    targets.reverse();
    Ok(targets)
}

/// A line is `id parent major:minor root TARGET options [fields] - type SOURCE options`.
fn mount_of(line: &str, device: &Path) -> Option<PathBuf> {
    let (left, right) = line.split_once(" - ")?;
    let source = right.split(' ').nth(1)?;
    let target = left.split(' ').nth(4)?;
    (Path::new(source) == device).then(|| PathBuf::from(unescape(target)))
}

/// The kernel writes space, tab, line feed and backslash as three octal digits.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_kernels_are_read() {
        assert_eq!(version("6.18.44-generic\n"), Some((6, 18)));
        assert_eq!(version("6.9.0"), Some((6, 9)));
        assert!(version("6.9.0") >= Some(KERNEL_MIN) && version("6.8.12") < Some(KERNEL_MIN));
        assert_eq!(version("strange"), None);
    }

    #[test]
    fn mounts_of_a_device_are_told_from_others() {
        let line = r"36 35 7:1 / /mnt/a\040b rw,noatime shared:1 - ext4 /dev/loop1 rw";
        assert_eq!(mount_of(line, Path::new("/dev/loop1")), Some(PathBuf::from("/mnt/a b")));
        assert_eq!(mount_of(line, Path::new("/dev/loop11")), None);
        assert_eq!(mount_of("36 35 7:1 / /mnt", Path::new("/dev/loop1")), None);
    }
}
