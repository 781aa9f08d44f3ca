//! What the driver counts, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tonic::Code;

/// Upper bounds in seconds: from an answer out of memory to the longest wait of a sidecar.
const BUCKETS: [f64; 10] = [0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0];

/// Counters of one process. Their number is bounded by the methods and codes there are.
#[derive(Default)]
pub struct Metrics {
    calls: Mutex<BTreeMap<(&'static str, &'static str), Histogram>>,
}

#[derive(Default)]
struct Histogram {
    counts: [u64; BUCKETS.len()],
    all: u64,
    sum_seconds: f64,
}

impl Metrics {
    pub fn on_call(&self, method: &'static str, code: Code, took: Duration) {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let histogram = calls.entry((method, code_name(code))).or_default();
        let seconds = took.as_secs_f64();
        for (count, bound) in histogram.counts.iter_mut().zip(BUCKETS) {
            *count += u64::from(seconds <= bound);
        }
        histogram.all += 1;
        histogram.sum_seconds += seconds;
    }

    pub fn render(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("a string takes everything");
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let name = "holdfast_csi_rpc_duration_seconds";
        writeln!(text, "# HELP {name} Time that an RPC of the CSI took, by its method and gRPC code.")?;
        writeln!(text, "# TYPE {name} histogram")?;
        for ((method, code), histogram) in calls.iter() {
            let labels = format!("method=\"{method}\",code=\"{code}\"");
            for (count, bound) in histogram.counts.iter().zip(BUCKETS) {
                writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {count}")?;
            }
            writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {}", histogram.all)?;
            writeln!(text, "{name}_sum{{{labels}}} {}", histogram.sum_seconds)?;
            writeln!(text, "{name}_count{{{labels}}} {}", histogram.all)?;
        }
        let name = "holdfast_csi_stuck_commands";
        writeln!(text, "# HELP {name} Host commands that were given up and hang in the kernel.")?;
        writeln!(text, "# TYPE {name} gauge\n{name} {}", holdfast_host::command::stuck())?;
        let name = "holdfast_csi_build_info";
        writeln!(text, "# HELP {name} The version that runs.")?;
        writeln!(text, "# TYPE {name} gauge\n{name}{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"))
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_count_everything_up_to_their_bound() {
        let metrics = Metrics::default();
        metrics.on_call("NodeStageVolume", Code::Ok, Duration::from_millis(100));
        metrics.on_call("NodeStageVolume", Code::Ok, Duration::from_secs(1000));
        metrics.on_call("NodeStageVolume", Code::Aborted, Duration::ZERO);
        let text = metrics.render();
        let line =
            |le: &str| format!("rpc_duration_seconds_bucket{{method=\"NodeStageVolume\",code=\"OK\",le=\"{le}\"}} ");
        assert!(text.contains(&(line("0.025") + "0")) && text.contains(&(line("0.1") + "1")), "{text}");
        assert!(text.contains(&(line("300") + "1")) && text.contains(&(line("+Inf") + "2")), "{text}");
        assert!(text.contains("code=\"ABORTED\"} 1"), "{text}");
    }
}
