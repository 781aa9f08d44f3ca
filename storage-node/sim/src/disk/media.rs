//! What a disk holds, sector by sector: what is durable, and every later version that a crash may or may not keep.
//!
//! A sector is written whole or not at all. Versions that are not durable survive a crash in any combination, each
//! sector for itself: real disks reorder and tear, and promise nothing before a flush.

use std::collections::BTreeMap;

use holdfast_store::device::SECTOR_BYTES;

use crate::prng::Prng;

pub(crate) const SECTOR: u64 = SECTOR_BYTES as u64;

type Sector = [u8; SECTOR_BYTES];

const PAGE_SECTORS: usize = 8;

/// Orders versions: a flush covers the versions below its mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Mark(u64);

/// What a crash keeps of the versions that no flush covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashMode {
    LoseAll,
    KeepAll,
    /// Any version of each sector, or none.
    Any,
}

#[derive(Clone, Debug)]
struct Version {
    mark: Mark,
    /// A flush failed over it: it is still read from the cache, and no later flush writes it.
    doomed: bool,
    data: Box<Sector>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Reads fail until the sector is written again.
    Unreadable,
    /// Reads give other bytes, without an error, until the sector is written again.
    Rotten(u64),
}

/// Sectors that lie side by side are mostly written and read together.
#[derive(Clone, Debug)]
struct Page {
    /// By sector: whether it was ever durable; the others hold garbage.
    written: [bool; PAGE_SECTORS],
    data: [Sector; PAGE_SECTORS],
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Media {
    /// Never written sectors read as zeroes, or as a function of this number and the sector where it is not 0.
    garbage: u64,
    /// By page number; `None` where no sector of the page was ever durable.
    durable: Vec<Option<Box<Page>>>,
    /// By sector, the oldest first.
    versions: BTreeMap<u64, Vec<Version>>,
    faults: BTreeMap<u64, Fault>,
    next: Mark,
}

impl Media {
    pub fn new(garbage: u64) -> Media {
        Media { garbage, ..Media::default() }
    }

    /// Sectors that have a version which no flush has covered.
    pub fn volatile_sectors(&self) -> usize {
        self.versions.len()
    }

    /// Everything written before now lies below it.
    pub fn mark(&self) -> Mark {
        self.next
    }

    /// Whether every sector of the range was written at some time.
    pub fn is_allocated(&self, offset: u64, length: u64) -> bool {
        sectors(offset, length).all(|sector| {
            let (page, within) = place(sector);
            let durable = self.durable.get(page).and_then(Option::as_ref).is_some_and(|page| page.written[within]);
            durable || self.versions.contains_key(&sector)
        })
    }

    /// As a reader sees it now. `Err` names the first unreadable sector.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), u64> {
        let range = sectors(offset, buffer.len() as u64);
        for (sector, chunk) in range.clone().zip(buffer.chunks_exact_mut(SECTOR_BYTES)) {
            self.read_durable(sector, chunk);
        }
        let at = |sector: u64| (sector - range.start) as usize * SECTOR_BYTES;
        for (sector, versions) in self.versions.range(range.clone()) {
            if let Some(version) = versions.last() {
                buffer[at(*sector)..][..SECTOR_BYTES].copy_from_slice(&version.data[..]);
            }
        }
        for (sector, fault) in self.faults.range(range.clone()) {
            match fault {
                Fault::Unreadable => return Err(*sector),
                Fault::Rotten(seed) => rot(*seed, &mut buffer[at(*sector)..][..SECTOR_BYTES]),
            }
        }
        Ok(())
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mark = self.next;
        self.next.0 += 1;
        for (sector, chunk) in sectors(offset, data.len() as u64).zip(data.chunks_exact(SECTOR_BYTES)) {
            self.faults.remove(&sector);
            self.versions.entry(sector).or_default().push(Version { mark, doomed: false, data: boxed(chunk) });
        }
    }

    /// Like a write and a flush of it alone: nothing else becomes durable by it.
    pub fn write_durable(&mut self, offset: u64, data: &[u8]) {
        self.next.0 += 1;
        for (sector, chunk) in sectors(offset, data.len() as u64).zip(data.chunks_exact(SECTOR_BYTES)) {
            self.faults.remove(&sector);
            self.versions.remove(&sector);
            self.set_durable(sector, chunk);
        }
    }

    /// Makes durable what lies below the mark and is not doomed.
    pub fn flush(&mut self, mark: Mark) {
        let mut covered = Vec::new();
        self.versions.retain(|sector, versions| {
            if let Some(last) = versions.iter().rposition(|version| version.mark < mark && !version.doomed) {
                covered.extend(versions.drain(..=last).next_back().map(|version| (*sector, version.data)));
            }
            !versions.is_empty()
        });
        for (sector, data) in covered {
            self.set_durable(sector, &data[..]);
        }
    }

    /// A flush failed: what it should have covered is read as before, and is lost at the next crash.
    pub fn doom(&mut self, mark: Mark) {
        for version in self.versions.values_mut().flatten() {
            version.doomed |= version.mark < mark;
        }
    }

    pub fn crash(&mut self, mode: CrashMode, prng: &mut Prng) {
        for (sector, versions) in std::mem::take(&mut self.versions) {
            let kept: Vec<Version> = versions.into_iter().filter(|version| !version.doomed).collect();
            let survivor = match mode {
                CrashMode::LoseAll => None,
                CrashMode::KeepAll => kept.into_iter().next_back(),
                CrashMode::Any => {
                    let choice = prng.below(kept.len() as u64 + 1) as usize;
                    kept.into_iter().nth(choice)
                }
            };
            if let Some(version) = survivor {
                self.set_durable(sector, &version.data[..]);
            }
        }
    }

    /// Latent error: every sector of the range is unreadable until it is written.
    pub fn make_unreadable(&mut self, offset: u64, length: u64) {
        self.faults.extend(sectors(offset, length).map(|sector| (sector, Fault::Unreadable)));
    }

    /// Bit rot: every sector of the range reads as other bytes until it is written.
    pub fn corrupt(&mut self, offset: u64, length: u64, prng: &mut Prng) {
        for sector in sectors(offset, length) {
            self.faults.insert(sector, Fault::Rotten(prng.next_u64()));
        }
    }

    fn read_durable(&self, sector: u64, chunk: &mut [u8]) {
        let (page, within) = place(sector);
        match self.durable.get(page).and_then(Option::as_ref).filter(|page| page.written[within]) {
            Some(page) => chunk.copy_from_slice(&page.data[within]),
            None if self.garbage != 0 => Prng::new(self.garbage ^ sector).fill(chunk),
            None => chunk.fill(0),
        }
    }

    fn set_durable(&mut self, sector: u64, data: &[u8]) {
        let (page, within) = place(sector);
        if page >= self.durable.len() {
            self.durable.resize(page + 1, None);
        }
        let page = self.durable[page].get_or_insert_with(|| {
            Box::new(Page { written: [false; PAGE_SECTORS], data: [[0; SECTOR_BYTES]; PAGE_SECTORS] })
        });
        page.written[within] = true;
        page.data[within].copy_from_slice(data);
    }
}

fn place(sector: u64) -> (usize, usize) {
    ((sector / PAGE_SECTORS as u64) as usize, (sector % PAGE_SECTORS as u64) as usize)
}

/// Flips one to eight bits: never none.
fn rot(seed: u64, chunk: &mut [u8]) {
    let mut prng = Prng::new(seed);
    let first = prng.below(chunk.len() as u64) as usize;
    chunk[first] ^= prng.between(1, 255) as u8;
}

fn sectors(offset: u64, length: u64) -> std::ops::Range<u64> {
    assert!(offset.is_multiple_of(SECTOR) && length.is_multiple_of(SECTOR), "whole sectors");
    offset / SECTOR..(offset + length) / SECTOR
}

fn boxed(chunk: &[u8]) -> Box<Sector> {
    Box::new(chunk.try_into().expect("chunks of one sector"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte(media: &Media, sector: u64) -> Result<u8, u64> {
        let mut buffer = [0; SECTOR_BYTES];
        media.read(sector * SECTOR, &mut buffer)?;
        assert!(buffer.iter().all(|byte| *byte == buffer[0]), "one sector, one writer");
        Ok(buffer[0])
    }

    fn write(media: &mut Media, sector: u64, fill: u8) {
        media.write(sector * SECTOR, &[fill; SECTOR_BYTES]);
    }

    #[test]
    fn a_flush_covers_what_lies_below_its_mark() {
        let mut media = Media::new(0);
        write(&mut media, 0, 1);
        let mark = media.mark();
        write(&mut media, 0, 2);
        write(&mut media, 1, 3);
        media.flush(mark);
        assert_eq!((byte(&media, 0), byte(&media, 1)), (Ok(2), Ok(3)));
        media.crash(CrashMode::LoseAll, &mut Prng::new(1));
        assert_eq!((byte(&media, 0), byte(&media, 1)), (Ok(1), Ok(0)));
        assert!(media.is_allocated(0, SECTOR) && !media.is_allocated(0, 2 * SECTOR));
    }

    #[test]
    fn a_durable_write_is_not_undone_by_an_older_one() {
        let mut media = Media::new(0);
        write(&mut media, 0, 1);
        write(&mut media, 1, 1);
        media.write_durable(0, &[9; SECTOR_BYTES]);
        media.flush(media.mark());
        media.crash(CrashMode::KeepAll, &mut Prng::new(1));
        assert_eq!((byte(&media, 0), byte(&media, 1)), (Ok(9), Ok(1)));

        write(&mut media, 0, 2);
        media.write_durable(SECTOR, &[8; SECTOR_BYTES]);
        media.crash(CrashMode::LoseAll, &mut Prng::new(1));
        assert_eq!((byte(&media, 0), byte(&media, 1)), (Ok(9), Ok(8)), "a durable write covers no other");
    }

    #[test]
    fn a_crash_keeps_any_version_of_each_sector() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let mut media = Media::new(0);
            media.write(0, &[1; 2 * SECTOR_BYTES]);
            media.write(0, &[2; 2 * SECTOR_BYTES]);
            media.crash(CrashMode::Any, &mut Prng::new(seed));
            assert_eq!(media.volatile_sectors(), 0);
            seen.insert((byte(&media, 0), byte(&media, 1)));
        }
        assert_eq!(seen.len(), 9, "none, the first or the second, for each of two sectors");
    }

    #[test]
    fn a_failed_flush_loses_what_it_should_have_covered() {
        let mut media = Media::new(0);
        write(&mut media, 0, 1);
        media.doom(media.mark());
        write(&mut media, 1, 2);
        media.flush(media.mark());
        assert_eq!(byte(&media, 0), Ok(1), "still in the cache");
        media.crash(CrashMode::KeepAll, &mut Prng::new(1));
        assert_eq!((byte(&media, 0), byte(&media, 1)), (Ok(0), Ok(2)));
    }

    #[test]
    fn faults_at_rest_last_until_the_sector_is_written() {
        let mut media = Media::new(0);
        write(&mut media, 0, 1);
        media.make_unreadable(0, SECTOR);
        assert_eq!(byte(&media, 0), Err(0));
        write(&mut media, 0, 2);
        assert_eq!(byte(&media, 0), Ok(2));
        media.corrupt(0, SECTOR, &mut Prng::new(1));
        let (mut first, mut second) = ([0; SECTOR_BYTES], [0; SECTOR_BYTES]);
        media.read(0, &mut first).unwrap();
        media.read(0, &mut second).unwrap();
        assert_ne!(first, [2; SECTOR_BYTES]);
        assert_eq!(first, second, "rot is the same at every read");
        media.write_durable(0, &[3; SECTOR_BYTES]);
        assert_eq!(byte(&media, 0), Ok(3));
    }

    #[test]
    fn a_used_disk_is_full_of_garbage() {
        let media = Media::new(5);
        let (mut first, mut second) = ([0; 1024], [0; 1024]);
        media.read(0, &mut first).unwrap();
        media.read(0, &mut second).unwrap();
        assert!(first == second && first[..512] != first[512..]);
    }
}
