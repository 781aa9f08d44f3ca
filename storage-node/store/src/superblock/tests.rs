use super::*;
use crate::device::memory::MemoryDevice;

const GOLDEN: &[u8] = include_bytes!("../../golden/superblock-1.bin");

fn golden() -> Superblock {
    Superblock {
        version: 1,
        incompat: 0,
        ro_compat: 0,
        cluster: ClusterId::from_bytes([0x11; 16]).unwrap(),
        node: NodeId::from_bytes([0x22; 16]).unwrap(),
        disk: DiskId::from_bytes([0x33; 16]).unwrap(),
        lanes: 1,
        clean: true,
        boot_epoch: 7,
        generation: 9,
        device_bytes: 64 << 20,
        wal: Region::new(1 << 20, 33 << 20),
        wal_segment_bytes: 8 << 20,
        chunks: Region::new(33 << 20, 64 << 20),
    }
}

fn disk() -> MemoryDevice {
    let device = MemoryDevice::new(64 << 20);
    golden().write(&device).unwrap();
    device
}

/// Encodes a superblock as some other program would have.
fn write_raw(device: &MemoryDevice, superblock: &Superblock) {
    let block = superblock.encode();
    for copy in COPIES {
        device.write_at(copy, &block).unwrap();
    }
}

#[test]
fn the_first_format_is_written_and_read_for_ever() {
    assert_eq!(golden().encode()[..FIELDS_END], *GOLDEN);
    let mut block = GOLDEN.to_vec();
    block.resize(BLOCK_BYTES, 0);
    assert!(matches!(Superblock::decode(&block), Copy::Valid(found) if found == golden()));
}

#[test]
fn one_good_copy_of_two_is_enough_and_none_is_told() {
    for (copy, offset) in COPIES.into_iter().enumerate() {
        let device = disk();
        device.corrupt(offset + 100, 1);
        assert_eq!(Superblock::read(&device).unwrap(), Some(golden()));
        assert!(!Superblock::whole_copies(&device).unwrap()[copy]);
    }
    let device = disk();
    COPIES.iter().for_each(|offset| device.corrupt(offset + 100, 1));
    assert!(matches!(Superblock::read(&device), Err(OpenError::SuperblockDamaged)));
}

#[test]
fn a_crash_in_a_change_leaves_the_old_or_the_new_whichever_copy_was_bad_before() {
    let next = Superblock { generation: 10, boot_epoch: 8, ..golden() };
    for bad in [None, Some(COPIES[0]), Some(COPIES[1])] {
        let device = disk();
        if let Some(offset) = bad {
            device.corrupt(offset + 100, 1);
        }
        /// Ends like a power failure, in the middle of the `n`th write from now.
        struct Cut(MemoryDevice, std::sync::Mutex<usize>);
        impl Device for Cut {
            fn len(&self) -> io::Result<u64> {
                self.0.len()
            }
            fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
                self.0.read_at(offset, buffer)
            }
            fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
                self.0.write_at(offset, data)?;
                let mut left = self.1.lock().unwrap();
                *left = left.checked_sub(1).ok_or(io::ErrorKind::Interrupted)?;
                Ok(())
            }
            fn flush(&self) -> io::Result<()> {
                self.0.flush()
            }
        }
        for cut in 0..2 {
            // The fields lie in the first sector: a tear within the block leaves the old or the new checksum.
            for survives in [0..0, 0..1, 1..8, 0..8] {
                let torn = device.fork();
                next.write(&Cut(torn.clone(), cut.into())).unwrap_err();
                torn.crash(|_, sector| survives.contains(&sector));
                let found = Superblock::read(&torn).unwrap().unwrap();
                assert!(found == next || found == golden(), "{found:?}");
            }
        }
    }
}

#[test]
fn what_this_program_must_not_open_has_its_reason() {
    let device = disk();
    write_raw(&device, &Superblock { incompat: 4, ..golden() });
    assert!(matches!(Superblock::read(&device), Err(OpenError::NewerFormat { unknown_bits: 4 })));
    write_raw(&device, &Superblock { ro_compat: 2, ..golden() });
    let found = Superblock::read(&device).unwrap().unwrap();
    assert!(matches!(found.check_writable(), Err(OpenError::NewerFormat { unknown_bits: 2 })));
    write_raw(&device, &Superblock { device_bytes: 65 << 20, ..golden() });
    assert!(matches!(Superblock::read(&device), Err(OpenError::TooSmall { .. })));
    write_raw(&device, &Superblock { wal_segment_bytes: 12345, ..golden() });
    assert!(matches!(Superblock::read(&device), Err(OpenError::SuperblockDamaged)));
    let foreign = MemoryDevice::new(1 << 20);
    foreign.corrupt(510, 2);
    assert!(matches!(Superblock::read(&foreign), Err(OpenError::Foreign)));
    assert!(matches!(Superblock::read(&MemoryDevice::new(8192)), Err(OpenError::TooSmall { .. })));
}
