//! `holdfast`: one program for the storage node, the attach agent and everything a person does with them.

mod agent_metrics;
mod args;
mod client;
mod demo;
mod dev;
mod device;
mod disk;
mod enroll;
mod health;
mod nbd_client;
mod node;
mod show;
mod volume;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::args::{Arguments, Verb};

#[cfg(all(feature = "planted", not(debug_assertions)))]
compile_error!("planted bugs are for tests: no release has them");

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    #[cfg(feature = "planted")]
    plant();
    let default_level = if arguments.verb.is_daemon() { "info" } else { "warn" };
    let filter = EnvFilter::try_from_env("HOLDFAST_LOG").unwrap_or_else(|_| EnvFilter::new(default_level));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    if arguments.verb.prints_lists() {
        // Who reads a list with `head` wants it to end quietly.
        // SAFETY: the default action is set before any thread is started.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    }
    if arguments.verb.is_daemon() {
        keep_memory();
    }
    let result = match arguments.verb {
        Verb::Demo(options) => demo::run(options),
        Verb::Dev(verb) => dev::run(verb),
        Verb::Node(verb) => node::run(arguments.cluster, verb),
        Verb::StorageNode(options) => node::serve(options),
        Verb::Disk(verb) => disk::run(arguments.cluster, verb),
        Verb::Status(format) => show::status(arguments.cluster, format),
        Verb::Volume(verb) => volume::run(arguments.cluster, verb),
        Verb::Explain(options) => show::explain(arguments.cluster, options),
        Verb::KubectlPlugin => {
            print!("{}", include_str!("kubectl-holdfast"));
            Ok(())
        }
        Verb::Agent(options) => volume::agent(options),
        Verb::Keeper(options) => volume::keeper(options),
        Verb::Attach(options) => volume::attach(arguments.cluster, options),
        Verb::Detach(options) => volume::detach(arguments.cluster, options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfast: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Buffers of requests come and go: without this their memory goes back to the system each time, and comes anew page by
/// page.
fn keep_memory() {
    /// Longer than any frame.
    #[cfg(target_env = "gnu")]
    const MAPPED_FROM_BYTES: libc::c_int = 8 << 20;
    #[cfg(target_env = "gnu")]
    const KEPT_BYTES: libc::c_int = 16 << 20;
    // SAFETY: numbers of the allocator, set before any thread is started.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
    }
}

/// The bug that a test wants of this process and of those it starts.
#[cfg(feature = "planted")]
fn plant() {
    if let Ok(name) = std::env::var("HOLDFAST_PLANTED") {
        let bug = holdfast_planted::Bug::named(&name).unwrap_or_else(|| panic!("no bug is called {name}"));
        holdfast_planted::plant_everywhere(bug);
    }
}
