//! `holdfast demo`: three nodes in a temporary folder, a volume, its leader killed while data is written, every byte read back.
//!
//! Nothing is staged: the nodes and the agent are the processes that `dev up` and `attach` start, the data goes through
//! the NBD socket that any NBD client could use, and the leader dies by SIGKILL.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use holdfast_api::v1;
use serde_json::json;

use crate::args::Demo;
use crate::client::{Cluster, block_on};
use crate::dev::supervisor::{Options, Supervisor};
use crate::dev::{found, layout::ClusterFile};
use crate::nbd_client::NbdClient;
use crate::volume;

const NODES: usize = 3;
/// One write of the data set.
const CHUNK_BYTES: u64 = 64 << 10;
/// How long a single request may take before the demo calls it a failure.
const REQUEST_WITHIN: Duration = Duration::from_secs(20);
/// For the dead node to come back and catch up.
const HEAL_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(20);
const AGENT: &str = "demo";

pub fn run(options: Demo) -> Result<()> {
    let began = Instant::now();
    let folder = tempfile::Builder::new().prefix("holdfast-demo-").tempdir().context("a temporary folder")?;
    let dir = folder.path().canonicalize()?;
    let result = block_on(demo(&dir, options.data << 20, began));
    if options.keep {
        println!("kept: {}", folder.keep().display());
    }
    result
}

fn say(began: Instant, text: &str) {
    println!("{:5.1} s  {text}", began.elapsed().as_secs_f64());
}

async fn demo(dir: &Path, data_bytes: u64, began: Instant) -> Result<()> {
    say(began, &format!("starting {NODES} storage nodes in {}", dir.display()));
    let file = found::prepare(dir, NODES)?;
    let disk_bytes = (512 << 20) + 4 * data_bytes;
    let options = Options { dir: dir.to_owned(), restart: true, disk_bytes, device_fault: None };
    let supervisor = Supervisor::start(options, file).await?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(supervisor.run_until(async move {
        let _ = stopped.await;
    }));
    let result = tokio::select! {
        result = scenes(dir, data_bytes, began) => result,
        _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted")),
    };
    let agent = volume::call_agent(dir, AGENT, json!({ "command": "shutdown" }));
    let _ = stop.send(());
    let ended = running.await.context("the supervisor")?;
    result.and(agent.map(|_| ())).and(ended)?;
    say(began, "all processes ended, everything removed: done");
    Ok(())
}

async fn scenes(dir: &Path, data_bytes: u64, began: Instant) -> Result<()> {
    let cluster = Cluster::open(dir)?;
    found::found(&cluster).await?;
    say(began, "the nodes have formed a cluster of their own: no etcd, no Kubernetes, mutual TLS everywhere");

    let created = volume::create(&cluster, "demo", 2 * data_bytes, 3, 4096).await?;
    let nodes: Vec<&str> = created.replicas.iter().map(|replica| replica.node_name.as_str()).collect();
    say(began, &format!("volume demo: {} MiB, copies on {}", created.size_bytes >> 20, nodes.join(", ")));

    let socket = dir.join("demo.sock");
    let (owned, path) = (dir.to_owned(), socket.clone());
    let blocking = tokio::task::spawn_blocking(move || volume::attach_to(&owned, &created, &path, false, AGENT));
    blocking.await??;
    say(began, "attached as an NBD device on a Unix socket (no kernel device: the demo reads and writes blocks)");

    let writer = Writer::start(socket, data_bytes);
    writer.wait_for(data_bytes / 2)?;
    let leader = leader_of(&cluster).await?;
    let pid = pid_of(dir, &leader)?;
    say(began, &format!("{} MiB written; killing {leader}, which leads the volume (SIGKILL {pid})", data_bytes >> 21));
    // SAFETY: plain kill(2) of a process that this demo started.
    ensure!(unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) } == 0, "{leader} could not be killed");

    let mut client = writer.finish(began)?;
    let healed = heal(&cluster, &leader).await?;
    say(began, &format!("{leader} is back as {}, its copy is up to date again", healed.role));
    if let Some(entries) = healed.caught_up_entries {
        say(began, &format!("it was brought up by the log: {entries} entries, nothing else was copied"));
    }

    let verified = tokio::task::spawn_blocking(move || verify(&mut client, data_bytes)).await??;
    say(began, &format!("every byte read back and compared: {} MiB, no difference", verified >> 20));
    Ok(())
}

/// Writes the data set in the background, one request at a time, and notes the longest wait.
struct Writer {
    written: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Result<(NbdClient, Duration)>>,
}

impl Writer {
    fn start(socket: PathBuf, data_bytes: u64) -> Writer {
        let written = Arc::new(AtomicU64::new(0));
        let ended = Arc::new(AtomicBool::new(false));
        let (progress, end) = (Arc::clone(&written), Arc::clone(&ended));
        let thread = std::thread::spawn(move || {
            let result = write_all(&socket, data_bytes, &progress);
            end.store(true, Ordering::Release);
            result
        });
        Writer { written, ended, thread }
    }

    fn wait_for(&self, bytes: u64) -> Result<()> {
        while self.written.load(Ordering::Relaxed) < bytes {
            ensure!(!self.ended.load(Ordering::Acquire), "writing ended early");
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    fn finish(self, began: Instant) -> Result<NbdClient> {
        let result = self.thread.join().map_err(|_| anyhow!("the writer panicked"))?;
        let (client, longest) = result?;
        say(
            began,
            &format!("writing went on with another leader; the longest wait of a write: {} ms", longest.as_millis()),
        );
        Ok(client)
    }
}

fn write_all(socket: &Path, data_bytes: u64, progress: &AtomicU64) -> Result<(NbdClient, Duration)> {
    let mut client = NbdClient::connect(socket, "", REQUEST_WITHIN)?;
    ensure!(client.size_bytes() >= data_bytes, "the device is smaller than the data set");
    let mut longest = Duration::ZERO;
    for number in 0..data_bytes / CHUNK_BYTES {
        let asked = Instant::now();
        client.write(number * CHUNK_BYTES, &chunk(number))?;
        longest = longest.max(asked.elapsed());
        progress.fetch_add(CHUNK_BYTES, Ordering::Relaxed);
    }
    client.flush()?;
    Ok((client, longest))
}

/// Reads everything back, and the half that was never written, which must be zeroes.
fn verify(client: &mut NbdClient, data_bytes: u64) -> Result<u64> {
    for number in 0..data_bytes / CHUNK_BYTES {
        let found = client.read(number * CHUNK_BYTES, CHUNK_BYTES as u32)?;
        ensure!(found == chunk(number), "the data at {} differs from what was written", number * CHUNK_BYTES);
    }
    let beyond = client.read(data_bytes, CHUNK_BYTES as u32)?;
    ensure!(beyond.iter().all(|byte| *byte == 0), "what was never written is not zero");
    Ok(data_bytes)
}

/// Content that differs in every block and cannot be guessed from its neighbours: xorshift from the chunk's number.
fn chunk(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..CHUNK_BYTES / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

async fn leader_of(cluster: &Cluster) -> Result<String> {
    let view = volume::get(cluster, "demo").await?;
    let leader = view.replicas.iter().find(|replica| replica.node_id == view.leader_node_id);
    Ok(leader.context("the volume has no leader")?.node_name.clone())
}

fn pid_of(dir: &Path, node: &str) -> Result<u32> {
    let file = ClusterFile::load(dir)?;
    let entry = file.nodes.iter().find(|entry| entry.name == node).context("a leader outside the cluster")?;
    ensure!(entry.pid != 0, "{node} does not run");
    Ok(entry.pid)
}

struct Healed {
    role: &'static str,
    caught_up_entries: Option<u64>,
}

/// Waits until the node's copy has everything its leader has; counts what it lacked when it came back.
async fn heal(cluster: &Cluster, node: &str) -> Result<Healed> {
    let until = Instant::now() + HEAL_WITHIN;
    let mut lacked = None;
    let mut seen = String::from("nobody answers");
    loop {
        if let Ok(view) = volume::get(cluster, "demo").await {
            let highest = view.replicas.iter().map(|replica| replica.flushed_index).max().unwrap_or(0);
            let copy = view.replicas.iter().find(|replica| replica.node_name == node).context("the copy is gone")?;
            let answers = copy.role() != v1::ReplicaRole::Unspecified;
            let reasons = view.replicas.iter().filter_map(|replica| replica.reason.as_ref());
            let reasons: Vec<&str> = reasons.map(|reason| reason.message.as_str()).collect();
            seen = format!("applied {} of {highest}; {}", copy.applied_index, reasons.join("; "));
            if answers && lacked.is_none() {
                lacked = Some(highest - copy.flushed_index);
            }
            if answers && copy.healthy && copy.applied_index == highest && view.health() == v1::VolumeHealth::Healthy {
                let role = if copy.role() == v1::ReplicaRole::Leader { "leader" } else { "follower" };
                return Ok(Healed { role, caught_up_entries: lacked.filter(|entries| *entries > 0) });
            }
        }
        if Instant::now() >= until {
            bail!("{node} is not whole again within {} s: {seen}", HEAL_WITHIN.as_secs());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
