//! `holdfast-sim`: runs seeds of the simulated cluster and says what they have shown.
//!
//! Exit status: 0 all held, 1 something came out wrong, 2 something got stuck, 3 too little was shown to count (or a
//! planted bug was not found), 64 the arguments are not understood.

#![forbid(unsafe_code)]

mod arguments;
mod tally;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use holdfast_sim::scenario::{self, Options, Report};
use holdfast_sim::world::Failure;

use crate::arguments::Arguments;
use crate::tally::Tally;

const INCORRECT: u8 = 1;
const STUCK: u8 = 2;
const SHOWN_TOO_LITTLE: u8 = 3;
const USAGE: u8 = 64;

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("error: {error}\n\n{}", arguments::USAGE);
            return ExitCode::from(USAGE);
        }
    };
    match &arguments.planted {
        Some(name) => planted(&arguments, name),
        None => ExitCode::from(seeds(&arguments)),
    }
}

fn seeds(arguments: &Arguments) -> u8 {
    let start = Instant::now();
    let mut tally = Tally::default();
    let mut status = 0;
    for (seed, outcome) in run_all(arguments) {
        match outcome {
            Ok(report) => {
                if arguments.replay {
                    println!("log {:016x} of {} events", report.log_hash, report.events);
                }
                tally.add(&report);
            }
            Err(failure) => {
                println!("seed {seed}: {failure}\nreproduce: cargo xtask sim --seed {seed} --replay");
                tally.failed += 1;
                let own = if matches!(failure, Failure::Incorrect(_)) { INCORRECT } else { STUCK };
                // What is wrong outweighs what is stuck.
                status = if status == 0 { own } else { status.min(own) };
            }
        }
    }
    println!("{}", tally.summary(start.elapsed()));
    let enough = if arguments.complete { tally.is_complete() } else { tally.counted > 0 };
    if status == 0 && !enough { SHOWN_TOO_LITTLE } else { status }
}

/// Every seed has a thread to itself; where several run at a time, what they tell would mix.
fn run_all(arguments: &Arguments) -> BTreeMap<u64, Result<Report, Failure>> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let next = Mutex::new(arguments.seeds());
    let outcomes = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..if arguments.replay { 1 } else { processors } {
            scope.spawn(|| {
                loop {
                    let Some(seed) = next.lock().expect("no holder panics").next() else { return };
                    let outcome = run(seed, arguments.replay);
                    outcomes.lock().expect("no holder panics").insert(seed, outcome);
                }
            });
        }
    });
    outcomes.into_inner().expect("no holder panics")
}

/// A panic of the code under test is a failure like any other.
fn run(seed: u64, verbose: bool) -> Result<Report, Failure> {
    catch_unwind(AssertUnwindSafe(|| scenario::run(seed, Options { verbose })))
        .unwrap_or_else(|_| Err(Failure::Incorrect("it panicked, see above".to_owned())))
}

#[cfg(feature = "planted")]
fn planted(arguments: &Arguments, name: &str) -> ExitCode {
    use holdfast_planted::Bug;

    let Some(bug) = Bug::named(name) else {
        let names: Vec<&str> = Bug::ALL.iter().map(|bug| bug.name()).collect();
        eprintln!("error: no bug is called {name}; there are {}", names.join(", "));
        return ExitCode::from(USAGE);
    };
    for seed in arguments.seeds() {
        if let Some(failure) = holdfast_sim::planted::found_by(bug, seed, Options { verbose: arguments.replay }) {
            println!("{name} is found by seed {seed}: {failure}");
            return ExitCode::SUCCESS;
        }
    }
    println!("{name} is not found");
    ExitCode::from(SHOWN_TOO_LITTLE)
}

#[cfg(not(feature = "planted"))]
fn planted(_: &Arguments, name: &str) -> ExitCode {
    eprintln!("error: {name} is not compiled in: build with the feature planted");
    ExitCode::from(USAGE)
}
