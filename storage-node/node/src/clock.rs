//! The one place that reads a clock: CLOCK_BOOTTIME, which also counts the time a machine slept.

use std::time::Duration;

use holdfast_consensus::Timestamp;

pub(crate) fn now() -> Timestamp {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    assert_eq!(result, 0, "CLOCK_BOOTTIME exists since Linux 2.6.39");
    Timestamp(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

pub(crate) fn since_boot(now: Timestamp) -> Duration {
    Duration::from_nanos(now.0)
}
