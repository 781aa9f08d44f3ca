//! A claim becomes a volume in a pod, with its copies on different machines; the pod moves, the volume grows and goes.

use std::time::Instant;

use anyhow::{Result, bail, ensure};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::command::{SHORT, kubectl, run as command};
use crate::environment::{Environment, SOON};
use crate::lanes::Cases;
use crate::objects::{Mode, WORK};
use crate::wait::{Seen, until};

pub async fn run(cases: &mut Cases<'_>) {
    let environment = cases.environment;
    for (name, mode) in [("ext4", Mode::Ext4), ("xfs", Mode::Xfs), ("block", Mode::Block)] {
        cases.case(&format!("smoke {name}"), async || volume(environment, &format!("smoke-{name}"), mode).await).await;
    }
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
    explained(environment, claim).await?;

    let claims: Api<PersistentVolumeClaim> = environment.work();
    let patch = json!({"spec": {"resources": {"requests": {"storage": "2Gi"}}}});
    claims.patch(claim, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    // ext4 may have to wait for the next mount: see e2e/values.yaml.
    if mode != Mode::Ext4 {
        grown(environment, claim, mode).await?;
    }
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
    grown(environment, claim, mode).await?;

    environment.stop_writer(claim).await?;
    environment.progress(claim).await?.check()?;
    environment.delete_claims(&[claim]).await
}

/// By the plugin that the command line prints.
async fn explained(environment: &Environment<'_>, claim: &str) -> Result<()> {
    let plugin = environment.holdfast(&["kubectl-plugin"]).await?;
    let ask = |claim: String| {
        let plugin = plugin.clone();
        async move { command("sh", &["-c", &plugin, "kubectl-holdfast", "explain", "pvc", &claim], SHORT).await }
    };
    environment.whole(claim).await?;
    until("the claim's volume is well, as the plugin says", SOON, async || {
        let said = ask(format!("{WORK}/{claim}")).await?;
        Ok(if said.trim() == "all is well" { Seen::Done(()) } else { Seen::Not(said) })
    })
    .await?;
    let Err(error) = ask(format!("{WORK}/nobody")).await else { bail!("a claim that is not there is explained") };
    ensure!(format!("{error:#}").contains("NotFound"), "{error:#}");
    Ok(())
}

/// Waits until the claim and its pod have 2 GiB.
async fn grown(environment: &Environment<'_>, claim: &str, mode: Mode) -> Result<()> {
    let claims: Api<PersistentVolumeClaim> = environment.work();
    until(&format!("{claim} has grown"), SOON, async || {
        let status = claims.get(claim).await?.status.unwrap_or_default();
        let capacity = status.capacity.as_ref().and_then(|capacity| capacity.get("storage")).map(|size| size.0.clone());
        let pod = format!("{claim}-0");
        let question = match mode {
            // A file system keeps some of its device to itself.
            Mode::Ext4 | Mode::Xfs => "df --block-size=1 --output=size /volume | tail -n 1",
            Mode::Block => "blockdev --getsize64 /dev/volume",
        };
        let words = ["exec", "--namespace", WORK, &pod, "--", "sh", "-c", question];
        let bytes: u64 = kubectl(&words).await?.trim().parse()?;
        if capacity.as_deref() == Some("2Gi") && bytes > 1_800 << 20 {
            return Ok(Seen::Done(()));
        }
        Ok(Seen::Not(format!("the claim says {capacity:?}, the pod sees {bytes} bytes; {:?}", status.conditions)))
    })
    .await
}
