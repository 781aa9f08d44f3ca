//! `cargo xtask tools`: the programs `verify` calls that do not come with Rust, at pinned versions.
//!
//! They go into the target directory, so neither the user's own tools nor the source tree change. A version that is
//! already to be found, there or in `PATH`, is not built again.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::run::{self, Step};
use crate::workspace::Workspace;

struct Tool {
    package: &'static str,
    /// The name after `cargo`.
    subcommand: &'static str,
    version: &'static str,
    /// Further arguments of `cargo install`.
    options: &'static [&'static str],
}

const TOOLS: [Tool; 2] = [
    // Without `self-update`: a pinned tool does not update itself, and its HTTP client doubles the build.
    Tool {
        package: "cargo-nextest",
        subcommand: "nextest",
        version: "0.9.151",
        options: &["--no-default-features", "--features", "default-no-update"],
    },
    Tool { package: "cargo-deny", subcommand: "deny", version: "0.20.2", options: &[] },
];

/// Settings for a quick build: these tools start other programs and compare strings.
const PROFILE: [(&str, &str); 6] = [
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"),
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
    ("CARGO_PROFILE_RELEASE_DEBUG", "0"),
    ("CARGO_PROFILE_RELEASE_STRIP", "debuginfo"),
    ("CARGO_PROFILE_RELEASE_PANIC", "unwind"),
];

pub fn run(workspace: &Workspace) -> Result<()> {
    for tool in &TOOLS {
        if is_installed(workspace, tool) {
            eprintln!("== {} {} is there", tool.package, tool.version);
        } else {
            install(workspace, tool)?;
        }
    }
    Ok(())
}

/// Fails where a tool is missing or has another version; looked at before a task that would find out much later.
pub fn require(workspace: &Workspace) -> Result<()> {
    let missing: Vec<String> = TOOLS
        .iter()
        .filter(|tool| !is_installed(workspace, tool))
        .map(|tool| format!("{} {}", tool.package, tool.version))
        .collect();
    if !missing.is_empty() {
        bail!("not installed: {}; `cargo xtask tools` installs what is missing", missing.join(", "));
    }
    Ok(())
}

fn is_installed(workspace: &Workspace, tool: &Tool) -> bool {
    let output = Command::new(run::cargo())
        .args([tool.subcommand, "--version"])
        .env("PATH", run::path_with_tools(workspace))
        .current_dir(&workspace.root)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    output.is_ok_and(|output| tells_version(tool, &String::from_utf8_lossy(&output.stdout)))
}

/// Both tools print their name and their version as the first two words.
fn tells_version(tool: &Tool, output: &str) -> bool {
    let mut words = output.split_whitespace();
    words.next() == Some(tool.package) && words.next() == Some(tool.version)
}

fn install(workspace: &Workspace, tool: &Tool) -> Result<()> {
    let root = run::tools_directory(workspace);
    let title = format!("install {} {}", tool.package, tool.version);
    let mut arguments = vec!["install", "--locked", "--force", "--version", tool.version];
    arguments.extend(tool.options);
    arguments.extend(["--root", utf8(&root)?, tool.package]);
    let build = root.join("build");
    let mut step = Step::cargo(workspace, &title, &arguments).env("CARGO_TARGET_DIR", &build);
    for (variable, value) in PROFILE {
        step = step.env(variable, value);
    }
    step.run()
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| anyhow::anyhow!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pinned_version_counts() {
        let [nextest, deny] = &TOOLS;
        assert!(tells_version(nextest, "cargo-nextest 0.9.151 (abc 2026-01-01)\nrelease: 0.9.151\n"));
        assert!(tells_version(deny, "cargo-deny 0.20.2\n"));
        assert!(!tells_version(deny, "cargo-deny 0.20.20\n"));
        assert!(!tells_version(deny, "cargo-nextest 0.20.2\n"));
        assert!(!tells_version(deny, ""));
    }
}
