//! The figures as a table and as JSON.

use std::fmt;

use serde_json::{Value, json};

use crate::fio::Found;
use crate::jobs::Job;
use crate::processes::Usage;

/// One job on one target.
pub struct Measured {
    pub job: &'static Job,
    pub target: &'static str,
    pub result: Found,
    pub used: Usage,
}

/// Jobs in order, the local disk first among the targets of each.
#[derive(Default)]
pub struct Report {
    pub measured: Vec<Measured>,
    /// Resident MiB by process, after the last job.
    pub memory: Vec<(String, f64)>,
}

impl Measured {
    /// Seconds of the whole machine per 1,000 operations.
    fn cpu(&self) -> f64 {
        self.used.machine * 1000.0 / self.result.operations.max(1) as f64
    }

    fn own_cpu(&self) -> f64 {
        self.used.own * 1000.0 / self.result.operations.max(1) as f64
    }
}

impl Report {
    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self.measured.iter().map(|row| self.row_json(row)).collect();
        let memory: Vec<Value> = self.memory.iter().map(|(name, mib)| json!({"process": name, "mib": mib})).collect();
        json!({"rows": rows, "memory": memory})
    }

    fn row_json(&self, row: &Measured) -> Value {
        json!({
            "job": row.job.name,
            "target": row.target,
            "iops": row.result.rate,
            "bytesPerSecond": row.result.bytes_per_second,
            "p50Us": row.result.p50_us,
            "p99Us": row.result.p99_us,
            "cpuSecondsPer1000": row.cpu(),
            "ownCpuSecondsPer1000": row.own_cpu(),
            "ofLocalDisk": self.of_first(row),
        })
    }

    /// The rate as a part of the first target's.
    fn of_first(&self, row: &Measured) -> f64 {
        let first =
            self.measured.iter().find(|other| other.job.name == row.job.name).map_or(f64::NAN, |r| r.result.rate);
        row.result.rate / first
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HEAD: [&str; 9] =
            ["JOB", "TARGET", "IOPS", "MB/s", "p50 us", "p99 us", "CPU s/1000", "OWN CPU", "OF LOCAL"];
        let mut lines = vec![HEAD.map(str::to_owned)];
        for (i, row) in self.measured.iter().enumerate() {
            let found = &row.result;
            let first = i == 0 || self.measured[i - 1].job.name != row.job.name;
            lines.push([
                if first { row.job.name.to_owned() } else { String::new() },
                row.target.to_owned(),
                format!("{:.0}", found.rate),
                format!("{:.0}", found.bytes_per_second / 1e6),
                format!("{:.0}", found.p50_us),
                format!("{:.0}", found.p99_us),
                format!("{:.3}", row.cpu()),
                format!("{:.3}", row.own_cpu()),
                format!("{:.3}", self.of_first(row)),
            ]);
            let last = self.measured.get(i + 1).is_none_or(|next| next.job.name != row.job.name);
            if let (true, Some(ceph)) = (last, row.job.ceph) {
                let optional = |value: Option<f64>, digits| value.map_or("-".into(), |v| format!("{v:.digits$}"));
                lines.push([
                    String::new(),
                    "Ceph RBD (recorded)".into(),
                    format!("{:.0}", ceph.rate),
                    format!("{:.0}", ceph.rate * f64::from(row.job.block_kib) * 1024.0 / 1e6),
                    optional(ceph.p50_us, 0),
                    "-".into(),
                    optional(ceph.cpu, 3),
                    "-".into(),
                    "-".into(),
                ]);
            }
        }
        let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
        for line in &lines {
            let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
                0 | 1 => format!("{cell:width$}"),
                _ => format!("{cell:>width$}"),
            });
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        writeln!(
            f,
            "\nCPU s/1000: of the whole machine, the load included, per 1,000 operations; OWN: of the target."
        )?;
        writeln!(f, "Resident memory after the last job:")?;
        for (name, mib) in &self.memory {
            writeln!(f, "  {name:20} {mib:6.0} MiB")?;
        }
        Ok(())
    }
}
