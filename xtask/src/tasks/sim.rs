//! `cargo xtask sim`: builds the simulator and runs it in this task's place, with its exit status.
//!
//! The planted bugs are compiled in only where one is asked for: all other seeds run the code that ships.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::checks::manifests::PLANTED;
use crate::run;
use crate::workspace::Workspace;

pub fn run(workspace: &Workspace, arguments: &[OsString]) -> Result<ExitCode> {
    let mut command = Command::new(run::cargo());
    command.args(["run", "--quiet", "--locked", "-p", "holdfast-sim", "--bin", "holdfast-sim"]);
    if arguments.iter().any(|argument| argument == "--planted") {
        command.args(["--features", &format!("holdfast-sim/{PLANTED}")]);
    }
    let status = command.arg("--").args(arguments).current_dir(&workspace.root).status();
    let status = status.context("cannot start cargo")?;
    // A process that a signal ended has no code.
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX);
    Ok(ExitCode::from(code))
}
