//! `/healthz` and `/metrics`. Healthy is a process that serves, whether it leads or waits for the lease: a restart would
//! mend nobody else's failure.

use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_http::{Labels, Page, Source};

use crate::context::Context;

impl Source for Context {
    async fn health(&self) -> Result<(), String> {
        Ok(())
    }

    async fn metrics(&self) -> Page {
        let metrics = &self.metrics;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let labels = |name: &'static str, value: &str| -> Labels { vec![(name, value.to_owned())] };
        let by_kind = |clusters: &AtomicU64, volumes: &AtomicU64| {
            [(labels("kind", "StorageCluster"), read(clusters)), (labels("kind", "Volume"), read(volumes))]
        };
        let mut page = Page::new();
        let build = [(labels("version", env!("CARGO_PKG_VERSION")), 1.0)];
        page.gauge("holdfast_operator_build_info", "Build of this process", build);
        let leading = f64::from(u8::from(read(&metrics.leading) > 0));
        page.gauge("holdfast_operator_leading", "1 while this process holds the lease", [(Labels::new(), leading)]);
        let looks = by_kind(&metrics.cluster_looks, &metrics.volume_looks);
        page.counter("holdfast_operator_reconciles", "Looks at objects, by kind", looks);
        let errors = by_kind(&metrics.cluster_errors, &metrics.volume_errors);
        let help = "Looks that ended in an error and are made again, by kind";
        page.counter("holdfast_operator_reconcile_errors", help, errors);
        let enrolments = [
            (labels("result", "issued"), read(&metrics.enrolments)),
            (labels("result", "refused"), read(&metrics.enrolments_refused)),
        ];
        page.counter("holdfast_operator_enrolments", "Certificates given to agents, and requests refused", enrolments);
        page
    }
}
