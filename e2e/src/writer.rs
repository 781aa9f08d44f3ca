//! Writes blocks in a fixed order and verifies them, one request at a time, past the page cache.
//!
//! Write `n` goes to the position `n * STRIDE` modulo the number of blocks, and its bytes are a function of `n` and of
//! the position. So the highest number found in a file tells what every block of it must hold: whoever starts on the
//! file again, on whatever machine, checks all of it without any record but the file. A write that was acknowledged and
//! lost, a write that came back after a later one, and a byte that changed all show.
//!
//! What it did goes to a log, a JSON object a line, which is not on the volume.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::fs::OFlags;

use crate::progress::{Event, Line};

const BLOCK: usize = 4096;
/// Odd, hence coprime to the number of blocks, a power of two: every position has its turn. Large, so that neighbours in
/// time are no neighbours on the volume.
const STRIDE: u64 = 1_049;
const MAGIC: u64 = 0x484f_4c44_4641_5354;
/// Time that one line of the log is about.
const WINDOW: Duration = Duration::from_millis(250);

#[derive(Args)]
pub struct Options {
    /// A block device, or a file, made where it is absent
    #[arg(long)]
    path: PathBuf,
    /// Blocks of 4 KiB that are written; a power of two
    #[arg(long, default_value_t = 4096)]
    blocks: u64,
    /// Where progress is appended
    #[arg(long)]
    log: PathBuf,
}

/// A block as direct I/O wants it.
#[derive(PartialEq, Eq, Clone)]
#[repr(align(4096))]
struct Block([u8; BLOCK]);

impl Block {
    fn zero() -> Box<Block> {
        Box::new(Block([0; BLOCK]))
    }

    /// What write `number` leaves at `position`.
    fn of(number: u64, position: u64) -> Box<Block> {
        let mut block = Block::zero();
        let mut state = (number ^ position.rotate_left(32)) | 1;
        for (index, word) in block.0.chunks_exact_mut(8).enumerate() {
            let value = match index {
                0 => MAGIC,
                1 => number,
                2 => position,
                _ => {
                    // xorshift64: cheap, and no two blocks are alike.
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state
                }
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
        block
    }

    fn word(&self, index: usize) -> u64 {
        u64::from_le_bytes(self.0[index * 8..][..8].try_into().expect("eight bytes"))
    }

    /// The number of the write it says it is of; zero for a block that was never written.
    fn number(&self) -> u64 {
        if self.word(0) == MAGIC { self.word(1) } else { 0 }
    }
}

/// The blocks and the order in which they are written.
#[derive(Clone, Copy)]
struct Order {
    blocks: u64,
}

impl Order {
    fn new(blocks: u64) -> Result<Order> {
        if !blocks.is_power_of_two() {
            bail!("--blocks {blocks} is no power of two");
        }
        Ok(Order { blocks })
    }

    fn position(self, number: u64) -> u64 {
        number.wrapping_mul(STRIDE) % self.blocks
    }

    /// The writes that are still to be seen after write `last`, one for each position that was ever written.
    fn visible(self, last: u64) -> impl Iterator<Item = u64> {
        last.saturating_sub(self.blocks) + 1..=last
    }
}

pub fn run(options: &Options) -> Result<()> {
    let order = Order::new(options.blocks)?;
    let stop = on_signal()?;
    let mut log = Log::open(&options.log)?;
    let outcome = work(&options.path, order, &stop, &mut log);
    if let Err(error) = &outcome {
        log.event(&Line::now(Event::Failed { why: format!("{error:#}") }))?;
    }
    outcome
}

fn work(path: &Path, order: Order, stop: &AtomicBool, log: &mut Log) -> Result<()> {
    let file = open(path, order).with_context(|| path.display().to_string())?;
    let mut last = verify(&file, order)?;
    log.event(&Line::now(Event::Verified { number: last }))?;
    let mut block = Block::zero();
    let mut acknowledged = Instant::now();
    let mut window = Window::default();
    while !stop.load(Ordering::Relaxed) {
        let number = last + 1;
        let position = order.position(number);
        file.write_all_at(&Block::of(number, position).0, position * BLOCK as u64)
            .with_context(|| format!("write {number}"))?;
        let now = Instant::now();
        window.acknowledge(now - acknowledged);
        acknowledged = now;
        last = number;
        // Some earlier write, another one each time.
        let range = order.blocks.min(last);
        let earlier = last - number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % range;
        read(&file, order.position(earlier), &mut block).with_context(|| format!("read of write {earlier}"))?;
        check(&block, earlier, order.position(earlier))?;
        if window.started.elapsed() >= WINDOW {
            log.event(&window.line(last))?;
            window = Window::default();
        }
    }
    if window.writes > 0 {
        log.event(&window.line(last))?;
    }
    let found = verify(&file, order)?;
    if found != last {
        bail!("the last write acknowledged is {last}, the last one found is {found}");
    }
    log.event(&Line::now(Event::Stopped { number: last }))
}

/// What happened since the last line of the log.
struct Window {
    started: Instant,
    writes: u64,
    /// Of the first acknowledgement and of the last one.
    first: u64,
    last: u64,
    /// Before one of the acknowledgements.
    gap: Duration,
}

impl Default for Window {
    fn default() -> Window {
        Window { started: Instant::now(), writes: 0, first: 0, last: 0, gap: Duration::ZERO }
    }
}

impl Window {
    fn acknowledge(&mut self, after: Duration) {
        self.last = now_ms();
        if self.writes == 0 {
            self.first = self.last;
        }
        self.writes += 1;
        self.gap = self.gap.max(after);
    }

    fn line(&self, number: u64) -> Line {
        let gap_ms = u64::try_from(self.gap.as_millis()).unwrap_or(u64::MAX);
        Line::now(Event::Acknowledged { number, writes: self.writes, first: self.first, last: self.last, gap_ms })
    }
}

/// Opens it with all its blocks in place. Writes return when they are durable.
fn open(path: &Path, order: Order) -> Result<File> {
    let is_device = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let bytes = order.blocks * BLOCK as u64;
    if !is_device && fs::metadata(path).map_or(0, |metadata| metadata.len()) < bytes {
        // Real zeroes, because a hole would make every first write one of the file system's metadata too; complete under
        // another name first, so that a file of this name is never a part of one.
        let new = path.with_extension("new");
        let file = File::create(&new)?;
        let mut writer = BufWriter::with_capacity(1 << 20, &file);
        for _ in 0..order.blocks {
            writer.write_all(&[0; BLOCK])?;
        }
        writer.flush()?;
        drop(writer);
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(path.parent().context("no folder")?)?.sync_all()?;
    }
    let flags = (OFlags::DIRECT | OFlags::DSYNC).bits();
    let flags = i32::try_from(flags).context("flags of open(2)")?;
    Ok(OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?)
}

fn read(file: &File, position: u64, block: &mut Block) -> std::io::Result<()> {
    file.read_exact_at(&mut block.0, position * BLOCK as u64)
}

fn check(block: &Block, number: u64, position: u64) -> Result<()> {
    if *block != *Block::of(number, position) {
        let found = block.number();
        bail!("block {position} does not hold write {number}: its header names write {found}");
    }
    Ok(())
}

/// Reads every block, finds the last write, and checks that each block holds what it must after that. Returns its number.
fn verify(file: &File, order: Order) -> Result<u64> {
    let mut block = Block::zero();
    let mut last = 0;
    for position in 0..order.blocks {
        read(file, position, &mut block).with_context(|| format!("read of block {position}"))?;
        last = last.max(block.number());
    }
    for number in order.visible(last) {
        let position = order.position(number);
        read(file, position, &mut block).with_context(|| format!("read of block {position}"))?;
        check(&block, number, position)?;
    }
    Ok(last)
}

/// Set by SIGTERM, which the first process of a container would else never see.
fn on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut terminate = {
        let _guard = runtime.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?
    };
    std::thread::spawn(move || {
        runtime.block_on(terminate.recv());
        flag.store(true, Ordering::Relaxed);
    });
    Ok(stop)
}

struct Log(File);

impl Log {
    fn open(path: &Path) -> Result<Log> {
        let file = OpenOptions::new().append(true).create(true).open(path);
        Ok(Log(file.with_context(|| path.display().to_string())?))
    }

    fn event(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        print!("{text}");
        Ok(self.0.write_all(text.as_bytes())?)
    }
}

/// Milliseconds of the machine's clock, which all nodes of a kind cluster share.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    u64::try_from(since.as_millis()).expect("584 million years")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(order: Order, last: u64) -> (tempfile::NamedTempFile, File) {
        let name = tempfile::NamedTempFile::new().unwrap();
        let file = OpenOptions::new().read(true).write(true).open(name.path()).unwrap();
        file.set_len(order.blocks * BLOCK as u64).unwrap();
        for number in 1..=last {
            let position = order.position(number);
            file.write_all_at(&Block::of(number, position).0, position * BLOCK as u64).unwrap();
        }
        (name, file)
    }

    #[test]
    fn every_position_has_its_turn() {
        let order = Order::new(64).unwrap();
        let positions: std::collections::BTreeSet<u64> = (1..=64).map(|number| order.position(number)).collect();
        assert_eq!(positions.len(), 64);
    }

    #[test]
    fn a_prefix_of_the_writes_is_accepted() {
        let order = Order::new(16).unwrap();
        for last in [0, 1, 15, 16, 17, 40] {
            let (_name, file) = written(order, last);
            assert_eq!(verify(&file, order).unwrap(), last);
        }
    }

    #[test]
    fn a_write_that_is_missing_below_the_last_one_is_found() {
        let order = Order::new(16).unwrap();
        let (_name, file) = written(order, 40);
        let lost = 33;
        let position = order.position(lost);
        file.write_all_at(&Block::of(lost - 16, position).0, position * BLOCK as u64).unwrap();
        let error = verify(&file, order).unwrap_err().to_string();
        assert!(error.contains("does not hold write 33: its header names write 17"), "{error}");
    }

    #[test]
    fn a_changed_byte_is_found() {
        let order = Order::new(16).unwrap();
        let (_name, file) = written(order, 40);
        file.write_all_at(&[0xff], 5 * BLOCK as u64 + 4000).unwrap();
        assert!(verify(&file, order).is_err());
    }
}
