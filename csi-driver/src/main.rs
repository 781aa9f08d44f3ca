//! `holdfast-csi`: the CSI driver as a process, in one of its two modes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use holdfast_csi::identity::Identity;
use holdfast_csi::metrics::Metrics;
use holdfast_csi::node::volumes::Folders;
use holdfast_csi::node::{self, AgentReady, Node};
use holdfast_csi::registration::Registrar;
use holdfast_csi::{http, server};
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(name = "holdfast-csi", version, about = "The CSI driver of Holdfast")]
struct Arguments {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Serve the volumes of this machine to its kubelet
    Node(NodeOptions),
}

#[derive(Args)]
struct NodeOptions {
    /// This machine's name in Kubernetes
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// Kubelet's folder, here under the same path as on the machine
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// The attach agent's control socket
    #[arg(long, value_name = "PATH")]
    agent_socket: PathBuf,
    /// Serve /healthz and /metrics here
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
}

fn main() -> Result<()> {
    let filter = EnvFilter::try_from_env("HOLDFAST_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().json().with_env_filter(filter).with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // Looks at the agent's readiness are not counted among the workers.
        .max_blocking_threads(node::WORKERS_MAX + 8)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        match arguments.mode {
            Mode::Node(options) => serve_node(options).await,
        }
    })
}

async fn serve_node(options: NodeOptions) -> Result<()> {
    let shutdown = server::shutdown()?;
    let metrics = Arc::new(Metrics::default());
    if let Some(address) = options.http {
        http::bind(address, metrics.clone()).await.with_context(|| format!("serve HTTP on {address}"))?;
    }
    let folders = Folders::below(&options.kubelet_dir);
    let volumes = node::open(&options.agent_socket, folders.records)?;
    let routes = tonic::service::Routes::new(Identity::service(Arc::new(AgentReady(volumes.clone()))))
        .add_service(Node::service(options.node_name, volumes, metrics));
    let registration = tonic::service::Routes::new(Registrar::service(&folders.endpoint));
    tracing::info!(endpoint = %folders.endpoint.display(), "the node service begins");
    // Kubelet asks behind the registration at once: what it is sent to listens already, and queues.
    tokio::try_join!(
        server::serve(routes, &folders.endpoint, shutdown.clone()),
        server::serve(registration, &folders.registration, shutdown),
    )?;
    Ok(())
}
