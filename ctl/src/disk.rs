//! `holdfast disk …`: looks at a disk that no node has open, and writes nothing.

use anyhow::{Context, Result, bail};
use holdfast_store::device::file::FileDevice;
use holdfast_store::inspect::{self, Severity};

use crate::args::Disk;

pub fn run(verb: Disk) -> Result<()> {
    match verb {
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
