//! `cargo xtask test`: documentation tests, the planted bugs, every other test under cargo-nextest, then the simulator.
//!
//! Tests that plant a bug have `planted` in their path and need the feature of that name, which compiles the bugs in.
//! They run apart, so that all other tests see the code that ships.
//!
//! Some tests need more than a compiler. They carry the name of their tier as a module or in their own name
//! (`needs_root`, `needs_fuse`); a tier that this machine cannot run is left out and named, never silently passed.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fs;

use anyhow::Result;

use crate::checks::manifests::PLANTED;
use crate::run::{Step, path_with_programs};
use crate::workspace::Workspace;

/// Tests that need something of the machine.
struct Tier {
    /// What a test's path contains.
    name: &'static str,
    /// Why this machine cannot run it; `None` if it can.
    obstacle: fn(&Workspace) -> Option<String>,
}

const TIERS: [Tier; 4] = [
    Tier { name: "needs_root", obstacle: |_| not_root() },
    Tier { name: "needs_fuse", obstacle: |_| no_fuse() },
    Tier { name: "needs_postgres", obstacle: |_| no_postgres() },
    Tier { name: "needs_apiserver", obstacle: no_apiserver },
];

/// Two to four minutes on two processors.
const SEEDS: &str = "300";

/// With `nextest` arguments what they select runs and nothing else: no documentation
/// tests, no planted bugs, no tier left out.
pub fn run(workspace: &Workspace, nextest: &[OsString]) -> Result<()> {
    let mut arguments: Vec<OsString> = ["nextest", "run", "--locked"].map(OsString::from).into();
    if nextest.is_empty() {
        Step::cargo(workspace, "documentation tests", &["test", "--workspace", "--doc", "--locked", "--quiet"])
            .run()?;
        planted(workspace)?;
        arguments.push("--workspace".into());
        if let Some(filter) = leave_out(workspace, &TIERS) {
            arguments.extend(["--filterset".into(), filter.into()]);
        }
    }
    arguments.extend(nextest.iter().cloned());
    Step::cargo(workspace, "tests", &arguments).env("PATH", path_with_programs(workspace)).run()?;
    if nextest.is_empty() { seeds(workspace) } else { Ok(()) }
}

/// The simulated cluster, with all that can happen to it.
fn seeds(workspace: &Workspace) -> Result<()> {
    let arguments = [
        "run",
        "--quiet",
        "--locked",
        "-p",
        "holdfast-sim",
        "--bin",
        "holdfast-sim",
        "--",
        "--seeds",
        SEEDS,
        "--complete",
    ];
    Step::cargo(workspace, &format!("{SEEDS} seeds of the simulator"), &arguments).run()
}

/// Runs the tests that plant bugs, in every crate that has some.
fn planted(workspace: &Workspace) -> Result<()> {
    let mut arguments: Vec<String> = ["nextest", "run", "--locked"].map(String::from).into();
    let has_planted = |(_, features): &(&String, &BTreeSet<String>)| features.contains(PLANTED);
    let crates: Vec<&String> = workspace.features.iter().filter(has_planted).map(|(name, _)| name).collect();
    if crates.is_empty() {
        return Ok(());
    }
    for name in crates {
        arguments.extend(["-p".to_owned(), name.clone(), "--features".to_owned(), format!("{name}/{PLANTED}")]);
    }
    arguments.extend(["--filterset".to_owned(), format!("test(/{PLANTED}/)")]);
    Step::cargo(workspace, "planted bugs", &arguments).run()
}

/// Names the tiers this machine cannot run, and returns the runner's filter for all other tests. One filter for all
/// of them, because the runner takes the union of several.
fn leave_out(workspace: &Workspace, tiers: &[Tier]) -> Option<String> {
    let mut impossible = Vec::new();
    for tier in tiers {
        if let Some(obstacle) = (tier.obstacle)(workspace) {
            eprintln!("== skipped tests: {}: {obstacle}", tier.name);
            impossible.push(format!("test(/{}/)", tier.name));
        }
    }
    (!impossible.is_empty()).then(|| format!("not ({})", impossible.join(" | ")))
}

fn not_root() -> Option<String> {
    match fs::read_to_string("/proc/self/status") {
        Ok(status) if effective_user(&status) == Some(0) => None,
        Ok(_) => Some("the effective user is not root".to_owned()),
        Err(error) => Some(format!("/proc/self/status: {error}")),
    }
}

/// The second number of the `Uid:` line of proc(5): real, effective, saved, file system.
fn effective_user(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

/// A control plane of processes; and root, for a mount of the tests' own.
fn no_apiserver(workspace: &Workspace) -> Option<String> {
    let path = path_with_programs(workspace);
    let there = |program: &str| env::split_paths(&path).any(|folder| folder.join(program).is_file());
    let missing: Vec<&str> = ["etcd", "kube-apiserver", "kubectl", "helm", "unshare"]
        .into_iter()
        .filter(|program| !there(program))
        .collect();
    if missing.is_empty() { not_root() } else { Some(format!("not in PATH: {}", missing.join(", "))) }
}

fn no_fuse() -> Option<String> {
    ["/dev/fuse", "/dev/loop-control"].into_iter().find_map(|device| {
        let opened = fs::OpenOptions::new().read(true).write(true).open(device);
        opened.err().map(|error| format!("{device}: {error}"))
    })
}

/// Debian's packages: programs under this path by version, and a user of that name.
fn no_postgres() -> Option<String> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.into_iter().any(|version| version.path().join("bin/pgbench").exists());
    (!found).then(|| "/usr/lib/postgresql: no version with pgbench (Debian: postgresql)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_user_is_the_second_number() {
        assert_eq!(effective_user("Name:\tx\nUid:\t1000\t0\t1000\t1000\nGid:\t5\t5\t5\t5\n"), Some(0));
        assert_eq!(effective_user("Uid:\t0\t1000\t0\t0\n"), Some(1000));
        assert_eq!(effective_user("Name:\tx\n"), None);
    }

    #[test]
    fn tiers_with_an_obstacle_are_left_out_together() {
        let workspace = Workspace::load().unwrap();
        let possible = || Tier { name: "needs_nothing", obstacle: |_| None };
        let impossible = |name| Tier { name, obstacle: |_| Some("absent".to_owned()) };
        assert_eq!(leave_out(&workspace, &[possible()]), None);
        assert_eq!(
            leave_out(&workspace, &[impossible("needs_a"), possible()]),
            Some("not (test(/needs_a/))".to_owned())
        );
        let both = Some("not (test(/needs_a/) | test(/needs_b/))".to_owned());
        assert_eq!(leave_out(&workspace, &[impossible("needs_a"), possible(), impossible("needs_b")]), both);
    }
}
