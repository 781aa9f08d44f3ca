//! `holdfast disk …`: the disks of the cluster; and a look, which writes nothing, at one that no node has open.

use anyhow::{Context, Result, bail};
use holdfast_api::v1;
use holdfast_store::device::file::FileDevice;
use holdfast_store::inspect::{self, Severity};

use crate::args::{Disk, Format, Where};
use crate::client::{Cluster, block_on};
use crate::show;

/// Tells the metadata leader what is to become of a disk.
pub async fn set_life(cluster: &Cluster, disk: &str, life: v1::DiskLife) -> Result<v1::ClusterDisk> {
    let request = v1::SetDiskLifeRequest { disk: disk.to_owned(), life: life.into() };
    let response = cluster.call(|mut client| {
        let request = request.clone();
        async move { client.set_disk_life(request).await }
    });
    response.await?.disk.context("an answer without a disk")
}

fn change(cluster: Where, disk: &str, life: v1::DiskLife, format: Format) -> Result<()> {
    let cluster = show::open(cluster)?;
    let disk = block_on(set_life(&cluster, disk, life))?;
    show::changed_disk(&disk, format)
}

pub fn run(cluster: Where, verb: Disk) -> Result<()> {
    match verb {
        Disk::List(format) => show::disks(cluster, format)?,
        Disk::Add { disk, format } => change(cluster, &disk, v1::DiskLife::Active, format)?,
        Disk::Remove { disk, format } => change(cluster, &disk, v1::DiskLife::Removing, format)?,
        Disk::Replace { disk, format } => change(cluster, &disk, v1::DiskLife::Lost, format)?,
        Disk::Describe { device } => {
            let description = inspect::describe(&FileDevice::open(&device)?);
            print!("{}", description.with_context(|| device.display().to_string())?);
        }
        Disk::Check { device } => {
            let findings = inspect::check(&FileDevice::open(&device)?).with_context(|| device.display().to_string())?;
            for finding in &findings {
                println!("{:?}: {}", finding.severity, finding.text);
            }
            let lost = findings.iter().filter(|finding| finding.severity == Severity::Error).count();
            if lost > 0 {
                bail!("{}: {lost} findings of lost data", device.display());
            }
            println!("{}: consistent", device.display());
        }
    }
    Ok(())
}
