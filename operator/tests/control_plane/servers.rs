//! [`Servers`]: an API server of one test, with the chart's objects in it, and the operator beside it.

use std::env;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use holdfast_transport::pki::{Authority, Validity};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tempfile::TempDir;

use crate::wait::until;

pub const SYSTEM: &str = "holdfast-system";
/// Where the StorageClusters are.
pub const NAMESPACE: &str = "storage";
const DAY: Duration = Duration::from_secs(86_400);
/// Lines of each log that a failed test prints.
const LINES: usize = 25;

/// Ended with everything it started, however the test ends.
pub struct Servers {
    pub folder: TempDir,
    processes: Vec<Process>,
    pub client: Client,
}

/// Killed when it is dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(LINES)..].join("\n");
            eprintln!("== {}\n{tail}", self.log.display());
        }
    }
}

/// Addresses of this process alone: every machine has all of 127.0.0.0/8 for itself. So ports may be those of
/// production, whichever tests run side by side.
pub fn address(index: u32) -> Ipv4Addr {
    assert!(index < 8);
    let own = (std::process::id() << 3 | index) & 0x00ff_ffff;
    Ipv4Addr::from(0x7f00_0000 | own)
}

impl Servers {
    pub async fn start() -> Servers {
        let folder = tempfile::Builder::new().prefix("holdfast-").tempdir().unwrap();
        let at = address(0);
        let mut processes = vec![start(
            folder.path(),
            "etcd",
            Command::new("etcd")
                .arg(format!("--data-dir={}", folder.path().join("etcd").display()))
                .args(["--name=etcd", "--unsafe-no-fsync", "--log-level=warn"])
                .args([
                    format!("--listen-client-urls=http://{at}:2379"),
                    format!("--advertise-client-urls=http://{at}:2379"),
                ])
                .args([
                    format!("--listen-peer-urls=http://{at}:2380"),
                    format!("--initial-advertise-peer-urls=http://{at}:2380"),
                ])
                .arg(format!("--initial-cluster=etcd=http://{at}:2380")),
        )];
        let authority = authority();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let (key, certificate) = (file("sa.key", authority.key_pem()), file("sa.pem", authority.certificate_pem()));
        let operator = format!("system:serviceaccount:{SYSTEM}:holdfast-operator");
        let tokens = format!(
            "admin,admin,admin,\"system:masters\"\noperator,{operator},operator,\"system:serviceaccounts,system:authenticated\"\n"
        );
        let tokens = file("tokens.csv", &tokens);
        for user in ["admin", "operator"] {
            file(&format!("{user}.kubeconfig"), &kubeconfig(at, user));
        }
        processes.push(start(
            folder.path(),
            "kube-apiserver",
            Command::new("kube-apiserver")
                .arg(format!("--etcd-servers=http://{at}:2379"))
                .args([format!("--bind-address={at}"), format!("--advertise-address={at}")])
                .args([
                    "--secure-port=6443",
                    "--endpoint-reconciler-type=none",
                    "--service-cluster-ip-range=10.0.0.0/24",
                ])
                .arg(format!("--cert-dir={}", folder.path().join("certificates").display()))
                .args(["--service-account-issuer=https://holdfast.test", "--authorization-mode=RBAC"])
                .arg(format!("--service-account-key-file={certificate}"))
                .arg(format!("--service-account-signing-key-file={key}"))
                .arg(format!("--token-auth-file={tokens}"))
                .args(["--allow-privileged=true", "--disable-admission-plugins=ServiceAccount"]),
        ));
        let kubeconfig = Kubeconfig::read_from(folder.path().join("admin.kubeconfig")).unwrap();
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        let client = Client::try_from(config).unwrap();
        let mut servers = Servers { folder, processes, client };
        until("the API server answers", async || {
            for process in &mut servers.processes {
                let ended = process.child.try_wait().unwrap();
                assert!(ended.is_none(), "{}: {ended:?}", process.log.display());
            }
            servers.try_kubectl(&["get", "--raw=/readyz"], "")
        })
        .await;
        for namespace in [SYSTEM, NAMESPACE] {
            servers.kubectl(&["create", "namespace", namespace], "");
        }
        let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/holdfast");
        let mut helm = Command::new("helm");
        let chart = run(helm.args(["template", "holdfast", chart, "--no-hooks", "--namespace", SYSTEM]), "").unwrap();
        servers.kubectl(&["apply", "--server-side", "--namespace", SYSTEM, "--filename", "-"], &chart);
        let crds = ["storageclusters", "volumes", "storagenodes", "storagedisks"]
            .map(|kind| format!("crd/{kind}.holdfast.dev"));
        let wait: Vec<&str> = ["wait", "--for=condition=Established", "--timeout=120s"]
            .into_iter()
            .chain(crds.iter().map(String::as_str))
            .collect();
        servers.kubectl(&wait, "");
        servers
    }

    pub fn kubectl(&self, arguments: &[&str], input: &str) -> String {
        self.try_kubectl(arguments, input).unwrap()
    }

    fn try_kubectl(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let kubeconfig = self.folder.path().join("admin.kubeconfig");
        run(Command::new("kubectl").arg("--kubeconfig").arg(kubeconfig).args(arguments), input)
    }

    /// The operator as the chart starts it. `hosts`: names of pods, and their addresses.
    pub fn operator(&self, hosts: &[(String, Ipv4Addr)]) -> Process {
        let text: String = hosts.iter().map(|(name, address)| format!("{address} {name}\n")).collect();
        fs::write(self.folder.path().join("hosts"), text).unwrap();
        let at = address(0);
        let mut command = self.with_names(env!("CARGO_BIN_EXE_holdfast-operator"));
        command
            .env("KUBECONFIG", self.folder.path().join("operator.kubeconfig"))
            .env("HOLDFAST_DEFAULT_CLUSTER", self.folder.path().join("none"))
            .args(["--image=holdfast:test", "--namespace", SYSTEM, "--pod-name=operator-0"])
            .args(["--provisioner-image=provisioner", "--attacher-image=attacher", "--resizer-image=resizer"])
            .args([format!("--http={at}:7722"), format!("--enroll={at}:7723")]);
        start(self.folder.path(), "operator", &mut command)
    }

    /// A program for which the names of pods resolve.
    pub fn with_names(&self, program: &str) -> Command {
        let mut command = Command::new("unshare");
        let script = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
        command.args(["--mount", "sh", "-c", script]).arg(self.folder.path().join("hosts")).arg(program);
        command
    }

    /// Looks of the operator at objects of a kind, since it started.
    pub fn looks(&self, kind: &str) -> Result<u64, String> {
        let page = get(SocketAddr::from((address(0), 7722)), "/metrics").map_err(|error| error.to_string())?;
        let name = format!("holdfast_operator_reconciles_total{{kind=\"{kind}\"}} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&name)).ok_or("the operator tells no count")?;
        line.trim().parse().map_err(|_| format!("{line:?} is no count"))
    }
}

/// Starts it with its output in a file of its name.
pub fn start(folder: &Path, name: &str, command: &mut Command) -> Process {
    let log = folder.join(format!("{name}.log"));
    let file = File::create(&log).unwrap();
    let child = command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).spawn();
    Process { child: child.unwrap_or_else(|error| panic!("{name}: {error}")), log }
}

fn run(command: &mut Command, input: &str) -> Result<String, String> {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it is in PATH");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{command:?}: {}", text(&output.stderr)))
    }
}

fn authority() -> Authority {
    let now = SystemTime::now();
    Authority::create("accounts", Validity { not_before: now - DAY, not_after: now + DAY }).unwrap()
}

fn kubeconfig(at: Ipv4Addr, user: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: test\nclusters: [{{name: test, cluster: {{server: \
         \"https://{at}:6443\", insecure-skip-tls-verify: true}}}}]\nusers: [{{name: {user}, user: {{token: \
         {user}}}}}]\ncontexts: [{{name: test, context: {{cluster: test, user: {user}}}}}]\n"
    )
}

fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: operator\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
