//! The cluster of a folder or of addresses, as the command line uses it.

use std::future::Future;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use holdfast_api::v1::cluster_client::ClusterClient;
use holdfast_api::v1::node_client::NodeClient;
use holdfast_cluster_client::{Client, tls_from_files};
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::dev::layout::ClusterFile;

pub struct Cluster {
    /// Where it is made of processes of this machine.
    home: Option<(ClusterFile, PathBuf)>,
    /// Control APIs of its nodes.
    api: Vec<String>,
    client: Client,
}

impl Cluster {
    pub fn open(dir: &Path) -> Result<Cluster> {
        let file = ClusterFile::load(dir)?;
        let api = file.nodes.iter().map(|node| node.api.clone()).collect();
        let cluster = Cluster::with(api, &ClusterFile::pki(dir), "admin")?;
        Ok(Cluster { home: Some((file, dir.to_owned())), ..cluster })
    }

    /// `pki`: a folder as the CSI controller has it.
    pub fn at(api: Vec<String>, pki: &Path) -> Result<Cluster> {
        Cluster::with(api, pki, "tls")
    }

    fn with(api: Vec<String>, pki: &Path, name: &str) -> Result<Cluster> {
        let file = |name: String| pki.join(name);
        let tls =
            tls_from_files(&file(format!("{name}.pem")), &file(format!("{name}.key")), &file("ca.pem".to_owned()))?;
        Ok(Cluster { home: None, client: Client::new(api.clone(), tls), api })
    }

    /// # Errors
    /// The cluster is not one of this machine's.
    pub fn home(&self) -> Result<(&ClusterFile, &Path)> {
        let (file, dir) = self.home.as_ref().context("only with --cluster DIR, the folder given to `dev up`")?;
        Ok((file, dir))
    }

    /// Control APIs of its nodes.
    pub fn api(&self) -> &[String] {
        &self.api
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
