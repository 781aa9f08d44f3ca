//! The storage node: one data thread (shard, disk, sockets) and one control thread (gRPC). Composition, no decisions.

mod addresses;
mod api;
mod clock;
mod config;
mod control;
mod disk;
mod peers;
mod rim;

pub use config::{Config, ConfigError, Join};

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::sync::oneshot;

/// Runs until SIGTERM or SIGINT, or until the node cannot go on.
///
/// # Errors
/// What the operator has to mend before the node can start: certificates, ports, the disk.
pub fn run(config: Config) -> Result<()> {
    config.check()?;
    std::fs::create_dir_all(&config.dir).with_context(|| format!("create {}", config.dir.display()))?;
    let config = Arc::new(config);
    let listener = bind(config.api)?;
    let http = config.http.map(bind).transpose()?;
    let (rim, control) = rim::Rim::start(&config)?;
    // Dropped with the data thread, however that ends: the control thread must not go on without it.
    let (alive, ended) = oneshot::channel::<()>();
    let data = std::thread::Builder::new().name("shard".into()).spawn(move || {
        let _alive = alive;
        rim.run()
    });
    let data = data.context("start the data thread")?;
    let served = api::serve(&config, control, listener, http, ended);
    match data.join() {
        Ok(result) => result.and(served),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("listen on {address}: is another node running there?"))
}
