//! What processes and the machine use, from `/proc`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Linux counts processor time in these, on every architecture it runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// A process of a target.
#[derive(Clone, Debug)]
pub struct Process {
    pub name: String,
    pub pid: u32,
}

/// Seconds of processor time since some start.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Of the target's own processes.
    pub own: f64,
    /// Of everything on the machine, the load and the kernel included.
    pub machine: f64,
}

impl Usage {
    pub fn now(processes: &[Process]) -> Result<Usage> {
        let mut own = 0.0;
        for process in processes {
            let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).context("a process ended")?;
            // The name, in brackets, may hold anything; user and system time are the 12th and 13th word behind it.
            let (_, words) = stat.rsplit_once(')').context("/proc/PID/stat")?;
            own += words.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>();
        }
        let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
        let line = stat.lines().next().context("/proc/stat")?;
        let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|ticks| ticks.parse().ok()).collect();
        // user nice system IDLE IOWAIT irq softirq
        let machine = [0, 1, 2, 5, 6].iter().filter_map(|column| ticks.get(*column)).sum::<f64>();
        Ok(Usage { own: own / TICKS_PER_SECOND, machine: machine / TICKS_PER_SECOND })
    }

    pub fn since(&self, before: &Usage) -> Usage {
        Usage { own: self.own - before.own, machine: self.machine - before.machine }
    }
}

/// Resident memory in MiB.
pub fn resident_mib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("a process ended")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("/proc/PID/status")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().context("VmRSS")?;
    Ok(kib / 1024.0)
}

/// Every process that was started with `word` among its arguments.
pub fn with_argument(word: &Path) -> Result<Vec<Process>> {
    let word = word.to_str().context("the folder's name is not text")?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Processes end while they are looked at.
        let Ok(line) = fs::read_to_string(format!("/proc/{pid}/cmdline")) else { continue };
        if pid != std::process::id() && line.contains(word) {
            let name = line.split('\0').skip(1).find(|word| !word.starts_with('-')).unwrap_or_default().to_owned();
            found.push(Process { name, pid });
        }
    }
    Ok(found)
}

/// `name`: as kill(1) takes it. There is no safe call for it in the standard library.
pub fn signal(name: &str, pid: u32) -> Result<()> {
    let status = Command::new("kill").args([name, &pid.to_string()]).status().context("kill")?;
    ensure!(status.success(), "no process {pid}");
    Ok(())
}
