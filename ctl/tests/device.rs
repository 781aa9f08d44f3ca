//! Volumes as devices of this machine, on a real local cluster: what a file system on one sees while agents die.

#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const HOLDFAST: &str = env!("CARGO_BIN_EXE_holdfast");
/// A test that would hang fails instead; no test depends on its length.
const HANG: Duration = Duration::from_secs(180);
const FILES: usize = 2000;

/// A cluster with one volume; its end leaves neither mounts nor devices nor processes, whatever the test came to.
struct World {
    directory: tempfile::TempDir,
    cluster: PathBuf,
    mount: PathBuf,
    supervisor: Child,
}

impl World {
    fn new() -> World {
        let directory = tempfile::tempdir().unwrap();
        let (cluster, mount) = (directory.path().join("c"), directory.path().join("mnt"));
        fs::create_dir(&mount).unwrap();
        let mut supervisor = Command::new(HOLDFAST)
            .args(["dev", "up", "--nodes", "3", "--disk-size", "2GiB", "--dir"])
            .arg(&cluster)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let out = supervisor.stdout.take().unwrap();
        let world = World { directory, cluster, mount, supervisor };
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).unwrap();
        assert!(line.starts_with("cluster of 3 nodes is up"), "{line}");
        world.run(&["volume", "create", "v", "--size", "512Mi"]);
        world
    }

    fn output(&self, arguments: &[&str]) -> Output {
        Command::new(HOLDFAST).arg("--cluster").arg(&self.cluster).args(arguments).output().unwrap()
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn mount(&self) -> String {
        self.run(&["attach", "v", "--mount", self.mount.to_str().unwrap()])
    }

    /// Processes of this test alone: its folder is in their arguments.
    fn processes(&self, verb: &str) -> Vec<i32> {
        let own = self.directory.path().to_str().unwrap();
        let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        numbers
            .filter(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let arguments: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
                let ours =
                    arguments.iter().any(|argument| argument.windows(own.len()).any(|part| part == own.as_bytes()));
                ours && arguments.get(1) == Some(&verb.as_bytes())
            })
            .collect()
    }

    fn kill(&self, verb: &str, signal: &str) {
        let pids = self.processes(verb);
        assert_eq!(pids.len(), 1, "one process {verb}");
        host("kill", &[signal, &pids[0].to_string()]);
        self.wait_for(verb, 0);
    }

    fn wait_for(&self, verb: &str, count: usize) {
        let until = Instant::now() + HANG;
        while self.processes(verb).len() != count {
            assert!(Instant::now() < until, "{verb}: {:?}", self.processes(verb));
            std::thread::yield_now();
        }
    }

    /// Loop devices over files of this volume, in any epoch.
    fn devices(&self) -> Vec<String> {
        let volume: serde_json::Value = serde_json::from_str(&self.run(&["volume", "get", "v", "--json"])).unwrap();
        let id = volume["id"].as_str().unwrap();
        let backing = |entry: std::io::Result<fs::DirEntry>| {
            let entry = entry.ok()?;
            let file = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
            file.contains(id).then(|| entry.file_name().to_string_lossy().into_owned())
        };
        fs::read_dir("/sys/block").unwrap().filter_map(backing).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let quiet = |command: &mut Command| {
            let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        };
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if table.contains(self.mount.to_str().unwrap()) {
            quiet(Command::new("umount").args(["-l", "--"]).arg(&self.mount));
        }
        let _ = self.output(&["detach", "v", "--force"]);
        for verb in ["agent", "keeper"] {
            for pid in self.processes(verb) {
                quiet(Command::new("kill").args(["-9", &pid.to_string()]));
            }
        }
        quiet(Command::new("kill").args(["-TERM", &self.supervisor.id().to_string()]));
        let _ = self.supervisor.wait();
    }
}

fn host(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// 1 to 9000 bytes that no other file has.
fn content(number: usize) -> Vec<u8> {
    let length = 1 + number * 37 % 9000;
    format!("file {number}; ").into_bytes().into_iter().cycle().take(length).collect()
}

fn path(mount: &Path, number: usize) -> PathBuf {
    mount.join(format!("d{}/f{number}", number % 20))
}

/// Writes every file and makes it durable; tells after each how many there are.
fn write_files(mount: PathBuf) -> (std::thread::JoinHandle<std::io::Result<()>>, Receiver<usize>) {
    let (tell, written) = channel();
    let writer = std::thread::spawn(move || {
        for directory in 0..20 {
            fs::create_dir(mount.join(format!("d{directory}")))?;
        }
        for number in 0..FILES {
            let mut file = fs::File::create_new(path(&mount, number))?;
            file.write_all(&content(number))?;
            // Most are durable together at the next of these; so there is always much in flight.
            if number % 8 == 0 {
                file.sync_all()?;
            }
            let _ = tell.send(number + 1);
        }
        Ok(())
    });
    (writer, written)
}

fn verify(mount: &Path) {
    for number in 0..FILES {
        assert_eq!(fs::read(path(mount, number)).unwrap(), content(number), "file {number}");
    }
}

#[test]
fn ext4_sees_no_error_while_agents_are_killed_needs_root_needs_fuse() {
    let world = World::new();
    let device = world.mount();
    let (writer, written) = write_files(world.mount.clone());
    for mark in [300, 700, 1100, 1500] {
        while written.recv_timeout(HANG).expect("the writer goes on") < mark {}
        world.kill("agent", "-KILL");
        assert_eq!(world.run(&["attach", "v", "--device"]), device, "the same device");
    }
    writer.join().unwrap().expect("no I/O error");
    verify(&world.mount);
    world.run(&["detach", "v"]);
    assert_eq!(world.devices(), Vec::<String>::new());
    // Everything again, from what the nodes hold.
    let device = world.run(&["attach", "v", "--device"]);
    host("e2fsck", &["-f", "-n", &device]);
    world.run(&["detach", "v"]);
    world.mount();
    verify(&world.mount);
    world.run(&["detach", "v"]);
    world.kill("agent", "-TERM");
    // It has nothing to keep, and ends by itself.
    world.wait_for("keeper", 0);
}

#[test]
fn a_device_outlives_a_keeper_and_a_planned_end_of_its_agent_needs_root_needs_fuse() {
    let world = World::new();
    let device = world.mount();
    let (writer, written) = write_files(world.mount.clone());
    let reached = |mark| while written.recv_timeout(HANG).expect("the writer goes on") < mark {};
    reached(300);
    let keeper = world.processes("keeper");
    host("kill", &["-KILL", &keeper[0].to_string()]);
    // The agent starts another one and hands it the device.
    let until = Instant::now() + HANG;
    while world.processes("keeper").is_empty() || world.processes("keeper") == keeper {
        assert!(Instant::now() < until, "no new keeper");
        std::thread::yield_now();
    }
    reached(900);
    world.kill("agent", "-TERM");
    assert_eq!(world.run(&["attach", "v", "--device"]), device);
    writer.join().unwrap().expect("no I/O error");
    verify(&world.mount);
    world.run(&["detach", "v"]);
}

#[test]
fn what_is_in_use_stays_and_what_nobody_serves_is_cleared_needs_root_needs_fuse() {
    let world = World::new();
    let device = world.run(&["attach", "v", "--device"]);
    host("mkfs.ext4", &["-q", "-F", &device]);
    host("mount", &[&device, world.mount.to_str().unwrap()]);
    let refused = world.output(&["detach", "v"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("in-use"), "{refused:?}");
    fs::write(world.mount.join("file"), "still there").unwrap();
    let other = world.output(&["attach", "v", "--nbd-socket", world.directory.path().join("s").to_str().unwrap()]);
    assert!(!other.status.success(), "it is a device already");
    // Without a keeper the device dies with its agent; the next agent clears what is left.
    let keepers = world.processes("keeper");
    let agents = world.processes("agent");
    host("kill", &["-KILL", &agents[0].to_string(), &keepers[0].to_string()]);
    world.wait_for("agent", 0);
    let device = world.run(&["attach", "v", "--device"]);
    assert_eq!(world.devices(), [device.trim_start_matches("/dev/")]);
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(world.mount.to_str().unwrap()), "a dead file system is unmounted");
    world.run(&["detach", "v"]);
    assert_eq!(world.devices(), Vec::<String>::new());
}
