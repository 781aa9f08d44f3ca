//! Parts of Holdfast and of Kubernetes die, are updated or go away, while a pod writes to a volume and verifies it. No
//! request fails, no byte is wrong. The longest gap of each case is printed in a table: it is measured, not asserted.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::{DaemonSet, StatefulSet};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use tokio::time::sleep;

use crate::command::{kubectl, on_node, run as command};
use crate::environment::{Environment, LATE, SOON};
use crate::lanes::Cases;
use crate::objects::{CLUSTER, Mode, SYSTEM};
use crate::progress::Span;
use crate::wait::{Seen, until};
use crate::writer::now_ms;

const CLAIM: &str = "faults";
/// Writes that must follow a fault before the next one.
const FURTHER: u64 = 200;
const API_AWAY: Duration = Duration::from_secs(60);
const API_SERVER: &str = "/etc/kubernetes/manifests/kube-apiserver.yaml";

pub async fn run(cases: &mut Cases<'_>) {
    let environment = cases.environment;
    if !cases.case("faults begin", async || begin(environment).await).await {
        return;
    }
    let mut table: Vec<(&str, Span)> = Vec::new();
    macro_rules! fault {
        ($name:literal, $strike:expr) => {
            cases
                .case(concat!("faults ", $name), async || {
                    table.push(($name, struck(environment, async || $strike.await).await?));
                    Ok(())
                })
                .await;
        };
    }
    fault!("leader killed", kill_storage_node(environment, true));
    fault!("follower killed", kill_storage_node(environment, false));
    fault!("csi node plugin killed", kill_beside_writer(environment, "holdfast-csi node"));
    fault!("agent killed", kill_beside_writer(environment, "holdfast agent"));
    fault!("operator killed", kill_operator(environment));
    fault!("storage nodes restarted", restart_storage_nodes(environment));
    fault!("agents updated", update_agents(environment));
    fault!("helm upgrade", upgrade(environment));
    fault!("nodes drained", drain(environment));
    fault!("api server away", api_server_away(environment));
    println!("{:<26} {:>10} {:>12}", "fault", "writes", "longest gap");
    for (name, span) in &table {
        println!("{name:<26} {:>10} {:>9} ms", span.writes, span.gap_ms);
    }
    cases.case("faults end", async || end(environment).await).await;
}

async fn begin(environment: &Environment<'_>) -> Result<()> {
    environment.create_claim(CLAIM, Mode::Ext4, "1Gi").await?;
    environment.start_writer(CLAIM, Mode::Ext4, None).await?;
    environment.written(CLAIM, FURTHER).await.map(drop)
}

async fn end(environment: &Environment<'_>) -> Result<()> {
    environment.stop_writer(CLAIM).await?;
    environment.progress(CLAIM).await?.check()?;
    environment.delete_claims(&[CLAIM]).await
}

/// Strikes a whole volume, and waits until it is written again and whole again.
async fn struck(environment: &Environment<'_>, strike: impl AsyncFnOnce() -> Result<()>) -> Result<Span> {
    environment.whole(CLAIM).await?;
    let from = now_ms();
    strike().await?;
    environment.written(CLAIM, FURTHER).await?;
    environment.whole(CLAIM).await?;
    environment.cluster_ready().await?;
    let to = now_ms();
    let progress = environment.written(CLAIM, FURTHER).await?;
    Ok(progress.span(from, to))
}

/// Kills what has this command line, on a node; there must be exactly one such process.
async fn kill(node: &str, command_line: &str) -> Result<()> {
    // The anchor keeps the shell that looks from finding itself.
    let find = format!(
        r"for process in /proc/[0-9]*; do
            tr '\0' ' ' <$process/cmdline 2>/dev/null | grep -qE '^([^ ]*/)?{command_line}( |$)' && echo ${{process#/proc/}}
        done; true"
    );
    let found = on_node(node, &find).await?;
    let processes: Vec<&str> = found.split_whitespace().collect();
    ensure!(processes.len() == 1, "{node}: `{command_line}` is {processes:?}");
    on_node(node, &format!("kill -9 {}", processes[0])).await.map(drop)
}

async fn kill_storage_node(environment: &Environment<'_>, leader: bool) -> Result<()> {
    let copies = environment.copies_of(CLAIM).await?;
    let leads = copies.leader.context("nobody leads")?;
    let name =
        if leader { &leads } else { copies.machines.keys().find(|name| **name != leads).context("nobody follows")? };
    kill_storage_node_named(environment, name).await
}

pub async fn kill_storage_node_named(environment: &Environment<'_>, name: &str) -> Result<()> {
    let pods: Api<Pod> = environment.system();
    let node = pods.get(name).await?.spec.and_then(|spec| spec.node_name).context("it is on no node")?;
    kill(&node, &format!("holdfast storage-node .*--name={name} .*")).await
}

async fn kill_beside_writer(environment: &Environment<'_>, command_line: &str) -> Result<()> {
    let node = environment.writer_runs(CLAIM).await?;
    kill(&node, &format!("{command_line} .*")).await?;
    until("its successor runs", SOON, async || {
        Ok(match running_daemons(environment).await? {
            None => Seen::Done(()),
            Some(missing) => Seen::Not(missing),
        })
    })
    .await
}

/// What is missing in one of the DaemonSets.
async fn running_daemons(environment: &Environment<'_>) -> Result<Option<String>> {
    let sets: Api<DaemonSet> = environment.system();
    for set in sets.list(&ListParams::default()).await? {
        let status = set.status.clone().unwrap_or_default();
        let wanted = status.desired_number_scheduled;
        let current = status.observed_generation == set.metadata.generation;
        if !current || status.number_ready != wanted || status.updated_number_scheduled != Some(wanted) {
            let updated = status.updated_number_scheduled;
            return Ok(Some(format!(
                "{}: {} ready, {updated:?} updated of {wanted}",
                set.name_any(),
                status.number_ready
            )));
        }
    }
    Ok(None)
}

async fn kill_operator(environment: &Environment<'_>) -> Result<()> {
    let pods: Api<Pod> = environment.system();
    let selector = ListParams::default().labels("app.kubernetes.io/component=operator");
    let pod = pods.list(&selector).await?.items.pop().context("no operator")?;
    let node = pod.spec.and_then(|spec| spec.node_name).context("the operator is on no node")?;
    kill(&node, "holdfast-operator").await
}

/// Waits until every storage node runs what its StatefulSet says.
async fn storage_nodes_updated(environment: &Environment<'_>) -> Result<()> {
    let name = format!("{CLUSTER}-main");
    let sets: Api<StatefulSet> = environment.system();
    let pods: Api<Pod> = environment.system();
    until("the storage nodes are updated", LATE, async || {
        let set = sets.get(&name).await?;
        let wanted = set.spec.replicas.unwrap_or_default();
        let status = set.status.unwrap_or_default();
        if status.observed_generation != set.metadata.generation || status.ready_replicas != Some(wanted) {
            return Ok(Seen::Not(format!("{:?} ready of {wanted}", status.ready_replicas)));
        }
        for number in 0..wanted {
            let pod = pods.get(&format!("{name}-{number}")).await?;
            let revision = pod.labels().get("controller-revision-hash").cloned();
            if revision != status.update_revision {
                return Ok(Seen::Not(format!("{name}-{number} is not updated")));
            }
        }
        Ok(Seen::Done(()))
    })
    .await
}

async fn daemons_updated(environment: &Environment<'_>) -> Result<()> {
    until("the daemons are updated", LATE, async || {
        Ok(match running_daemons(environment).await? {
            None => Seen::Done(()),
            Some(missing) => Seen::Not(missing),
        })
    })
    .await
}

async fn restart_storage_nodes(environment: &Environment<'_>) -> Result<()> {
    kubectl(&["rollout", "restart", "--namespace", SYSTEM, &format!("statefulset/{CLUSTER}-main")]).await?;
    storage_nodes_updated(environment).await
}

async fn update_agents(environment: &Environment<'_>) -> Result<()> {
    kubectl(&["rollout", "restart", "--namespace", SYSTEM, &format!("daemonset/{CLUSTER}-agent")]).await?;
    daemons_updated(environment).await
}

/// The same image under another name: every pod is started again.
async fn upgrade(environment: &Environment<'_>) -> Result<()> {
    let image = &environment.run.image;
    let next = format!("{image}-next");
    // Agents run on the control plane too.
    for node in environment.nodes("").await? {
        let name = |image: &str| format!("docker.io/library/{image}");
        let tag = ["ctr", "--namespace", "k8s.io", "images", "tag", "--force", &name(image), &name(&next)].join(" ");
        on_node(&node, &tag).await?;
    }
    environment.install(&next).await?;
    storage_nodes_updated(environment).await?;
    daemons_updated(environment).await
}

async fn drain(environment: &Environment<'_>) -> Result<()> {
    for node in environment.workers().await? {
        let words = ["drain", &node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=600s"];
        let drained = command("kubectl", &words, LATE).await;
        if drained.is_ok() {
            environment.writer_runs(CLAIM).await?;
            environment.written(CLAIM, FURTHER).await?;
        }
        kubectl(&["uncordon", &node]).await?;
        drained?;
        storage_nodes_updated(environment).await?;
        environment.whole(CLAIM).await?;
    }
    Ok(())
}

async fn api_server_away(environment: &Environment<'_>) -> Result<()> {
    let control_plane = "node-role.kubernetes.io/control-plane";
    let node = environment.nodes(control_plane).await?.pop().context("no control plane")?;
    on_node(&node, &format!("mv {API_SERVER} /root/kube-apiserver.yaml")).await?;
    sleep(API_AWAY).await;
    on_node(&node, &format!("mv /root/kube-apiserver.yaml {API_SERVER}")).await?;
    until("the API server is back", LATE, async || Ok(Seen::Done(environment.nodes(control_plane).await.map(drop)?)))
        .await
}
