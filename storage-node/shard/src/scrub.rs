//! When the disk is scrubbed, and how fast. What a pass reads is the store's business, what it finds is `repair`'s.
//!
//! One wake-up per step, none between two passes. A step that met other work on the disk makes the next one wait longer.

use std::time::Duration;

use holdfast_consensus::Timestamp;
use holdfast_id::GroupId;

use crate::admin::ScrubReport;
use crate::shard::Shard;

/// Before a look whether repairs have been caught up with.
const REPAIRS_FIRST: Duration = Duration::from_millis(100);

/// Times and rates of scrubbing.
#[derive(Clone, Copy, Debug)]
pub struct ScrubOptions {
    /// From the start of the process to the first pass.
    pub first_after: Duration,
    /// From the end of a pass to the next one.
    pub interval: Duration,
    /// While nobody else uses the disk.
    pub idle_bytes_per_second: u64,
    /// While somebody does.
    pub busy_bytes_per_second: u64,
}

impl ScrubOptions {
    /// A pass a day; 1 TiB takes five hours of an idle disk. Studies of disks in the field see most latent errors
    /// within days of each other, so that a second copy rots in the same place within one is no worry.
    pub const PRODUCT: ScrubOptions = ScrubOptions {
        first_after: Duration::from_secs(60),
        interval: Duration::from_secs(24 * 3600),
        idle_bytes_per_second: 64 << 20,
        busy_bytes_per_second: 8 << 20,
    };
}

pub(crate) struct Scrubbing {
    options: ScrubOptions,
    state: State,
    began: Timestamp,
    bytes: u64,
    passes: u64,
    last: Option<(Timestamp, Duration, u64)>,
}

#[derive(Clone, Copy)]
enum State {
    /// Between two passes.
    Rests {
        until: Timestamp,
    },
    /// Between two steps.
    Pauses {
        until: Timestamp,
    },
    Steps,
}

impl Scrubbing {
    /// `at_once`: the disk was found damaged.
    pub(crate) fn new(options: ScrubOptions, now: Timestamp, at_once: bool) -> Scrubbing {
        let until = if at_once { now } else { now + options.first_after };
        Scrubbing { options, state: State::Rests { until }, began: now, bytes: 0, passes: 0, last: None }
    }

    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        match self.state {
            State::Rests { until } | State::Pauses { until } => Some(until),
            State::Steps => None,
        }
    }

    pub(crate) fn report(&self, now: Timestamp) -> ScrubReport {
        ScrubReport {
            running: !matches!(self.state, State::Rests { .. }),
            passes: self.passes,
            bytes: self.bytes,
            last: self.last.map(|(ended, took, bytes)| (now.since(ended), took, bytes)),
        }
    }
}

impl Shard {
    /// Takes the next step where it is time for one.
    pub(crate) fn drive_scrub(&mut self) {
        let now = self.core.now;
        match self.scrub.state {
            State::Rests { until } if until <= now => {
                self.scrub.began = now;
                self.scrub.bytes = 0;
                self.core.store.scrub_from_start();
            }
            // What was found is repaired first.
            State::Pauses { until } if until <= now && self.repairs.is_busy() => {
                self.scrub.state = State::Pauses { until: now + REPAIRS_FIRST };
                return;
            }
            State::Pauses { until } if until <= now => {}
            State::Rests { .. } | State::Pauses { .. } | State::Steps => return,
        }
        self.scrub.state = State::Steps;
        self.core.store.scrub_step();
    }

    pub(crate) fn on_scrubbed(&mut self, bytes: u64, finished: bool) {
        let now = self.core.now;
        let scrub = &mut self.scrub;
        scrub.bytes += bytes;
        if finished {
            scrub.passes += 1;
            scrub.last = Some((now, now.since(scrub.began), scrub.bytes));
            scrub.state = State::Rests { until: now + scrub.options.interval };
            return;
        }
        let busy = self.core.disk_is_busy();
        let rate = if busy { scrub.options.busy_bytes_per_second } else { scrub.options.idle_bytes_per_second };
        let pause = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate.max(1));
        scrub.state = State::Pauses { until: now + pause };
    }

    /// All that was asked for is repaired or lost, or installed. A map of which a page was lost is whole only when a
    /// pass has seen all of it.
    pub(crate) fn look_through(&mut self, group: GroupId) {
        let unknown = self.core.store.map_hash(group).is_none();
        if let State::Rests { until } = &mut self.scrub.state
            && unknown
        {
            *until = (*until).min(self.core.now + self.scrub.options.first_after);
        }
    }
}
