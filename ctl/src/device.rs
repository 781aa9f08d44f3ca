//! A volume as a device or a mounted file system of this machine: what `attach --device` and `--mount` do on the host.
//!
//! A file system is made only where the volume itself says that it carries none, never by what its bytes look like.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use holdfast_host::file_system::{self, Before, FileSystem};
use holdfast_host::mounts;
use serde_json::{Value, json};

/// Makes a file system where the volume has none, checks it, and mounts it. `agent` takes one command.
pub fn mount(
    status: &Value,
    directory: &Path,
    wanted: Option<FileSystem>,
    agent: impl Fn(Value) -> Result<Value>,
) -> Result<()> {
    let device = device_of(status)?;
    let present = mounts::of_device(&device)?;
    if present.iter().any(|target| target == directory) {
        return Ok(());
    }
    ensure!(present.is_empty(), "{} is mounted at {} already", device.display(), present[0].display());
    let before = match status["formatted"].as_str() {
        Some("formatted") => None,
        Some("none") => Some(Before::Zeroes),
        Some("formatting") => Some(Before::Anything),
        _ => bail!("the agent does not say whether the volume carries a file system"),
    };
    if let Some(before) = before {
        let set = |formatted: &str| {
            agent(json!({ "command": "set-formatted", "volume": status["volume"], "formatted": formatted }))
        };
        set("formatting")?;
        file_system::make(&device, wanted.unwrap_or(FileSystem::Ext4), before, &[])?;
        set("formatted")?;
    }
    let found = file_system::recognise(&device, wanted)?;
    file_system::check(&device, found)?;
    let options: Vec<String> = found.mount_options().iter().map(|option| (*option).to_owned()).collect();
    mounts::mount(found.name(), &device, directory, &options)?;
    Ok(())
}

/// Unmounts the device from `directory`, where it still is.
pub fn unmount(device: &Path, directory: &Path) -> Result<()> {
    if mounts::of_device(device)?.iter().any(|target| target == directory) {
        mounts::unmount(directory)?;
    }
    Ok(())
}

pub fn device_of(status: &Value) -> Result<PathBuf> {
    status["device"].as_str().map(PathBuf::from).context("the volume is not attached as a device")
}
