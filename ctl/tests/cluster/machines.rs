//! Volumes attached for machines by the control API, and the agents that serve them: nothing by themselves.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, SystemTime};

use holdfast_api::v1;
use holdfast_cluster_client::{CallError, Client, tls_from_files};
use holdfast_transport::pki::{Authority, Validity};
use serde_json::{Value, json};

use crate::harness::{Cluster, SOON, holdfast, wait_for};
use crate::model::Model;
use crate::nbd::EIO;
use crate::workload::{End, Workload, verify};

const BLOCKS: usize = 256;

/// The agent of a machine of some cluster, as it runs in a pod of its own.
struct Machine<'a> {
    cluster: &'a Cluster,
    name: &'static str,
    process: Child,
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl<'a> Machine<'a> {
    fn start(cluster: &'a Cluster, name: &'static str, id: u128) -> Machine<'a> {
        let pki = cluster.dir().join("pki");
        let authority = Authority::load(&pki.join("ca.pem"), &pki.join("ca.key")).expect("an authority");
        let now = SystemTime::now();
        let validity =
            Validity { not_before: now - Duration::from_secs(60), not_after: now + Duration::from_secs(3600) };
        let issued = authority.issue_node_agent(id, name, validity).expect("a certificate");
        let file = |suffix: &str| pki.join(format!("agent-{name}.{suffix}"));
        issued.save(&file("pem"), &file("key")).expect("saved");
        let dir = cluster.dir().join("agents").join(name);
        std::fs::create_dir_all(&dir).expect("a folder");
        let mut command = holdfast();
        command.args(["agent", "--holder", name]).arg("--dir").arg(&dir).arg("--pki").arg(&pki);
        let log = std::fs::File::create(dir.join("agent.log")).expect("a log file");
        let process = command.stdout(Stdio::null()).stderr(log).spawn().expect("the agent starts");
        let machine = Machine { cluster, name, process };
        let socket = dir.join("control.sock");
        wait_for("the agent listens", || UnixStream::connect(&socket).ok());
        machine
    }

    fn ask(&self, command: &Value) -> Value {
        let path = self.cluster.dir().join("agents").join(self.name).join("control.sock");
        let mut stream = UnixStream::connect(path).expect("the agent listens");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        writeln!(stream, "{command}").expect("the agent reads");
        let mut line = String::new();
        BufReader::new(stream.take(1 << 20)).read_line(&mut line).expect("the agent answers");
        serde_json::from_str(&line).expect("JSON")
    }

    fn attach(&self, volume: &v1::Volume, mode: Value) -> Value {
        let replicas = volume.replicas.iter();
        let nodes = replicas.map(|replica| json!({ "node": replica.node_id, "address": replica.peer_address }));
        let spec = json!({
            "volume": volume.volume_id, "nodes": nodes.collect::<Vec<_>>(), "mode": mode,
            "nbd_socket": self.cluster.nbd_socket(self.name),
        });
        self.ask(&json!({ "version": 1, "command": "attach", "volume": spec, "wait_ms": 20_000 }))
    }

    fn resume(&self, volume: &v1::Volume, epoch: u64) -> Value {
        self.attach(volume, json!({ "resume": { "epoch": epoch } }))
    }
}

struct Api {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Api {
    fn new(cluster: &Cluster) -> Api {
        let file = cluster.file();
        let nodes = file["nodes"].as_array().expect("nodes").iter();
        let endpoints = nodes.map(|node| node["api"].as_str().expect("an address").to_owned()).collect();
        let file = |name: &str| cluster.dir().join("pki").join(name);
        let tls = tls_from_files(&file("admin.pem"), &file("admin.key"), &file("ca.pem")).expect("certificates");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Api { runtime, client: Client::new(endpoints, tls) }
    }

    fn volume(&self, name: &str) -> v1::Volume {
        let request = v1::GetVolumeRequest { volume: name.into() };
        let answer = self.client.call(|mut cluster| {
            let request = request.clone();
            async move { cluster.get_volume(request).await }
        });
        self.runtime.block_on(answer).expect("an answer").volume.expect("a volume")
    }

    fn attach(&self, volume: &v1::Volume, holder: &str, take_over: bool) -> Result<(u64, bool), CallError> {
        let request = v1::AttachVolumeRequest { volume_id: volume.volume_id.clone(), holder: holder.into(), take_over };
        let answer = self.client.call_volume(&volume.volume_id, |mut node| {
            let request = request.clone();
            async move { node.attach_volume(request).await }
        });
        self.runtime.block_on(answer).map(|answer| (answer.epoch, answer.already))
    }

    fn detach(&self, volume: &v1::Volume, epoch: u64) -> Result<(), CallError> {
        let request = v1::DetachVolumeRequest { volume_id: volume.volume_id.clone(), epoch };
        let answer = self.client.call_volume(&volume.volume_id, |mut node| {
            let request = request.clone();
            async move { node.detach_volume(request).await }
        });
        self.runtime.block_on(answer).map(|_| ())
    }
}

#[test]
fn a_machines_agent_serves_what_was_attached_for_it_and_nothing_else() {
    let cluster = Cluster::start(&[]);
    cluster.must(&["volume", "create", "v", "--size", "64Mi"]);
    let api = Api::new(&cluster);
    let volume = api.volume("v");
    let (one, two) = (Machine::start(&cluster, "machine-1", 1), Machine::start(&cluster, "machine-2", 2));
    let refused = one.attach(&volume, json!("take-over"));
    assert_eq!(refused["error"]["code"], "refused", "{refused:#}");

    assert_eq!(api.attach(&volume, "machine-1", false).expect("attached"), (1, false));
    let refused = two.resume(&volume, 1);
    assert_eq!(refused["error"]["code"], "refused", "{refused:#}");
    assert!(refused["error"]["message"].as_str().is_some_and(|text| text.contains("machine-1")), "{refused:#}");
    let attached = one.resume(&volume, 1);
    assert_eq!(attached["result"]["state"], "attached", "{attached:#}");

    // Repeated after whatever was lost, it comes to the same epoch, also at another leader.
    let workload = Workload::start(&cluster.nbd_socket("machine-1"), Model::new(BLOCKS), 7);
    workload.wait_completed(20);
    let leader = cluster.leader("v");
    cluster.kill(&leader);
    assert_eq!(api.attach(&volume, "machine-1", true).expect("attached"), (1, true));
    let error = api.attach(&volume, "machine-2", false).expect_err("it is held");
    assert_eq!(error.reason(), "Held", "{error}");
    let outcome = workload.stop();
    assert_eq!(outcome.end, End::Stopped, "an attachment that is repeated disturbs nobody");
    let mut model = outcome.model;
    verify(&cluster.nbd_socket("machine-1"), &mut model);

    // The next machine's epoch ends the first one's, and a late detachment of the first one ends nothing.
    let workload = Workload::start(&cluster.nbd_socket("machine-1"), model, 8);
    workload.wait_completed(20);
    assert_eq!(api.attach(&volume, "machine-2", true).expect("attached"), (2, false));
    let outcome = workload.join();
    assert_eq!(outcome.end, End::Error(EIO));
    api.detach(&volume, 1).expect("it is over");
    let attached = two.resume(&volume, 2);
    assert_eq!(attached["result"]["state"], "attached", "{attached:#}");
    let over = one.resume(&volume, 1);
    assert_eq!(over["error"]["code"], "fenced", "{over:#}");
    assert_eq!(cluster.attachment("machine-1")["state"], "fenced");
    for _ in 0..2 {
        api.detach(&volume, 2).expect("detached");
    }
    assert_eq!(api.attach(&volume, "machine-1", false).expect("attached"), (3, false));
    let attached = one.resume(&volume, 3);
    assert_eq!(attached["result"]["epoch"], 3, "{attached:#}");
}
