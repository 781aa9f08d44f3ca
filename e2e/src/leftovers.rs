//! What volumes that are gone must not leave on nodes.

use anyhow::Result;
use kube::ResourceExt as _;
use kube::api::ListParams;

use crate::command::on_node;
use crate::environment::{Environment, SOON};
use crate::wait::{Seen, until};

/// Mounts of the driver; loop devices over a volume's file, which show its name alone, since its file system is attached
/// nowhere, and which all nodes of the machine see; the driver's records of what is staged.
const LOOK: &str = r"findmnt --noheadings --raw --output TARGET | grep csi.holdfast.dev;
losetup --list --noheadings --output NAME,BACK-FILE | grep -E '/holdfast-[0-9a-f-]{36}-';
find /var/lib/kubelet/plugins/csi.holdfast.dev/volumes -name '*.json' 2>/dev/null; true";

/// Waits until no worker has a mount or loop device of a volume, where there are no Volumes.
pub async fn none(environment: &Environment<'_>) -> Result<()> {
    let workers = environment.workers().await?;
    until("nodes are clean", SOON, async || {
        if let Ok(volumes) = environment.volumes().list(&ListParams::default()).await
            && let Some(volume) = volumes.items.first()
        {
            return Ok(Seen::Not(format!("the Volume {}", volume.name_any())));
        }
        for node in &workers {
            let found = on_node(node, LOOK).await?;
            if !found.trim().is_empty() {
                return Ok(Seen::Not(format!("{node}: {}", found.trim())));
            }
        }
        Ok(Seen::Done(()))
    })
    .await
}
