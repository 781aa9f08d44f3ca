//! [`Cluster`]: a `dev up` of its own, ended with everything it started, however the test ends.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// For anything that must come true on a machine as slow as a loaded runner; no test passes by its being long.
pub const SOON: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// A copy this far behind under load has caught up: it is what is in flight.
const LAG_ENTRIES_MAX: u64 = 64;
/// For the supervisor to end its nodes in order.
const END_WITHIN: Duration = Duration::from_secs(8);
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Polls until `condition` gives a value.
pub fn wait_for<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    poll(condition).unwrap_or_else(|| panic!("not within {SOON:?}: {what}"))
}

fn poll<T>(mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let until = Instant::now() + SOON;
    loop {
        match condition() {
            None if Instant::now() < until => thread::sleep(LOOK_EVERY),
            value => return value,
        }
    }
}

pub fn holdfast() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast"));
    command.env_remove("HOLDFAST_CLUSTER").stdin(Stdio::null());
    command
}

pub fn signal(pid: u32, signal: libc::c_int) {
    assert!(pid > 1, "no process to signal");
    // SAFETY: plain kill(2) of a process of this test's own cluster.
    let result = unsafe { libc::kill(pid as libc::pid_t, signal) };
    assert_eq!(result, 0, "process {pid} is there");
}

pub struct Cluster {
    dir: TempDir,
    supervisor: Child,
}

impl Cluster {
    /// Three nodes, up and founded.
    pub fn start(options: &[&str]) -> Cluster {
        let dir = tempfile::Builder::new().prefix("holdfast-").tempdir().expect("a temporary folder");
        let supervisor = Self::spawn(dir.path(), options, None);
        let mut cluster = Cluster { dir, supervisor };
        cluster.wait_up();
        cluster
    }

    /// Ends all nodes in order and starts the same cluster with other options, and with a planted bug.
    pub fn restart(&mut self, options: &[&str], planted: Option<&str>) {
        signal(self.supervisor.id(), libc::SIGTERM);
        self.supervisor.wait().expect("dev up ends");
        self.supervisor = Self::spawn(self.dir.path(), options, planted);
        self.wait_up();
    }

    fn spawn(dir: &Path, options: &[&str], planted: Option<&str>) -> Child {
        let log = File::create(dir.join("up.log")).expect("a log file");
        let mut command = holdfast();
        command.args(["dev", "up", "--disk-size", "1GiB"]).args(options).arg("--dir").arg(dir);
        command.envs(planted.map(|bug| ("HOLDFAST_PLANTED", bug)));
        // A test runner that is killed leaves no cluster behind.
        // SAFETY: prctl is async-signal-safe and touches only the child.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        command.stdout(Stdio::piped()).stderr(log).spawn().expect("dev up starts")
    }

    fn wait_up(&mut self) {
        let output = self.supervisor.stdout.take().expect("piped");
        let (said, says) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = said.send(line);
            }
        });
        match says.recv_timeout(SOON) {
            Ok(line) => assert!(line.contains("is up"), "dev up says {line:?}"),
            Err(_) => panic!("the cluster does not come up: {}", self.log("up")),
        }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.dir().join(format!("{name}.log"))).unwrap_or_default()
    }

    /// Runs `holdfast --cluster DIR …`.
    pub fn run(&self, arguments: &[&str]) -> Output {
        holdfast().arg("--cluster").arg(self.dir()).args(arguments).output().expect("holdfast runs")
    }

    /// A command that must do what it is told; what it prints.
    pub fn must(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {} {said}", output.status);
        String::from_utf8(output.stdout).expect("text")
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.must(arguments)).expect("JSON")
    }

    pub fn file(&self) -> Value {
        serde_json::from_slice(&fs::read(self.dir().join("cluster.json")).expect("cluster.json")).expect("JSON")
    }

    pub fn nodes(&self) -> Vec<String> {
        let file = self.file();
        let nodes = file["nodes"].as_array().expect("nodes");
        nodes.iter().map(|node| node["name"].as_str().expect("a name").to_owned()).collect()
    }

    /// 0 while the node is not running.
    pub fn pid(&self, node: &str) -> u32 {
        let file = self.file();
        let nodes = file["nodes"].as_array().expect("nodes");
        let entry = nodes.iter().find(|entry| entry["name"] == node).expect("a node of this cluster");
        u32::try_from(entry["pid"].as_u64().expect("a pid")).expect("a pid")
    }

    pub fn volume(&self, name: &str) -> Value {
        self.json(&["volume", "get", name, "--json"])
    }

    pub fn leader(&self, volume: &str) -> String {
        wait_for("a leader", || Some(self.volume(volume)["leader"].as_str()?.to_owned()))
    }

    pub fn follower(&self, volume: &str) -> String {
        let leader = self.leader(volume);
        self.nodes().into_iter().find(|node| *node != leader).expect("three nodes")
    }

    /// Until the node's copy is healthy in the leader's eyes: it is running and lacks nothing that is committed.
    pub fn wait_healthy(&self, volume: &str, node: &str) {
        let mut last = Value::Null;
        poll(|| {
            last = self.volume(volume);
            let replicas = last["replicas"].as_array()?;
            let replica = replicas.iter().find(|replica| replica["node"] == node)?;
            let flushed = replicas.iter().find(|replica| replica["state"] == "leader")?["flushed"].as_u64()?;
            let lag = flushed.saturating_sub(replica["flushed"].as_u64()?);
            (replica["healthy"] == true && lag < LAG_ENTRIES_MAX).then_some(())
        })
        .unwrap_or_else(|| panic!("{node} does not catch up: {last:#}"));
    }

    /// The process that was killed.
    pub fn kill(&self, node: &str) -> u32 {
        let pid = self.pid(node);
        signal(pid, libc::SIGKILL);
        pid
    }

    pub fn wait_restart(&self, node: &str, old: u32) {
        wait_for("the supervisor starts the node again", || (![0, old].contains(&self.pid(node))).then_some(()));
    }

    pub fn nbd_socket(&self, agent: &str) -> PathBuf {
        self.dir().join(format!("{agent}.nbd"))
    }

    pub fn attach(&self, volume: &str, agent: &str, more: &[&str]) -> PathBuf {
        let socket = self.nbd_socket(agent);
        let path = socket.to_str().expect("a path in UTF-8");
        let mut arguments = vec!["attach", volume, "--nbd-socket", path, "--agent", agent];
        arguments.extend(more);
        self.must(&arguments);
        socket
    }

    /// What the agent says of its only volume.
    pub fn attachment(&self, agent: &str) -> Value {
        let path = self.dir().join("agents").join(agent).join("control.sock");
        let mut stream = UnixStream::connect(path).expect("the agent listens");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        writeln!(stream, "{}", json!({ "version": 1, "command": "status" })).expect("the agent reads");
        let mut line = String::new();
        BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut line).expect("the agent answers");
        let answer: Value = serde_json::from_str(&line).expect("JSON");
        answer["result"]["volumes"][0].clone()
    }

    pub fn agent_pid(&self, agent: &str) -> u32 {
        let pids = self.agents(agent);
        assert_eq!(pids.len(), 1, "one agent {agent}");
        pids[0]
    }

    pub fn agent_log(&self, agent: &str) -> String {
        fs::read_to_string(self.dir().join("agents").join(agent).join("agent.log")).unwrap_or_default()
    }

    pub fn agents(&self, agent: &str) -> Vec<u32> {
        processes_naming(&self.dir().join("agents").join(agent))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            for name in self.nodes() {
                let log = self.log(&name);
                let tail: Vec<&str> = log.lines().rev().take(20).collect();
                eprintln!("--- {name}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
            }
        }
        // SAFETY: plain kill(2) of our own child, which is not yet waited for.
        unsafe { libc::kill(self.supervisor.id() as libc::pid_t, libc::SIGTERM) };
        let until = Instant::now() + END_WITHIN;
        while matches!(self.supervisor.try_wait(), Ok(None)) && Instant::now() < until {
            thread::sleep(LOOK_EVERY);
        }
        let _ = self.supervisor.kill();
        let _ = self.supervisor.wait();
        // Agents are daemons of their own. The folder's name is random, so nobody else's process names it.
        for pid in processes_naming(self.dir.path()) {
            // SAFETY: plain kill(2); a process that ended meanwhile gives an error that changes nothing.
            unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
        }
    }
}

/// Processes of this program with an argument that is `path` or below it.
fn processes_naming(path: &Path) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<&str> = line.split(|byte| *byte == 0).filter_map(|word| str::from_utf8(word).ok()).collect();
        if words.first() == Some(&env!("CARGO_BIN_EXE_holdfast"))
            && words.iter().any(|word| Path::new(word).starts_with(path))
        {
            found.push(pid);
        }
    }
    found
}
