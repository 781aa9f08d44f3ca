//! Storage nodes, disks and copies come and go while pods write to volumes: no request fails, and the copies end on
//! machines of their own.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use holdfast_crds::{StorageCluster, StorageDisk, StorageNode};
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use crate::command::kubectl;
use crate::environment::{Environment, LATE, SOON};
use crate::lanes::Cases;
use crate::objects::{CLUSTER, Mode, SYSTEM};
use crate::wait::{Seen, until};
use crate::writer::now_ms;

/// Made before the fourth storage node, and with its pod beside it.
const CLAIMS: [&str; 2] = ["scale", "scale-new"];
const FURTHER: u64 = 200;
const MEMBERS: i32 = 3;

pub async fn run(cases: &mut Cases<'_>) {
    let environment = cases.environment;
    if !cases.case("scale begin", async || begin(environment).await).await {
        return;
    }
    let mut passed = true;
    macro_rules! change {
        ($name:literal, $change:expr) => {
            passed = passed
                && cases.case(concat!("scale ", $name), async || written(environment, $name, $change).await).await;
        };
    }
    change!("members 3 to 4", async || scale_out(environment).await);
    change!("copies 3 to 2 to 4 to 3", async || copies(environment).await);
    change!("disk removed", async || remove_disk(environment).await);
    change!("disk replaced", async || replace_disk(environment).await);
    change!("members 4 to 3", async || scale_in(environment).await);
    if passed {
        cases.case("scale end", async || end(environment).await).await;
    }
}

async fn begin(environment: &Environment<'_>) -> Result<()> {
    let workers = environment.workers().await?.len();
    ensure!(workers > MEMBERS as usize, "{workers} workers are too few: cargo xtask cluster up --workers 4");
    environment.create_claim(CLAIMS[0], Mode::Ext4, "1Gi").await?;
    environment.start_writer(CLAIMS[0], Mode::Ext4, None).await?;
    environment.written(CLAIMS[0], FURTHER).await.map(drop)
}

async fn end(environment: &Environment<'_>) -> Result<()> {
    for claim in CLAIMS {
        environment.stop_writer(claim).await?;
        environment.progress(claim).await?.check()?;
    }
    environment.delete_claims(&CLAIMS).await
}

/// Makes a change and waits until all is whole, each copy on a machine of its own, and every volume is written further.
async fn written(environment: &Environment<'_>, name: &str, change: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    let (from, started) = (now_ms(), Instant::now());
    let mut running = Vec::new();
    for claim in CLAIMS {
        running.push(environment.progress(claim).await?.acknowledged() > 0);
    }
    change().await?;
    environment.cluster_ready().await?;
    for (claim, running) in CLAIMS.into_iter().zip(running) {
        environment.whole(claim).await?;
        let copies = environment.copies_of(claim).await?;
        let (count, machines) = (copies.machines.len(), copies.different_machines());
        ensure!(count == 3 && machines == 3, "{claim}: {copies:?}");
        let to = now_ms();
        let progress = environment.written(claim, FURTHER).await?;
        let gap = progress.span(from, to).gap_ms;
        let at = copies.machines.keys().cloned().collect::<Vec<_>>().join(" ");
        let gap = if running { format!(", longest gap {gap} ms") } else { String::new() };
        println!("{name}: {claim} on {at}{gap}, {:.0} s", started.elapsed().as_secs_f64());
    }
    Ok(())
}

async fn set_members(environment: &Environment<'_>, members: i32) -> Result<()> {
    let clusters: Api<StorageCluster> = environment.system();
    let patch = json!({"spec": {"members": {"replicas": members}}});
    clusters.patch(CLUSTER, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    Ok(())
}

fn member(ordinal: i32) -> String {
    format!("{CLUSTER}-main-{ordinal}")
}

/// State of each storage node.
async fn nodes(environment: &Environment<'_>) -> Result<BTreeMap<String, String>> {
    let nodes: Api<StorageNode> = environment.system();
    let state = |node: &StorageNode| node.status.as_ref().and_then(|status| status.state.clone()).unwrap_or_default();
    Ok(nodes.list(&ListParams::default()).await?.iter().map(|node| (node.name_any(), state(node))).collect())
}

/// State of each disk of a storage node.
async fn disks(environment: &Environment<'_>, node: &str) -> Result<BTreeMap<String, String>> {
    let disks: Api<StorageDisk> = environment.system();
    let state = |disk: &StorageDisk| disk.status.as_ref().and_then(|status| status.state.clone()).unwrap_or_default();
    let of_node =
        disks.list(&ListParams::default()).await?.items.into_iter().filter(|disk| disk.spec.storage_node == node);
    Ok(of_node.map(|disk| (disk.name_any(), state(&disk))).collect())
}

/// Waits for a state, and tells each one on the way.
async fn story<T: PartialEq + std::fmt::Debug>(
    what: &str,
    mut look: impl AsyncFnMut() -> Result<T>,
    done: impl Fn(&T) -> bool,
) -> Result<()> {
    let mut last: Option<T> = None;
    until(what, LATE, async || {
        let now = look().await?;
        if last.as_ref() != Some(&now) {
            println!("{what}: {now:?}");
        }
        let seen = if done(&now) { Seen::Done(()) } else { Seen::Not(format!("{now:?}")) };
        last = Some(now);
        Ok(seen)
    })
    .await
}

async fn scale_out(environment: &Environment<'_>) -> Result<()> {
    set_members(environment, MEMBERS + 1).await?;
    let new = member(MEMBERS);
    story(
        "the fourth storage node joins",
        async || nodes(environment).await,
        |nodes| nodes.get(&new).is_some_and(|state| state == "Active"),
    )
    .await?;
    let all: Api<StorageNode> = environment.system();
    let machine = all.get(&new).await?.status.and_then(|status| status.node).context("it has no machine")?;
    environment.create_claim(CLAIMS[1], Mode::Ext4, "1Gi").await?;
    environment.start_writer(CLAIMS[1], Mode::Ext4, Some(&machine)).await?;
    let copies = environment.copies_of(CLAIMS[1]).await?;
    ensure!(copies.machines.contains_key(&new), "a copy is beside the pod, on {new}: {copies:?}");
    environment.written(CLAIMS[1], FURTHER).await.map(drop)
}

async fn copies(environment: &Environment<'_>) -> Result<()> {
    let name = environment.volume_of(CLAIMS[0]).await?.name_any();
    for copies in [2, 4, 3] {
        let patch = json!({"spec": {"replicas": copies}});
        environment.volumes().patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
        let wanted = format!("{copies}/{copies}");
        let look = async || {
            let status = environment.volume_of(CLAIMS[0]).await?.status.unwrap_or_default();
            let current = status.replicas.len();
            Ok((status.ready_replicas.unwrap_or_default(), status.health.unwrap_or_default(), current))
        };
        let done = |(ready, health, count): &(String, String, usize)| {
            *ready == wanted && health == "Healthy" && *count == copies
        };
        story(&format!("{copies} copies"), look, done).await?;
        environment.written(CLAIMS[0], FURTHER).await?;
    }
    Ok(())
}

/// What it holds moves to the fourth storage node.
async fn remove_disk(environment: &Environment<'_>) -> Result<()> {
    let node = member(1);
    environment.holdfast(&["disk", "remove", &node]).await?;
    story("the disk is removed", async || disks(environment, &node).await, BTreeMap::is_empty).await?;
    let nodes: Api<StorageNode> = environment.system();
    let schedulable = async || {
        let conditions = nodes.get(&node).await?.status.map(|status| status.conditions).unwrap_or_default();
        let found = conditions.into_iter().find(|condition| condition.type_ == "Schedulable");
        found.map(|condition| condition.reason).context("it does not say whether it takes copies")
    };
    story("its StorageNode says that it has no disk", schedulable, |reason| reason == "NoDisk").await
}

/// A storage node whose claim is gone comes back with an empty disk.
async fn replace_disk(environment: &Environment<'_>) -> Result<()> {
    let node = member(1);
    let claims: Api<k8s_openapi::api::core::v1::PersistentVolumeClaim> = environment.system();
    let ours = |name: &String| name.ends_with(&format!("-{node}"));
    let claim = claims.list(&ListParams::default()).await?.iter().map(|claim| claim.name_any()).find(ours);
    let claim = claim.with_context(|| format!("{node} has no claim"))?;
    kubectl(&["delete", "pvc", "--namespace", SYSTEM, "--wait=false", &claim]).await?;
    kubectl(&["delete", "pod", "--namespace", SYSTEM, &node]).await?;
    story(
        "the storage node has another disk",
        async || disks(environment, &node).await,
        |disks| disks.values().any(|state| state == "Active"),
    )
    .await
}

async fn scale_in(environment: &Environment<'_>) -> Result<()> {
    set_members(environment, MEMBERS).await?;
    let last = member(MEMBERS);
    story("the fourth storage node leaves", async || nodes(environment).await, |nodes| !nodes.contains_key(&last))
        .await?;
    for claim in CLAIMS {
        // A Volume's status is some seconds old.
        until(&format!("{claim} has no copy on {last}"), SOON, async || {
            let copies = environment.copies_of(claim).await?;
            let left = !copies.machines.contains_key(&last);
            Ok(if left { Seen::Done(()) } else { Seen::Not(format!("{copies:?}")) })
        })
        .await?;
    }
    Ok(())
}
