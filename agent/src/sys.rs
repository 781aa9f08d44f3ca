//! The system calls for loop devices and FUSE that no safe wrapper has.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::Dev;

/// `LOOP_*` of Linux `include/uapi/linux/loop.h`.
const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_SET_CAPACITY: libc::Ioctl = 0x4C07;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// Major number of loop devices, `LOOP_MAJOR`.
const LOOP_MAJOR: u32 = 7;
/// `PR_SET_IO_FLUSHER` of Linux `include/uapi/linux/prctl.h`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// `struct loop_config` with its `struct loop_info64` spelled out.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    device: u64,
    inode: u64,
    real_device: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304);

fn checked(result: libc::c_int) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The number of a loop device that was free when the kernel looked.
pub(crate) fn loop_free(control: impl AsFd) -> io::Result<u32> {
    // SAFETY: the call takes no argument and touches no memory of this process.
    checked(unsafe { libc::ioctl(control.as_fd().as_raw_fd(), LOOP_CTL_GET_FREE) })
}

/// Puts `file` under the loop device, with direct I/O. `EBUSY` where somebody else was faster.
pub(crate) fn loop_configure(device: impl AsFd, file: impl AsFd, block_bytes: u32) -> io::Result<()> {
    let config = LoopConfig {
        fd: file.as_fd().as_raw_fd() as u32,
        block_size: block_bytes,
        device: 0,
        inode: 0,
        real_device: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: LO_FLAGS_DIRECT_IO,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads one `struct loop_config`, which is what `config` is, and it lives across the call.
    checked(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), LOOP_CONFIGURE, &raw const config) }).map(drop)
}

/// Takes the file away; while others have the device open, once the last of them closes it.
pub(crate) fn loop_clear(device: impl AsFd) -> io::Result<()> {
    // SAFETY: the call takes no argument and touches no memory of this process.
    checked(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), LOOP_CLR_FD) }).map(drop)
}

/// Makes the device as large as its file is now.
pub(crate) fn loop_resize(device: impl AsFd) -> io::Result<()> {
    // SAFETY: the call takes no argument and touches no memory of this process.
    checked(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), LOOP_SET_CAPACITY) }).map(drop)
}

pub(crate) fn loop_number(number: u32) -> Dev {
    rustix::fs::makedev(LOOP_MAJOR, number)
}

/// This thread serves a block device: its allocations must not wait for that device's own writes.
pub(crate) fn become_io_flusher() -> io::Result<()> {
    // SAFETY: the call only sets a flag of this thread.
    checked(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) }).map(drop)
}

/// Keeps the memory where it is, so that the kernel never faults a page in while it copies a request there.
pub(crate) fn lock_memory(memory: &[u8]) -> io::Result<()> {
    // SAFETY: the call changes no byte; the range is one allocation of this process.
    checked(unsafe { libc::mlock(memory.as_ptr().cast(), memory.len()) }).map(drop)
}
