//! The volumes of this machine: attached, staged, published, grown and looked at. Waits for the host and the agent, so
//! every call has a thread; the service above holds the volume's lock.
//!
//! Every step looks at what is there first, so that a call may come again after a crash at any line of it. What this
//! process knows it reads from the agent, the kernel's mounts and the volume's [`Record`].

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdfast_agent::{Code as AgentCode, FormattedState, VolumeStatus};
use holdfast_host::file_system::{self, Before, FileSystem, Usage};
use holdfast_host::mounts::{self, Mount};

use super::agent::{Agent, AgentError};
use super::error::NodeError;
use super::plan::{self, Served, Step};
use super::record::{Record, Records};
use super::request::{Publish, Stage};
use crate::capability::Kind;

/// Each turn ends an obstacle or finds the device: a former epoch's, one that failed, a change in between.
const TURNS_MAX: usize = 6;
/// The device learns of a new size from the cluster, a moment after the volume has it.
const GROWN_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub struct Volumes {
    pub agent: Agent,
    pub records: Records,
}

impl Volumes {
    /// Brings the volume to this machine, and its file system to `staging`.
    pub fn stage(&self, stage: &Stage) -> Result<(), NodeError> {
        let mut record = match self.records.load(&stage.name)? {
            Some(record) if record.staging != stage.staging || record.volume != stage.grant.volume => {
                return Err(NodeError::StagedOtherwise { name: stage.name.clone(), path: record.staging });
            }
            Some(record) if record.block != stage.access.is_block() => {
                return Err(NodeError::StagedOtherwise { name: stage.name.clone(), path: record.staging });
            }
            Some(record) if record.epoch > stage.grant.epoch => {
                let (wanted, current) = (stage.grant.epoch, record.epoch);
                return Err(plan::Refusal::Stale { wanted, current }.into());
            }
            Some(record) => record,
            None => {
                let staging = stage.staging.clone();
                Record::new(stage.grant.volume, 0, staging, stage.access.is_block())
            }
        };
        if record.epoch != stage.grant.epoch {
            record.epoch = stage.grant.epoch;
            self.records.save(&stage.name, &record)?;
        }
        let served = self.device(stage)?;
        match &stage.access.kind {
            Kind::Block => {
                // Nobody shall ever make a file system over what its user writes there. One state comes after the other.
                if served.formatted == FormattedState::None {
                    self.agent.set_formatted(stage.grant.volume, FormattedState::Formatting)?;
                }
                if served.formatted != FormattedState::Formatted {
                    self.agent.set_formatted(stage.grant.volume, FormattedState::Formatted)?;
                }
                Ok(())
            }
            Kind::Mount { file_system, options } => self.mount(stage, &served, *file_system, options),
        }
    }

    /// Takes it away from `staging` and from this machine; the attachment stays the controller's.
    pub fn unstage(&self, name: &str, staging: &Path) -> Result<(), NodeError> {
        mounts::unmount(staging)?;
        let Some(record) = self.records.load(name)? else { return Ok(()) };
        if record.staging != staging {
            // It is staged elsewhere, and not asked to leave there.
            return Ok(());
        }
        self.agent.release(record.volume, false)?;
        self.records.remove(name)?;
        Ok(())
    }

    /// Makes the staged volume appear at the target, as a directory or as a device.
    pub fn publish(&self, publish: &Publish) -> Result<(), NodeError> {
        let Publish { stage, target, read_only } = publish;
        let name = &stage.name;
        let record = self.records.load(name)?.filter(|record| record.staging == stage.staging);
        let mut record = record.ok_or_else(|| NodeError::NotStaged(name.clone()))?;
        if stage.access.single_writer {
            for other in record.targets.iter().filter(|other| *other != target) {
                if mounts::at(other)?.is_some() {
                    return Err(NodeError::PublishedElsewhere { name: name.clone(), path: other.clone() });
                }
            }
        }
        // Kubelet does not stage again for another pod of the same node, whatever has become of the device since.
        self.stage(stage)?;
        // Staging may have recorded a later epoch.
        record.epoch = stage.grant.epoch;
        if record.targets.insert(target.clone()) {
            self.records.save(name, &record)?;
        }
        let served = self.device(stage)?;
        if stage.access.is_block() {
            publish_device(&served.device, target, *read_only)
        } else {
            publish_directory(name, &stage.staging, &served.device, target, *read_only)
        }
    }

    pub fn unpublish(&self, name: &str, target: &Path) -> Result<(), NodeError> {
        mounts::unmount(target)?;
        let removed = match fs::symlink_metadata(target) {
            // Only what is empty: what somebody has put there meanwhile is theirs.
            Ok(metadata) if metadata.is_dir() => fs::remove_dir(target),
            Ok(_) => fs::remove_file(target),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(NodeError::Path { path: target.to_owned(), source: error });
            }
            _ => {}
        }
        if let Some(mut record) = self.records.load(name)?
            && record.targets.remove(target)
        {
            self.records.save(name, &record)?;
        }
        Ok(())
    }

    /// Lets the file system use what the volume has grown by; returns the device's size.
    pub fn expand(&self, name: &str, path: &Path, wanted: u64, limit: u64) -> Result<u64, NodeError> {
        let (record, status) = self.known(name, path)?;
        let device = status.and_then(|status| status.device).ok_or_else(|| NodeError::NotStaged(name.to_owned()))?;
        let until = Instant::now() + GROWN_WITHIN;
        let size = loop {
            let now = file_system::size(&device)?;
            if now >= wanted {
                break now;
            }
            if Instant::now() >= until {
                return Err(NodeError::NotGrown { now, wanted });
            }
            std::thread::sleep(LOOK_EVERY);
        };
        if limit != 0 && size > limit {
            return Err(NodeError::TooLarge { now: size, limit });
        }
        if !record.block {
            let mount = mounts::at(&record.staging)?.filter(|mount| mount.source == device);
            let mount = mount.ok_or_else(|| NodeError::NotStaged(name.to_owned()))?;
            file_system::grow_mounted(&device, &record.staging, mount.file_system.parse()?)?;
        }
        Ok(size)
    }

    /// What the file system at `path` has and has left; of a device only its size.
    pub fn usage(&self, name: &str, path: &Path) -> Result<Usage, NodeError> {
        let (record, status) = self.known(name, path)?;
        if record.block {
            let size = status.and_then(|status| status.size_bytes);
            let total_bytes = size.ok_or_else(|| NodeError::NotStaged(name.to_owned()))?;
            return Ok(Usage { total_bytes, available_bytes: 0, used_bytes: 0, total_inodes: 0, free_inodes: 0 });
        }
        if mounts::at(path)?.is_none() {
            return Err(NodeError::NotThere { name: name.to_owned(), path: path.to_owned() });
        }
        Ok(file_system::usage(path)?)
    }

    /// The record of a volume and what the agent says of it; without a path to check where that is empty.
    pub fn known(&self, name: &str, path: &Path) -> Result<(Record, Option<VolumeStatus>), NodeError> {
        let not_there = || NodeError::NotThere { name: name.to_owned(), path: path.to_owned() };
        let record = self.records.load(name)?.ok_or_else(not_there)?;
        let status = self.agent.volume(record.volume)?;
        if !path.as_os_str().is_empty() && !record.knows(path) {
            // kubelet asks for raw block volumes by a mount of its own.
            let device = status.as_ref().and_then(|status| status.device.as_deref()).filter(|_| record.block);
            if !device.map_or(Ok(false), |device| file_system::is_same_device(path, device))? {
                return Err(not_there());
            }
        }
        Ok((record, status))
    }

    /// The volume's device in the epoch that was granted.
    fn device(&self, stage: &Stage) -> Result<Served, NodeError> {
        let (volume, epoch) = (stage.grant.volume, stage.grant.epoch);
        for _ in 0..TURNS_MAX {
            let status = self.agent.volume(volume)?;
            match plan::device(status.as_ref(), epoch) {
                Step::Use(served) => return Ok(served),
                Step::Refuse(refusal) => return Err(refusal.into()),
                Step::Attach => match self.agent.attach(volume, epoch, stage.grant.nodes.clone()) {
                    // Something else came between: it is looked at again.
                    Ok(_) | Err(AgentError::Refused { code: AgentCode::Exists | AgentCode::Fenced, .. }) => {}
                    Err(error) => return Err(error.into()),
                },
                Step::Replace { device } => {
                    tracing::warn!(volume = %volume, epoch, name = stage.name, "the former device is replaced");
                    if let Some(device) = device
                        && mounts::at(&stage.staging)?.is_some_and(|mount| mount.source == device)
                    {
                        mounts::unmount_lazily(&stage.staging)?;
                    }
                    self.agent.release(volume, true)?;
                }
            }
        }
        Err(NodeError::Unsettled)
    }

    fn mount(
        &self,
        stage: &Stage,
        served: &Served,
        wanted: Option<FileSystem>,
        options: &[String],
    ) -> Result<(), NodeError> {
        let Served { device, formatted } = served;
        if let Some(mount) = mounts::at(&stage.staging)? {
            if mount.source == *device && wanted.is_some_and(|wanted| wanted.name() != mount.file_system) {
                let path = stage.staging.clone();
                return Err(NodeError::StagedOtherwise { name: stage.name.clone(), path });
            }
            if mount.source == *device && (stage.access.read_only || !mount.file_system_read_only) {
                return Ok(());
            }
            take_away(&stage.staging, &mount, device)?;
        }
        let before = match formatted {
            FormattedState::Formatted => None,
            FormattedState::None => Some(Before::Zeroes),
            FormattedState::Formatting => Some(Before::Anything),
        };
        if let Some(before) = before {
            let kind = wanted.unwrap_or(FileSystem::Ext4);
            self.agent.set_formatted(stage.grant.volume, FormattedState::Formatting)?;
            file_system::make(device, kind, before, &stage.mkfs_options)?;
            self.agent.set_formatted(stage.grant.volume, FormattedState::Formatted)?;
        }
        let kind = file_system::recognise(device, wanted)?;
        // Where pods still have it, it is in use, and neither checked nor changed under them.
        let in_use = !mounts::of_device(device)?.is_empty();
        if !in_use {
            file_system::check(device, kind)?;
            file_system::grow_unmounted(device, kind)?;
        }
        let mut all: Vec<String> = kind.mount_options().iter().map(|option| (*option).to_owned()).collect();
        all.extend(options.iter().cloned());
        if stage.access.read_only {
            all.push("ro".into());
        }
        mounts::mount(kind.name(), device, &stage.staging, &all)?;
        if kind == FileSystem::Xfs && !stage.access.read_only {
            file_system::grow_mounted(device, &stage.staging, kind)?;
        }
        Ok(())
    }
}

/// Ends a mount that is of no use: of another device, or made read-only by an error.
fn take_away(staging: &Path, mount: &Mount, device: &Path) -> Result<(), NodeError> {
    tracing::warn!(staging = %staging.display(), ?mount, "an unusable mount is replaced");
    if mount.source == device {
        mounts::unmount(staging)?;
    } else {
        mounts::unmount_lazily(staging)?;
    }
    Ok(())
}

fn publish_directory(
    name: &str,
    staging: &Path,
    device: &Path,
    target: &Path,
    read_only: bool,
) -> Result<(), NodeError> {
    match mounts::at(target)? {
        Some(mount) if mount.source == *device => {
            return match (mount.read_only, read_only) {
                (false, true) => Ok(mounts::make_read_only(target)?),
                (true, false) => Err(NodeError::PublishedOtherwise { name: name.to_owned(), path: target.to_owned() }),
                _ => Ok(()),
            };
        }
        Some(_) => mounts::unmount_lazily(target)?,
        None => {}
    }
    let created = DirBuilder::new().recursive(true).mode(0o750).create(target);
    created.map_err(|source| NodeError::Path { path: target.to_owned(), source })?;
    Ok(mounts::bind(staging, target, read_only)?)
}

fn publish_device(device: &Path, target: &Path, read_only: bool) -> Result<(), NodeError> {
    if mounts::at(target)?.is_some() {
        if file_system::is_same_device(target, device)? {
            return Ok(());
        }
        mounts::unmount_lazily(target)?;
    }
    let failed = |source| NodeError::Path { path: target.to_owned(), source };
    if let Some(parent) = target.parent() {
        DirBuilder::new().recursive(true).mode(0o750).create(parent).map_err(failed)?;
    }
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o660).open(target).map_err(failed)?;
    Ok(mounts::bind(device, target, read_only)?)
}

/// Whether a staged file system takes no writes although it should.
pub fn is_read_only_by_error(record: &Record, device: &Path) -> Result<bool, NodeError> {
    if record.block {
        return Ok(false);
    }
    let mount = mounts::at(&record.staging)?;
    // One that was asked to be read-only says so in its own options, too.
    Ok(mount.is_some_and(|mount| mount.source == device && mount.file_system_read_only && !mount.read_only))
}

/// Kubelet's folders of this driver.
#[derive(Clone, Debug)]
pub struct Folders {
    pub endpoint: PathBuf,
    pub registration: PathBuf,
    pub records: PathBuf,
}

impl Folders {
    pub fn below(kubelet: &Path) -> Folders {
        let plugin = kubelet.join("plugins").join(crate::DRIVER);
        Folders {
            endpoint: plugin.join("csi.sock"),
            registration: kubelet.join("plugins_registry").join(format!("{}-reg.sock", crate::DRIVER)),
            records: plugin.join("volumes"),
        }
    }
}
