//! A claim becomes a volume in a pod, with its copies on different machines; the pod moves, the volume grows and goes.

use std::time::Instant;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::command::kubectl;
use crate::environment::{Environment, SOON};
use crate::lanes::Cases;
use crate::objects::{Mode, WORK};
use crate::wait::{Seen, until};

pub async fn run(cases: &mut Cases<'_>) {
    let environment = cases.environment;
    cases.case("smoke file system", async || volume(environment, "smoke-fs", Mode::Filesystem).await).await;
    cases.case("smoke raw block", async || volume(environment, "smoke-block", Mode::Block).await).await;
}

async fn volume(environment: &Environment<'_>, claim: &str, mode: Mode) -> Result<()> {
    let started = Instant::now();
    environment.create_claim(claim, mode, "1Gi").await?;
    let first = environment.start_writer(claim, mode, None).await?;
    println!("{claim}: claim to running pod {:.1} s, on {first}", started.elapsed().as_secs_f64());
    let copies = environment.copies_of(claim).await?;
    println!("{claim}: copies {:?}, led by {:?}", copies.machines, copies.leader);
    ensure!(
        copies.machines.len() == 3 && copies.different_machines() == 3,
        "three copies on three machines: {copies:?}"
    );
    ensure!(copies.machines.values().any(|machine| *machine == first), "a copy is on the pod's machine: {copies:?}");
    environment.written(claim, 1000).await?;

    grow(environment, claim, mode).await?;
    environment.written(claim, 100).await?;

    environment.stop_writer(claim).await?;
    let workers = environment.workers().await?;
    let other = workers.iter().find(|worker| **worker != first).expect("there are three workers");
    let started = Instant::now();
    environment.start_writer(claim, mode, Some(other)).await?;
    println!("{claim}: running on {other} after {:.1} s", started.elapsed().as_secs_f64());
    // The second writer read and compared every block that the first one wrote before it wrote itself.
    let progress = environment.written(claim, 100).await?;
    ensure!(progress.starts() == 2, "two writers verified the volume: {}", progress.starts());

    environment.stop_writer(claim).await?;
    environment.progress(claim).await?.check()?;
    environment.delete_claims(&[claim]).await
}

/// Grows a claim from 1 to 2 GiB under its pod, and waits until the pod has it.
async fn grow(environment: &Environment<'_>, claim: &str, mode: Mode) -> Result<()> {
    let claims: Api<PersistentVolumeClaim> = environment.work();
    let patch = json!({"spec": {"resources": {"requests": {"storage": "2Gi"}}}});
    claims.patch(claim, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    until(&format!("{claim} has grown"), SOON, async || {
        let status = claims.get(claim).await?.status.unwrap_or_default();
        let capacity = status.capacity.as_ref().and_then(|capacity| capacity.get("storage")).map(|size| size.0.clone());
        let pod = format!("{claim}-0");
        let question = match mode {
            // Size of the file system in blocks of 4096 bytes; it keeps some of the device to itself.
            Mode::Filesystem => "stat --file-system --format=%b /volume",
            Mode::Block => "blockdev --getsize64 /dev/volume",
        };
        let words = ["exec", "--namespace", WORK, &pod, "--", "sh", "-c", question];
        let size: u64 = kubectl(&words).await?.trim().parse()?;
        let bytes = if mode == Mode::Block { size } else { size * 4096 };
        if capacity.as_deref() == Some("2Gi") && bytes > 1_800 << 20 {
            return Ok(Seen::Done(()));
        }
        Ok(Seen::Not(format!("the claim says {capacity:?}, the pod sees {bytes} bytes; {:?}", status.conditions)))
    })
    .await
}
