//! The lanes: each makes what it needs on an installed Holdfast, tries one kind of thing, and cleans up.

mod churn;
mod faults;
mod node;
mod postgres;
mod sanity;
mod scale;
mod smoke;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::Run;
use crate::collect;
use crate::environment::Environment;
use crate::writer::now_ms;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Lane {
    /// Install; a claim becomes a volume in a pod, moves, grows, and goes without a trace
    Smoke,
    /// csi-sanity, with mounted volumes and raw ones
    Sanity,
    /// Parts of Holdfast and of Kubernetes die under a pod that writes
    Faults,
    /// Machines die, or hang and come back
    Node,
    /// Hundreds of claims come and go
    Churn,
    /// PostgreSQL under load while the storage node that leads is killed every 20 s
    Postgres,
    /// Storage nodes, disks and copies come and go; needs four workers
    Scale,
}

/// Runs lanes on an installation that they share, and removes it.
pub async fn run(run: &Run) -> Result<()> {
    let environment = Environment::new(run).await?;
    let mut cases = Cases { environment: &environment, filter: run.case.as_deref(), failed: Vec::new() };
    let lanes = if run.lane.is_empty() { Lane::value_variants() } else { &run.lane };
    if cases.case("install", async || environment.install(&run.image).await).await {
        for lane in lanes {
            println!("== lane {lane:?}");
            match lane {
                Lane::Smoke => smoke::run(&mut cases).await,
                Lane::Sanity => sanity::run(&mut cases).await,
                Lane::Faults => faults::run(&mut cases).await,
                Lane::Node => node::run(&mut cases).await,
                Lane::Churn => churn::run(&mut cases).await,
                Lane::Postgres => postgres::run(&mut cases).await,
                Lane::Scale => scale::run(&mut cases).await,
            }
        }
    }
    // What failed is left as it is for a look.
    if cases.failed.is_empty() && !run.keep {
        cases.case("uninstall", async || environment.uninstall().await).await;
    }
    if cases.failed.is_empty() {
        return Ok(());
    }
    bail!("{} failed: {}", cases.failed.len(), cases.failed.join(", "))
}

/// Runs cases one by one, tells how each ended, and collects what there is to see where one failed.
pub struct Cases<'a> {
    pub environment: &'a Environment<'a>,
    filter: Option<&'a str>,
    failed: Vec<String>,
}

impl Cases<'_> {
    /// Whether it passed, or was left out by the filter.
    pub async fn case(&mut self, name: &str, test: impl AsyncFnOnce() -> Result<()>) -> bool {
        let always = ["install", "uninstall"].contains(&name);
        if !always && self.filter.is_some_and(|filter| !name.contains(filter)) {
            return true;
        }
        let started = now_ms();
        let outcome = test().await;
        let seconds = (now_ms() - started) as f64 / 1000.0;
        let Err(error) = outcome else {
            println!("ok      {seconds:7.1} s  {name}");
            return true;
        };
        println!("FAILED  {seconds:7.1} s  {name}: {error:#}");
        match collect::collect(self.environment, name).await {
            Ok(folder) => println!("        see {}", folder.display()),
            Err(error) => println!("        nothing could be collected: {error:#}"),
        }
        self.failed.push(name.to_owned());
        false
    }
}
