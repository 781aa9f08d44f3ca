//! `cargo xtask cluster`: a Kubernetes cluster in containers, by kind, and our images in it.
//!
//! Where kind is installed and its registry answers, this is ordinary kind. Elsewhere the node image is made from package
//! registries (`e2e/offline`); manifests, image names and tests are the same both ways.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::run::Step;
use crate::tasks::image;
use crate::workspace::Workspace;

/// Answers without an account where a machine reaches registries at all; Kubernetes' own images are there.
const REGISTRY: &str = "https://registry.k8s.io/v2/";
const REGISTRY_SECONDS: &str = "10";
/// Time for nodes to become ready; half a minute on two idle processors.
const READY: &str = "300s";
/// Workers in `e2e/kind.yaml`.
const WORKERS: usize = 3;

#[derive(clap::Args)]
pub struct Options {
    /// Name of the kind cluster
    #[arg(long, global = true, default_value = "holdfast")]
    name: String,
    /// Workers of a cluster that is made
    #[arg(long, global = true, default_value_t = WORKERS)]
    workers: usize,
}

#[derive(clap::Subcommand)]
pub enum Action {
    /// Make the cluster unless it is there, and print what to export
    Up,
    /// Load the image of `cargo xtask image` into its nodes
    Load,
    /// Delete the cluster
    Down,
}

/// A kind cluster, there or not, and the programs that work on it.
pub struct Cluster<'a> {
    workspace: &'a Workspace,
    name: &'a str,
    workers: usize,
    pub kubeconfig: PathBuf,
    /// Folder and node image made by `e2e/offline`; `None` with a registry.
    offline: Option<Offline>,
}

struct Offline {
    programs: PathBuf,
    image: String,
}

pub fn run(workspace: &Workspace, action: &Action, options: &Options) -> Result<()> {
    let cluster = Cluster::find(workspace, options)?;
    match action {
        Action::Up => cluster.up()?,
        Action::Load => return cluster.load(&[image::name(workspace)?]),
        Action::Down => return cluster.down(),
    }
    println!("export KUBECONFIG={} PATH={}", cluster.kubeconfig.display(), cluster.path().display());
    Ok(())
}

impl<'a> Cluster<'a> {
    pub fn find(workspace: &'a Workspace, options: &'a Options) -> Result<Cluster<'a>> {
        let cache = match env::var_os("XDG_CACHE_HOME") {
            Some(cache) => PathBuf::from(cache),
            None => {
                PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?).join(".cache")
            }
        };
        let kubeconfig = cache.join("holdfast-e2e").join(format!("kubeconfig-{}", options.name));
        let offline = if has_registry() { None } else { Some(Offline::names(workspace)?) };
        Ok(Cluster { workspace, name: &options.name, workers: options.workers, kubeconfig, offline })
    }

    /// Makes the cluster unless it is there.
    pub fn up(&self) -> Result<()> {
        if let Some(offline) = &self.offline {
            offline.prepare(self.workspace)?;
        }
        if self.exists()? {
            return Ok(());
        }
        fs::create_dir_all(self.kubeconfig.parent().expect("the kubeconfig is in the cache's folder"))?;
        let config = self.workspace.target.join(format!("kind-{}.yaml", self.name));
        fs::write(&config, self.config()?).with_context(|| config.display().to_string())?;
        let mut arguments = self.kind_arguments(&["create", "cluster", "--wait", READY]);
        arguments.extend(["--config".into(), config.into(), "--kubeconfig".into(), self.kubeconfig.clone().into()]);
        if let Some(offline) = &self.offline {
            arguments.extend(["--image".into(), offline.image.clone().into()]);
        }
        self.step("make the cluster", "kind", &arguments).run()?;
        // kind waits for the control plane only.
        let wait = ["wait", "--for=condition=Ready", "node", "--all", "--timeout", READY];
        self.step("wait for the nodes", "kubectl", &wait).run()
    }

    /// Loads images into every node, as one archive.
    pub fn load(&self, images: &[String]) -> Result<()> {
        let mut arguments = self.kind_arguments(&["load", "docker-image"]);
        arguments.extend(images.iter().map(OsString::from));
        self.step(&format!("load {}", images.join(", ")), "kind", &arguments).run()
    }

    fn down(&self) -> Result<()> {
        let mut arguments = self.kind_arguments(&["delete", "cluster", "--kubeconfig"]);
        arguments.push(self.kubeconfig.clone().into());
        self.step("delete the cluster", "kind", &arguments).run()
    }

    /// A program that sees the cluster.
    pub fn step<A: AsRef<OsStr>>(&self, title: &str, program: impl AsRef<OsStr>, arguments: &[A]) -> Step {
        let program = match &self.offline {
            Some(offline) if offline.programs.join(program.as_ref()).exists() => {
                offline.programs.join(program.as_ref()).into_os_string()
            }
            _ => program.as_ref().to_owned(),
        };
        Step::program(self.workspace, title, program, arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            .env("PATH", self.path())
    }

    fn path(&self) -> OsString {
        let rest = env::var_os("PATH").unwrap_or_default();
        match &self.offline {
            Some(offline) => prepended(&offline.programs, &rest),
            None => rest,
        }
    }

    fn exists(&self) -> Result<bool> {
        let kind = self.offline.as_ref().map_or(PathBuf::from("kind"), |offline| offline.programs.join("kind"));
        let output = Command::new(kind).args(["get", "clusters"]).stdin(Stdio::null()).output().context("kind")?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().any(|name| name == self.name))
    }

    fn kind_arguments(&self, words: &[&str]) -> Vec<OsString> {
        words.iter().copied().chain(["--name", self.name]).map(OsString::from).collect()
    }

    fn config(&self) -> Result<String> {
        let read = |path: &str| fs::read_to_string(self.workspace.root.join(path)).context(path.to_owned());
        if self.workers < WORKERS {
            bail!("--workers {}: at least {WORKERS}, one for each copy of a volume", self.workers);
        }
        let mut config = read("e2e/kind.yaml")?;
        config.push_str(&"- role: worker\n".repeat(self.workers - WORKERS));
        if self.offline.is_some() {
            config.push_str(&read("e2e/offline/kind.tail.yaml")?);
        }
        Ok(config)
    }
}

impl Offline {
    fn names(workspace: &Workspace) -> Result<Offline> {
        let script = workspace.root.join("e2e/offline/node-image");
        let output = Command::new(&script).arg("--names").stderr(Stdio::inherit()).output();
        let output = output.with_context(|| script.display().to_string())?;
        let names = String::from_utf8(output.stdout).context("node-image --names")?;
        let value = |key: &str| {
            let line = names.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            line.map(str::to_owned).with_context(|| format!("node-image --names does not tell {key}"))
        };
        Ok(Offline { programs: value("bin")?.into(), image: value("image")? })
    }

    fn prepare(&self, workspace: &Workspace) -> Result<()> {
        let script = |name: &str| workspace.root.join("e2e/offline").join(name);
        let none: [&str; 0] = [];
        Step::program(workspace, "prepare the machine for kind", script("machine"), &none).run()?;
        Step::program(workspace, "node image from package registries", script("node-image"), &none)
            .stdout_to_stderr()
            .run()
    }
}

/// Programs of Kubernetes that `e2e/offline` has built, where it has.
pub fn programs(workspace: &Workspace) -> Option<PathBuf> {
    Offline::names(workspace).ok().map(|offline| offline.programs).filter(|folder| folder.join("complete").exists())
}

/// Whether ordinary kind will do: its programs are installed and a registry answers.
fn has_registry() -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let installed = |program: &str| env::split_paths(&path).any(|folder| folder.join(program).is_file());
    ["kind", "kubectl", "helm"].into_iter().all(installed)
        && Command::new("curl")
            .args([
                "--silent",
                "--fail",
                "--location",
                "--output",
                "/dev/null",
                "--max-time",
                REGISTRY_SECONDS,
                REGISTRY,
            ])
            .stdin(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}

fn prepended(folder: &Path, path: &OsStr) -> OsString {
    let mut all = folder.as_os_str().to_owned();
    all.push(":");
    all.push(path);
    all
}
