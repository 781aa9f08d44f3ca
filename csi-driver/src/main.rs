//! `holdfast-csi`: the CSI driver as a process, in one of its two modes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use holdfast_crds::ClusterRef;
use holdfast_csi::controller::cluster::Cluster;
use holdfast_csi::controller::{ClusterReady, Controller, Inner};
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
    /// Serve the sidecars of one StorageCluster: provisioner, attacher, resizer
    Controller(ControllerOptions),
    /// Serve the volumes of this machine to its kubelet
    Node(NodeOptions),
}

#[derive(Args)]
struct ControllerOptions {
    /// Where the sidecars find it
    #[arg(long, value_name = "PATH", default_value = "/csi/csi.sock")]
    endpoint: PathBuf,
    /// The StorageCluster whose volumes it serves
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = cluster_ref)]
    cluster: ClusterRef,
    /// Control APIs of storage nodes of that cluster, HOST:PORT; one that answers is enough
    #[arg(long, value_name = "ADDRESS", required = true, value_delimiter = ',')]
    api: Vec<String>,
    /// Folder with ca.pem, and with tls.pem and tls.key of role admin
    #[arg(long, value_name = "DIR")]
    pki: PathBuf,
    /// Serve /healthz and /metrics here
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
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
            Mode::Controller(options) => serve_controller(options).await,
            Mode::Node(options) => serve_node(options).await,
        }
    })
}

fn cluster_ref(text: &str) -> Result<ClusterRef, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(ClusterRef { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => Err(format!("{text:?} is not NAMESPACE/NAME")),
    }
}

async fn serve_controller(options: ControllerOptions) -> Result<()> {
    let shutdown = server::shutdown()?;
    let metrics = Arc::new(Metrics::default());
    if let Some(address) = options.http {
        http::bind(address, metrics.clone()).await.with_context(|| format!("serve HTTP on {address}"))?;
    }
    let kubernetes = kube::Client::try_default().await.context("find the Kubernetes API")?;
    let inner = Inner::new(options.cluster, kubernetes, Cluster::new(options.api, options.pki));
    let routes = tonic::service::Routes::new(Identity::service(Arc::new(ClusterReady(inner.clone()))))
        .add_service(Controller::service(inner, metrics));
    tracing::info!(endpoint = %options.endpoint.display(), "the controller service begins");
    Ok(server::serve(routes, &options.endpoint, shutdown).await?)
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
