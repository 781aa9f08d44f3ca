//! What the operator counts, in the text form of Prometheus.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Default)]
pub struct Metrics {
    pub leading: AtomicU64,
    pub cluster_looks: AtomicU64,
    pub cluster_errors: AtomicU64,
    pub volume_looks: AtomicU64,
    pub volume_errors: AtomicU64,
    /// There are, in all storage clusters.
    pub volumes: AtomicU64,
    pub enrolments: AtomicU64,
    pub enrolments_refused: AtomicU64,
}

impl Metrics {
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub fn render(&self) -> String {
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, values: &[(&str, &AtomicU64)]| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (label, value) in values {
                let _ = writeln!(text, "{name}{label} {}", value.load(Ordering::Relaxed));
            }
        };
        let help = "Build of this process.";
        let version = format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
        family("holdfast_operator_build_info", "gauge", help, &[(&version, &AtomicU64::new(1))]);
        family("holdfast_operator_leading", "gauge", "1 while this process holds the lease.", &[("", &self.leading)]);
        let help = "Looks at objects, by kind.";
        let by_kind = [("{kind=\"StorageCluster\"}", &self.cluster_looks), ("{kind=\"Volume\"}", &self.volume_looks)];
        family("holdfast_operator_reconciles_total", "counter", help, &by_kind);
        let help = "Looks that ended in an error and are made again, by kind.";
        let by_kind = [("{kind=\"StorageCluster\"}", &self.cluster_errors), ("{kind=\"Volume\"}", &self.volume_errors)];
        family("holdfast_operator_reconcile_errors_total", "counter", help, &by_kind);
        let help = "Certificates given to agents, and requests refused.";
        let by_result = [("{result=\"issued\"}", &self.enrolments), ("{result=\"refused\"}", &self.enrolments_refused)];
        family("holdfast_operator_enrolments_total", "counter", help, &by_result);
        text
    }
}
