use super::*;

const BLOCK: u64 = BLOCK_BYTES as u64;

fn at(micros: u64) -> Timestamp {
    Timestamp::ZERO + Duration::from_micros(micros)
}

fn disk(seed: u64) -> SimDisk {
    SimDisk::new(Prng::new(seed), DiskOptions { used: false, ..DiskOptions::solid_state(64 * BLOCK) })
}

fn write(id: u64, block: u64, fill: u8, durable: bool) -> DeviceOp {
    DeviceOp::Write {
        id: OpId(id),
        offset: block * BLOCK,
        data: AlignedBuffer::padded(&[fill; BLOCK_BYTES]).into(),
        durable,
    }
}

fn read(id: u64, block: u64) -> DeviceOp {
    DeviceOp::Read { id: OpId(id), offset: block * BLOCK, length: BLOCK_BYTES as u32, cached: false }
}

fn drain(disk: &mut SimDisk) -> Vec<(Timestamp, OpId, Result<Bytes, DeviceError>)> {
    let mut done = Vec::new();
    while let Some(when) = disk.next_completion() {
        while let Some((id, result)) = disk.complete(when) {
            done.push((when, id, result));
        }
    }
    done
}

/// The operation's result, alone on the disk.
fn run(disk: &mut SimDisk, op: DeviceOp) -> Result<Bytes, DeviceError> {
    disk.submit(at(0), op);
    let mut done = drain(disk);
    assert_eq!(done.len(), 1);
    done.remove(0).2
}

fn byte(disk: &mut SimDisk, block: u64) -> u8 {
    let data = run(disk, read(99, block)).unwrap();
    assert!(data.iter().all(|byte| *byte == data[0]));
    data[0]
}

#[test]
fn operations_take_time_and_have_no_order() {
    let mut disk = disk(1);
    for id in 0..50 {
        disk.submit(at(0), write(id, id, id as u8, false));
    }
    assert!(disk.complete(at(9)).is_none(), "no write takes less than 10 us");
    let done = drain(&mut disk);
    let ids: Vec<u64> = done.iter().map(|(_, id, _)| id.0).collect();
    assert!(!ids.is_sorted());
    assert!(done.iter().all(|(when, _, result)| *when >= at(10) && result.is_ok()));
    assert_eq!((0..50).map(|block| byte(&mut disk, block)).collect::<Vec<_>>(), (0..50).collect::<Vec<u8>>());
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let mut disk = disk(seed);
        (0..40).for_each(|id| disk.submit(at(id), write(id, id % 8, id as u8, id % 5 == 0)));
        let early: Vec<_> = std::iter::from_fn(|| disk.complete(at(40))).collect();
        disk.crash(CrashMode::Any);
        let mut bytes = vec![0; 8 * BLOCK_BYTES];
        disk.read_at(0, &mut bytes).unwrap();
        (early, bytes, disk.statistics())
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

#[test]
fn a_flush_covers_what_completed_before_its_submission_and_nothing_else() {
    let mut disk = disk(2);
    run(&mut disk, write(0, 0, 1, false)).unwrap();
    disk.submit(at(0), DeviceOp::Flush { id: OpId(1) });
    disk.submit(at(0), write(2, 1, 2, false));
    drain(&mut disk);
    disk.crash(CrashMode::LoseAll);
    assert_eq!((byte(&mut disk, 0), byte(&mut disk, 1)), (1, 0));
}

#[test]
fn a_durable_write_survives_and_covers_no_other() {
    let mut disk = disk(3);
    run(&mut disk, write(0, 0, 1, false)).unwrap();
    run(&mut disk, write(1, 1, 2, true)).unwrap();
    assert_eq!(disk.volatile_sectors(), 8);
    disk.crash(CrashMode::LoseAll);
    assert_eq!((byte(&mut disk, 0), byte(&mut disk, 1)), (0, 2));
}

#[test]
fn a_write_in_flight_at_a_crash_may_land_in_part_and_never_completes() {
    let (mut whole, mut torn, mut nothing) = (0, 0, 0);
    for seed in 0..200 {
        let mut disk = disk(seed);
        disk.submit(at(0), write(0, 0, 7, true));
        disk.crash(if seed % 3 == 0 { CrashMode::KeepAll } else { CrashMode::Any });
        assert_eq!((disk.in_flight(), disk.next_completion()), (0, None));
        let mut data = vec![0; BLOCK_BYTES];
        disk.read_at(0, &mut data).unwrap();
        for sector in data.chunks(512) {
            assert!(sector == [7; 512] || sector == [0; 512], "a sector is never torn");
        }
        match data.iter().filter(|byte| **byte == 7).count() {
            0 => nothing += 1,
            BLOCK_BYTES => whole += 1,
            _ => torn += 1,
        }
        assert_eq!(disk.statistics().interrupted, 1);
    }
    assert!(whole > 50 && torn > 50, "{whole} {torn} {nothing}");
}

#[test]
fn every_injected_fault_strikes_once() {
    let mut disk = disk(4);
    (0..64).for_each(|block| {
        run(&mut disk, write(block, block, block as u8, true)).unwrap();
    });
    disk.inject(Fault::ReadError);
    assert!(matches!(run(&mut disk, read(1, 3)), Err(DeviceError::Read { .. })));
    disk.inject(Fault::MisdirectedRead);
    assert_ne!(byte(&mut disk, 3), 3);
    assert_eq!(byte(&mut disk, 3), 3);

    disk.inject(Fault::LostWrite);
    assert!(run(&mut disk, write(1, 3, 100, true)).is_ok());
    assert_eq!(byte(&mut disk, 3), 3);
    disk.inject(Fault::MisdirectedWrite);
    assert!(run(&mut disk, write(1, 3, 101, true)).is_ok());
    let holding: Vec<u64> = (0..64).filter(|block| byte(&mut disk, *block) == 101).collect();
    assert!(holding.len() == 1 && holding[0] != 3, "{holding:?}");
    disk.inject(Fault::WriteError);
    assert!(matches!(run(&mut disk, write(1, 4, 102, false)), Err(DeviceError::Write { .. })));
    assert_eq!(disk.statistics().faults, 5);
    assert!(run(&mut disk, write(1, 4, 103, false)).is_ok());
}

#[test]
fn a_failed_flush_loses_its_writes_even_if_the_next_succeeds() {
    let mut disk = disk(5);
    run(&mut disk, write(0, 0, 1, false)).unwrap();
    disk.inject(Fault::FlushError);
    assert!(matches!(run(&mut disk, DeviceOp::Flush { id: OpId(1) }), Err(DeviceError::Flush { .. })));
    run(&mut disk, DeviceOp::Flush { id: OpId(2) }).unwrap();
    assert_eq!(byte(&mut disk, 0), 1);
    disk.crash(CrashMode::KeepAll);
    assert_eq!(byte(&mut disk, 0), 0);
}

#[test]
fn media_faults_reach_the_reader() {
    let mut disk = disk(6);
    run(&mut disk, write(0, 0, 1, true)).unwrap();
    disk.make_unreadable(512, 512);
    assert!(run(&mut disk, read(1, 0)).is_err());
    assert!(disk.read_at(0, &mut [0; BLOCK_BYTES]).is_err());
    run(&mut disk, write(0, 0, 1, true)).unwrap();
    disk.corrupt(1024, 512);
    let data = run(&mut disk, read(1, 0)).unwrap();
    assert!(data[1024..1536] != [1; 512] && data[..1024] == [1; 1024] && data[1536..] == [1; 2560]);
}

#[test]
fn a_hung_disk_completes_nothing_until_it_goes_on() {
    let mut disk = disk(7);
    disk.submit(at(0), write(0, 0, 1, false));
    disk.hang();
    disk.submit(at(1), write(1, 1, 2, false));
    assert_eq!((disk.next_completion(), disk.complete(at(1_000_000)), disk.in_flight()), (None, None, 2));
    disk.resume(at(2_000_000));
    assert!(drain(&mut disk).iter().all(|(when, _, result)| *when >= at(2_000_000) && result.is_ok()));
    disk.set_slowness(100);
    disk.submit(at(0), write(0, 0, 1, false));
    assert!(disk.next_completion() >= Some(at(1000)));
}

#[test]
fn a_full_disk_takes_only_what_it_has_place_for() {
    let mut disk = disk(8);
    run(&mut disk, write(0, 0, 1, true)).unwrap();
    disk.set_full(true);
    assert!(run(&mut disk, write(1, 1, 2, true)).is_err());
    assert!(run(&mut disk, write(1, 0, 3, true)).is_ok());
    disk.set_full(false);
    assert!(run(&mut disk, write(1, 1, 2, true)).is_ok());
}
