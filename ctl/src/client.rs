//! The cluster of a folder, as the command line uses it.

use std::future::Future;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use holdfast_api::v1::cluster_client::ClusterClient;
use holdfast_api::v1::node_client::NodeClient;
use holdfast_cluster_client::{Client, tls_from_files};
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::dev::layout::{ClusterFile, NodeEntry};

pub struct Cluster {
    pub file: ClusterFile,
    pub dir: PathBuf,
    client: Client,
}

impl Cluster {
    pub fn open(dir: &Path) -> Result<Cluster> {
        let file = ClusterFile::load(dir)?;
        let pki = ClusterFile::pki(dir);
        let tls = tls_from_files(&pki.join("admin.pem"), &pki.join("admin.key"), &pki.join("ca.pem"))?;
        let client = Client::new(file.nodes.iter().map(|node| node.api.clone()).collect(), tls);
        Ok(Cluster { file, dir: dir.to_owned(), client })
    }

    pub fn nodes(&self) -> &[NodeEntry] {
        &self.file.nodes
    }

    pub async fn node(&self, address: &str) -> Result<NodeClient<Channel>> {
        Ok(self.client.node(address).await?)
    }

    /// Calls the metadata leader, wherever it is, as long as there may be one.
    pub async fn call<T, F, R>(&self, call: F) -> Result<T>
    where
        F: Fn(ClusterClient<Channel>) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        Ok(self.client.call(call).await?)
    }
}

/// Runs one asynchronous command.
pub fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?.block_on(future)
}
