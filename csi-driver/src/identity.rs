//! The identity service, of both modes.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::DRIVER;
use crate::csi::plugin_capability::{self, service, volume_expansion};
use crate::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse, identity_server,
};

/// Whether what a mode needs answers.
#[tonic::async_trait]
pub trait Ready: Send + Sync + 'static {
    async fn is_ready(&self) -> bool;
}

pub struct Identity {
    ready: Arc<dyn Ready>,
}

impl Identity {
    pub fn service(ready: Arc<dyn Ready>) -> identity_server::IdentityServer<Identity> {
        identity_server::IdentityServer::new(Identity { ready })
    }
}

#[tonic::async_trait]
impl identity_server::Identity for Identity {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: [].into(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let service =
            |kind: service::Type| plugin_capability::Type::Service(plugin_capability::Service { r#type: kind.into() });
        let online = volume_expansion::Type::Online.into();
        let capabilities = [
            service(service::Type::ControllerService),
            service(service::Type::VolumeAccessibilityConstraints),
            plugin_capability::Type::VolumeExpansion(plugin_capability::VolumeExpansion { r#type: online }),
        ];
        let capabilities = capabilities.into_iter().map(|kind| PluginCapability { r#type: Some(kind) }).collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    /// "Not ready" is an answer and no error: it passes without anybody's help.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(self.ready.is_ready().await) }))
    }
}
