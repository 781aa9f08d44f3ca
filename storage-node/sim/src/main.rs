//! `holdfast-sim`: runs seeds of the simulated cluster and says what they have shown.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use holdfast_sim::scenario::{self, Options};
use holdfast_sim::world::Failure;

fn main() -> ExitCode {
    let mut seeds = 1u64;
    let mut first = 1u64;
    let mut verbose = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--seeds" => seeds = arguments.next().and_then(|n| n.parse().ok()).expect("a number"),
            "--seed" => first = arguments.next().and_then(|n| n.parse().ok()).expect("a number"),
            "--replay" => verbose = true,
            other => panic!("unknown {other}"),
        }
    }
    let start = Instant::now();
    let (mut counted, mut operations, mut bytes, mut lagging) = (0u64, 0u64, 0u64, 0u64);
    let mut faults = BTreeMap::new();
    let mut marks = BTreeSet::new();
    let mut simulated = Duration::ZERO;
    let mut failed = 0;
    for seed in first..first + seeds {
        let result = catch_unwind(AssertUnwindSafe(|| scenario::run(seed, Options { verbose })))
            .unwrap_or_else(|_| Err(Failure::Incorrect("a panic, told above".to_owned())));
        match result {
            Ok(report) => {
                counted += u64::from(report.counts());
                if !report.counts() {
                    println!("seed {seed} does not count: {} operations {:?}", report.operations, report.faults);
                }
                operations += report.operations;
                bytes += report.bytes_verified;
                lagging += report.lagging;
                simulated += report.lasted;
                for (kind, count) in report.faults {
                    *faults.entry(kind).or_insert(0) += count;
                }
                marks.extend(report.marks);
                if verbose {
                    println!("log {:016x} events {}", report.log_hash, report.events);
                }
            }
            Err(failure) => {
                failed += 1;
                println!("seed {seed}: {failure}");
            }
        }
    }
    let took = start.elapsed();
    println!(
        "{seeds} seeds, {counted} count, {failed} failed, {operations} operations, {bytes} bytes verified, lagging {lagging}, simulated {simulated:?}, took {took:?}, {:.0} seeds/hour",
        seeds as f64 * 3600.0 / took.as_secs_f64()
    );
    println!("{faults:?}\n{marks:?}");
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
