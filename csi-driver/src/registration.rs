//! The driver tells kubelet that it is there, by kubelet's plugin registration v1.
//!
//! Kubelet watches a folder of sockets; on each new one it asks what is behind it, connects to the endpoint named, asks
//! for the node's information and tells the outcome. A socket that was removed and made again registers anew, so a
//! driver that starts unlinks what it finds.

use std::path::{Path, PathBuf};

use tonic::{Request, Response, Status};

use crate::DRIVER;
use crate::kubelet::registration_server::{Registration, RegistrationServer};
use crate::kubelet::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};

/// Version of CSI as kubelet's watcher knows it: only the major number is looked at.
const CSI_VERSION: &str = "1.0.0";

pub struct Registrar {
    endpoint: PathBuf,
}

impl Registrar {
    /// `endpoint`: the driver's own socket, by a path that kubelet can open.
    pub fn service(endpoint: &Path) -> RegistrationServer<Registrar> {
        RegistrationServer::new(Registrar { endpoint: endpoint.to_owned() })
    }
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".into(),
            name: DRIVER.into(),
            endpoint: self.endpoint.to_string_lossy().into_owned(),
            supported_versions: vec![CSI_VERSION.into()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            tracing::info!("kubelet has registered the driver");
        } else {
            // Kubelet tries again by itself.
            tracing::error!(error = status.error, "kubelet does not register the driver");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
