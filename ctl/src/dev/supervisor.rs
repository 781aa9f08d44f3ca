//! `holdfast dev up`: starts the nodes, starts again what dies, obeys `dev node stop|start`, ends with its signal.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use super::control::{self, Answer};
use super::layout::ClusterFile;

/// How long a dead node stays away: long enough to see what the others do without it.
const RESTART_AFTER: Duration = Duration::from_secs(2);
/// A node that was asked to end is killed after this.
const STOP_WITHIN: Duration = Duration::from_secs(5);
/// Between two looks while the cluster is being founded, the end of which raises no event.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// As above, afterwards: a child's death and a start that is due end the wait.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub struct Options {
    pub dir: PathBuf,
    pub restart: bool,
    pub disk_bytes: u64,
    pub device_fault: Option<String>,
}

enum Running {
    Child(Child),
    /// Died or was never started; to be started at the instant.
    Due(Instant),
    /// Stopped by command, or died under `--no-restart`.
    Stopped,
}

pub struct Supervisor {
    options: Options,
    file: ClusterFile,
    nodes: BTreeMap<String, Running>,
    listener: UnixListener,
    /// Set from outside when the cluster is founded; kept in the file.
    founded: Arc<AtomicBool>,
}

impl Supervisor {
    /// Takes the folder: a second supervisor on it is refused while the first one lives.
    pub async fn start(options: Options, mut file: ClusterFile) -> Result<Supervisor> {
        let socket = control::socket(&options.dir);
        if socket.exists() {
            ensure!(
                UnixStream::connect(&socket).await.is_err(),
                "another `holdfast dev up` runs on {}",
                options.dir.display()
            );
            fs::remove_file(&socket)?;
        }
        let listener = UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
        file.supervisor_pid = std::process::id();
        let now = Instant::now();
        let nodes = file.nodes.iter().map(|node| (node.name.clone(), Running::Due(now))).collect();
        let founded = Arc::new(AtomicBool::new(file.founded));
        let mut supervisor = Supervisor { options, file, nodes, listener, founded };
        supervisor.look().await?;
        Ok(supervisor)
    }

    /// To be set once the cluster is founded.
    pub fn founded(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.founded)
    }

    /// Until SIGINT or SIGTERM; ends every node before it returns.
    pub async fn run(self) -> Result<()> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        self.run_until(async move {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        })
        .await
    }

    /// As [`Supervisor::run`], until `stop` is ready.
    pub async fn run_until(mut self, stop: impl Future<Output = ()>) -> Result<()> {
        tokio::pin!(stop);
        let mut deaths = signal(SignalKind::child())?;
        loop {
            let next_look = self.next_look();
            tokio::select! {
                () = &mut stop => break,
                _ = deaths.recv() => self.look().await?,
                () = tokio::time::sleep_until(next_look) => self.look().await?,
                connection = self.listener.accept() => {
                    let (stream, _) = connection.context("the control socket failed")?;
                    self.serve(stream).await;
                }
            }
        }
        self.stop_all().await
    }

    /// Ends every node; what is not gone within [`STOP_WITHIN`] is killed.
    pub async fn stop_all(&mut self) -> Result<()> {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for name in &names {
            if let Some(Running::Child(child)) = self.nodes.get(name) {
                terminate(child);
            }
        }
        for name in &names {
            self.stop(name).await?;
        }
        self.file.supervisor_pid = 0;
        self.file.store(&self.options.dir)?;
        let _ = fs::remove_file(control::socket(&self.options.dir));
        Ok(())
    }

    fn next_look(&self) -> Instant {
        let due = |running: &Running| if let Running::Due(at) = running { Some(*at) } else { None };
        let every = if self.file.founded { LOOK_AT_LEAST_EVERY } else { LOOK_EVERY };
        self.nodes.values().filter_map(due).chain([Instant::now() + every]).min().expect("it is not empty")
    }

    async fn look(&mut self) -> Result<()> {
        let mut changed = self.founded.load(Ordering::Relaxed) != self.file.founded;
        self.file.founded = self.founded.load(Ordering::Relaxed);
        for (name, running) in &mut self.nodes {
            match running {
                Running::Child(child) => {
                    let Some(status) = child.try_wait()? else { continue };
                    tracing::warn!(node = %name, %status, "the node ended");
                    *running = match self.options.restart {
                        true => Running::Due(Instant::now() + RESTART_AFTER),
                        false => Running::Stopped,
                    };
                    self.file.node_mut(name)?.pid = 0;
                    changed = true;
                }
                Running::Due(at) if *at <= Instant::now() => {
                    let child = spawn(&self.options, &self.file, name)?;
                    self.file.node_mut(name)?.pid = child.id().unwrap_or(0);
                    *running = Running::Child(child);
                    changed = true;
                }
                Running::Due(_) | Running::Stopped => {}
            }
        }
        if changed {
            self.file.store(&self.options.dir)?;
        }
        Ok(())
    }

    async fn serve(&mut self, stream: UnixStream) {
        let result = tokio::time::timeout(STOP_WITHIN, read_command(stream)).await;
        let Ok(Ok((command, mut stream))) = result else { return };
        let outcome = match command {
            control::Command::Stop(name) => self.stop(&name).await,
            control::Command::Start(name) => self.start_node(&name).await,
            control::Command::Add(name) => self.add_node(&name).await,
        };
        let answer = Answer { error: outcome.err().map(|error| format!("{error:#}")) };
        let mut line = serde_json::to_vec(&answer).expect("a plain struct is JSON");
        line.push(b'\n');
        let _ = stream.write_all(&line).await;
    }

    async fn stop(&mut self, name: &str) -> Result<()> {
        self.file.node_mut(name)?;
        let running = self.nodes.insert(name.to_owned(), Running::Stopped);
        if let Some(Running::Child(mut child)) = running {
            terminate(&child);
            if tokio::time::timeout(STOP_WITHIN, child.wait()).await.is_err() {
                child.kill().await?;
            }
        }
        self.file.node_mut(name)?.pid = 0;
        self.file.store(&self.options.dir)
    }

    async fn add_node(&mut self, name: &str) -> Result<()> {
        ensure!(self.file.founded, "the cluster is not whole yet; try again when it is");
        let node = self.file.plan_node(&self.options.dir, name)?;
        super::found::node_identity(&self.options.dir, &node)?;
        self.file.nodes.push(node);
        self.start_node(name).await
    }

    async fn start_node(&mut self, name: &str) -> Result<()> {
        self.file.node_mut(name)?;
        if !matches!(self.nodes.get(name), Some(Running::Child(_))) {
            self.nodes.insert(name.to_owned(), Running::Due(Instant::now()));
        }
        self.look().await
    }
}

fn terminate(child: &Child) {
    if let Some(pid) = child.id() {
        // SAFETY: plain kill(2); the child is ours and not yet waited for, so the pid is not another process's.
        unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
    }
}

async fn read_command(stream: UnixStream) -> Result<(control::Command, UnixStream)> {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    (&mut reader).take(control::LINE_BYTES_MAX).read_until(b'\n', &mut line).await?;
    Ok((serde_json::from_slice(&line)?, reader.into_inner()))
}

fn spawn(options: &Options, file: &ClusterFile, name: &str) -> Result<Child> {
    let node = file.nodes.iter().find(|node| node.name == name).context("the supervisor keeps known nodes only")?;
    let log = fs::OpenOptions::new().create(true).append(true).open(options.dir.join(format!("{name}.log")))?;
    let mut command = Command::new(std::env::current_exe().context("this program's own path")?);
    command
        .arg("storage-node")
        .args(["--name", name, "--listen", &node.endpoint, "--api", &node.api])
        .args(["--disk-size", &options.disk_bytes.to_string()])
        .arg("--dir")
        .arg(&node.dir)
        .arg("--pki")
        .arg(ClusterFile::pki(&options.dir))
        .arg("--sockets")
        .arg(ClusterFile::sockets(&options.dir));
    if file.founded {
        command.args(["--join", &file.cluster.to_string()]);
        for other in file.nodes.iter().filter(|other| other.name != name) {
            command.args(["--seed", &other.api]);
        }
    }
    if let Some(fault) = &options.device_fault {
        command.args(["--device-fault", fault]);
    }
    // The nodes end with their supervisor, however it ends: none is left behind on the machine.
    // SAFETY: prctl is async-signal-safe and touches only the child.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
    // The terminal's interrupt goes to the supervisor, which ends the nodes in order.
    command.process_group(0);
    command.spawn().with_context(|| format!("start {name}"))
}

/// Folders of the nodes; the certificates are made by the caller.
pub fn make_folders(dir: &Path, file: &ClusterFile) -> Result<()> {
    for node in &file.nodes {
        fs::create_dir_all(&node.dir).with_context(|| format!("create {}", node.dir.display()))?;
    }
    file.store(dir)
}
