//! A running agent, its control socket and a client of its device.

pub mod cluster;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use holdfast_agent::{Agent, AgentConfig, AgentError, VolumeState, VolumeStatus};
use serde_json::{Value, json};

use cluster::{Cluster, volume};

/// A test that would hang fails instead; no test depends on its length.
pub const HANG: Duration = Duration::from_secs(60);

pub struct Host {
    pub directory: tempfile::TempDir,
    running: Option<(UnixStream, JoinHandle<Result<(), AgentError>>)>,
}

impl Host {
    pub fn new() -> Host {
        Host { directory: tempfile::tempdir().unwrap(), running: None }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn config(&self, cluster: &Cluster) -> AgentConfig {
        AgentConfig {
            holder: "host-a".into(),
            identity: cluster.save_identity(self.directory.path()),
            cluster: None,
            state_directory: self.path("state"),
            control_socket: self.path("control.sock"),
            keeper: None,
            sockets: Some(self.path("sockets")).filter(|folder| folder.exists()),
            volumes: Vec::new(),
        }
    }

    pub fn spec(&self, cluster: &Cluster, mode: &str) -> Value {
        json!({ "volume": volume(), "nodes": cluster.nodes, "mode": mode, "nbd_socket": self.path("nbd.sock") })
    }

    /// Starts an agent with the volume in its configuration, or with none.
    pub fn start(&mut self, cluster: &Cluster, with_volume: bool) {
        let mut config = self.config(cluster);
        if with_volume {
            config.volumes.push(serde_json::from_value(self.spec(cluster, "attach")).unwrap());
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || Agent::run(config, theirs));
        self.running = Some((ours, thread));
    }

    /// Ends the agent as a signal would.
    pub fn stop(&mut self) {
        let (shutdown, thread) = self.running.take().unwrap();
        drop(shutdown);
        thread.join().unwrap().unwrap();
    }

    pub fn join(&mut self) -> Result<(), AgentError> {
        self.running.take().unwrap().1.join().unwrap()
    }

    pub fn control(&self) -> Control {
        Control::connect(&self.path("control.sock"))
    }

    pub fn nbd(&self) -> NbdClient {
        NbdClient::connect(&self.path("nbd.sock"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some((shutdown, thread)) = self.running.take() {
            drop(shutdown);
            let _ = thread.join();
        }
    }
}

/// The socket appears while the agent's thread starts.
fn connect(path: &Path) -> UnixStream {
    let start = std::time::Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(HANG)).unwrap();
                return stream;
            }
            Err(error) if start.elapsed() > HANG => panic!("{}: {error}", path.display()),
            Err(_) => std::thread::yield_now(),
        }
    }
}

pub struct Control(BufReader<UnixStream>);

impl Control {
    fn connect(path: &Path) -> Control {
        Control(BufReader::new(connect(path)))
    }

    pub fn send(&mut self, line: &str) {
        self.0.get_mut().write_all(line.as_bytes()).unwrap();
    }

    pub fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "{line:?}");
        let answer: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(answer["version"], 1);
        answer
    }

    pub fn at_end(&mut self) -> bool {
        self.0.read(&mut [0]).unwrap() == 0
    }

    pub fn command(&mut self, mut command: Value) -> Result<Value, (String, String)> {
        command["version"] = json!(1);
        self.send(&format!("{command}\n"));
        let answer = self.receive();
        match answer.get("error") {
            Some(error) => Err((error["code"].as_str().unwrap().into(), error["message"].as_str().unwrap().into())),
            None => Ok(answer["result"].clone()),
        }
    }

    pub fn attach(&mut self, spec: Value) -> Result<VolumeStatus, (String, String)> {
        let result = self.command(json!({ "command": "attach", "volume": spec, "wait_ms": 60_000 }))?;
        Ok(serde_json::from_value(result).unwrap())
    }

    pub fn detach(&mut self, force: bool) -> Result<Value, (String, String)> {
        self.command(json!({ "command": "detach", "volume": volume(), "force": force, "wait_ms": 60_000 }))
    }

    pub fn status(&mut self) -> Vec<VolumeStatus> {
        let result = self.command(json!({ "command": "status" })).unwrap();
        serde_json::from_value(result["volumes"].clone()).unwrap()
    }

    pub fn wait_for(&mut self, state: VolumeState) -> VolumeStatus {
        let start = std::time::Instant::now();
        loop {
            let status = self.status().remove(0);
            if status.state == state {
                return status;
            }
            assert!(start.elapsed() < HANG, "{status:?}");
            std::thread::yield_now();
        }
    }
}

/// A client of the device with simple replies.
pub struct NbdClient {
    stream: UnixStream,
    pub size: u64,
}

impl NbdClient {
    pub fn connect(path: &Path) -> NbdClient {
        let mut stream = connect(path);
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        // EXPORT_NAME of the default export.
        stream.write_all(&[&b"IHAVEOPT"[..], &[0, 0, 0, 1, 0, 0, 0, 0]].concat()).unwrap();
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).unwrap();
        let size = u64::from_be_bytes(answer[..8].try_into().unwrap());
        NbdClient { stream, size }
    }

    pub fn send(&mut self, command: u16, cookie: u64, offset: u64, length: u32, payload: &[u8]) {
        let header = [
            &0x2560_9513_u32.to_be_bytes()[..],
            &[0, 0],
            &command.to_be_bytes(),
            &cookie.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
            payload,
        ]
        .concat();
        self.stream.write_all(&header).unwrap();
    }

    /// The error number and the cookie of the next reply.
    pub fn receive(&mut self) -> (u32, u64) {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes());
        (u32::from_be_bytes(reply[4..8].try_into().unwrap()), u64::from_be_bytes(reply[8..].try_into().unwrap()))
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.send(1, offset, offset, data.len() as u32, data);
        self.receive().0
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.send(0, offset, offset, length, &[]);
        match self.receive().0 {
            0 => {
                let mut data = vec![0; length as usize];
                self.stream.read_exact(&mut data).unwrap();
                Ok(data)
            }
            error => Err(error),
        }
    }

    /// Says goodbye and waits for the server's end.
    pub fn disconnect(mut self) {
        self.send(2, 0, 0, 0, &[]);
        assert_eq!(self.stream.read(&mut [0]).unwrap(), 0);
    }

    /// Whether the server closed the connection.
    pub fn at_end(&mut self) -> bool {
        !matches!(self.stream.read(&mut [0]), Ok(1))
    }
}
