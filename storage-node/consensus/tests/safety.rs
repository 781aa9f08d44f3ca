//! The safety properties of Raft (Figure 3 of the paper), of leases and of reads, in random clusters under faults.
//!
//! A failure names its seed; the same seed gives the same run.

mod cluster;

use std::time::Duration;

use cluster::world::{Property, World};

/// Per property; `HOLDFAST_SEEDS` asks for more.
const SEEDS: u64 = 60;

fn seeds() -> u64 {
    std::env::var("HOLDFAST_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SEEDS)
}

fn hold_in_random_clusters(property: Property, first_seed: u64) {
    let (mut elections, mut commands, mut reads) = (0, 0, 0);
    for seed in first_seed..first_seed + seeds() {
        let mut world = World::new(seed, property);
        world.run(Duration::from_secs(20));
        elections += world.elections();
        commands += world.commands_committed();
        reads += world.reads_served;
    }
    // A cluster that does nothing is safe and proves nothing.
    assert!(elections > 3 * seeds() as usize, "{elections} elections");
    assert!(commands > 100 * seeds() as usize, "{commands} commands");
    assert!(reads > 20 * seeds(), "{reads} reads");
}

#[test]
fn election_safety_at_most_one_leader_per_term() {
    hold_in_random_clusters(Property::ElectionSafety, 1_000);
}

#[test]
fn leader_append_only_a_leader_never_drops_its_entries() {
    hold_in_random_clusters(Property::LeaderAppendOnly, 2_000);
}

#[test]
fn log_matching_same_position_same_prefix() {
    hold_in_random_clusters(Property::LogMatching, 3_000);
}

#[test]
fn leader_completeness_every_later_leader_has_what_was_committed() {
    hold_in_random_clusters(Property::LeaderCompleteness, 4_000);
}

#[test]
fn state_machine_safety_no_two_replicas_apply_different_entries_at_one_index() {
    hold_in_random_clusters(Property::StateMachineSafety, 5_000);
}

#[test]
fn lease_safety_nobody_is_elected_under_anothers_lease() {
    hold_in_random_clusters(Property::LeaseSafety, 6_000);
}

#[test]
fn reads_cover_every_earlier_commit() {
    hold_in_random_clusters(Property::LinearizableReads, 7_000);
}

#[test]
fn after_the_faults_the_cluster_serves_is_level_and_sleeps() {
    for seed in 8_000..8_000 + seeds() {
        let mut world = World::new(seed, Property::StateMachineSafety);
        world.damage = false;
        world.run(Duration::from_secs(10));
        world.heal();
        world.run(Duration::from_secs(20));
        world.must_propose();
        world.run(Duration::from_secs(5));
        world.assert_settled();
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = || {
        let mut world = World::new(9_000, Property::StateMachineSafety);
        world.run(Duration::from_secs(10));
        (world.committed, world.reads_served)
    };
    assert_eq!(run(), run());
}
