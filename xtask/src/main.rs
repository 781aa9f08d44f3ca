//! Developer tasks of the workspace: `cargo xtask <task>`.
//!
//! One file per task in [`tasks`], one per rule in [`checks`]. A rule is a pure function from what was read to the
//! list of its violations; only tasks run programs. `verify` never writes into the source tree, `fix` does.

#![forbid(unsafe_code)]

mod checks;
mod run;
mod tasks;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Developer tasks of the Holdfast workspace")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check everything that must hold before a change lands; writes nothing into the source tree
    Verify {
        /// Run the checks only
        #[arg(long)]
        skip_tests: bool,
    },
    /// Rewrite what can be rewritten: generated code, clippy's suggestions, formatting
    Fix,
    /// Run the documentation tests and the tests
    Test {
        /// Arguments of `cargo nextest run`, such as `-p holdfast-store`; the documentation tests are left out then
        #[arg(last = true)]
        nextest: Vec<OsString>,
    },
    /// Run seeds of the simulated cluster: `--seeds N`, `--seed S --replay`, `--planted BUG`
    Sim {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Measure a volume beside the local disk and nbdkit, built for release: `--seconds N`, `--only "write 4k"`, `--json`;
    /// or nodes killed and stopped under a verified load: `--failover`
    Bench {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Build the programs for shipping, and from them the image `holdfast:<commit>`
    Image,
    /// A Kubernetes cluster in containers, by kind
    Cluster {
        #[command(subcommand)]
        action: tasks::cluster::Action,
        #[command(flatten)]
        options: tasks::cluster::Options,
    },
    /// Run lanes of tests against a kind cluster, made here if it is not there
    E2e {
        #[command(flatten)]
        options: tasks::cluster::Options,
        #[command(flatten)]
        arguments: tasks::e2e::Arguments,
    },
    /// Install the pinned cargo-nextest and cargo-deny into the target directory, unless they are there
    Tools,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    match arguments.task {
        Task::Verify { skip_tests } => tasks::verify::run(&workspace, skip_tests),
        Task::Fix => tasks::fix::run(&workspace),
        Task::Test { nextest } => tasks::test::run(&workspace, &nextest),
        Task::Sim { arguments } => return tasks::sim::run(&workspace, &arguments),
        Task::Bench { arguments } => tasks::bench::run(&workspace, &arguments),
        Task::Image => tasks::image::run(&workspace).map(|image| println!("{image}")),
        Task::Cluster { action, options } => tasks::cluster::run(&workspace, &action, &options),
        Task::E2e { options, arguments } => tasks::e2e::run(&workspace, &options, &arguments),
        Task::Tools => tasks::tools::run(&workspace),
    }
    .map(|()| ExitCode::SUCCESS)
}
