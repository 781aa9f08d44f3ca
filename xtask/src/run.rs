//! Starts the programs the tasks consist of.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::tasks::cluster;
use crate::workspace::Workspace;

/// One program of a task: announced, run at the root of the workspace without standard input, failed with its
/// command line.
pub struct Step {
    title: String,
    command: Command,
}

impl Step {
    pub fn cargo<A: AsRef<OsStr>>(workspace: &Workspace, title: &str, arguments: &[A]) -> Step {
        Step::program(workspace, title, cargo(), arguments)
    }

    pub fn program<A: AsRef<OsStr>>(
        workspace: &Workspace,
        title: &str,
        program: impl AsRef<OsStr>,
        arguments: &[A],
    ) -> Step {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir(&workspace.root)
            .env("PATH", path_with_tools(workspace))
            .stdin(Stdio::null());
        Step { title: title.to_owned(), command }
    }

    pub fn env(mut self, variable: &str, value: impl AsRef<OsStr>) -> Step {
        self.command.env(variable, value);
        self
    }

    /// Lets what the program prints go to standard error, where the output of this task is something else.
    pub fn stdout_to_stderr(mut self) -> Step {
        self.command.stdout(std::io::stderr());
        self
    }

    pub fn run(mut self) -> Result<()> {
        eprintln!("== {}", self.title);
        let status = self.command.status().with_context(|| format!("cannot start {:?}", self.command.get_program()))?;
        if !status.success() {
            bail!("{}: {}: {status}", self.title, self.command_line());
        }
        Ok(())
    }

    fn command_line(&self) -> String {
        let program = Path::new(self.command.get_program()).file_name().unwrap_or_default();
        let words: Vec<_> = [program].into_iter().chain(self.command.get_args()).map(OsStr::to_string_lossy).collect();
        words.join(" ")
    }
}

/// The cargo that runs this task, so that a toolchain chosen on its command line stays chosen.
pub fn cargo() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Where `cargo xtask tools` installs.
pub fn tools_directory(workspace: &Workspace) -> PathBuf {
    workspace.target.join("tools")
}

/// `PATH` with the installed tools first, and last the programs of Kubernetes that the tests on a cluster were given.
pub fn path_with_programs(workspace: &Workspace) -> OsString {
    let mut path = path_with_tools(workspace);
    if let Some(programs) = cluster::programs(workspace) {
        path.push(":");
        path.push(programs);
    }
    path
}

/// `PATH` with the installed tools first, so that the pinned version wins over the user's own.
pub fn path_with_tools(workspace: &Workspace) -> OsString {
    let mut path = tools_directory(workspace).join("bin").into_os_string();
    if let Some(rest) = env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    path
}
