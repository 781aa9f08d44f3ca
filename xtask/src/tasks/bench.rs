//! `cargo xtask bench`: builds the shipped binary and the bench for release, and runs the one on the other.

use std::ffi::OsString;

use anyhow::Result;

use crate::run::Step;
use crate::workspace::Workspace;

pub fn run(workspace: &Workspace, arguments: &[OsString]) -> Result<()> {
    let build = ["build", "--quiet", "--locked", "--release", "-p", "holdfast-cli", "-p", "holdfast-bench"];
    Step::cargo(workspace, "build for release", &build).run()?;
    let binary = workspace.target.join("release").join("holdfast");
    let mut run: Vec<OsString> =
        ["run", "--quiet", "--locked", "--release", "-p", "holdfast-bench", "--"].map(Into::into).into();
    run.extend(["--holdfast".into(), binary.into_os_string()]);
    run.extend(arguments.iter().cloned());
    Step::cargo(workspace, "measure", &run).run()
}
