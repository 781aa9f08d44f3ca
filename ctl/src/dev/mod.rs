//! `holdfast dev`: a local cluster of real storage nodes on loopback, under one foreground supervisor.

pub mod control;
pub mod found;
pub mod layout;
pub mod supervisor;

use std::sync::atomic::Ordering;

use anyhow::{Context, Result};

use crate::args::{Dev, DevNode, DevUp};
use crate::client::{Cluster, block_on};
use layout::ClusterFile;
use supervisor::{Options, Supervisor};

pub fn run(verb: Dev) -> Result<()> {
    match verb {
        Dev::Up(options) => block_on(up(options)),
        Dev::Node(DevNode::Stop { name, dir }) => control::call(&dir, &control::Command::Stop(name)),
        Dev::Node(DevNode::Start { name, dir }) => control::call(&dir, &control::Command::Start(name)),
    }
}

async fn up(options: DevUp) -> Result<()> {
    std::fs::create_dir_all(&options.dir).with_context(|| format!("create {}", options.dir.display()))?;
    let dir = options.dir.canonicalize()?;
    let file = if ClusterFile::path(&dir).exists() {
        ClusterFile::load(&dir)?
    } else {
        found::prepare(&dir, usize::from(options.nodes))?
    };
    let supervisor = Supervisor::start(
        Options {
            dir: dir.clone(),
            restart: !options.no_restart,
            disk_bytes: options.disk_size,
            device_fault: options.device_fault,
        },
        file,
    )
    .await?;
    let cluster = Cluster::open(&dir)?;
    let is_founded = supervisor.founded();
    let running = supervisor.run();
    tokio::pin!(running);
    tokio::select! {
        result = &mut running => return result,
        founded = found::found(&cluster) => match founded {
            Ok(()) => {
                is_founded.store(true, Ordering::Relaxed);
                println!("cluster of {} nodes is up: holdfast --cluster {} status", cluster.api().len(), dir.display());
            }
            Err(error) => eprintln!("holdfast: the cluster is not whole yet: {error:#}"),
        },
    }
    running.await
}
