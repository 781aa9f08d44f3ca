//! The node service on this machine: a real cluster, a real attach agent, real devices and mounts. Needs root.
//!
//! The test plays the controller, which takes the epochs, and kubelet, which calls. `holdfast` is looked for beside
//! this test's own folder: `cargo build -p holdfast-cli` makes it.

#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_api::v1;
use holdfast_cluster_client::Client;
use holdfast_csi::csi::identity_client::IdentityClient;
use holdfast_csi::csi::node_client::NodeClient;
use holdfast_csi::csi::volume_capability::access_mode::Mode;
use holdfast_csi::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use holdfast_csi::csi::{self, VolumeCapability};
use holdfast_csi::kubelet::InfoRequest;
use holdfast_csi::kubelet::registration_client::RegistrationClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// A test that would hang fails instead; no test depends on its length.
const HANG: Duration = Duration::from_secs(120);
const MACHINE: &str = "worker";

/// A cluster, an agent and a driver; its end leaves neither mounts nor devices nor processes.
struct World {
    directory: tempfile::TempDir,
    cluster: PathBuf,
    kubelet: PathBuf,
    supervisor: Child,
    driver: Child,
    client: Client,
}

fn holdfast() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.parent().and_then(Path::parent).unwrap().join("holdfast");
    assert!(path.is_file(), "{} is missing: cargo build -p holdfast-cli", path.display());
    path
}

fn run(program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {arguments:?}: {error}", program.display());
    String::from_utf8(output.stdout).unwrap()
}

fn start_driver(kubelet: &Path, agent_socket: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast-csi"));
    command.args(["node", "--node-name", MACHINE, "--kubelet-dir"]).arg(kubelet);
    command.arg("--agent-socket").arg(agent_socket).stderr(Stdio::null()).spawn().unwrap()
}

async fn channel(socket: PathBuf) -> Channel {
    let until = Instant::now() + HANG;
    loop {
        let path = socket.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        match Endpoint::from_static("http://localhost").connect_with_connector(connector).await {
            Ok(channel) => return channel,
            Err(error) => assert!(Instant::now() < until, "{}: {error}", socket.display()),
        }
        tokio::task::yield_now().await;
    }
}

impl World {
    async fn new() -> World {
        let directory = tempfile::tempdir().unwrap();
        let (cluster, kubelet) = (directory.path().join("c"), directory.path().join("kubelet"));
        let mut supervisor = Command::new(holdfast())
            .args(["dev", "up", "--nodes", "3", "--disk-size", "4GiB", "--dir"])
            .arg(&cluster)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(supervisor.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("cluster of 3 nodes is up"), "{line}");
        let cli =
            |arguments: &[&str]| run(&holdfast(), &[&["--cluster", cluster.to_str().unwrap()], arguments].concat());
        // The command line makes the agent's certificate and starts it.
        let socket = directory.path().join("nbd.sock");
        cli(&["volume", "create", "first", "--size", "64Mi"]);
        cli(&["attach", "first", "--nbd-socket", socket.to_str().unwrap(), "--agent", MACHINE]);
        cli(&["detach", "first", "--agent", MACHINE]);
        let nodes: serde_json::Value = serde_json::from_str(&cli(&["node", "list", "--json"])).unwrap();
        let list = nodes.as_array().or_else(|| nodes["nodes"].as_array()).unwrap();
        let endpoints = list.iter().map(|node| node["api"].as_str().unwrap().to_owned()).collect();
        let pki = cluster.join("pki");
        let tls = holdfast_cluster_client::tls_from_files(
            &pki.join("admin.pem"),
            &pki.join("admin.key"),
            &pki.join("ca.pem"),
        );
        let driver = start_driver(&kubelet, &cluster.join(format!("agents/{MACHINE}/control.sock")));
        World { directory, cluster, kubelet, supervisor, driver, client: Client::new(endpoints, tls.unwrap()) }
    }

    fn cli(&self, arguments: &[&str]) -> String {
        run(&holdfast(), &[&["--cluster", self.cluster.to_str().unwrap()], arguments].concat())
    }

    async fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(channel(self.kubelet.join("plugins/csi.holdfast.dev/csi.sock")).await)
    }

    /// The driver is killed, as by the kernel, and comes again.
    fn restart_driver(&mut self) {
        self.driver.kill().unwrap();
        self.driver.wait().unwrap();
        self.driver = start_driver(&self.kubelet, &self.cluster.join(format!("agents/{MACHINE}/control.sock")));
    }

    /// Makes a volume and attaches it for this machine.
    async fn volume(&self, name: &str) -> Volume<'_> {
        self.cli(&["volume", "create", name, "--size", "512Mi", "--block", "4096"]);
        let mut volume = Volume { world: self, name: name.to_owned(), grant: BTreeMap::new() };
        volume.attach(MACHINE, false).await;
        volume
    }

    fn records(&self) -> usize {
        fs::read_dir(self.kubelet.join("plugins/csi.holdfast.dev/volumes")).unwrap().count()
    }

    fn mounts(&self) -> Vec<String> {
        let own = self.directory.path().to_str().unwrap();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|at| at.contains(own))
            .map(str::to_owned)
            .collect()
    }

    fn processes(&self) -> Vec<i32> {
        let own = self.directory.path().to_str().unwrap();
        let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let ours = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(own)
        };
        numbers.filter(ours).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        for target in self.mounts().iter().rev() {
            let _ = Command::new("umount").args(["-l", "--", target]).status();
        }
        for volume in ["fs", "moved", "raw", "grown"] {
            let _ = Command::new(holdfast())
                .arg("--cluster")
                .arg(&self.cluster)
                .args(["detach", volume, "--force", "--agent", MACHINE])
                .stderr(Stdio::null())
                .status();
        }
        // First the supervisor, which would start its nodes again.
        let _ = self.supervisor.kill();
        let _ = self.supervisor.wait();
        for pid in self.processes() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
        }
    }
}

struct Volume<'a> {
    world: &'a World,
    name: String,
    grant: BTreeMap<String, String>,
}

impl Volume<'_> {
    /// What `ControllerPublishVolume` does.
    async fn attach(&mut self, holder: &str, take_over: bool) {
        let request = v1::GetVolumeRequest { volume: self.name.clone() };
        let get = self.world.client.call(|mut client| {
            let request = request.clone();
            async move { client.get_volume(request).await }
        });
        let there = get.await.unwrap().volume.unwrap();
        let request =
            v1::AttachVolumeRequest { volume_id: there.volume_id.clone(), holder: holder.to_owned(), take_over };
        let attach = self.world.client.call_volume(&there.volume_id, |mut client| {
            let request = request.clone();
            async move { client.attach_volume(request).await }
        });
        let epoch = attach.await.unwrap().epoch;
        let nodes: Vec<serde_json::Value> = there
            .replicas
            .iter()
            .map(|replica| serde_json::json!({ "node": replica.node_id, "address": replica.peer_address }))
            .collect();
        self.grant = [
            ("volumeId".to_owned(), there.volume_id),
            ("epoch".to_owned(), epoch.to_string()),
            ("nodes".to_owned(), serde_json::Value::Array(nodes).to_string()),
        ]
        .into();
    }

    fn staging(&self) -> PathBuf {
        let staging = self.world.kubelet.join("staging").join(&self.name);
        fs::create_dir_all(&staging).unwrap();
        staging
    }

    /// Kubelet makes the parent of a target, the driver the target.
    fn target(&self, pod: &str) -> PathBuf {
        let folder = self.world.kubelet.join("pods").join(pod);
        fs::create_dir_all(&folder).unwrap();
        folder.join(&self.name)
    }

    async fn stage(&self, capability: &VolumeCapability) -> Result<(), Status> {
        let request = csi::NodeStageVolumeRequest {
            volume_id: self.name.clone(),
            publish_context: self.grant.clone(),
            staging_target_path: text(&self.staging()),
            volume_capability: Some(capability.clone()),
            ..Default::default()
        };
        self.world.node().await.node_stage_volume(request).await.map(drop)
    }

    async fn unstage(&self) -> Result<(), Status> {
        let request =
            csi::NodeUnstageVolumeRequest { volume_id: self.name.clone(), staging_target_path: text(&self.staging()) };
        self.world.node().await.node_unstage_volume(request).await.map(drop)
    }

    async fn publish(&self, pod: &str, capability: &VolumeCapability, readonly: bool) -> Result<PathBuf, Status> {
        let target = self.target(pod);
        let request = csi::NodePublishVolumeRequest {
            volume_id: self.name.clone(),
            publish_context: self.grant.clone(),
            staging_target_path: text(&self.staging()),
            target_path: text(&target),
            volume_capability: Some(capability.clone()),
            readonly,
            ..Default::default()
        };
        self.world.node().await.node_publish_volume(request).await.map(|_| target)
    }

    async fn unpublish(&self, pod: &str) -> Result<(), Status> {
        let target_path = text(&self.target(pod));
        let request = csi::NodeUnpublishVolumeRequest { volume_id: self.name.clone(), target_path };
        self.world.node().await.node_unpublish_volume(request).await.map(drop)
    }

    async fn health(&self) -> Vec<String> {
        let request = csi::NodeGetVolumeHealthRequest { volume_id: self.name.clone(), ..Default::default() };
        let health = self.world.node().await.node_get_volume_health(request).await.unwrap().into_inner();
        health.volume_health.unwrap().health_statuses.into_iter().map(|entry| entry.reason).collect()
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn file_system(name: &str, mode: Mode) -> VolumeCapability {
    let mount = MountVolume { fs_type: name.to_owned(), ..MountVolume::default() };
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(mount)),
    }
}

fn block() -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

fn code(result: Result<impl Sized, Status>) -> Code {
    result.err().map_or(Code::Ok, |status| status.code())
}

#[tokio::test]
async fn volumes_come_to_pods_and_go_and_keep_what_was_written_needs_root_needs_fuse() {
    let mut world = World::new().await;
    registers(&world).await;
    a_file_system(&world).await;
    world.restart_driver();
    a_fenced_device_is_replaced(&world).await;
    a_raw_device(&world).await;
    a_file_system_grows(&world).await;
    assert_eq!(world.records(), 0, "nothing is staged any more");
    assert!(world.mounts().is_empty(), "{:?}", world.mounts());
}

async fn registers(world: &World) {
    let socket = world.kubelet.join("plugins_registry/csi.holdfast.dev-reg.sock");
    let mut registration = RegistrationClient::new(channel(socket).await);
    let info = registration.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", "csi.holdfast.dev"));
    let mut identity = IdentityClient::new(channel(info.endpoint.into()).await);
    assert_eq!(identity.probe(csi::ProbeRequest {}).await.unwrap().into_inner().ready, Some(true));
    let info = world.node().await.node_get_info(csi::NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.node_id, MACHINE);
    assert_eq!(info.accessible_topology.unwrap().segments["topology.holdfast.dev/node"], MACHINE);
}

async fn a_file_system(world: &World) {
    let (many, one) =
        (file_system("ext4", Mode::SingleNodeMultiWriter), file_system("ext4", Mode::SingleNodeSingleWriter));
    let volume = world.volume("fs").await;
    assert_eq!(code(volume.publish("a", &many, false).await), Code::FailedPrecondition, "it is not staged");
    volume.stage(&many).await.unwrap();
    volume.stage(&many).await.unwrap();
    let target = volume.publish("a", &many, false).await.unwrap();
    assert_eq!(volume.publish("a", &many, false).await.unwrap(), target);
    fs::write(target.join("file"), "kept").unwrap();
    let reader = volume.publish("b", &many, true).await.unwrap();
    assert_eq!(fs::read_to_string(reader.join("file")).unwrap(), "kept");
    assert_eq!(fs::write(reader.join("file"), "").unwrap_err().raw_os_error(), Some(30), "EROFS");
    assert_eq!(code(volume.publish("b", &many, false).await), Code::AlreadyExists);
    assert_eq!(code(volume.publish("c", &one, false).await), Code::FailedPrecondition, "one place only");
    assert_eq!(volume.health().await, [""; 0]);
    let stats = |path: &Path| {
        let volume_path = text(path);
        csi::NodeGetVolumeStatsRequest { volume_id: "fs".into(), volume_path, ..Default::default() }
    };
    let usage = world.node().await.node_get_volume_stats(stats(&target)).await.unwrap().into_inner().usage;
    assert!(usage.len() == 2 && usage[0].total > 400 << 20 && usage[0].available > 0, "{usage:?}");
    for place in ["/elsewhere", "some/path"] {
        assert_eq!(code(world.node().await.node_get_volume_stats(stats(Path::new(place))).await), Code::NotFound);
    }
    for pod in ["a", "b", "b", "c"] {
        volume.unpublish(pod).await.unwrap();
        assert!(!volume.target(pod).exists(), "the driver removes what it made");
    }
    volume.unstage().await.unwrap();
    volume.unstage().await.unwrap();
    // A pod that starts again on the same machine: no new attachment in between.
    volume.stage(&one).await.unwrap();
    let target = volume.publish("c", &one, false).await.unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "kept");
    let other = volume.stage(&file_system("xfs", Mode::SingleNodeWriter)).await;
    assert_eq!(code(other), Code::AlreadyExists, "it is mounted, as another");
    volume.unpublish("c").await.unwrap();
    volume.unstage().await.unwrap();
    let other = volume.stage(&file_system("xfs", Mode::SingleNodeWriter)).await;
    assert_eq!(code(other), Code::FailedPrecondition, "what it carries is not made anew");
    volume.unstage().await.unwrap();
}

async fn a_fenced_device_is_replaced(world: &World) {
    let capability = file_system("xfs", Mode::SingleNodeWriter);
    let mut volume = world.volume("moved").await;
    volume.stage(&capability).await.unwrap();
    let target = volume.publish("a", &capability, false).await.unwrap();
    fs::write(target.join("file"), "kept").unwrap();
    Command::new("sync").arg("-f").arg(&target).status().unwrap();
    let former = volume.grant.clone();
    volume.attach("elsewhere", true).await;
    volume.attach(MACHINE, true).await;
    assert!(volume.grant["epoch"].parse::<u64>().unwrap() > former["epoch"].parse::<u64>().unwrap() + 1);
    // The next pod of this machine: published, though kubelet stages nothing again.
    let next = volume.publish("b", &capability, false).await.unwrap();
    assert_eq!(fs::read_to_string(next.join("file")).unwrap(), "kept");
    fs::write(next.join("more"), "written").unwrap();
    let later = std::mem::replace(&mut volume.grant, former);
    assert_eq!(code(volume.stage(&capability).await), Code::FailedPrecondition, "the former epoch is over");
    volume.grant = later;
    for pod in ["a", "b"] {
        volume.unpublish(pod).await.unwrap();
    }
    volume.unstage().await.unwrap();
}

async fn a_raw_device(world: &World) {
    let volume = world.volume("raw").await;
    volume.stage(&block()).await.unwrap();
    let target = volume.publish("a", &block(), false).await.unwrap();
    assert!(fs::metadata(&target).unwrap().file_type().is_block_device());
    // kubelet asks for the device at another place than it had it published at.
    let elsewhere = target.with_extension("elsewhere");
    std::os::unix::fs::symlink(&target, &elsewhere).unwrap();
    for path in [&target, &elsewhere] {
        let stats =
            csi::NodeGetVolumeStatsRequest { volume_id: "raw".into(), volume_path: text(path), ..Default::default() };
        let usage = world.node().await.node_get_volume_stats(stats).await.unwrap().into_inner().usage;
        assert_eq!(usage[0].total, 512 << 20);
    }
    fs::remove_file(elsewhere).unwrap();
    let words = [0x5a; 4096];
    fs::OpenOptions::new()
        .write(true)
        .open(&target)
        .and_then(|mut file| std::io::Write::write_all(&mut file, &words))
        .unwrap();
    volume.unpublish("a").await.unwrap();
    volume.unstage().await.unwrap();
    let mounted = volume.stage(&file_system("ext4", Mode::SingleNodeWriter)).await;
    assert_eq!(code(mounted), Code::FailedPrecondition, "nobody makes a file system over it");
    volume.unstage().await.unwrap();
    volume.stage(&block()).await.unwrap();
    let target = volume.publish("a", &block(), false).await.unwrap();
    assert!(fs::read(&target).unwrap().starts_with(&words));
    volume.unpublish("a").await.unwrap();
    volume.unstage().await.unwrap();
}

async fn a_file_system_grows(world: &World) {
    let capability = file_system("xfs", Mode::SingleNodeWriter);
    let volume = world.volume("grown").await;
    volume.stage(&capability).await.unwrap();
    let target = volume.publish("a", &capability, false).await.unwrap();
    world.cli(&["volume", "resize", "grown", "--size", "1Gi"]);
    let request = csi::NodeExpandVolumeRequest {
        volume_id: "grown".into(),
        volume_path: text(&target),
        capacity_range: Some(csi::CapacityRange { required_bytes: 1 << 30, limit_bytes: 0 }),
        ..Default::default()
    };
    let grown = world.node().await.node_expand_volume(request).await.unwrap().into_inner();
    assert_eq!(grown.capacity_bytes, 1 << 30);
    let stats =
        csi::NodeGetVolumeStatsRequest { volume_id: "grown".into(), volume_path: text(&target), ..Default::default() };
    let usage = world.node().await.node_get_volume_stats(stats).await.unwrap().into_inner().usage;
    assert!(usage[0].total > 800 << 20, "{usage:?}");
    volume.unpublish("a").await.unwrap();
    volume.unstage().await.unwrap();
}
