//! `holdfast volume …`, `attach`, `detach` and the agent behind them.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_agent::{AgentConfig, AttachMode, CONTROL_VERSION, IdentityPaths, KeeperConfig, NodeAddress, VolumeSpec};
use holdfast_api::v1;
use serde_json::{Value, json};

use crate::agent_metrics;
use crate::args::{Agent, Attach, Detach, Format, Keeper, Volume, Where};
use crate::client::{Cluster, block_on};
use crate::dev::{found, layout::ClusterFile};
use crate::device;
use crate::enroll::{self, Enrolment};
use crate::show;

/// For an agent that was just started to listen.
const AGENT_WITHIN: Duration = Duration::from_secs(10);
/// What the agent may take for one command; it answers `pending` before that.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
const ANSWER_BYTES_MAX: u64 = 1 << 20;
const LOOK_EVERY: Duration = Duration::from_millis(10);

pub fn run(cluster: Where, verb: Volume) -> Result<()> {
    let cluster = show::open(cluster)?;
    match verb {
        Volume::Create { name, size, replicas, block, format } => {
            let volume = block_on(create(&cluster, &name, size, replicas, block))?;
            return show_changed(volume, format);
        }
        Volume::List(format) => {
            let volumes = block_on(show::all_volumes(&cluster))?;
            if format.json {
                return show::print_json(&Value::Array(volumes.iter().map(show::volume_json).collect()));
            }
            show::print_volumes(&volumes);
        }
        Volume::Get { name, format } => {
            let volume = block_on(get(&cluster, &name))?;
            if format.json {
                return show::print_json(&show::volume_json(&volume));
            }
            show::print_volume(&volume);
        }
        Volume::Resize { name, size, format } => {
            let request = v1::ResizeVolumeRequest { volume: name, size_bytes: size, expected_generation: 0 };
            let response = block_on(cluster.call(|mut client| {
                let request = request.clone();
                async move { client.resize_volume(request).await }
            }))?;
            let volume = response.volume.context("an answer without a volume")?;
            return show_changed(volume, format);
        }
        Volume::Set { name, replicas, format } => {
            let request = v1::SetVolumeReplicasRequest { volume: name, replicas, expected_generation: 0 };
            let response = block_on(cluster.call(|mut client| {
                let request = request.clone();
                async move { client.set_volume_replicas(request).await }
            }))?;
            let volume = response.volume.context("an answer without a volume")?;
            return show_changed(volume, format);
        }
        Volume::Delete { name } => {
            let volume = block_on(get(&cluster, &name))?;
            ensure!(
                volume.attached_to.is_empty(),
                "volume {name} is attached to {}; detach it first",
                volume.attached_to
            );
            let request = v1::DeleteVolumeRequest { volume: volume.volume_id, expected_generation: volume.generation };
            let response = block_on(cluster.call(|mut client| {
                let request = request.clone();
                async move { client.delete_volume(request).await }
            }))?;
            println!("{}", if response.gone { "deleted" } else { "deletion recorded; it goes on by itself" });
        }
    }
    Ok(())
}

/// As it is after a command.
fn show_changed(volume: v1::Volume, format: Format) -> Result<()> {
    if format.json {
        return show::print_json(&show::volume_json(&volume));
    }
    show::print_volumes(&[volume]);
    Ok(())
}

pub async fn create(cluster: &Cluster, name: &str, size: u64, replicas: u32, block: u32) -> Result<v1::Volume> {
    let request = v1::CreateVolumeRequest {
        name: name.to_owned(),
        size_bytes: size,
        logical_block_bytes: block,
        replicas,
        wait_ready: true,
        ..v1::CreateVolumeRequest::default()
    };
    let response = cluster.call(|mut client| {
        let request = request.clone();
        async move { client.create_volume(request).await }
    });
    response.await?.volume.context("an answer without a volume")
}

pub async fn get(cluster: &Cluster, name: &str) -> Result<v1::Volume> {
    let request = v1::GetVolumeRequest { volume: name.to_owned() };
    let response = cluster.call(|mut client| {
        let request = request.clone();
        async move { client.get_volume(request).await }
    });
    response.await?.volume.context("an answer without a volume")
}

fn agent_dir(cluster_dir: &Path, agent: &str) -> PathBuf {
    cluster_dir.join("agents").join(agent)
}

fn control_socket(cluster_dir: &Path, agent: &str) -> PathBuf {
    agent_dir(cluster_dir, agent).join("control.sock")
}

/// Attaches through this machine's agent, which is started where it does not run.
pub fn attach(cluster: Where, options: Attach) -> Result<()> {
    let dir = cluster.dir.context("which cluster? say --cluster DIR, the folder given to `dev up`")?.canonicalize()?;
    let cluster = Cluster::open(&dir)?;
    let volume = block_on(get(&cluster, &options.volume))?;
    let directory = options
        .how
        .mount
        .as_ref()
        .map(|directory| directory.canonicalize().with_context(|| format!("mount at {}", directory.display())));
    let directory = directory.transpose()?;
    let socket = options.how.nbd_socket.as_ref().map(std::path::absolute).transpose()?;
    let status = attach_as(&dir, &volume, socket.clone(), options.take_over, &options.agent)?;
    let shown = socket.map_or_else(|| device::device_of(&status), Ok)?;
    if let Some(directory) = &directory {
        let call = |command| call_agent(&dir, &options.agent, command);
        // Noted first: what is mounted must be found again by `detach`, whatever comes between.
        let note = mount_note(&dir, &options.agent, &volume.volume_id);
        std::fs::write(&note, directory.as_os_str().as_encoded_bytes()).context("note the mount")?;
        device::mount(&status, directory, options.fs, call)?;
    }
    if options.format.json {
        return show::print_json(&status);
    }
    println!("{}", shown.display());
    Ok(())
}

/// Holds the directory at which `attach --mount` has mounted a volume.
fn mount_note(cluster_dir: &Path, agent: &str, volume: &str) -> PathBuf {
    agent_dir(cluster_dir, agent).join(format!("{volume}.mount"))
}

pub fn attach_to(dir: &Path, volume: &v1::Volume, nbd_socket: &Path, take_over: bool, agent: &str) -> Result<Value> {
    attach_as(dir, volume, Some(std::path::absolute(nbd_socket)?), take_over, agent)
}

/// On the socket, or as a device where there is none.
fn attach_as(
    dir: &Path,
    volume: &v1::Volume,
    nbd_socket: Option<PathBuf>,
    take_over: bool,
    agent: &str,
) -> Result<Value> {
    ensure_agent(dir, agent)?;
    let mut nodes = Vec::new();
    for replica in &volume.replicas {
        nodes.push(NodeAddress { node: replica.node_id.parse()?, address: replica.peer_address.parse()? });
    }
    let spec = VolumeSpec {
        volume: volume.volume_id.parse()?,
        nodes,
        mode: if take_over { AttachMode::TakeOver } else { AttachMode::Attach },
        device: nbd_socket.is_none(),
        nbd_socket,
        unavailable_after_ms: None,
    };
    call_agent(dir, agent, json!({ "command": "attach", "volume": spec }))
}

pub fn detach(cluster: Where, options: Detach) -> Result<()> {
    let dir = cluster.dir.context("which cluster? say --cluster DIR, the folder given to `dev up`")?.canonicalize()?;
    let cluster = Cluster::open(&dir)?;
    let volume = block_on(get(&cluster, &options.volume))?;
    let note = mount_note(&dir, &options.agent, &volume.volume_id);
    if let Ok(directory) = std::fs::read(&note) {
        let status = call_agent(&dir, &options.agent, json!({ "command": "status" }))?;
        let volumes = status["volumes"].as_array().map(Vec::as_slice).unwrap_or_default();
        if let Some(status) = volumes.iter().find(|status| status["volume"] == volume.volume_id.as_str())
            && let Ok(device) = device::device_of(status)
        {
            device::unmount(&device, Path::new(std::ffi::OsStr::from_bytes(&directory)))?;
        }
        std::fs::remove_file(&note).context("forget the mount")?;
    }
    let command = json!({ "command": "detach", "volume": volume.volume_id, "force": options.force });
    call_agent(&dir, &options.agent, command)?;
    println!("detached");
    Ok(())
}

/// Sends one command to a running agent and returns its result.
pub fn call_agent(dir: &Path, agent: &str, mut command: Value) -> Result<Value> {
    let path = control_socket(dir, agent);
    let mut stream =
        UnixStream::connect(&path).with_context(|| format!("no agent {agent:?} listens on {}", path.display()))?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    stream.set_write_timeout(Some(ANSWER_WITHIN))?;
    command["version"] = CONTROL_VERSION.into();
    writeln!(stream, "{command}")?;
    let mut line = String::new();
    BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut line).context("the agent does not answer")?;
    let answer: Value = serde_json::from_str(&line).context("the agent's answer cannot be read")?;
    match answer.get("error") {
        Some(error) => bail!(
            "{} ({})",
            error["message"].as_str().unwrap_or("the agent refuses"),
            error["code"].as_str().unwrap_or("unknown")
        ),
        None => Ok(answer["result"].clone()),
    }
}

/// Starts the agent as a daemon of its own where none listens.
fn ensure_agent(dir: &Path, agent: &str) -> Result<()> {
    let socket = control_socket(dir, agent);
    if UnixStream::connect(&socket).is_ok() {
        return Ok(());
    }
    ensure!(
        !agent.is_empty() && agent.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'),
        "an agent's name has letters, digits and hyphens only"
    );
    found::agent_identity(dir, agent)?;
    let home = agent_dir(dir, agent);
    std::fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
    let log = std::fs::OpenOptions::new().create(true).append(true).open(home.join("agent.log"))?;
    let mut command = Command::new(std::env::current_exe().context("this program's own path")?);
    command.arg("agent").args(["--holder", agent]).arg("--dir").arg(&home).arg("--pki").arg(ClusterFile::pki(dir));
    command.arg("--sockets").arg(ClusterFile::sockets(dir));
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    let mut child = command.spawn().context("start the agent")?;
    let until = Instant::now() + AGENT_WITHIN;
    while UnixStream::connect(&socket).is_err() {
        if let Some(status) = child.try_wait()? {
            bail!("the agent ended at once ({status}); see {}", home.join("agent.log").display());
        }
        ensure!(Instant::now() < until, "the agent does not listen; see {}", home.join("agent.log").display());
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// A process that is the first of its container ends at no signal that it does not handle.
extern "C" fn end_at_once(_signal: libc::c_int) {
    // SAFETY: _exit(2) is async-signal-safe; what the keeper holds is only descriptors.
    unsafe { libc::_exit(0) };
}

/// Holds devices for an agent that is away.
pub fn keeper(options: Keeper) -> Result<()> {
    let handler = end_at_once as extern "C" fn(libc::c_int);
    // SAFETY: the handler does nothing but end the process.
    unsafe { libc::signal(libc::SIGTERM, handler as libc::sighandler_t) };
    holdfast_agent::Keeper::run(&options.socket, options.until_idle).context("the keeper")
}

/// The write end of the pipe that ends the agent; a signal handler may do no more than write to it.
static SHUTDOWN: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_signal(_signal: libc::c_int) {
    let fd = SHUTDOWN.load(Ordering::Relaxed);
    // SAFETY: write(2) is async-signal-safe; the descriptor stays open for the life of the process.
    unsafe { libc::write(fd, [1u8].as_ptr().cast(), 1) };
}

/// The daemon: serves until SIGTERM or SIGINT, and never detaches.
pub fn agent(options: Agent) -> Result<()> {
    if let Some(address) = options.http {
        agent_metrics::begin(address, options.dir.join("control.sock"))?;
    }
    if let (Some(address), Some(token), Some(ca)) = (options.enroll, options.enroll_token, options.enroll_ca) {
        let (pki, holder) = (options.pki.clone(), options.holder.clone());
        if enroll::begin(Enrolment { address, token, ca, pki, holder })?.is_none() {
            return Ok(());
        }
    }
    let (ours, theirs) = UnixStream::pair().context("a pair of sockets")?;
    SHUTDOWN.store(ours.into_raw_fd(), Ordering::Relaxed);
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let handler = on_signal as extern "C" fn(libc::c_int);
        // SAFETY: the handler only writes to a descriptor.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
    let file = |suffix: &str| enroll::credential_file(&options.pki, &options.holder, suffix);
    let config = AgentConfig {
        identity: IdentityPaths { certificate: file("pem"), key: file("key"), roots: options.pki.join("ca.pem") },
        holder: options.holder.clone(),
        cluster: None,
        control_socket: options.dir.join("control.sock"),
        keeper: Some(match options.keeper_socket {
            Some(socket) => KeeperConfig { socket, program: None },
            None => KeeperConfig {
                socket: options.dir.join("keeper.sock"),
                program: Some(std::env::current_exe().context("this program's own path")?),
            },
        }),
        sockets: options.sockets,
        state_directory: options.dir,
        volumes: Vec::new(),
    };
    let result = holdfast_agent::Agent::run(config, theirs);
    let fd = SHUTDOWN.swap(-1, Ordering::Relaxed);
    // SAFETY: the descriptor came from `into_raw_fd` above and nobody else closes it.
    drop(unsafe { UnixStream::from_raw_fd(fd) });
    result.context("the agent")
}
