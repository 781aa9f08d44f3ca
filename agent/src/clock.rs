//! The clock of everything in this process.

use holdfast_consensus::Timestamp;

/// Time since boot, time asleep included.
#[allow(unsafe_code)]
pub(crate) fn now() -> Timestamp {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec to the place given, which lives across it.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
    assert_eq!(failed, 0, "Linux has CLOCK_BOOTTIME since 2.6.39");
    Timestamp(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}
