//! `cargo xtask test`: documentation tests, then every other test under cargo-nextest.
//!
//! Some tests need more than a compiler. They carry the name of their tier as a module or in their own name
//! (`needs_root`, `needs_fuse`); a tier that this machine cannot run is left out and named, never silently passed.

use std::ffi::OsString;
use std::fs;

use anyhow::Result;

use crate::run::Step;
use crate::workspace::Workspace;

/// Tests that need something of the machine.
struct Tier {
    /// What a test's path contains.
    name: &'static str,
    /// Why this machine cannot run it; `None` if it can.
    obstacle: fn() -> Option<String>,
}

const TIERS: [Tier; 2] =
    [Tier { name: "needs_root", obstacle: not_root }, Tier { name: "needs_fuse", obstacle: no_fuse }];

/// With `nextest` arguments only what they select runs, without the documentation tests.
pub fn run(workspace: &Workspace, nextest: &[OsString]) -> Result<()> {
    if nextest.is_empty() {
        Step::cargo(workspace, "documentation tests", &["test", "--workspace", "--doc", "--locked", "--quiet"])
            .run()?;
    }
    let mut arguments: Vec<OsString> = ["nextest", "run", "--locked"].map(OsString::from).into();
    if nextest.is_empty() {
        arguments.push("--workspace".into());
    }
    arguments.extend(nextest.iter().cloned());
    for tier in &TIERS {
        if let Some(obstacle) = (tier.obstacle)() {
            eprintln!("== skipped tests: {}: {obstacle}", tier.name);
            arguments.push("--filterset".into());
            arguments.push(format!("not test(/{}/)", tier.name).into());
        }
    }
    Step::cargo(workspace, "tests", &arguments).run()
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

fn no_fuse() -> Option<String> {
    ["/dev/fuse", "/dev/loop-control"].into_iter().find_map(|device| {
        let opened = fs::OpenOptions::new().read(true).write(true).open(device);
        opened.err().map(|error| format!("{device}: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::effective_user;

    #[test]
    fn the_effective_user_is_the_second_number() {
        assert_eq!(effective_user("Name:\tx\nUid:\t1000\t0\t1000\t1000\nGid:\t5\t5\t5\t5\n"), Some(0));
        assert_eq!(effective_user("Uid:\t0\t1000\t0\t0\n"), Some(1000));
        assert_eq!(effective_user("Name:\tx\n"), None);
    }
}
