//! Tests on a real Kubernetes cluster, in lanes, and the program that writes and verifies in their pods.
//!
//! `holdfast-e2e run` is started by `cargo xtask e2e`, with images loaded and `kubectl`, `helm` and `docker` in PATH.
//! `holdfast-e2e write` is what pods run; see [`writer`].
//!
//! What holds: a lane leaves the cluster as it found it. A wait has a limit and says what it last saw. Figures are
//! printed, never asserted: a slow machine fails no test.

#![forbid(unsafe_code)]

mod collect;
mod command;
mod environment;
mod lanes;
mod leftovers;
mod objects;
mod progress;
mod wait;
mod writer;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::lanes::Lane;

#[derive(Parser)]
#[command(name = "holdfast-e2e", about = "Tests of Holdfast on a Kubernetes cluster")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run lanes of tests
    Run(Run),
    /// Write to a file or device and verify it, until told to stop
    Write(writer::Options),
}

#[derive(Args)]
pub struct Run {
    /// Lanes to run; all of them where absent
    #[arg(long)]
    pub lane: Vec<Lane>,
    /// Only cases with this in their name
    #[arg(long)]
    pub case: Option<String>,
    /// The image under test, in the cluster's nodes
    #[arg(long)]
    pub image: String,
    /// The same with this program in it
    #[arg(long)]
    pub tests_image: String,
    /// The image of the lane `postgres`
    #[arg(long)]
    pub postgres_image: Option<String>,
    /// Folder of the chart
    #[arg(long)]
    pub chart: PathBuf,
    /// Values of the chart
    #[arg(long)]
    pub values: PathBuf,
    /// Where logs and events go when a test fails
    #[arg(long)]
    pub artifacts: PathBuf,
    /// Leave the installation, for a look or for the next run
    #[arg(long)]
    pub keep: bool,
}

fn main() -> Result<()> {
    match Arguments::parse().verb {
        Verb::Run(run) => {
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(lanes::run(&run))
        }
        Verb::Write(options) => writer::run(&options),
    }
}
