use super::*;
use crate::prng::Prng;

fn checker() -> Checker {
    Checker::new(VolumeId::from_bytes([3; 16]).unwrap(), 9)
}

const EPOCH: Epoch = Epoch(1);

fn zeroes(count: usize) -> Vec<u8> {
    vec![0; count * BLOCK_BYTES]
}

fn read(checker: &mut Checker, first: u64, data: &[u8]) -> Result<(), Violation> {
    let read = checker.begin_read(first, (data.len() / BLOCK_BYTES) as u64);
    checker.end_read(read, data)
}

#[test]
fn an_acknowledged_write_replaces_what_was_there() {
    let mut checker = checker();
    assert_eq!(read(&mut checker, 0, &zeroes(1)), Ok(()));
    let (first, data) = checker.begin_write(EPOCH, 0, 1);
    let early = checker.begin_read(0, 1);
    assert_eq!(checker.end_read(early, &zeroes(1)), Ok(()), "not acknowledged: old and new are fine");
    let early = checker.begin_read(0, 1);
    checker.end_mutation(first);
    assert_eq!(checker.end_read(early, &zeroes(1)), Ok(()), "began before the acknowledgement");
    let stale = Violation::Stale { block: 0, shown: Value::Zeroes, by: Value::Write(first) };
    assert_eq!(read(&mut checker, 0, &zeroes(1)), Err(stale));
    assert_eq!(read(&mut checker, 0, &data), Ok(()));
    let (second, _) = checker.begin_write(EPOCH, 0, 1);
    checker.end_mutation(second);
    let stale = Violation::Stale { block: 0, shown: Value::Write(first), by: Value::Write(second) };
    assert_eq!(read(&mut checker, 0, &data), Err(stale));
}

#[test]
fn a_value_that_was_read_does_not_go_and_come_back() {
    let mut checker = checker();
    let (_, one) = checker.begin_write(EPOCH, 0, 1);
    let (_, two) = checker.begin_write(EPOCH, 0, 1);
    assert_eq!(read(&mut checker, 0, &one), Ok(()));
    assert_eq!(read(&mut checker, 0, &two), Ok(()));
    assert!(matches!(read(&mut checker, 0, &one), Err(Violation::Stale { .. })));
    assert!(matches!(read(&mut checker, 0, &zeroes(1)), Err(Violation::Stale { .. })));
}

#[test]
fn zeroes_may_come_from_any_zeroing() {
    let mut checker = checker();
    let (write, data) = checker.begin_write(EPOCH, 0, 1);
    checker.end_mutation(write);
    let zeroing = checker.begin_zeroes(EPOCH, 0, 4);
    assert_eq!(read(&mut checker, 0, &zeroes(1)), Ok(()));
    assert!(matches!(read(&mut checker, 0, &data), Err(Violation::Stale { .. })), "zeroes were seen over it");
    checker.end_mutation(zeroing);
    let (write, _) = checker.begin_write(EPOCH, 0, 1);
    checker.end_mutation(write);
    assert!(matches!(read(&mut checker, 0, &zeroes(1)), Err(Violation::Stale { .. })));
}

#[test]
fn phantoms_are_told_from_writes() {
    let mut checker = checker();
    let (_, data) = checker.begin_write(EPOCH, 0, 2);
    assert!(matches!(read(&mut checker, 1, &data[..BLOCK_BYTES]), Err(Violation::Phantom { .. })), "misdirected");
    let mut other = Checker::new(VolumeId::from_bytes([4; 16]).unwrap(), 9);
    let (_, foreign) = other.begin_write(EPOCH, 0, 2);
    assert!(matches!(read(&mut checker, 0, &foreign), Err(Violation::Phantom { .. })), "another volume's");
    let mut earlier = Checker::new(VolumeId::from_bytes([3; 16]).unwrap(), 8);
    let (_, foreign) = earlier.begin_write(EPOCH, 0, 2);
    assert!(matches!(read(&mut checker, 0, &foreign), Err(Violation::Phantom { .. })), "another run's");
    assert!(matches!(read(&mut checker, 0, &[5; BLOCK_BYTES]), Err(Violation::Unreadable { .. })));
    let pending = checker.begin_read(0, 2);
    assert!(matches!(checker.end_read(pending, &data[..BLOCK_BYTES]), Err(Violation::Length { .. })));
}

#[test]
fn a_write_of_several_blocks_shows_whole() {
    let mut checker = checker();
    let (first, old) = checker.begin_write(EPOCH, 0, 2);
    checker.end_mutation(first);
    let (second, new) = checker.begin_write(EPOCH, 0, 2);
    let torn = [&new[..BLOCK_BYTES], &old[BLOCK_BYTES..]].concat();
    let violation = Violation::Torn { block: 1, shown: Value::Write(first), write: second, other: 0 };
    assert_eq!(read(&mut checker, 0, &torn), Err(violation));
    let hole = [&new[..BLOCK_BYTES], &zeroes(1)[..]].concat();
    assert!(read(&mut checker, 0, &hole).is_err());
    // A concurrent write may lie over half of it.
    let (_, third) = checker.begin_write(EPOCH, 1, 1);
    assert_eq!(read(&mut checker, 0, &[&new[..BLOCK_BYTES], &third[..]].concat()), Ok(()));
}

#[test]
fn a_fenced_write_does_not_appear_late() {
    let mut checker = checker();
    let (_, old) = checker.begin_write(EPOCH, 0, 1);
    checker.on_attached(Epoch(2));
    let mut other = checker.clone();
    assert_eq!(read(&mut other, 0, &old), Ok(()), "it took effect before the attachment");
    assert_eq!(read(&mut checker, 0, &zeroes(1)), Ok(()), "or it did not");
    assert!(matches!(read(&mut checker, 0, &old), Err(Violation::Stale { .. })), "then it never will");
}

/// What the simulated volume below does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Nothing,
    /// An acknowledged mutation takes effect again.
    Again,
    /// A mutation is acknowledged and never takes effect.
    Lost,
    /// Half of a mutation's blocks change.
    Torn,
    /// A mutation of a former epoch takes effect.
    Late,
    /// A read is served from what an earlier moment held.
    StaleRead,
    /// Blocks land one further on.
    Misdirected,
}

const BLOCKS: u64 = 6;

struct Pending {
    write: WriteId,
    first: u64,
    data: Vec<u8>,
    effective: bool,
}

/// A volume that is right but for `wrong`, from time to time, under random concurrent clients.
fn run(seed: u64, wrong: Wrong) -> Result<(), Violation> {
    let (mut prng, mut checker) = (Prng::new(seed), checker());
    let mut bytes = zeroes(BLOCKS as usize);
    let mut before = bytes.clone();
    let (mut pending, mut fenced, mut done) = (Vec::<Pending>::new(), Vec::<Pending>::new(), Vec::<Pending>::new());
    let mut reads: Vec<(PendingRead, Option<Vec<u8>>)> = Vec::new();
    let mut epoch = Epoch(1);
    let put = |bytes: &mut Vec<u8>, first: u64, data: &[u8]| {
        let at = first as usize * BLOCK_BYTES;
        bytes[at..at + data.len()].copy_from_slice(data);
    };
    let serve = |bytes: &[u8], read: &PendingRead| {
        bytes[read.first_block as usize * BLOCK_BYTES..][..read.count as usize * BLOCK_BYTES].to_vec()
    };
    for step in 0..600 {
        let strikes = wrong != Wrong::Nothing && prng.chance(100_000);
        let range = |prng: &mut Prng| {
            let first = prng.below(BLOCKS);
            (first, prng.between(1, (BLOCKS - first).min(3)))
        };
        match prng.below(12) {
            0..=2 if pending.len() < 3 => {
                let (first, count) = range(&mut prng);
                let (write, data) = if prng.chance(200_000) {
                    (checker.begin_zeroes(epoch, first, count), zeroes(count as usize))
                } else {
                    let (write, data) = checker.begin_write(epoch, first, count);
                    (write, data.to_vec())
                };
                pending.push(Pending { write, first, data, effective: false });
            }
            3..=5 if !pending.is_empty() => {
                let at = prng.below(pending.len() as u64) as usize;
                let Pending { first, data, effective, .. } = &mut pending[at];
                if !*effective {
                    *effective = true;
                    let half = data.len() / BLOCK_BYTES / 2 * BLOCK_BYTES;
                    match wrong {
                        Wrong::Lost if strikes => {}
                        Wrong::Torn if strikes => put(&mut bytes, *first, &data[..half]),
                        Wrong::Misdirected if strikes => {
                            let room = (BLOCKS - 1 - *first) as usize * BLOCK_BYTES;
                            put(&mut bytes, (*first + 1).min(BLOCKS - 1), &data[..room.min(data.len())]);
                        }
                        _ => put(&mut bytes, *first, data),
                    }
                }
            }
            6 | 7 if !pending.is_empty() => {
                let at = prng.below(pending.len() as u64) as usize;
                if pending[at].effective {
                    let mutation = pending.remove(at);
                    // Some answers never arrive.
                    if prng.chance(800_000) {
                        checker.end_mutation(mutation.write);
                        done.push(mutation);
                    }
                }
            }
            8 | 9 if reads.len() < 2 => {
                let (first, count) = range(&mut prng);
                reads.push((checker.begin_read(first, count), None));
            }
            8..=10 if !reads.is_empty() => {
                let at = prng.below(reads.len() as u64) as usize;
                match &mut reads[at] {
                    (read, shown @ None) => {
                        let from = if wrong == Wrong::StaleRead && strikes { &before } else { &bytes };
                        *shown = Some(serve(from, read));
                    }
                    _ => {
                        if let (read, Some(shown)) = reads.remove(at) {
                            checker.end_read(read, &shown)?;
                        }
                    }
                }
            }
            11 if prng.chance(200_000) => {
                epoch.0 += 1;
                fenced.extend(pending.drain(..).filter(|mutation| !mutation.effective));
                checker.on_attached(epoch);
            }
            _ if strikes && wrong == Wrong::Again && !done.is_empty() => {
                let mutation = prng.pick(&done);
                put(&mut bytes, mutation.first, &mutation.data);
            }
            _ if strikes && wrong == Wrong::Late && !fenced.is_empty() => {
                let mutation = prng.pick(&fenced);
                put(&mut bytes, mutation.first, &mutation.data);
            }
            _ => {}
        }
        if step % 60 == 0 {
            before.clone_from(&bytes);
        }
    }
    let last = checker.begin_read(0, BLOCKS);
    checker.end_read(last, &bytes)
}

#[test]
fn a_right_volume_is_never_accused() {
    for seed in 0..300 {
        assert_eq!(run(seed, Wrong::Nothing), Ok(()), "seed {seed}");
    }
}

#[test]
fn every_kind_of_wrong_volume_is_found_out() {
    let kinds = [Wrong::Again, Wrong::Lost, Wrong::Torn, Wrong::Late, Wrong::StaleRead, Wrong::Misdirected];
    for wrong in kinds {
        let found = (0..100).filter(|seed| run(*seed, wrong).is_err()).count();
        assert!(found >= 50, "{wrong:?}: {found} of 100 runs");
    }
}
