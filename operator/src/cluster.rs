//! StorageClusters: dereference, validate, build, apply, status; I/O only at the two ends.
//!
//! One look at a StorageCluster goes through all of it. Looks come with every change of the object or of what it owns,
//! and every [`LOOK_EVERY`] besides: the storage cluster tells nothing by itself yet. Whatever is decided is decided by
//! the pure modules from one [`observed::Observed`]; a look that is interrupted anywhere is made again from the start.

pub mod authority;
pub mod build;
pub mod certificates;
pub mod changing;
pub mod ending;
pub mod files;
pub mod founding;
pub mod layout;
pub mod loss;
pub mod observed;
pub mod projecting;
pub mod projection;
pub mod reconcile;
pub mod scale;
pub mod status;
pub mod storage;
pub mod update;
pub mod validate;
pub mod version;
pub mod workloads;

use std::time::Duration;

/// Between two looks at a cluster that nobody touches.
pub const LOOK_EVERY: Duration = Duration::from_secs(5);
