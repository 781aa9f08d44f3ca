//! Many claims come and go, and nothing of them stays: no object, no copy, no file. What the memory of Holdfast's
//! processes is before and after is printed: it is measured, not asserted.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{ListParams, PostParams};
use kube::{Api, ResourceExt as _};

use crate::command::kubectl;
use crate::environment::Environment;
use crate::lanes::Cases;
use crate::objects::{self, Mode, SYSTEM};
use crate::wait::{Seen, until};

const CLAIMS: usize = 200;
/// Made, and deleted, together.
const BATCH: usize = 20;
const BATCH_LIMIT: Duration = Duration::from_secs(300);
/// Said by the scheduler once it knows where the pod of a claim goes; here no pod follows.
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";

pub async fn run(cases: &mut Cases<'_>) {
    let environment = cases.environment;
    cases.case("churn", async || churn(environment).await).await;
}

async fn churn(environment: &Environment<'_>) -> Result<()> {
    // The first ones make what processes keep for good.
    batch(environment, "warm").await?;
    let before = resident(environment).await?;
    let started = Instant::now();
    for number in 0..CLAIMS / BATCH {
        batch(environment, &format!("churn-{number}")).await?;
    }
    println!("{CLAIMS} claims bound and deleted in {:.0} s", started.elapsed().as_secs_f64());
    let after = resident(environment).await?;
    println!("{:<48} {:>10} {:>10}", "resident memory, KiB", "before", "after");
    for (process, kib) in &after {
        println!("{process:<48} {:>10} {kib:>10}", before.get(process).copied().unwrap_or_default());
    }
    Ok(())
}

async fn batch(environment: &Environment<'_>, prefix: &str) -> Result<()> {
    let worker = environment.workers().await?.into_iter().next().context("no worker")?;
    let api: Api<PersistentVolumeClaim> = environment.work();
    let names: Vec<String> = (0..BATCH).map(|number| format!("{prefix}-{number}")).collect();
    for name in &names {
        let mut claim = objects::claim(name, Mode::Block, "16Mi")?;
        claim.annotations_mut().insert(SELECTED_NODE.to_owned(), worker.clone());
        api.create(&PostParams::default(), &claim).await?;
    }
    until(&format!("the claims {prefix} are bound"), BATCH_LIMIT, async || {
        let claims = api.list(&ListParams::default()).await?;
        let bound = claims.iter().filter_map(|claim| claim.status.as_ref()?.phase.as_deref()).filter(|p| *p == "Bound");
        let bound = bound.count();
        Ok(if bound == names.len() { Seen::Done(()) } else { Seen::Not(format!("{bound} of {BATCH}")) })
    })
    .await?;
    environment.delete_claims(&names.iter().map(String::as_str).collect::<Vec<_>>()).await
}

/// Of the first process of every container of ours, in KiB.
async fn resident(environment: &Environment<'_>) -> Result<BTreeMap<String, u64>> {
    let pods: Api<Pod> = environment.system();
    let mut all = BTreeMap::new();
    for pod in pods.list(&ListParams::default()).await? {
        let (repository, _) = environment.run.image.rsplit_once(':').context("--image has no tag")?;
        for container in pod.spec.iter().flat_map(|spec| &spec.containers) {
            if !container.image.as_ref().is_some_and(|image| image.starts_with(&format!("{repository}:"))) {
                continue;
            }
            let (name, inside) = (pod.name_any(), &container.name);
            let read = ["exec", "--namespace", SYSTEM, &name, "--container", inside, "--", "cat", "/proc/1/status"];
            let status = kubectl(&read).await?;
            let kib =
                status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
            all.insert(format!("{name}/{inside}"), kib.context("no VmRSS")?);
        }
    }
    Ok(all)
}
