//! The storage cluster that the driver belongs to: what it asks of it, with credentials that may change under it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use holdfast_api::v1;
use holdfast_cluster_client::{CallError, Client, CredentialsError};

/// A certificate, its key and the authorities it trusts are a few thousand bytes; a Secret has a mebibyte.
const PEM_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("{path} cannot be read")]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Call(#[from] CallError),
}

pub struct Cluster {
    endpoints: Vec<String>,
    pki: PathBuf,
    current: Mutex<Option<(Pem, Client)>>,
}

#[derive(PartialEq, Eq)]
struct Pem {
    certificate: String,
    key: String,
    roots: String,
}

impl Cluster {
    /// `pki`: a folder with `tls.pem`, `tls.key` and `ca.pem`, looked at before each call, for they are renewed.
    pub fn new(endpoints: Vec<String>, pki: PathBuf) -> Cluster {
        Cluster { endpoints, pki, current: Mutex::new(None) }
    }

    pub async fn nodes(&self) -> Result<Vec<v1::ClusterNode>, ClusterError> {
        let client = self.client()?;
        let list = client.call(|mut client| async move { client.list_nodes(v1::ListNodesRequest {}).await });
        Ok(list.await?.nodes)
    }

    /// `None`: there is no such volume.
    pub async fn volume(&self, volume_id: &str) -> Result<Option<v1::Volume>, ClusterError> {
        let request = v1::GetVolumeRequest { volume: volume_id.to_owned() };
        let client = self.client()?;
        let get = client.call(|mut client| {
            let request = request.clone();
            async move { client.get_volume(request).await }
        });
        match get.await {
            Ok(response) => Ok(response.volume),
            Err(error) if error.reason() == "UnknownVolume" => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The epoch in which the machine has the volume from now on, or had it before.
    pub async fn attach(&self, volume_id: &str, holder: &str) -> Result<u64, ClusterError> {
        let (volume_id, holder) = (volume_id.to_owned(), holder.to_owned());
        let request = v1::AttachVolumeRequest { volume_id: volume_id.clone(), holder, take_over: false };
        let client = self.client()?;
        let attach = client.call_volume(&volume_id, |mut client| {
            let request = request.clone();
            async move { client.attach_volume(request).await }
        });
        Ok(attach.await?.epoch)
    }

    /// Ends an attachment: nothing that is still sent in its epoch has an effect any more.
    pub async fn detach(&self, volume_id: &str, epoch: u64) -> Result<(), ClusterError> {
        let request = v1::DetachVolumeRequest { volume_id: volume_id.to_owned(), epoch };
        let client = self.client()?;
        let detach = client.call_volume(volume_id, |mut client| {
            let request = request.clone();
            async move { client.detach_volume(request).await }
        });
        detach.await?;
        Ok(())
    }

    fn client(&self) -> Result<Client, ClusterError> {
        let pem = Pem {
            certificate: read(&self.pki.join("tls.pem"))?,
            key: read(&self.pki.join("tls.key"))?,
            roots: read(&self.pki.join("ca.pem"))?,
        };
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, client)) = current.as_ref().filter(|(used, _)| *used == pem) {
            return Ok(client.clone());
        }
        let tls = holdfast_cluster_client::tls_from_pem(&pem.certificate, &pem.key, &pem.roots)?;
        let client = Client::new(self.endpoints.clone(), tls);
        *current = Some((pem, client.clone()));
        Ok(client)
    }
}

fn read(path: &Path) -> Result<String, ClusterError> {
    let failed = |source| ClusterError::File { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > PEM_BYTES_MAX {
        return Err(failed(io::Error::other("it is too long")));
    }
    fs::read_to_string(path).map_err(failed)
}
