//! `holdfast-bench`: the same work on the local disk, on nbdkit with one copy, and on a Holdfast volume with three
//! copies, one after the other in one run, so that the figures share the machine and the minute.
//!
//! It drives the shipped `holdfast` binary as a user would (`dev up`, `volume create`, `attach --nbd-socket`), and fio
//! as the load. Every write is durable before it is answered: `O_DSYNC` on the local file, a forced FUA in nbdkit.
//! Ratios carry over to other machines, absolute figures do not. What is recorded of Ceph was measured once on a machine
//! of two cores with all daemons and the load on it; it says so in the table.

#![forbid(unsafe_code)]

mod failover;
mod fio;
mod jobs;
mod processes;
mod report;
mod targets;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::jobs::JOBS;
use crate::processes::Usage;
use crate::report::{Measured, Report};
use crate::targets::{Local, Nbdkit, Target, Volume};

#[derive(Parser)]
#[command(about = "Measure a volume beside the local disk and nbdkit")]
struct Arguments {
    /// The binary to measure
    #[arg(long)]
    holdfast: PathBuf,
    /// Seconds of each job on each target
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// MiB that each target holds; all of it is written before anything is measured
    #[arg(long, default_value_t = 1024)]
    size_mib: u64,
    /// Only jobs whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// A folder on the disk to measure, with room for eight times the size
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Kill and stop nodes under a verified load instead, two minutes, and tell the longest gaps
    #[arg(long)]
    failover: bool,
    /// MiB/s that `--failover` writes at most
    #[arg(long, requires = "failover")]
    rate_mib: Option<u64>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    fio::require(&["fio", "nbdkit"])?;
    let jobs: Vec<_> = JOBS.iter().filter(|job| job.name.contains(&arguments.only)).collect();
    ensure!(!jobs.is_empty(), "no job's name contains {:?}", arguments.only);
    let mut builder = tempfile::Builder::new();
    builder.prefix("holdfast-bench-");
    let dir = match &arguments.dir {
        Some(dir) => builder.tempdir_in(dir)?,
        None => builder.tempdir()?,
    };
    if arguments.failover {
        return failover::run(dir.path(), &arguments.holdfast, arguments.size_mib, arguments.rate_mib);
    }
    let local = Local::start(dir.path());
    let nbdkit = Nbdkit::start(dir.path(), arguments.size_mib)?;
    let volume = Volume::start(dir.path(), &arguments.holdfast, arguments.size_mib)?;
    let targets: [&dyn Target; 3] = [&local, &nbdkit, &volume];
    for target in targets {
        eprintln!("writing {} MiB to {}", arguments.size_mib, target.name());
        fio::fill(target, dir.path(), arguments.size_mib)?;
    }
    let mut report = Report::default();
    for job in jobs {
        for target in targets {
            eprintln!("{} on {}", job.name, target.name());
            let before = Usage::now(&target.processes()?)?;
            let result =
                fio::run(target, job, dir.path(), arguments.size_mib, Duration::from_secs(arguments.seconds.into()))?;
            let after = Usage::now(&target.processes()?)?;
            report.measured.push(Measured { job, target: target.name(), result, used: after.since(&before) });
        }
    }
    report.memory = volume.memory()?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report.json())?);
    } else {
        print!("{report}");
    }
    Ok(())
}
