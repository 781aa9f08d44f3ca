//! What the operator counts.

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
}
