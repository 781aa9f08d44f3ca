//! What the operator is told at its start; the chart gives all of it by environment.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use holdfast_crds::ClusterRef;

#[derive(Clone, Debug, Parser)]
#[command(name = "holdfast-operator", version, about = "Keeps StorageClusters and Volumes as their objects ask")]
pub struct Settings {
    /// Image of every process that it starts, unless a StorageCluster names its own
    #[arg(long, env = "HOLDFAST_IMAGE")]
    pub image: String,
    #[arg(long, env = "HOLDFAST_IMAGE_PULL_POLICY", default_value = "IfNotPresent")]
    pub image_pull_policy: String,
    #[arg(long, env = "HOLDFAST_PROVISIONER_IMAGE")]
    pub provisioner_image: String,
    #[arg(long, env = "HOLDFAST_ATTACHER_IMAGE")]
    pub attacher_image: String,
    #[arg(long, env = "HOLDFAST_RESIZER_IMAGE")]
    pub resizer_image: String,
    /// The StorageCluster whose volumes pods get, NAMESPACE/NAME; default: the oldest one
    #[arg(long, env = "HOLDFAST_CSI_CLUSTER", value_parser = cluster_ref)]
    pub csi_cluster: Option<ClusterRef>,
    #[arg(long, env = "HOLDFAST_KUBELET_DIR", default_value = "/var/lib/kubelet")]
    pub kubelet_dir: String,
    /// Its own namespace: leases, and the service where agents enrol
    #[arg(long, env = "POD_NAMESPACE")]
    pub namespace: String,
    /// Its own name: who holds the lease
    #[arg(long, env = "POD_NAME")]
    pub pod_name: String,
    /// Where /healthz and /metrics are served
    #[arg(long, default_value = "0.0.0.0:7722")]
    pub http: SocketAddr,
    /// Where agents enrol
    #[arg(long, default_value = "0.0.0.0:7723")]
    pub enroll: SocketAddr,
    /// The service by which agents find it
    #[arg(long, env = "HOLDFAST_OPERATOR_SERVICE", default_value = "holdfast-operator")]
    pub service: String,
    /// A StorageCluster that is made where it is not there; the file may be absent
    #[arg(long, env = "HOLDFAST_DEFAULT_CLUSTER", default_value = "/etc/holdfast/cluster.yaml")]
    pub default_cluster: PathBuf,
}

fn cluster_ref(text: &str) -> Result<ClusterRef, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(ClusterRef { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => Err(format!("{text:?} is not NAMESPACE/NAME")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Settings::command().debug_assert();
        assert!(cluster_ref("a/b").is_ok());
        assert!(["", "a", "/b", "a/", "a/b/c"].into_iter().all(|text| cluster_ref(text).is_err()));
    }
}
