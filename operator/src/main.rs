//! The Kubernetes operator of Holdfast.
//!
//! It keeps StorageClusters and Volumes as their objects ask: workloads, certificates and the founding of a storage
//! cluster ([`cluster`]), calls on the metadata plane ([`volume`]), certificates of agents ([`enroll`]). It is not in the
//! data path and holds no truth: whatever it knows it reads from the API server and from the storage clusters, and what
//! must not be forgotten stands in Secrets and a ConfigMap. While it is away, volumes serve as before.
//!
//! What it may do: objects of its own group; Services, ServiceAccounts, Secrets, ConfigMaps, StatefulSets, DaemonSets,
//! Deployments, PodDisruptionBudgets, bindings to the ClusterRoles of the chart, one CSIDriver; pods and claims of its
//! clusters deleted; TokenReviews; Leases and Events.

#![forbid(unsafe_code)]

mod apply;
mod cluster;
mod conditions;
mod context;
mod controllers;
mod default_cluster;
mod enroll;
mod http;
mod lease;
mod metrics;
mod object;
mod settings;
mod volume;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::context::Context;
use crate::settings::Settings;

/// Calls and waiting, no computation.
const THREADS: usize = 2;

fn main() -> anyhow::Result<()> {
    let settings = Settings::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,kube=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(run(settings))
}

async fn run(settings: Settings) -> anyhow::Result<()> {
    let (namespace, us) = (settings.namespace.clone(), settings.pod_name.clone());
    let client = kube::Client::try_default().await.context("find the API server")?;
    let context = Arc::new(Context::new(client.clone(), settings));
    let http = context.settings.http;
    let listener = TcpListener::bind(http).await.with_context(|| format!("listen on {http}"))?;
    tokio::spawn(holdfast_http::serve(listener, Arc::clone(&context)));
    let enrolling = tokio::spawn(enroll::serve(Arc::clone(&context)));
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    tokio::select! {
        () = lease::acquire(client.clone(), &namespace, &us) => {}
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    tracing::info!("the lease is ours");
    context.metrics.leading.store(1, Ordering::Relaxed);
    let (stop, stopped) = watch::channel(false);
    let controllers = controllers::run(Arc::clone(&context), stopped);
    tokio::pin!(controllers);
    let default_cluster = Arc::clone(&context);
    tokio::spawn(async move { default_cluster::make(&default_cluster).await });
    tokio::select! {
        // Another one may lead from now on: nothing more may be written by us.
        () = lease::keep(client.clone(), &namespace, &us) => anyhow::bail!("the lease was lost"),
        () = &mut controllers => anyhow::bail!("the controllers ended"),
        ended = enrolling => ended.context("enrolment")?.context("enrolment")?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending: looks under way are finished first");
    stop.send_replace(true);
    controllers.await;
    lease::release(client, &namespace, &us).await;
    Ok(())
}
