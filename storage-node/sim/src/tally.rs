//! What many runs have shown together.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Duration;

use holdfast_sim::faults::FaultKind;
use holdfast_sim::scenario::{MARKS, Report};

#[derive(Debug, Default)]
pub struct Tally {
    pub counted: u64,
    pub failed: u64,
    seeds: u64,
    operations: u64,
    bytes_verified: u64,
    lagging: u64,
    simulated: Duration,
    faults: BTreeMap<FaultKind, u64>,
    marks: BTreeSet<&'static str>,
}

impl Tally {
    pub fn add(&mut self, report: &Report) {
        self.seeds += 1;
        self.counted += u64::from(report.counts());
        self.operations += report.operations;
        self.bytes_verified += report.bytes_verified;
        self.lagging += report.lagging;
        self.simulated += report.lasted;
        for (kind, count) in &report.faults {
            *self.faults.entry(*kind).or_default() += count;
        }
        self.marks.extend(&report.marks);
    }

    /// Whether everything that can happen has, and enough seeds have shown enough.
    pub fn is_complete(&self) -> bool {
        let faults = FaultKind::ALL.iter().all(|kind| self.faults.contains_key(kind));
        faults && MARKS.iter().all(|mark| self.marks.contains(mark)) && self.counted * 10 >= self.seeds * 9
    }

    /// `took`: by a real clock.
    pub fn summary(&self, took: Duration) -> String {
        let seeds = self.seeds + self.failed;
        let hourly = seeds as f64 * 3600.0 / took.as_secs_f64();
        let mut text = format!(
            "{seeds} seeds, {} failed, {} count, {hourly:.0} seeds/hour, {} s simulated in {:.1} s\n",
            self.failed,
            self.counted,
            self.simulated.as_secs(),
            took.as_secs_f64()
        );
        let (operations, bytes) = (self.operations, self.bytes_verified);
        let lagging = self.lagging;
        writeln!(text, "{operations} operations, {bytes} bytes verified, {lagging} replicas left behind the log")
            .expect("a string takes everything");
        let faults: Vec<String> = FaultKind::ALL
            .iter()
            .map(|kind| format!("{kind:?} {}", self.faults.get(kind).copied().unwrap_or(0)))
            .collect();
        writeln!(text, "faults: {}", faults.join(", ")).expect("a string takes everything");
        let of = |reached: bool| {
            let marks: Vec<&str> = MARKS.into_iter().filter(|mark| self.marks.contains(mark) == reached).collect();
            if marks.is_empty() { "none".to_owned() } else { marks.join(", ") }
        };
        write!(text, "reached: {}\nnot reached: {}", of(true), of(false)).expect("a string takes everything");
        text
    }
}
