//! Volumes as devices of this machine, on a real local cluster: what a file system on one sees while agents die.

#![allow(clippy::unwrap_used, reason = "a failure of a test's own set-up needs no words")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

use holdfast_transport::pki::{Authority, Validity};
use holdfast_transport::{PeerIdentity, PeerRole};

const HOLDFAST: &str = env!("CARGO_BIN_EXE_holdfast");
/// A test that would hang fails instead; no test depends on its length.
const HANG: Duration = Duration::from_secs(180);
const FILES: usize = 10_000;

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

    fn agent_log(&self) -> String {
        fs::read_to_string(self.cluster.join("agents/local/agent.log")).unwrap_or_default()
    }

    fn mount(&self, file_system: &str) -> String {
        self.run(&["attach", "v", "--mount", self.mount.to_str().unwrap(), "--fs", file_system])
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

    /// The agent starts another one and hands it the device.
    /// Until the next one has the device's descriptor: whoever loses both its holders loses the device.
    fn kill_keeper(&self) {
        let keeper = self.processes("keeper");
        host("kill", &["-KILL", &keeper[0].to_string()]);
        let until = Instant::now() + HANG;
        let holds = |pid: &i32| {
            let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|to| to == Path::new("/dev/fuse"))
        };
        while !self.processes("keeper").iter().any(|pid| !keeper.contains(pid) && holds(pid)) {
            assert!(Instant::now() < until, "no new keeper holds the device");
            std::thread::yield_now();
        }
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
        for agent in fs::read_dir(self.cluster.join("agents")).into_iter().flatten().flatten() {
            let _ = self.output(&["detach", "v", "--force", "--agent", agent.file_name().to_str().unwrap()]);
        }
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

fn free_bytes(mount: &Path) -> u64 {
    let output = Command::new("df").args(["--output=avail", "-B1"]).arg(mount).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().nth(1).unwrap().trim().parse().unwrap()
}

fn bytes_of(device: &str) -> u64 {
    let sectors = fs::read_to_string(format!("/sys/block/{}/size", device.trim_start_matches("/dev/"))).unwrap();
    sectors.trim().parse::<u64>().unwrap() * 512
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
            if number % 32 == 0 {
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

/// Whatever its server and the keeper of its descriptor suffer, a file system on the device sees a pause.
fn file_system_sees_no_error(file_system: &str, check: &[&str]) {
    let world = World::new();
    let mount = world.mount.to_str().unwrap();
    let device = world.mount(file_system);
    let (writer, written) = write_files(world.mount.clone());
    let mut writer = Some(writer);
    let mut reached = |mark| {
        loop {
            match written.recv_timeout(HANG) {
                Ok(count) if count >= mark => return,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => panic!("the writer hangs"),
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = writer.take().expect("it ends once").join();
                    panic!("the writer ends early: {ended:?}\n{}", world.agent_log())
                }
            }
        }
    };
    for mark in [2500, 7500] {
        reached(mark);
        world.kill("agent", "-KILL");
        assert_eq!(world.run(&["attach", "v", "--device"]), device, "the same device");
        reached(mark + 1000);
        world.kill_keeper();
    }
    writer.expect("it goes on").join().unwrap().expect("no I/O error");
    verify(&world.mount);
    world.run(&["detach", "v"]);
    assert_eq!(world.devices(), Vec::<String>::new());
    // Everything again, from what the nodes hold.
    let device = world.run(&["attach", "v", "--device"]);
    host(check[0], &[&check[1..], &[&device]].concat());
    world.run(&["detach", "v"]);
    let device = world.mount(file_system);
    verify(&world.mount);
    // Growing: the device by itself and in use, the file system by its own tool.
    let free = free_bytes(&world.mount);
    world.run(&["volume", "resize", "v", "--size", "768Mi"]);
    let until = Instant::now() + HANG;
    while bytes_of(&device) != 768 << 20 {
        assert!(Instant::now() < until, "the device has {} bytes", bytes_of(&device));
        std::thread::yield_now();
    }
    if file_system == "xfs" {
        host("xfs_growfs", &[mount]);
    } else {
        // In use it takes a privilege (CAP_SYS_RESOURCE) that containers have not; at rest it takes a check before.
        host("umount", &[mount]);
        host("e2fsck", &["-f", "-p", &device]);
        host("resize2fs", &[&device]);
        host("mount", &[&device, mount]);
    }
    assert!(free_bytes(&world.mount) > free + (200 << 20), "the file system has grown");
    fs::write(world.mount.join("after"), vec![7; 64 << 20]).unwrap();
    world.run(&["detach", "v"]);
    let device = world.run(&["attach", "v", "--device"]);
    host(check[0], &[&check[1..], &[&device]].concat());
    world.run(&["detach", "v"]);
    world.kill("agent", "-TERM");
    // It has nothing to keep, and ends by itself.
    world.wait_for("keeper", 0);
}

#[test]
fn ext4_sees_no_error_while_agents_are_killed_needs_root_needs_fuse() {
    file_system_sees_no_error("ext4", &["e2fsck", "-f", "-n"]);
}

#[test]
fn xfs_sees_no_error_while_agents_are_killed_needs_root_needs_fuse() {
    file_system_sees_no_error("xfs", &["xfs_repair", "-n"]);
}

#[test]
fn a_device_outlives_a_keeper_and_a_planned_end_of_its_agent_needs_root_needs_fuse() {
    let world = World::new();
    let device = world.mount("ext4");
    let (writer, written) = write_files(world.mount.clone());
    let reached = |mark| while written.recv_timeout(HANG).expect("the writer goes on") < mark {};
    reached(1000);
    world.kill_keeper();
    reached(3000);
    world.kill("agent", "-TERM");
    assert_eq!(world.run(&["attach", "v", "--device"]), device);
    writer.join().unwrap().expect("no I/O error");
    verify(&world.mount);
    world.run(&["detach", "v"]);
}

/// As in pods of their own: a keeper of nobody's that no agent starts, and an agent that finds it.
struct Pods<'a> {
    world: &'a World,
    socket: PathBuf,
}

impl<'a> Pods<'a> {
    fn new(world: &'a World) -> Pods<'a> {
        let (run, pki) = (world.directory.path().join("run"), world.cluster.join("pki"));
        fs::create_dir(&run).unwrap();
        host("chown", &["65534", run.to_str().unwrap()]);
        host("chmod", &["755", world.directory.path().to_str().unwrap()]);
        let authority = Authority::load(&pki.join("ca.pem"), &pki.join("ca.key")).unwrap();
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        let validity = Validity { not_before: now - hour, not_after: now + hour };
        let issued = authority.issue(PeerIdentity { role: PeerRole::Agent, id: 1 }, validity).unwrap();
        issued.save(&pki.join("agent-local.pem"), &pki.join("agent-local.key")).unwrap();
        Pods { world, socket: run.join("keeper.sock") }
    }

    fn start_keeper(&self) -> Child {
        let mut command = contained();
        command.args(["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs", HOLDFAST]);
        command.arg("keeper").arg("--socket").arg(&self.socket).stderr(Stdio::null()).spawn().unwrap()
    }

    fn start_agent(&self) -> Child {
        let dir = self.world.cluster.join("agents/local");
        fs::create_dir_all(&dir).unwrap();
        let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("agent.log")).unwrap();
        let mut command = contained();
        command.args([HOLDFAST, "agent", "--holder", "local"]).arg("--dir").arg(&dir);
        command.arg("--pki").arg(self.world.cluster.join("pki")).arg("--keeper-socket").arg(&self.socket);
        let agent = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let until = Instant::now() + HANG;
        while UnixStream::connect(dir.join("control.sock")).is_err() {
            assert!(Instant::now() < until, "the agent does not listen\n{}", self.world.agent_log());
            std::thread::yield_now();
        }
        agent
    }
}

/// As a container is: with PIDs of its own, in which nobody outside has one.
fn contained() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child=KILL", "--"]);
    command
}

/// The process that a [`contained`] command is about.
fn inner(child: &Child) -> String {
    let path = format!("/proc/{0}/task/{0}/children", child.id());
    fs::read_to_string(path).unwrap().trim().to_owned()
}

fn end(mut child: Child, signal: &str) {
    host("kill", &[signal, &inner(&child)]);
    child.wait().unwrap();
}

#[test]
fn a_keeper_that_others_run_is_found_again_needs_root_needs_fuse() {
    let world = World::new();
    let pods = Pods::new(&world);
    // In whatever order they start.
    let agent = pods.start_agent();
    let keeper = pods.start_keeper();
    let device = world.mount("ext4");
    let (writer, written) = write_files(world.mount.clone());
    let reached = |mark| while written.recv_timeout(HANG).expect("the writer goes on") < mark {};
    reached(1000);
    // The first process of a container does not hear SIGTERM unless it asks for it.
    end(keeper, "-KILL");
    let keeper = pods.start_keeper();
    let holds = || {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", inner(&keeper))).into_iter().flatten().flatten();
        descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|to| to == Path::new("/dev/fuse"))
    };
    let until = Instant::now() + HANG;
    while !holds() {
        assert!(Instant::now() < until, "the next keeper does not get the device\n{}", world.agent_log());
        std::thread::yield_now();
    }
    reached(3000);
    end(agent, "-KILL");
    let agent = pods.start_agent();
    assert_eq!(world.run(&["attach", "v", "--device"]), device);
    writer.join().unwrap().expect("no I/O error");
    verify(&world.mount);
    world.run(&["detach", "v"]);
    assert_eq!(world.devices(), Vec::<String>::new());
    end(agent, "-TERM");
    assert_eq!(world.processes("keeper"), [inner(&keeper).parse::<i32>().unwrap()], "it stays, whatever it holds");
    end(keeper, "-KILL");
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

/// 4 KiB with the same number all over.
fn block_of(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(512)
}

/// Past the page cache, which would answer for the device.
fn read_device(device: &str, blocks: usize) -> Vec<u8> {
    let count = format!("count={blocks}");
    let output = Command::new("dd")
        .args([&format!("if={device}"), "bs=4096", &count, "iflag=direct", "status=none"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn a_device_that_was_taken_over_fails_for_good_needs_root_needs_fuse() {
    const BLOCKS: usize = 256;
    let world = World::new();
    let first = world.run(&["attach", "v", "--device", "--agent", "a"]);
    let (tell, written) = channel();
    let writer = std::thread::spawn({
        let first = first.clone();
        move || {
            use std::os::unix::fs::{FileExt, OpenOptionsExt};
            let device = fs::OpenOptions::new().write(true).custom_flags(libc::O_SYNC).open(first).unwrap();
            for number in 1.. {
                let at = (number as usize * 37 % BLOCKS * 4096) as u64;
                if let Err(error) = device.write_all_at(&block_of(number), at) {
                    return error;
                }
                let _ = tell.send(number);
            }
            unreachable!("there are enough numbers");
        }
    });
    while written.recv_timeout(HANG).expect("the writer goes on") < 100 {}
    let refused = world.output(&["attach", "v", "--device", "--agent", "b"]);
    assert!(!refused.status.success(), "it is held");
    let second = world.run(&["attach", "v", "--device", "--agent", "b", "--take-over"]);
    let seen = read_device(&second, BLOCKS);
    assert_eq!(writer.join().unwrap().raw_os_error(), Some(libc::EIO));
    assert!(
        read_device(&second, BLOCKS) == seen,
        "something of the first one landed after the second one's first read"
    );
    // What was acknowledged is there: the last number of each block, or the one that was in flight.
    let last = written.try_iter().last().unwrap_or(100);
    for number in last.saturating_sub(BLOCKS as u64 - 1).max(1)..=last {
        let at = number as usize * 37 % BLOCKS * 4096;
        let found = u64::from_le_bytes(seen[at..at + 8].try_into().unwrap());
        assert!(found == number || found == last + 1, "block at {at}: {found}, expected {number}");
        assert_eq!(seen[at..at + 4096], block_of(found), "block at {at}");
    }
    // For good: also for new users of the device, which goes once there are none, and with a new agent.
    let fails = || {
        let output = Command::new("dd")
            .args([&format!("if={first}"), "bs=4096", "count=1", "iflag=direct", "status=none"])
            .output()
            .unwrap();
        // Its number may be another device's by then, the second one's for example.
        let gone = first == second || !world.devices().iter().any(|name| first.ends_with(&format!("/{name}")));
        assert!(gone || !output.status.success() || output.stdout.is_empty(), "the first device still answers");
    };
    fails();
    let agents: Vec<i32> = world.processes("agent");
    let of_a = |pid: &&i32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().contains("--holder\0a\0");
    host("kill", &["-KILL", &agents.iter().find(of_a).expect("the first agent").to_string()]);
    world.wait_for("agent", 1);
    let again = world.output(&["attach", "v", "--device", "--agent", "a"]);
    assert!(!again.status.success(), "it does not take the volume back by itself: {again:?}");
    fails();
    assert!(read_device(&second, BLOCKS) == seen);
    for agent in ["a", "b"] {
        world.run(&["detach", "v", "--agent", agent]);
    }
    assert_eq!(world.devices(), Vec::<String>::new());
}

/// A PostgreSQL of its own on the mounted volume, as the user that it needs to be.
struct Postgres {
    programs: PathBuf,
    data: PathBuf,
    socket: PathBuf,
}

impl Postgres {
    const USER: &str = "postgres";

    fn create(world: &World) -> Postgres {
        let installed = fs::read_dir("/usr/lib/postgresql").unwrap().flatten().map(|entry| entry.path().join("bin"));
        let (data, socket) = (world.mount.join("pg"), world.directory.path().join("pg"));
        let postgres = Postgres { programs: installed.max().unwrap(), data, socket };
        for directory in [&postgres.data, &postgres.socket] {
            fs::create_dir(directory).unwrap();
            host("chown", &[Self::USER, directory.to_str().unwrap()]);
        }
        host("chmod", &["755", world.directory.path().to_str().unwrap()]);
        postgres.must("initdb", &["--auth=trust", "--data-checksums", "--pgdata", postgres.data.to_str().unwrap()]);
        postgres
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", Self::USER, "--regid", Self::USER, "--clear-groups"]);
        command.arg(self.programs.join(program)).args(arguments);
        command.env("PGHOST", &self.socket).env("PGDATABASE", "postgres").current_dir("/").stdin(Stdio::null());
        command
    }

    fn must(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program, arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Its log goes beside the data's file system, which must be free to be unmounted.
    fn control(&self, verb: &str, more: &[&str]) {
        let (data, log) = (self.data.to_str().unwrap(), self.socket.join("log"));
        let options = format!("-c listen_addresses= -c unix_socket_directories={}", self.socket.display());
        let mut arguments = vec![verb, "--wait", "--timeout=120", "--silent", "--pgdata", data];
        if verb == "start" {
            arguments.extend(["--log", log.to_str().unwrap(), "--options", &options]);
        }
        arguments.extend(more);
        self.must("pg_ctl", &arguments);
    }

    fn ask(&self, query: &str) -> String {
        self.must("psql", &["--no-psqlrc", "--tuples-only", "--no-align", "--command", query])
    }

    /// As many transactions as pgbench was told of, and every balance the sum of its changes.
    fn verify(&self, transactions: usize) {
        assert_eq!(self.ask("select count(*) from pgbench_history"), transactions.to_string());
        let sums = [("abalance", "accounts"), ("bbalance", "branches"), ("tbalance", "tellers"), ("delta", "history")];
        let sums = sums.map(|(column, table)| self.ask(&format!("select sum({column}) from pgbench_{table}")));
        assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let stop = ["stop", "--silent", "--mode=immediate", "--pgdata", self.data.to_str().unwrap()];
        let _ = self.command("pg_ctl", &stop).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

#[test]
fn pgbench_runs_through_killed_agents_needs_root_needs_fuse_needs_postgres() {
    const CLIENTS: usize = 4;
    const TRANSACTIONS: usize = 1000;
    let world = World::new();
    let device = world.mount("ext4");
    let postgres = Postgres::create(&world);
    postgres.control("start", &[]);
    postgres.must("pgbench", &["--initialize", "--quiet", "--scale=2"]);
    let (clients, each) = (CLIENTS.to_string(), TRANSACTIONS.to_string());
    let run = ["--client", &clients, "--jobs=2", "--transactions", &each, "--max-tries=1", "--no-vacuum"];
    let bench = postgres.command("pgbench", &run).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let all = CLIENTS * TRANSACTIONS;
    for quarter in 1..4 {
        let until = Instant::now() + HANG;
        while postgres.ask("select count(*) from pgbench_history").parse::<usize>().unwrap() < all * quarter / 4 {
            assert!(Instant::now() < until, "pgbench does not go on");
        }
        world.kill("agent", "-KILL");
        assert_eq!(world.run(&["attach", "v", "--device"]), device, "the same device");
    }
    let output = bench.wait_with_output().unwrap();
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{error}");
    assert!(said.contains(&format!("transactions actually processed: {all}/{all}")), "{said}{error}");
    postgres.verify(all);
    // Its own recovery, from what it had made durable; then every page's checksum, read from the nodes.
    postgres.control("stop", &["--mode=immediate"]);
    postgres.control("start", &[]);
    postgres.verify(all);
    postgres.control("stop", &["--mode=fast"]);
    world.run(&["detach", "v"]);
    world.mount("ext4");
    postgres.must("pg_checksums", &["--check", "--pgdata", postgres.data.to_str().unwrap()]);
    world.run(&["detach", "v"]);
}
