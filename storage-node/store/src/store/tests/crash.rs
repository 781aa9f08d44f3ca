//! Every crash of scripted runs, and what it may leave.

use super::model::{Run, group, replica};
use crate::device::memory::MemoryDevice;
use crate::device::{BLOCK_BYTES, Device};
use crate::group::{Append, Damage};
use crate::store::Store;

/// Up to so many unflushed sectors every subset is tried; beyond, those that tell bugs apart.
const SECTORS_ENUMERATED_MAX: usize = 8;

/// Which sectors of all unflushed ones survive, for every crash state that is tried.
fn crash_states(sectors: usize) -> Vec<Vec<bool>> {
    if sectors <= SECTORS_ENUMERATED_MAX {
        return (0..1u32 << sectors).map(|set| (0..sectors).map(|sector| set >> sector & 1 == 1).collect()).collect();
    }
    let mut states = Vec::new();
    // Of long writes every third boundary: a sector in the header, the table and each block is among them.
    for cut in (0..=sectors).step_by(if sectors > 24 { 3 } else { 1 }) {
        states.push((0..sectors).map(|sector| sector < cut).collect());
        states.push((0..sectors).map(|sector| sector >= cut).collect());
        states.push((0..sectors).map(|sector| sector != cut).collect());
        states.push((0..sectors).map(|sector| sector == cut).collect());
        // Scattered, and the same at every run.
        states.push((0..sectors).map(|sector| (sector * 7 + cut * 13) % 11 < 5).collect());
    }
    states
}

/// Forks of the disk, crashed in every way.
fn crashes(device: &MemoryDevice) -> impl Iterator<Item = MemoryDevice> {
    let writes = device.unflushed_sectors();
    let starts: Vec<usize> = writes
        .iter()
        .scan(0, |end, sectors| {
            let start = *end;
            *end += sectors;
            Some(start)
        })
        .collect();
    crash_states(writes.iter().sum()).into_iter().map(move |survives| {
        let fork = device.fork();
        fork.crash(|write: usize, sector: usize| survives[starts[write] + sector]);
        fork
    })
}

/// Recovers from every crash of the disk as it is, goes on a little, and recovers once more.
fn check_crashes(run: &Run) -> Result<(), String> {
    for crashed in crashes(&run.device) {
        let (mut store, held) = run.recover(&crashed)?;
        if held.len() != run.groups.len() {
            return Err("damage without bit rot".to_owned());
        }
        run.check_blocks(&mut store, &crashed, &held)?;
        // A second crash at once, and the remains under the next batch, change nothing.
        let mut appends = Vec::new();
        for number in run.groups.keys() {
            let next = store.last_appended(group(*number)).unwrap() + 1;
            let record = crate::group::Record {
                index: next,
                header: "after".into(),
                payload: vec![7; BLOCK_BYTES].into(),
                at: None,
            };
            appends.push((*number, record.clone()));
            let records = vec![record];
            let append = Append { group: group(*number), sequence: 1, hard_state: None, truncate_from: None, records };
            if store.append(append).is_err() {
                appends.pop();
            }
        }
        for op in store.take_ops() {
            let crate::ops::DeviceOp::Write { id, offset, data, durable: true } = op else { continue };
            crashed.write_durable_at(offset, &data).unwrap();
            store.on_completion(id, Ok(bytes::Bytes::new()));
        }
        crashed.crash(|_, _| false);
        let (_, again) = Store::open(&crashed).map_err(|error| format!("no second opening: {error}"))?;
        for (number, record) in appends {
            let found = again.iter().find(|found| found.replica == replica(number)).unwrap();
            if found.records.last() != Some(&record) || found.damage.is_some() {
                return Err(format!("group {number} lost what was flushed after a recovery"));
            }
        }
    }
    Ok(())
}

/// Payloads in slots: torn, truncated, overwritten in part, adopted by a checkpoint; crashed after every operation.
fn enumerate_payloads() -> Result<(), String> {
    let mut run = Run::new(2);
    let mut verdict = Ok(());
    let mut observe = |run: &Run| {
        if verdict.is_ok() {
            verdict = check_crashes(run);
        }
    };
    let step = |run: &mut Run, observe: &mut dyn FnMut(&Run)| while run.step(&mut *observe) {};
    // In one batch with records of another group, and with inline ones before and behind.
    run.append(1, 0, true, &[1, 20, 0]);
    run.append(2, 0, true, &[1]);
    step(&mut run, &mut observe);
    // Two in a row, of which the second truncates the first before either is durable.
    run.append_at(1, 0, false, &[(16, 16)]);
    run.append_at(1, 1, true, &[(16, 32), (20, 1)]);
    step(&mut run, &mut observe);
    run.checkpoint_observed(1, 1, &mut observe);
    // Flushed, then truncated, then in the same slots again.
    run.append_at(1, 0, false, &[(0, 16)]);
    while run.step(|_| {}) {}
    run.append_at(1, 1, true, &[(0, 16)]);
    step(&mut run, &mut observe);
    run.append_at(2, 0, true, &[(30, 20)]);
    step(&mut run, &mut observe);
    run.checkpoint_observed(2, 0, &mut observe);
    run.checkpoint_observed(1, 0, &mut observe);
    run.append(1, 0, true, &[2]);
    step(&mut run, &mut observe);
    run.checkpoint_observed(1, 0, &mut observe);
    verdict
}

#[test]
fn after_every_crash_payloads_in_slots_are_there_with_their_records() {
    enumerate_payloads().unwrap();
}

/// Snapshots with short and long payloads between, overwritten, deleted in both orders; crashed after every operation.
fn enumerate_snapshots() -> Result<(), String> {
    let mut run = Run::new(2);
    let mut verdict = Ok(());
    let mut observe = |run: &Run| {
        if verdict.is_ok() {
            verdict = check_crashes(run);
        }
    };
    let step = |run: &mut Run, observe: &mut dyn FnMut(&Run)| while run.step(&mut *observe) {};
    run.append_at(1, 0, true, &[(0, 16), (20, 2)]);
    run.append(2, 0, true, &[1]);
    step(&mut run, &mut observe);
    run.snapshot_observed(1, &mut observe);
    // In a slot that the snapshot names, and a whole one in the place of another.
    run.append_at(1, 0, false, &[(21, 1), (0, 16)]);
    while run.step(|_| {}) {}
    run.snapshot_observed(1, &mut observe);
    run.append_at(1, 0, true, &[(2, 1)]);
    while run.step(|_| {}) {}
    run.delete_snapshot(1, 0);
    run.checkpoint_observed(1, 0, &mut observe);
    step(&mut run, &mut observe);
    run.append_at(1, 0, true, &[(40, 16)]);
    while run.step(|_| {}) {}
    run.delete_snapshot(1, 0);
    run.checkpoint_observed(1, 0, &mut observe);
    step(&mut run, &mut observe);
    verdict
}

#[test]
fn after_every_crash_snapshots_hold_what_they_held() {
    enumerate_snapshots().unwrap();
}

/// A disk so full that the slots of a truncated record are the next ones to be taken.
fn reuse_of_slots() -> Result<(), String> {
    let mut run = Run::on(MemoryDevice::new(6 << 20), 1);
    // Blocks that stay, until few slots are free.
    for n in 1.. {
        if run.slots_free() < 10 {
            break;
        }
        assert!(run.append_at(1, 0, false, &[(n * 16, 16)]));
        while run.step(|_| {}) {}
        run.checkpoint(1, 0);
    }
    assert!(run.append_at(1, 0, true, &[(0, 16)]));
    while run.step(|_| {}) {}
    // In the last batch a payload that is gone could be a torn one.
    assert!(run.append(1, 0, true, &[]));
    while run.step(|_| {}) {}
    let taken = (0..12).take_while(|_| run.append_at(1, 1, false, &[(0, 16)])).count();
    assert!(taken > 0);
    let mut verdict = Ok(());
    while run.step(|run| {
        let crashed = run.device.fork();
        crashed.crash(|_, _| true);
        match run.recover(&crashed) {
            Ok((_, held)) if held.len() == 1 => {}
            Ok(_) => verdict = Err("damage without bit rot".to_owned()),
            Err(error) => verdict = Err(error),
        }
    }) {}
    verdict
}

#[test]
fn slots_of_a_truncated_record_are_its_own_until_the_truncation_is_durable() {
    reuse_of_slots().unwrap();
}

/// A run over most of the ring, with every kind of append, crashed after every write and flush.
fn enumerate() -> Result<(), String> {
    let mut run = Run::new(2);
    let mut verdict = Ok(());
    let mut observe = |run: &Run| {
        if verdict.is_ok() {
            verdict = check_crashes(run);
        }
    };
    let step = |run: &mut Run, observe: &mut dyn FnMut(&Run)| while run.step(&mut *observe) {};
    run.append(1, 0, true, &[]);
    run.append(2, 0, true, &[0, 0]);
    step(&mut run, &mut observe);
    run.append(1, 0, false, &[1, 0]);
    step(&mut run, &mut observe);
    run.append(1, 1, true, &[0]);
    run.append(2, 2, false, &[1]);
    step(&mut run, &mut observe);
    run.idle();
    step(&mut run, &mut observe);
    for round in 0..6 {
        run.append(1, 0, true, &[3, 0]);
        while run.step(|_| {}) {}
        run.append(2, u64::from(round % 2 == 0), round % 3 == 0, &[1]);
        run.step(&mut observe);
        run.append(1, 1, false, &[]);
        run.step(&mut observe);
        run.checkpoint(1, 2);
        run.checkpoint(2, 0);
    }
    step(&mut run, &mut observe);
    verdict
}

#[test]
fn after_every_crash_each_group_holds_a_prefix_with_all_that_was_flushed() {
    enumerate().unwrap();
}

#[test]
fn a_crash_of_a_recovery_changes_nothing() {
    let mut run = Run::new(2);
    for _ in 0..4 {
        run.append(1, 1, true, &[1]);
        run.append(2, 0, true, &[0, 1]);
        while run.step(|_| {}) {}
    }
    run.append(1, 0, true, &[1]);
    let mut torn = 0;
    run.step(|run| {
        for disk in crashes(&run.device).step_by(5) {
            let recording = Recording { inner: disk, seen: std::sync::Mutex::default() };
            let (_, held) = run.recover(&recording).unwrap();
            torn += usize::from(held[&1].append == 4);
            for seen in recording.seen.into_inner().unwrap() {
                for crashed in crashes(&seen).step_by(17) {
                    let (_, again) = run.recover(&crashed).unwrap();
                    assert_eq!(again, held, "both recoveries saw the same tail");
                }
            }
        }
    });
    assert!(torn > 0, "no crash tore the last append");
}

/// Forks the disk after every write and flush.
struct Recording {
    inner: MemoryDevice,
    seen: std::sync::Mutex<Vec<MemoryDevice>>,
}

impl Device for Recording {
    fn len(&self) -> std::io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.inner.write_at(offset, data)?;
        self.seen.lock().unwrap().push(self.inner.fork());
        Ok(())
    }

    fn flush(&self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Rots every block of the WAL in turn: what was flushed is there, or the group is damaged.
fn enumerate_rot() -> Result<(), String> {
    let mut run = Run::new(2);
    for round in 0..5 {
        run.append(1, round % 2, true, &[1]);
        while run.step(|_| {}) {}
        run.append(2, 0, round % 2 == 0, &[0, 2]);
        while run.step(|_| {}) {}
    }
    run.idle();
    while run.step(|_| {}) {}
    let wal = Store::probe(&run.device).unwrap().unwrap().wal;
    let mut damaged = 0;
    for offset in (wal.start..wal.end).step_by(BLOCK_BYTES) {
        let rotten = run.device.fork();
        rotten.corrupt(offset, 1);
        let (_, held) = run.recover(&rotten)?;
        damaged += run.groups.len() - held.len();
        // Damage stays known until a hard state notes it, and does not spread.
        let (_, again) = run.recover(&rotten)?;
        if again != held {
            return Err(format!("rot at {offset}: intact were {held:?}, then {again:?}"));
        }
    }
    if damaged == 0 { Err("no rot was noticed".to_owned()) } else { Ok(()) }
}

#[test]
fn rot_is_reported_as_damage_of_whoever_lost_something() {
    enumerate_rot().unwrap();
}

#[test]
fn rot_that_a_crash_cannot_tell_from_a_torn_tail_is_told_by_the_mark() {
    let mut run = Run::new(1);
    run.append(1, 0, true, &[0]);
    while run.step(|_| {}) {}
    let mut offset = 0;
    run.append(1, 0, true, &[1]);
    let before = run.device.fork();
    while run.step(|_| {}) {}
    run.idle();
    while run.step(|_| {}) {}
    let wal = Store::probe(&run.device).unwrap().unwrap().wal;
    for at in (wal.start..wal.end).step_by(BLOCK_BYTES) {
        let (mut old, mut new) = (vec![0; BLOCK_BYTES], vec![0; BLOCK_BYTES]);
        before.read_at(at, &mut old).unwrap();
        run.device.read_at(at, &mut new).unwrap();
        if old != new {
            offset = at;
        }
    }
    run.device.corrupt(offset, 1);
    let (_, recovered) = Store::open(&run.device).unwrap();
    assert_eq!(recovered[0].damage, Some(Damage::Log { intact_to: 1 }));
}

#[cfg(feature = "planted")]
mod planted {
    use holdfast_planted::{Bug, plant};

    /// The bug is gone when the test ends, however it ends: the thread may serve another test.
    struct Planted;

    impl Planted {
        fn new(bug: Bug) -> Planted {
            plant(Some(bug));
            Planted
        }
    }

    impl Drop for Planted {
        fn drop(&mut self) {
            plant(None);
        }
    }

    #[test]
    fn the_enumeration_finds_an_acknowledgement_before_the_flush() {
        let _planted = Planted::new(Bug::AcknowledgeBeforeFlush);
        super::enumerate().unwrap_err();
    }

    #[test]
    fn the_enumeration_finds_a_missing_flush() {
        let _planted = Planted::new(Bug::SkipWalFlush);
        super::enumerate().unwrap_err();
    }

    #[test]
    fn the_enumeration_finds_a_missing_flush_of_payloads() {
        let _planted = Planted::new(Bug::SkipPayloadFlush);
        super::enumerate_payloads().unwrap_err();
    }

    #[test]
    fn the_enumeration_finds_a_slot_reused_under_the_log() {
        let _planted = Planted::new(Bug::ReuseSlotUnderLog);
        super::reuse_of_slots().unwrap_err();
    }

    #[test]
    fn the_enumeration_finds_a_truncation_at_a_bad_checksum() {
        let _planted = Planted::new(Bug::TruncateAtBadChecksum);
        super::enumerate_rot().unwrap_err();
    }
}
