//! Who trusts whom, and certificates that are replaced while everything runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, SystemTime};

use holdfast_transport::pki::{Authority, Validity};
use holdfast_transport::{PeerIdentity, PeerRole};

use crate::harness::{Cluster, holdfast, signal, wait_for};
use crate::refusals::refused;

/// A folder that leads to our nodes with certificates of theirs, and trusts the nodes of `trusted`.
fn stranger(dir: &Path, ours: &Cluster, theirs: &Cluster, trusted: &Cluster) -> PathBuf {
    fs::create_dir_all(dir.join("pki")).expect("a folder");
    fs::copy(ours.dir().join("cluster.json"), dir.join("cluster.json")).expect("copied");
    for (file, from) in [("ca.pem", trusted), ("admin.pem", theirs), ("admin.key", theirs)] {
        fs::copy(from.dir().join("pki").join(file), dir.join("pki").join(file)).expect("copied");
    }
    dir.to_owned()
}

fn validity() -> Validity {
    let now = SystemTime::now();
    Validity { not_before: now - Duration::from_secs(60), not_after: now + Duration::from_secs(3600) }
}

fn run(dir: &Path, verb: &[&str]) -> Output {
    holdfast().arg("--cluster").arg(dir).args(verb).output().expect("holdfast runs")
}

#[test]
fn certificates_of_another_authority_reach_nobody() {
    let (ours, theirs) = (Cluster::start(&[]), Cluster::start(&["--nodes", "1"]));
    let mixed = tempfile::tempdir().expect("a temporary folder");
    let folder = |name: &str, trusted: &Cluster| stranger(&mixed.path().join(name), &ours, &theirs, trusted);
    let create = ["volume", "create", "v", "--size", "64Mi"];
    // One that does not trust our nodes, one that our nodes do not trust.
    let (distrusts, distrusted) = (folder("distrusts", &theirs), folder("distrusted", &ours));
    refused(&run(&distrusts, &create), "UnknownIssuer");
    refused(&run(&distrusted, &create), "does not accept the certificate");
    assert_eq!(ours.json(&["volume", "list", "--json"]).as_array().map(Vec::len), Some(0), "nothing was made");

    let status = |dir: &Path| run(dir, &["status"]);
    refused(&status(mixed.path()), "no development cluster here");
    let newer = ours.file().to_string().replace("\"version\":1", "\"version\":9");
    fs::write(distrusted.join("cluster.json"), newer).expect("written");
    refused(&status(&distrusted), "written by another release");
    fs::write(distrusted.join("cluster.json"), "{").expect("written");
    refused(&status(&distrusted), "cannot be read");
}

#[test]
fn replaced_certificates_count_without_a_restart() {
    let (ours, theirs) = (Cluster::start(&[]), Cluster::start(&["--nodes", "1"]));
    ours.must(&["volume", "create", "v", "--size", "64Mi"]);
    ours.attach("v", "local", &[]);
    // Below ours, so that its agent ends with the cluster.
    let folder = stranger(&ours.dir().join("stranger"), &ours, &theirs, &ours);
    refused(&run(&folder, &["status"]), "does not accept the certificate");

    // As when an authority is replaced: for a while both are trusted.
    let pids: Vec<u32> = ours.nodes().iter().map(|node| ours.pid(node)).collect();
    let (pki, their_pki) = (ours.dir().join("pki"), theirs.dir().join("pki"));
    let authority = Authority::load(&their_pki.join("ca.pem"), &their_pki.join("ca.key")).expect("an authority");
    let bundle = [&pki, &their_pki].map(|pki| fs::read_to_string(pki.join("ca.pem")).expect("a certificate"));
    fs::write(pki.join("ca.pem"), "half a fi").expect("written");
    pids.iter().for_each(|pid| signal(*pid, libc::SIGHUP));
    wait_for("the nodes say so", || ours.log("node-0").contains("cannot be used").then_some(()));
    fs::write(pki.join("ca.pem"), bundle.concat()).expect("written");
    pids.iter().for_each(|pid| signal(*pid, libc::SIGHUP));
    wait_for("the nodes trust both", || run(&folder, &["status"]).status.success().then_some(()));

    // And shows it: a node whose certificate the other authority has issued, to nodes and agents that run on.
    let file = ours.file();
    let id = file["nodes"][0]["id"].as_str().expect("an identifier").replace('-', "");
    let peer = PeerIdentity { role: PeerRole::Node, id: u128::from_str_radix(&id, 16).expect("an identifier") };
    let issued = authority.issue(peer, validity()).expect("a certificate");
    issued.save(&pki.join("node-0.pem"), &pki.join("node-0.key")).expect("saved");
    signal(pids[0], libc::SIGHUP);
    wait_for("the agent trusts both", || ours.agent_log("local").contains("were replaced").then_some(()));
    signal(pids[0], libc::SIGKILL);
    ours.wait_restart("node-0", pids[0]);
    ours.wait_healthy("v", "node-0");
    wait_for("the agent connects to it", || {
        let nodes = ours.attachment("local")["nodes"].as_array()?.clone();
        nodes.iter().all(|node| node["connected"] == true).then_some(())
    });
    ours.must(&["detach", "v"]);

    // The data port too: an agent of that authority.
    let agent = authority.issue(PeerIdentity { role: PeerRole::Agent, id: 77 }, validity()).expect("a certificate");
    let files = ["pem", "key"].map(|suffix| folder.join("pki").join(format!("agent-local.{suffix}")));
    agent.save(&files[0], &files[1]).expect("saved");
    fs::write(folder.join("pki/ca.pem"), bundle.concat()).expect("written");
    let socket = folder.join("v.nbd");
    let output = run(&folder, &["attach", "v", "--nbd-socket", socket.to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(run(&folder, &["detach", "v"]).status.success());
    assert_eq!([1, 2].map(|node| ours.pid(&format!("node-{node}"))), pids[1..], "nobody else was restarted");
}
