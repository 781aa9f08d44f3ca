use std::io;

use super::*;
use crate::device::memory::MemoryDevice;
use crate::store::tests::model::Run;

/// Reads pass, writes are the test's failure.
struct ReadOnly(MemoryDevice);

impl Device for ReadOnly {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, _: &[u8]) -> io::Result<()> {
        panic!("a write at {offset}")
    }

    fn flush(&self) -> io::Result<()> {
        panic!("a flush")
    }
}

fn written() -> Run {
    let mut run = Run::new(2);
    for _ in 0..3 {
        run.append(1, 0, true, &[1]);
        while run.step(|_| {}) {}
    }
    run
}

#[test]
fn a_sound_disk_is_described_without_a_write_and_has_no_findings() {
    let run = written();
    let device = ReadOnly(run.device.fork());
    let text = describe(&device).unwrap().to_string();
    for line in ["boot epoch 1", "generation 1: batches 1 to 3", "checkpoint 0, records 1 to 3", "no records"] {
        assert!(text.contains(line), "{line:?} is missing in:\n{text}");
    }
    assert_eq!(check(&device).unwrap(), []);
}

#[test]
fn payloads_in_slots_are_described_and_a_torn_one_is_a_note() {
    let mut run = written();
    run.append(1, 0, false, &[32, 16]);
    while run.step(|_| {}) {}
    let device = ReadOnly(run.device.fork());
    let text = describe(&device).unwrap().to_string();
    assert!(text.contains("records 1 to 5, 196608 bytes of payload in slots"), "{text}");
    assert_eq!(check(&device).unwrap(), []);
    // The last slot that the chunks took.
    let superblock = Superblock::read(&run.device).unwrap().unwrap();
    let mut block = vec![0; 4096];
    let written = (superblock.chunks.start..superblock.chunks.end).step_by(4096).filter(|offset| {
        run.device.read_at(*offset, &mut block).unwrap();
        block.iter().any(|byte| *byte != 0)
    });
    run.device.corrupt(written.last().unwrap(), 1);
    let findings = check(&ReadOnly(run.device.fork())).unwrap();
    let [Finding { severity: Severity::Note, text }] = findings.as_slice() else { panic!("{findings:?}") };
    assert!(text.contains("the payload of record 5 is torn"), "{text}");
}

#[test]
fn findings_have_their_severity_and_the_worst_comes_first() {
    let run = written();
    let superblock = Superblock::read(&run.device).unwrap().unwrap();
    // Where generation 1 lies, the first ever written.
    let first = superblock.wal.start + superblock.wal_segment_bytes;
    run.device.corrupt(32 << 10, 64);
    // The first batch's records, then the last batch's.
    run.device.corrupt(first + 200, 1);
    run.device.corrupt(first + 2 * 8192 + 200, 1);
    let findings = check(&ReadOnly(run.device.fork())).unwrap();
    let severities: Vec<Severity> = findings.iter().map(|finding| finding.severity).collect();
    assert_eq!(severities, [Severity::Error, Severity::Error, Severity::Warning, Severity::Note], "{findings:?}");
    assert!(findings[1].to_string().contains("intact only up to 0"), "{findings:?}");
}
