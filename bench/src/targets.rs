//! What is measured: each starts what it needs and ends it when it is dropped.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::processes::{Process, resident_mib, signal, with_argument};

const START_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub trait Target {
    fn name(&self) -> &'static str;

    /// How fio reaches it, with so many requests at a time.
    fn fio(&self, depth: u32) -> Vec<String>;

    /// What runs for it, the load and the kernel aside.
    fn processes(&self) -> Result<Vec<Process>>;
}

/// A file on the local disk, past the page cache.
pub struct Local {
    file: PathBuf,
}

impl Local {
    pub fn start(dir: &Path) -> Local {
        Local { file: dir.join("local.img") }
    }
}

impl Target for Local {
    fn name(&self) -> &'static str {
        "local disk"
    }

    fn fio(&self, depth: u32) -> Vec<String> {
        // One durable write at a time is fastest by a plain system call: asynchronous ones hand their sync to a worker.
        let engine = if depth == 1 { "psync" } else { "libaio" };
        let file = format!("--filename={}", self.file.display());
        vec![format!("--ioengine={engine}"), "--direct=1".into(), "--sync=dsync".into(), file]
    }

    fn processes(&self) -> Result<Vec<Process>> {
        Ok(Vec::new())
    }
}

/// nbdkit over a Unix socket: one copy in a file, every write forced to the disk.
pub struct Nbdkit {
    process: Child,
    socket: PathBuf,
}

impl Nbdkit {
    pub fn start(dir: &Path, size_mib: u64) -> Result<Nbdkit> {
        let image = dir.join("nbdkit.img");
        File::create(&image)?.set_len(size_mib << 20)?;
        let socket = dir.join("nbdkit.sock");
        let process = Command::new("nbdkit")
            .args(["--foreground", "--unix"])
            .arg(&socket)
            .args(["--filter=fua", "file"])
            .arg(&image)
            .arg("fuamode=force")
            .stdin(Stdio::null())
            .spawn()
            .context("nbdkit")?;
        let nbdkit = Nbdkit { process, socket };
        wait_for("nbdkit's socket", || nbdkit.socket.exists())?;
        Ok(nbdkit)
    }
}

impl Target for Nbdkit {
    fn name(&self) -> &'static str {
        "nbdkit, 1 copy"
    }

    fn fio(&self, _depth: u32) -> Vec<String> {
        over_nbd(&self.socket)
    }

    fn processes(&self) -> Result<Vec<Process>> {
        Ok(vec![Process { name: "nbdkit".into(), pid: self.process.id() }])
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// A volume with three copies on three storage nodes of this machine, attached by the agent.
pub struct Volume {
    supervisor: Child,
    holdfast: PathBuf,
    dir: PathBuf,
    socket: PathBuf,
}

impl Volume {
    pub fn start(dir: &Path, holdfast: &Path, size_mib: u64) -> Result<Volume> {
        let dir = dir.join("cluster");
        std::fs::create_dir(&dir)?;
        let log = File::create(dir.join("up.log"))?;
        let mut supervisor = Command::new(holdfast)
            .args(["dev", "up", "--disk-size"])
            .arg(format!("{}MiB", 2 * size_mib + 1024))
            .arg("--dir")
            .arg(&dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| holdfast.display().to_string())?;
        let mut said = String::new();
        let output = supervisor.stdout.take().context("the pipe")?;
        let volume =
            Volume { supervisor, holdfast: holdfast.to_owned(), socket: dir.join("volume.sock"), dir: dir.clone() };
        BufReader::new(output).read_line(&mut said)?;
        ensure!(said.contains("is up"), "dev up says {said:?}, and in {}", dir.join("up.log").display());
        volume.holdfast(&["volume", "create", "bench", "--size", &format!("{size_mib}MiB")])?;
        let socket = volume.socket.to_str().context("the folder's name is not text")?;
        volume.holdfast(&["attach", "bench", "--nbd-socket", socket])?;
        Ok(volume)
    }

    /// Resident MiB of every process of it.
    pub fn memory(&self) -> Result<Vec<(String, f64)>> {
        let processes = self.processes()?;
        processes.into_iter().map(|process| Ok((process.name, resident_mib(process.pid)?))).collect()
    }

    /// The names of the nodes.
    pub fn nodes(&self) -> Result<Vec<String>> {
        let file = self.file()?;
        let nodes = file["nodes"].as_array().context("nodes")?.iter();
        nodes.map(|node| Ok(node["name"].as_str().context("a name")?.to_owned())).collect()
    }

    pub fn pid(&self, name: &str) -> Result<u32> {
        let file = self.file()?;
        let node = file["nodes"].as_array().and_then(|nodes| nodes.iter().find(|node| node["name"] == name));
        let pid = node.and_then(|node| node["pid"].as_u64()).filter(|pid| *pid > 1);
        Ok(u32::try_from(pid.with_context(|| format!("{name} runs not"))?)?)
    }

    /// The volume as `volume get` shows it.
    pub fn seen(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.holdfast(&["volume", "get", "bench", "--json"])?)?)
    }

    fn file(&self) -> Result<Value> {
        Ok(serde_json::from_str(&std::fs::read_to_string(self.dir.join("cluster.json"))?)?)
    }

    /// What it prints.
    fn holdfast(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.holdfast);
        command.arg("--cluster").arg(&self.dir).args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit());
        let output = command.output().with_context(|| self.holdfast.display().to_string())?;
        ensure!(output.status.success(), "holdfast {}: {}", arguments.join(" "), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Target for Volume {
    fn name(&self) -> &'static str {
        "Holdfast, 3 copies"
    }

    fn fio(&self, _depth: u32) -> Vec<String> {
        over_nbd(&self.socket)
    }

    fn processes(&self) -> Result<Vec<Process>> {
        with_argument(&self.dir)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // The agent outlives its clients and the cluster, unless it is told to give the volume up.
        if let Err(error) = self.holdfast(&["detach", "bench"]) {
            eprintln!("{error:#}");
        }
        end(&mut self.supervisor);
        for process in self.processes().unwrap_or_default() {
            let _ = signal("-TERM", process.pid);
        }
    }
}

fn over_nbd(socket: &Path) -> Vec<String> {
    vec!["--ioengine=nbd".into(), format!("--uri=nbd+unix:///?socket={}", socket.display())]
}

fn end(process: &mut Child) {
    let _ = signal("-TERM", process.id());
    let _ = process.wait();
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let until = Instant::now() + START_WITHIN;
    while !condition() {
        if Instant::now() > until {
            bail!("{what} is not there after {} s", START_WITHIN.as_secs());
        }
        thread::sleep(LOOK_EVERY);
    }
    Ok(())
}
