//! [`Disk`]: the node's disk as file, driver and what is on it.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result};
use bytes::Bytes;
use holdfast_consensus::Timestamp;
use holdfast_id::{ClusterId, DiskId, NodeId};
use holdfast_shard::{Shard, ShardOptions};
use holdfast_store::device::Device;
use holdfast_store::device::fault::{FaultDevice, Faults};
use holdfast_store::device::file::FileDevice;
use holdfast_store::driver::thread::ThreadDriver;
use holdfast_store::driver::{self, Driver};
use holdfast_store::group::OpenError;
use holdfast_store::ops::{DeviceError, DeviceOp, OpId};
use holdfast_store::store::Store;
use holdfast_store::superblock::FormatOptions;

use crate::config::Config;
use crate::control::{DiskState, DiskView};

pub(crate) struct Disk {
    device: Arc<dyn Device>,
    driver: Box<dyn Driver>,
    state: DiskState,
}

impl Disk {
    /// Opens the device, or makes the file there is none of; reads what it is, changes nothing on it.
    pub(crate) fn open(config: &Config) -> Result<Disk> {
        let path = &config.device;
        let file = if path.exists() { FileDevice::open(path)? } else { FileDevice::create(path, config.disk_bytes)? };
        let file = Arc::new(file);
        let (device, driver): (Arc<dyn Device>, Box<dyn Driver>) = match &config.device_fault {
            None => (file.clone(), driver::for_file(file)?),
            Some(faults) => {
                let faults: Faults = faults.parse().context("--device-fault")?;
                tracing::warn!(?faults, "the disk has faults on purpose");
                let device: Arc<dyn Device> = Arc::new(FaultDevice::new(file, faults));
                (device.clone(), Box::new(ThreadDriver::new(device)?))
            }
        };
        let state = match Store::probe(&*device) {
            Ok(None) => DiskState::Empty,
            Ok(Some(superblock)) => DiskState::Formatted(superblock),
            Err(OpenError::Foreign) => {
                let device = path.display();
                tracing::error!(%device, "the disk holds something that is not Holdfast's: the node serves nothing");
                DiskState::Foreign(OpenError::Foreign.to_string())
            }
            Err(error) => return Err(error).with_context(|| format!("the disk {}", path.display())),
        };
        Ok(Disk { device, driver, state })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.driver.fd()
    }

    pub(crate) fn view(&self) -> DiskView {
        DiskView { bytes: self.device.len().unwrap_or(0), state: self.state.clone() }
    }

    pub(crate) fn format(&mut self, cluster: ClusterId, node: NodeId, disk: DiskId) -> Result<()> {
        // Seconds of the wall clock: above whatever a former disk of this node has counted up to, one a start.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("the clock is before 1970")?;
        let options = FormatOptions { boot_epoch: now.as_secs(), ..FormatOptions::new(cluster, node, disk) };
        let superblock = Store::format(&*self.device, &options)?;
        self.state = DiskState::Formatted(superblock);
        Ok(())
    }

    /// `None` where the disk belongs to no cluster.
    pub(crate) fn open_shard(&mut self, options: ShardOptions, now: Timestamp) -> Result<Option<Shard>> {
        let DiskState::Formatted(_) = self.state else { return Ok(None) };
        let shard = Shard::open(options, &*self.device, now)?;
        self.state = DiskState::Formatted(shard.superblock().clone());
        Ok(Some(shard))
    }

    pub(crate) fn submit(&mut self, operations: Vec<DeviceOp>) {
        if !operations.is_empty() {
            self.driver.submit(operations);
        }
    }

    /// See [`Driver::is_ready`].
    pub(crate) fn is_ready(&mut self) -> bool {
        self.driver.is_ready()
    }

    pub(crate) fn completions(&mut self) -> Vec<(OpId, Result<Bytes, DeviceError>)> {
        self.driver.completions()
    }

    /// Waits for what is in flight, then notes the orderly end.
    pub(crate) fn close(self, shard: Option<Shard>) -> Result<()> {
        drop(self.driver);
        match shard {
            Some(shard) => shard.close(&*self.device).context("note the orderly end on the disk"),
            None => Ok(()),
        }
    }

    pub(crate) fn fail(&mut self, reason: String) {
        self.state = DiskState::Failed(reason);
    }
}
