//! Storage nodes as plain processes: what kubelet would start, from the StatefulSet's arguments and the Secret's files.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Container, Secret};
use kube::Api;

use crate::servers::{NAMESPACE, Process, Servers, address, start};
use crate::wait::until;

/// A pod of a StorageCluster that is to run.
#[derive(Clone, Debug)]
pub struct Member {
    pub cluster: &'static str,
    pub group: &'static str,
    pub ordinal: u32,
    /// Of its address.
    pub index: u32,
}

impl Member {
    pub fn name(&self) -> String {
        format!("{}-{}-{}", self.cluster, self.group, self.ordinal)
    }

    pub fn host(&self) -> (String, Ipv4Addr) {
        (format!("{}.{}-nodes.{NAMESPACE}.svc", self.name(), self.cluster), address(self.index))
    }
}

/// Starts the member as its StatefulSet says, with the certificates that are in the Secret now.
pub async fn run(servers: &Servers, member: &Member) -> Process {
    let sets: Api<StatefulSet> = Api::namespaced(servers.client.clone(), NAMESPACE);
    let set = until("the StatefulSet is there", async || {
        sets.get(&format!("{}-{}", member.cluster, member.group)).await.map_err(|error| error.to_string())
    })
    .await;
    let folder = servers.folder.path().join(member.name());
    write_certificates(servers, member, &folder.join("tls")).await;
    fs::create_dir_all(folder.join("disk")).unwrap();
    let pod = set.spec.template.spec.unwrap();
    let mut command = servers.with_names(&program());
    command.args(arguments(&pod.containers[0], member, &folder));
    start(&folder, "log", &mut command)
}

/// As kubelet brings a changed Secret to pods: waits until every process uses what it says now.
pub async fn renew(servers: &Servers, members: &[Member]) {
    let replaced = |member: &Member| {
        let log = fs::read_to_string(servers.folder.path().join(member.name()).join("log.log")).unwrap();
        log.matches("the certificates were replaced").count()
    };
    let before: Vec<usize> = members.iter().map(replaced).collect();
    for member in members {
        write_certificates(servers, member, &servers.folder.path().join(member.name()).join("tls")).await;
    }
    until("every storage node uses the new certificates", async || {
        let now: Vec<usize> = members.iter().map(replaced).collect();
        if now.iter().zip(&before).all(|(now, before)| now > before) {
            Ok(())
        } else {
            Err(format!("{before:?} {now:?}"))
        }
    })
    .await;
}

/// As kubelet puts a Secret into a pod.
async fn write_certificates(servers: &Servers, member: &Member, folder: &Path) {
    let secrets: Api<Secret> = Api::namespaced(servers.client.clone(), NAMESPACE);
    let key = format!("{}.key", member.name());
    let files = until("the member has a certificate", async || {
        let name = format!("{}-nodes-tls", member.cluster);
        let secret = secrets.get(&name).await.map_err(|error| error.to_string())?;
        secret.data.filter(|data| data.contains_key(&key)).ok_or_else(|| format!("{name} has no {key}"))
    })
    .await;
    fs::create_dir_all(folder).unwrap();
    for (name, text) in files {
        fs::write(folder.join(name), text.0).unwrap();
    }
}

/// The arguments, with folders and addresses of this machine in place of those of the pod.
fn arguments(container: &Container, member: &Member, folder: &Path) -> Vec<String> {
    let zone = container.env.iter().flatten().find(|variable| variable.name == "ZONE");
    let zone = zone.and_then(|variable| variable.value.clone()).unwrap_or_default();
    let path = |name: &str| folder.join(name).display().to_string();
    let replaced = |argument: &String| match argument.split_once('=') {
        Some(("--dir", _)) => format!("--dir={}", path("disk")),
        Some(("--device", _)) => format!("--device={}", path("disk/disk")),
        Some(("--pki", _)) => format!("--pki={}", path("tls")),
        Some(("--sockets", _)) => format!("--sockets={}", path("sockets")),
        _ => argument
            .replace("$(POD_NAME)", &member.name())
            .replace("$(ZONE)", &zone)
            .replace("0.0.0.0", &address(member.index).to_string()),
    };
    container.args.iter().flatten().map(replaced).collect()
}

/// Built beside the operator.
fn program() -> String {
    let program = Path::new(env!("CARGO_BIN_EXE_holdfast-operator")).with_file_name("holdfast");
    assert!(program.exists(), "build it first: cargo build --package holdfast-cli");
    program.display().to_string()
}
