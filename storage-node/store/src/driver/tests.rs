use std::collections::BTreeMap;

use super::thread::ThreadDriver;
use super::uring::UringDriver;
use super::*;
use crate::ops::AlignedBuffer;

/// Waits for the descriptor, never for time.
fn wait(driver: &mut dyn Driver, count: usize) -> BTreeMap<OpId, Result<Bytes, DeviceError>> {
    let mut done = BTreeMap::new();
    while done.len() < count {
        let mut poll = libc::pollfd { fd: driver.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd is passed with its count, and lives through the call.
        unsafe { libc::poll(&mut poll, 1, -1) };
        for (id, result) in driver.completions() {
            assert!(done.insert(id, result).is_none(), "{id:?} completed twice");
        }
    }
    done
}

fn exercise(driver: &mut dyn Driver) {
    let block = |byte| AlignedBuffer::padded(&[byte; 4096]);
    // More operations than any driver takes at once.
    let writes = (0..200).map(|n| DeviceOp::Write {
        id: OpId(n),
        offset: n * 4096,
        data: block(n as u8).into(),
        durable: n % 7 == 0,
    });
    driver.submit(writes.collect());
    assert!(wait(driver, 200).values().all(|result| result.as_ref().is_ok_and(Bytes::is_empty)));
    driver.submit(vec![
        DeviceOp::Flush { id: OpId(1000) },
        DeviceOp::Read { id: OpId(1001), offset: 4096, length: 8192, cached: true },
        DeviceOp::Read { id: OpId(1002), offset: 4 << 20, length: 4096, cached: false },
    ]);
    let done = wait(driver, 3);
    assert_eq!(done[&OpId(1000)], Ok(Bytes::new()));
    assert_eq!(done[&OpId(1001)], Ok(Bytes::from([[1; 4096], [2; 4096]].concat())));
    assert!(matches!(done[&OpId(1002)], Err(DeviceError::Read { offset: 0x40_0000, length: 4096, .. })));
    // What is in memory follows what is written past it.
    let write = DeviceOp::Write { id: OpId(1003), offset: 8192, data: block(9).into(), durable: true };
    driver.submit(vec![write]);
    wait(driver, 1);
    driver.submit(vec![DeviceOp::Read { id: OpId(1004), offset: 4096, length: 8192, cached: true }]);
    assert_eq!(wait(driver, 1)[&OpId(1004)], Ok(Bytes::from([[1; 4096], [9; 4096]].concat())));
    // Dropped with operations in flight by the caller: nothing may be freed under the kernel's hands.
    driver.submit(
        (0..50).map(|n| DeviceOp::Read { id: OpId(n), offset: n * 4096, length: 4096, cached: n % 2 == 0 }).collect(),
    );
}

fn file() -> (tempfile::TempDir, Arc<FileDevice>) {
    let folder = tempfile::tempdir().unwrap();
    let device = FileDevice::create(&folder.path().join("disk"), 4 << 20).unwrap();
    (folder, Arc::new(device))
}

#[test]
fn threads_perform_every_operation_once() {
    let (_folder, device) = file();
    exercise(&mut ThreadDriver::new(device).unwrap());
}

#[test]
fn io_uring_performs_every_operation_once() {
    let (_folder, device) = file();
    match UringDriver::new(device) {
        Ok(mut driver) => exercise(&mut driver),
        // A kernel that forbids it is told from a driver that is broken.
        Err(error) => assert!(
            matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES)),
            "io_uring fails with {error}"
        ),
    }
}
