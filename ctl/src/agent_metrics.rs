//! What an agent tells probes and scrapers: what its own control socket says, from a thread that does no I/O for anybody.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use holdfast_agent::{CONTROL_VERSION, VolumeState, VolumeStatus};
use holdfast_http::{Labels, Page, Source};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, UnixStream};

/// The agent's loop answers a status within a turn, which takes milliseconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// A thousand volumes with sixteen nodes each take about three million bytes.
const ANSWER_BYTES_MAX: u64 = 8 << 20;

struct AgentSource {
    control: PathBuf,
    /// It has answered before. Until then it enrols, or starts; where it cannot, its process ends by itself.
    began: AtomicBool,
}

#[derive(Deserialize)]
struct Answer {
    result: Option<Status>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Status {
    volumes: Vec<VolumeStatus>,
}

/// Serves in the background for the life of the process.
///
/// # Errors
/// The address cannot be listened on.
pub fn begin(address: SocketAddr, control: PathBuf) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let listener = runtime.block_on(TcpListener::bind(address)).with_context(|| format!("listen on {address}"))?;
    let source = Arc::new(AgentSource { control, began: AtomicBool::new(false) });
    std::thread::Builder::new()
        .name("http".into())
        .spawn(move || runtime.block_on(holdfast_http::serve(listener, source)))
        .context("start a thread")?;
    Ok(())
}

impl AgentSource {
    async fn status(&self) -> Result<Vec<VolumeStatus>> {
        let asked = async {
            let mut stream = UnixStream::connect(&self.control).await?;
            let command = format!("{{\"version\":{CONTROL_VERSION},\"command\":\"status\"}}\n");
            stream.write_all(command.as_bytes()).await?;
            let mut line = String::new();
            BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut line).await?;
            ensure!(line.ends_with('\n'), "the agent hung up");
            let answer: Answer = serde_json::from_str(&line)?;
            match (answer.result, answer.error) {
                (Some(status), _) => Ok(status.volumes),
                (None, error) => bail!("the agent refuses: {}", error.unwrap_or_default()),
            }
        };
        tokio::time::timeout(ANSWER_WITHIN, asked).await.context("the agent does not answer")?
    }
}

impl Source for AgentSource {
    async fn health(&self) -> Result<(), String> {
        match self.status().await {
            Ok(_) => self.began.store(true, Ordering::Relaxed),
            Err(error) if self.began.load(Ordering::Relaxed) => return Err(format!("{error:#}")),
            Err(_) => {}
        }
        Ok(())
    }

    async fn metrics(&self) -> Page {
        match self.status().await {
            Ok(volumes) => page(&volumes),
            Err(_) => Page::new(),
        }
    }
}

fn page(volumes: &[VolumeStatus]) -> Page {
    let of = |volume: &VolumeStatus| -> Labels { vec![("volume", volume.volume.to_string())] };
    let mut page = Page::new();
    let build = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
    page.gauge("holdfast_agent_build_info", "The agent's version; always 1", [(build, 1.0)]);
    page.gauge("holdfast_agent_volumes", "Volumes of this machine", [(Labels::new(), volumes.len() as f64)]);
    let states = volumes.iter().flat_map(|volume| {
        STATES.iter().map(move |(state, name)| {
            let mut labels = of(volume);
            labels.push(("state", (*name).to_owned()));
            (labels, f64::from(u8::from(volume.state == *state)))
        })
    });
    page.gauge("holdfast_agent_volume_state", "1 for the state that the volume is in", states);
    type Gauge = (&'static str, &'static str, fn(&VolumeStatus) -> f64);
    let gauges: [Gauge; 5] = [
        ("holdfast_agent_outstanding_requests", "Requests without an answer", |v| v.outstanding as f64),
        ("holdfast_agent_waiting_seconds", "For how long the oldest of them waits", |v| v.waiting_ms as f64 / 1e3),
        ("holdfast_agent_longest_wait_seconds", "Longest time without an answer while requests waited", |v| {
            v.longest_gap_ms as f64 / 1e3
        }),
        ("holdfast_agent_nodes_connected", "Nodes of the volume that are connected", |v| {
            v.nodes.iter().filter(|node| node.connected).count() as f64
        }),
        ("holdfast_agent_has_leader", "Whether the volume's leader is known", |v| {
            f64::from(u8::from(v.leader.is_some()))
        }),
    ];
    for (name, help, value) in gauges {
        page.gauge(name, help, volumes.iter().map(|volume| (of(volume), value(volume))));
    }
    type Counter = (&'static str, &'static str, fn(&VolumeStatus) -> u64);
    let counters: [Counter; 3] = [
        ("holdfast_agent_requests", "Requests taken from the device's users", |v| v.requests),
        ("holdfast_agent_read_bytes", "Read for them", |v| v.read_bytes),
        ("holdfast_agent_written_bytes", "Written for them", |v| v.written_bytes),
    ];
    for (name, help, value) in counters {
        page.counter(name, help, volumes.iter().map(|volume| (of(volume), value(volume))));
    }
    page
}

const STATES: [(VolumeState, &str); 6] = [
    (VolumeState::Attaching, "attaching"),
    (VolumeState::Attached, "attached"),
    (VolumeState::Detaching, "detaching"),
    (VolumeState::Fenced, "fenced"),
    (VolumeState::Refused, "refused"),
    (VolumeState::Failed, "failed"),
];
