//! The command line's words.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use holdfast_host::file_system::FileSystem;
use holdfast_id::ClusterId;

#[derive(Parser)]
#[command(name = "holdfast", version, about = "Replicated block volumes that keep working when machines do not")]
pub struct Arguments {
    #[command(flatten)]
    pub cluster: Where,
    #[command(subcommand)]
    pub verb: Verb,
}

/// The cluster that a command is about.
#[derive(Args)]
pub struct Where {
    /// Folder of a cluster made by `dev up`: its nodes and certificates
    #[arg(id = "cluster", long = "cluster", global = true, value_name = "DIR", env = "HOLDFAST_CLUSTER")]
    pub dir: Option<PathBuf>,
    /// Control APIs of storage nodes, HOST:PORT, where there is no such folder; one that answers is enough
    #[arg(id = "cluster-api", long = "cluster-api", global = true, value_name = "ADDRESS", env = "HOLDFAST_API")]
    #[arg(value_delimiter = ',')]
    pub api: Vec<String>,
    /// Folder with ca.pem, and with tls.pem and tls.key of role admin, beside --cluster-api
    #[arg(id = "cluster-pki", long = "cluster-pki", global = true, value_name = "DIR", env = "HOLDFAST_PKI")]
    pub pki: Option<PathBuf>,
}

#[derive(Subcommand)]
pub enum Verb {
    /// Three nodes, a volume, a killed leader: see it keep every byte, in half a minute
    Demo(Demo),
    /// A local cluster of real storage nodes
    #[command(subcommand)]
    Dev(Dev),
    /// Nodes, volumes and what is wrong, at a glance
    Status(Format),
    /// The nodes of the cluster
    #[command(subcommand)]
    Node(Node),
    /// The volumes of the cluster
    #[command(subcommand)]
    Volume(Volume),
    /// Attach a volume to this machine
    Attach(Attach),
    /// End an attachment of this machine
    Detach(Detach),
    /// Why something is as it is
    Explain(Explain),
    /// The disks of the cluster; or look at one that no node has open
    #[command(subcommand)]
    Disk(Disk),
    /// Print the script that makes this command line `kubectl holdfast`
    KubectlPlugin,
    /// Run a storage node
    StorageNode(StorageNode),
    /// Run the attach agent of this machine
    Agent(Agent),
    /// Hold the devices of an agent while it is away
    Keeper(Keeper),
}

impl Verb {
    pub fn prints_lists(&self) -> bool {
        matches!(self, Verb::Status(_) | Verb::Explain(_) | Verb::Node(_) | Verb::Volume(_) | Verb::Disk(_))
    }

    pub fn is_daemon(&self) -> bool {
        matches!(self, Verb::StorageNode(_) | Verb::Agent(_) | Verb::Keeper(_) | Verb::Dev(Dev::Up(_)))
    }
}

#[derive(Args, Clone, Copy)]
pub struct Format {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct Demo {
    /// Keep the cluster's folder
    #[arg(long)]
    pub keep: bool,
    /// How much data is written, in MiB
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(16..=512))]
    pub data: u64,
}

#[derive(Subcommand)]
pub enum Dev {
    /// Start a cluster and stay in the foreground; on an existing folder, start what is there
    Up(DevUp),
    /// Stop or start one node of the running cluster
    #[command(subcommand)]
    Node(DevNode),
}

#[derive(Args)]
pub struct DevUp {
    /// Nodes of a new cluster; the first one or three hold the metadata plane
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub nodes: u8,
    /// The cluster's folder
    #[arg(long)]
    pub dir: PathBuf,
    /// Size of each node's disk, such as 4GiB
    #[arg(long, default_value = "4GiB", value_parser = size)]
    pub disk_size: u64,
    /// Leave dead nodes dead
    #[arg(long)]
    pub no_restart: bool,
    /// Faults of every disk, such as lose-unflushed
    #[arg(long)]
    pub device_fault: Option<String>,
}

#[derive(Subcommand)]
pub enum DevNode {
    Stop {
        name: String,
        #[arg(long)]
        dir: PathBuf,
    },
    Start {
        name: String,
        #[arg(long)]
        dir: PathBuf,
    },
}

#[derive(Subcommand)]
pub enum Node {
    /// List the nodes and their disks
    List(Format),
    /// Let a node take copies, also one that was about to be removed; with `dev`, a name that is not there is started
    Add {
        name: String,
        #[command(flatten)]
        format: Format,
    },
    /// Move what a node holds elsewhere, then let it go for good
    Remove {
        name: String,
        #[command(flatten)]
        format: Format,
    },
    /// What a node had is lost: make its copies again, on its new disk or elsewhere
    Replace {
        name: String,
        #[command(flatten)]
        format: Format,
    },
}

#[derive(Subcommand)]
pub enum Volume {
    /// Create a volume and wait until its copies exist
    Create {
        name: String,
        /// Such as 4Gi or 512MiB; a multiple of 4 KiB
        #[arg(long, value_parser = size)]
        size: u64,
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
        replicas: u32,
        /// 512 or 4096
        #[arg(long, default_value_t = 512)]
        block: u32,
        #[command(flatten)]
        format: Format,
    },
    List(Format),
    /// One volume with the state of each copy
    Get {
        name: String,
        #[command(flatten)]
        format: Format,
    },
    /// Grow a volume
    Resize {
        name: String,
        #[arg(long, value_parser = size)]
        size: u64,
        #[command(flatten)]
        format: Format,
    },
    /// Change what a volume is to be, while it is used
    Set {
        name: String,
        /// Copies, each on its own node; they are made or taken out one after the other
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        replicas: u32,
        #[command(flatten)]
        format: Format,
    },
    /// Delete a volume and its data
    Delete {
        name: String,
    },
}

#[derive(Args)]
pub struct Attach {
    pub volume: String,
    #[command(flatten)]
    pub how: AttachHow,
    /// The file system to make on a volume that has none
    #[arg(long, value_name = "TYPE", conflicts_with_all = ["device", "nbd_socket"])]
    pub fs: Option<FileSystem>,
    /// Fence whoever holds it now
    #[arg(long)]
    pub take_over: bool,
    /// Which agent of this machine: each has its own attachments
    #[arg(long, default_value = "local")]
    pub agent: String,
    #[command(flatten)]
    pub format: Format,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct AttachHow {
    /// Serve it as an NBD device on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub nbd_socket: Option<PathBuf>,
    /// Make it a block device of this machine, and print which; needs root
    #[arg(long)]
    pub device: bool,
    /// Mount it at this directory, with a file system made where it has none; needs root
    #[arg(long, value_name = "DIR")]
    pub mount: Option<PathBuf>,
}

#[derive(Args)]
pub struct Keeper {
    /// Where the agent finds it
    #[arg(long)]
    pub socket: PathBuf,
    /// End once there is nothing to hold and nobody is connected
    #[arg(long)]
    pub until_idle: bool,
}

#[derive(Args)]
pub struct Detach {
    pub volume: String,
    /// Also while a client uses the device
    #[arg(long)]
    pub force: bool,
    #[arg(long, default_value = "local")]
    pub agent: String,
}

#[derive(Args)]
pub struct Explain {
    #[command(subcommand)]
    pub subject: Subject,
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Subcommand)]
pub enum Subject {
    Cluster,
    Volume {
        name: String,
    },
    /// The volume of a PersistentVolumeClaim of Kubernetes
    Pvc {
        #[arg(value_name = "NAMESPACE/NAME")]
        claim: String,
    },
    Node {
        name: String,
    },
    /// By identifier, or by the name of its node
    Disk {
        name: String,
    },
}

#[derive(Subcommand)]
pub enum Disk {
    /// List the disks of the cluster
    List(Format),
    /// Let a disk take copies again that was about to be removed
    Add {
        /// Identifier, or the name of its node
        disk: String,
        #[command(flatten)]
        format: Format,
    },
    /// Move what a disk holds elsewhere, then let it go for good
    Remove {
        /// Identifier, or the name of its node
        disk: String,
        #[command(flatten)]
        format: Format,
    },
    /// A disk is lost for ever: make its copies again on others
    Replace {
        /// Identifier, or the name of its node
        disk: String,
        #[command(flatten)]
        format: Format,
    },
    /// What is on the disk
    Describe { device: PathBuf },
    /// Whether it is consistent; fails where it is not
    Check { device: PathBuf },
}

#[derive(Args)]
pub struct StorageNode {
    /// 1 to 63 lower-case letters, digits and hyphens; names the certificate files
    #[arg(long)]
    pub name: String,
    /// Where the node keeps what is not on its disk
    #[arg(long)]
    pub dir: PathBuf,
    /// Block device or file; default: DIR/disk
    #[arg(long)]
    pub device: Option<PathBuf>,
    /// Size of a file that is to be made
    #[arg(long, default_value = "4GiB", value_parser = size)]
    pub disk_size: u64,
    /// Nodes and attached machines connect here
    #[arg(long)]
    pub listen: SocketAddr,
    /// The control API
    #[arg(long)]
    pub api: SocketAddr,
    /// Where others reach it, HOST:PORT; default: what it listens on
    #[arg(long, value_name = "ADDRESS")]
    pub advertise: Option<String>,
    /// Where others reach its control API, HOST:PORT; default: what it listens on
    #[arg(long, value_name = "ADDRESS")]
    pub advertise_api: Option<String>,
    /// The failure domain above this node; empty: none
    #[arg(long)]
    pub zone: Option<String>,
    /// Plain HTTP for probes and scrapers: /healthz and /metrics
    #[arg(long, value_name = "ADDRESS")]
    pub http: Option<SocketAddr>,
    /// Folder with ca.pem, NAME.pem and NAME.key
    #[arg(long)]
    pub pki: PathBuf,
    /// Format an empty disk for this cluster and join it
    #[arg(long, value_name = "CLUSTER", requires = "seeds")]
    pub join: Option<ClusterId>,
    /// Control API of a node that is in the cluster; several times for several
    #[arg(long = "seed", value_name = "ADDRESS")]
    pub seeds: Vec<String>,
    /// Folder for a Unix socket by which agents of this machine connect
    #[arg(long)]
    pub sockets: Option<PathBuf>,
    #[arg(long)]
    pub device_fault: Option<String>,
}

#[derive(Args)]
pub struct Agent {
    /// The agent's folder: records and control socket
    #[arg(long)]
    pub dir: PathBuf,
    /// Who attaches, in words an operator knows
    #[arg(long)]
    pub holder: String,
    /// Folder with ca.pem, agent-HOLDER.pem and agent-HOLDER.key
    #[arg(long)]
    pub pki: PathBuf,
    /// Folder with the Unix sockets of the storage nodes of this machine
    #[arg(long)]
    pub sockets: Option<PathBuf>,
    /// Where a keeper that others run listens; default: one in DIR that the agent starts
    #[arg(long, value_name = "PATH")]
    pub keeper_socket: Option<PathBuf>,
    /// Get the certificate from who enrols machines there, HOST:PORT, and renew it
    #[arg(long, value_name = "ADDRESS", requires_all = ["enroll_token", "enroll_ca"])]
    pub enroll: Option<String>,
    /// File with the token that says which machine this is
    #[arg(long, value_name = "FILE", requires = "enroll")]
    pub enroll_token: Option<PathBuf>,
    /// File with the authority of who enrols
    #[arg(long, value_name = "FILE", requires = "enroll")]
    pub enroll_ca: Option<PathBuf>,
    /// Plain HTTP for probes and scrapers: /healthz and /metrics
    #[arg(long, value_name = "ADDRESS")]
    pub http: Option<SocketAddr>,
}

/// `4096`, `4Ki`, `4KiB`, `4k`; decimal units are refused, so that nobody gets less than they meant.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no size; say 512MiB or 4GiB"))?;
    let shift = match &text[digits.len()..] {
        "" | "B" => 0,
        "k" | "K" | "Ki" | "KiB" => 10,
        "M" | "Mi" | "MiB" => 20,
        "G" | "Gi" | "GiB" => 30,
        "T" | "Ti" | "TiB" => 40,
        unit => return Err(format!("{unit:?} is no unit; use Ki, Mi, Gi or Ti")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_volume_is_attached_in_exactly_one_way() {
        let parse = |ways: &[&str]| Arguments::try_parse_from([&["holdfast", "attach", "v"], ways].concat()).is_ok();
        assert!(parse(&["--device"]) && parse(&["--nbd-socket", "/s"]) && parse(&["--mount", "/m", "--fs", "xfs"]));
        assert!(!parse(&[]) && !parse(&["--device", "--mount", "/m"]) && !parse(&["--device", "--fs", "xfs"]));
    }

    #[test]
    fn sizes_are_binary() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("4Gi"), Ok(4 << 30));
        assert_eq!(size("16M"), Ok(16 << 20));
        assert!(size("4GB").is_err());
        assert!(size("-1").is_err());
        assert!(size("99999999999Ti").is_err());
    }
}
