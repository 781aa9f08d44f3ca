//! Runs fio and reads what it found.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::jobs::{Direction, Job};
use crate::targets::Target;

const FILL_DEPTH: u32 = 4;

/// Of one job on one target.
#[derive(Clone, Debug)]
pub struct Found {
    pub operations: u64,
    /// Operations per second.
    pub rate: f64,
    pub bytes_per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// # Errors
/// Names what is missing and where it comes from.
pub fn require(programs: &[&str]) -> Result<()> {
    for program in programs {
        let started = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        ensure!(started.is_ok(), "{program} is not installed: apt-get install {}", programs.join(" "));
    }
    Ok(())
}

/// Writes every byte of the target once, so that nothing measured later allocates or reads what was never written.
pub fn fill(target: &dyn Target, dir: &Path, size_mib: u64) -> Result<()> {
    let arguments = ["--rw=write", "--bs=1m", "--refill_buffers"].map(str::to_owned);
    fio(target, dir, size_mib, FILL_DEPTH, &arguments).map(|_| ())
}

pub fn run(target: &dyn Target, job: &Job, dir: &Path, size_mib: u64, length: Duration) -> Result<Found> {
    let arguments = [
        format!("--rw={}", job.pattern),
        format!("--bs={}k", job.block_kib),
        format!("--runtime={}", length.as_secs()),
        "--time_based".to_owned(),
        "--ramp_time=1".to_owned(),
        "--randrepeat=0".to_owned(),
        "--norandommap".to_owned(),
        "--refill_buffers".to_owned(),
    ];
    let report = fio(target, dir, size_mib, job.depth, &arguments)?;
    let part = match job.direction {
        Direction::Read => &report["read"],
        Direction::Write => &report["write"],
    };
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("fio's report has no {what}"));
    let percentile = |rank: &str| number(&part["clat_ns"]["percentile"][rank], "latencies").map(|ns| ns / 1000.0);
    Ok(Found {
        operations: part["total_ios"].as_u64().context("fio's report has no operations")?,
        rate: number(&part["iops"], "rate")?,
        bytes_per_second: number(&part["bw_bytes"], "bandwidth")?,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
    })
}

/// The report of the only job.
fn fio(target: &dyn Target, dir: &Path, size_mib: u64, depth: u32, arguments: &[String]) -> Result<Value> {
    let output = dir.join("fio.json");
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--output-format=json", "--group_reporting"]);
    command.arg(format!("--output={}", output.display())).arg(format!("--size={size_mib}m"));
    command
        .arg(format!("--iodepth={depth}"))
        .args(target.fio(depth))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let status = command.status().context("fio")?;
    let text = std::fs::read_to_string(&output).context("fio's report")?;
    // Warnings come before the report.
    let start = text.find('{').with_context(|| format!("fio says {}", text.trim()))?;
    let report: Value = serde_json::from_str(&text[start..]).context("fio's report")?;
    let errors = report["jobs"][0]["error"].as_i64();
    if !status.success() || errors != Some(0) {
        bail!("fio on {}: {status}, error {errors:?}: {}", target.name(), text[..start].trim());
    }
    Ok(report["jobs"][0].clone())
}
