//! What is measured, and what is known of others for it.

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Read,
    Write,
}

/// One kind of work, at random places where blocks are small and in sequence where they are large.
#[derive(Debug)]
pub struct Job {
    pub name: &'static str,
    pub direction: Direction,
    /// fio's word for it.
    pub pattern: &'static str,
    pub block_kib: u32,
    pub depth: u32,
    /// Ceph RBD 16.2 with three copies and no client cache.
    pub ceph: Option<Reference>,
}

/// Recorded elsewhere; `None`: not recorded.
#[derive(Clone, Copy, Debug)]
pub struct Reference {
    /// Operations per second.
    pub rate: f64,
    pub p50_us: Option<f64>,
    /// Of the whole machine, seconds per 1,000 operations.
    pub cpu: Option<f64>,
}

const fn reference(rate: f64, p50_us: Option<f64>, cpu: Option<f64>) -> Option<Reference> {
    Some(Reference { rate, p50_us, cpu })
}

pub const JOBS: [Job; 6] = [
    Job {
        name: "write 4k QD1",
        direction: Direction::Write,
        pattern: "randwrite",
        block_kib: 4,
        depth: 1,
        ceph: reference(1057.0, Some(881.0), Some(1.285)),
    },
    Job {
        name: "write 4k QD32",
        direction: Direction::Write,
        pattern: "randwrite",
        block_kib: 4,
        depth: 32,
        ceph: reference(2802.0, Some(10_813.0), Some(0.71)),
    },
    Job {
        name: "read 4k QD1",
        direction: Direction::Read,
        pattern: "randread",
        block_kib: 4,
        depth: 1,
        ceph: reference(8120.0, None, None),
    },
    Job {
        name: "read 4k QD32",
        direction: Direction::Read,
        pattern: "randread",
        block_kib: 4,
        depth: 32,
        ceph: reference(24_600.0, None, None),
    },
    Job {
        name: "write 1M sequential QD8",
        direction: Direction::Write,
        pattern: "write",
        block_kib: 1024,
        depth: 8,
        ceph: reference(468.0 / 1.048_576, None, None),
    },
    Job {
        name: "read 1M sequential QD8",
        direction: Direction::Read,
        pattern: "read",
        block_kib: 1024,
        depth: 8,
        ceph: reference(2237.0 / 1.048_576, None, None),
    },
];
