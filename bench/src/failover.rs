//! `--failover`: fio writes, reads back and verifies while each node in turn is killed and started again, then while
//! each in turn is stopped for ten seconds. Every fault is told with what the node was and the longest time in which
//! nothing was answered.
//!
//! Errors and wrong bytes fail it. Gaps are for a person to judge, who knows what else the machine does.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::processes::signal;
use crate::targets::{Target, Volume};

const DEPTH: u32 = 16;
/// From the start to the first fault, and from the end of one to the next: a node that is back has caught up by then.
const CALM: Duration = Duration::from_secs(8);
/// A killed node is started again after two seconds.
const AWAY: Duration = Duration::from_secs(10);

/// Entries that are in flight to a copy that keeps up.
const BEHIND_MAX: u64 = 256;

#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill,
    Stop,
}

struct Struck {
    /// Milliseconds since 1970, as fio's log has them.
    at: u64,
    node: String,
    led: bool,
    /// Copies that were not whole just before.
    behind: Vec<String>,
}

/// `rate_mib`: MiB/s that are written at most.
pub fn run(dir: &Path, holdfast: &Path, size_mib: u64, rate_mib: Option<u64>) -> Result<()> {
    let volume = Volume::start(dir, holdfast, size_mib)?;
    for fault in [Fault::Kill, Fault::Stop] {
        let (struck, report, answered) = under_load(&volume, dir, size_mib, rate_mib, fault)?;
        let operations = |way: &str| report[way]["total_ios"].as_u64().unwrap_or(0);
        println!("{fault:?}: {} writes, {} verified reads, no error", operations("write"), operations("read"));
        println!("  before any: longest gap {} ms", longest_gap(&answered, 0, struck[0].at));
        for (number, one) in struck.iter().enumerate() {
            let until = struck.get(number + 1).map_or(u64::MAX, |next| next.at);
            let limit = match (fault, one.led) {
                (Fault::Kill, true) => 1000,
                (Fault::Stop, true) => 1500,
                (_, false) => 100,
            };
            let gap = longest_gap(&answered, one.at, until);
            let role = if one.led { "leader" } else { "follower" };
            let verdict = if gap <= limit { "within" } else { "OVER" };
            println!("  {} ({role}): longest gap {gap} ms, {verdict} {limit}", one.node);
            for behind in &one.behind {
                println!("    when it was struck, {behind}");
            }
        }
    }
    Ok(())
}

/// What was struck, fio's report, and when requests were answered.
fn under_load(
    volume: &Volume,
    dir: &Path,
    size_mib: u64,
    rate_mib: Option<u64>,
    fault: Fault,
) -> Result<(Vec<Struck>, Value, Vec<u64>)> {
    let nodes = volume.nodes()?;
    let length = CALM + (CALM + AWAY) * nodes.len() as u32;
    let (output, log) = (dir.join("failover.json"), dir.join("failover"));
    let mut command = Command::new("fio");
    command.args(["--name=failover", "--output-format=json", "--rw=randwrite", "--bsrange=4k-256k", "--time_based"]);
    // Written blocks are read back and verified all along, and the rest of them at the end.
    command.args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--serialize_overlap=1"]);
    command.args(["--randrepeat=0", "--log_unix_epoch=1"]);
    command.arg(format!("--runtime={}", length.as_secs())).arg(format!("--size={size_mib}m"));
    command.arg(format!("--iodepth={DEPTH}")).args(volume.fio(DEPTH));
    command.args(rate_mib.map(|rate| format!("--rate=,{rate}m")));
    command.arg(format!("--output={}", output.display())).arg(format!("--write_lat_log={}", log.display()));
    let mut fio = command.current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("fio")?;
    let mut struck = Vec::new();
    for node in nodes {
        sleep(CALM);
        ensure!(fio.try_wait()?.is_none(), "fio ended early: {}", std::fs::read_to_string(&output)?);
        let (seen, pid) = (volume.seen()?, volume.pid(&node)?);
        let leader = seen["leader"].as_str().context("the volume has no leader")?;
        let behind = behind(&seen);
        let at = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock")?.as_millis() as u64;
        struck.push(Struck { at, led: leader == node, node, behind });
        match fault {
            Fault::Kill => {
                signal("-KILL", pid)?;
                sleep(AWAY);
            }
            Fault::Stop => {
                signal("-STOP", pid)?;
                sleep(AWAY);
                signal("-CONT", pid)?;
            }
        }
    }
    let status = fio.wait()?;
    let text = std::fs::read_to_string(&output).context("fio's report")?;
    let start = text.find('{').with_context(|| format!("fio says {}", text.trim()))?;
    let report: Value = serde_json::from_str(&text[start..]).context("fio's report")?;
    let job = report["jobs"][0].clone();
    ensure!(status.success() && job["error"] == 0, "fio: {status}, error {}: {}", job["error"], text[..start].trim());
    Ok((struck, job, answers(&log.with_file_name("failover_clat.1.log"))?))
}

fn behind(volume: &Value) -> Vec<String> {
    let replicas = volume["replicas"].as_array().map(Vec::as_slice).unwrap_or_default();
    let index = |replica: &Value| replica["flushed"].as_u64().unwrap_or(0);
    let last = replicas.iter().map(index).max().unwrap_or(0);
    let lags = |replica: &&Value| replica["healthy"] != true || index(replica) + BEHIND_MAX < last;
    let told = |replica: &Value| {
        let reason = replica["reason"].as_str().unwrap_or("behind");
        format!("{} had {} of {last} entries: {reason}", replica["node"], index(replica))
    };
    replicas.iter().filter(lags).map(told).collect()
}

/// Each line is `time, latency, direction, length, …`.
fn answers(log: &Path) -> Result<Vec<u64>> {
    let text = std::fs::read_to_string(log).with_context(|| log.display().to_string())?;
    let mut answers: Vec<u64> = text.lines().filter_map(|line| line.split(',').next()?.trim().parse().ok()).collect();
    // Reads and writes are logged one after the other.
    answers.sort_unstable();
    ensure!(!answers.is_empty(), "{} holds no answers", log.display());
    Ok(answers)
}

/// Of gaps that end in `[from, until)`.
fn longest_gap(answers: &[u64], from: u64, until: u64) -> u64 {
    let gaps = answers.windows(2).filter(|pair| (from..until).contains(&pair[1]));
    gaps.map(|pair| pair[1] - pair[0].max(from)).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_counts_where_it_ends_and_from_the_fault_on() {
        let answers = [100, 110, 150, 900, 905];
        assert_eq!(longest_gap(&answers, 0, 200), 40);
        assert_eq!(longest_gap(&answers, 160, 1000), 740);
        assert_eq!(longest_gap(&answers, 1000, 2000), 0);
    }
}
