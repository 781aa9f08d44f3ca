//! A machine dies, or hangs and comes back, while a pod on it writes. Kubernetes is told by the out-of-service taint; the
//! pod goes on elsewhere with all that was acknowledged, and nothing of the old machine lands afterwards.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::Api;

use crate::command::{SHORT, kubectl, on_node, run as command};
use crate::environment::{Environment, LATE, SOON};
use crate::lanes::Cases;
use crate::objects::{LOGS, Mode};
use crate::progress::Progress;
use crate::wait::{Seen, until};

const TAINT: &str = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute";

pub async fn run(cases: &mut Cases<'_>) {
    let environment = cases.environment;
    cases.case("node stopped", async || lost(environment, "node-stopped", "stop", "start").await).await;
    cases.case("node paused", async || lost(environment, "node-paused", "pause", "unpause").await).await;
}

/// The machine of a pod that writes goes away by one verb of docker and comes back by another.
async fn lost(environment: &Environment<'_>, claim: &str, away: &str, back: &str) -> Result<()> {
    environment.create_claim(claim, Mode::Ext4, "1Gi").await?;
    let old = environment.start_writer(claim, Mode::Ext4, None).await?;
    environment.written(claim, 200).await?;
    command("docker", &[away, &old], SHORT).await?;
    let moved = moved(environment, claim, &old).await;
    // Back in any case: other tests need it.
    command("docker", &[back, &old], SHORT).await?;
    kubectl(&["taint", "node", &old, &format!("{TAINT}-")]).await?;
    let found = moved?;

    is_ready(environment, &old, true).await?;
    environment.whole(claim).await?;
    environment.cluster_ready().await?;
    let now = environment.writer_runs(claim).await?;
    ensure!(now != old, "the writer is on {old} again");
    let fenced = Progress::parse(&on_node(&old, &format!("cat {LOGS}/{claim}.log")).await?);
    ensure!(
        fenced.acknowledged() <= found,
        "{old} had write {} acknowledged, its successor found {found}",
        fenced.acknowledged()
    );
    let successor = on_node(&now, &format!("cat {LOGS}/{claim}.log")).await?;
    let before = Progress::parse(&successor).acknowledged();
    until("the successor goes on", SOON, async || {
        let progress = Progress::parse(&on_node(&now, &format!("cat {LOGS}/{claim}.log")).await?);
        progress.check()?;
        let further = progress.acknowledged() - before;
        Ok(if further >= 200 { Seen::Done(()) } else { Seen::Not(format!("{further} further writes")) })
    })
    .await?;
    no_mount(&old).await?;

    // It verifies every block when it stops.
    environment.stop_writer(claim).await?;
    Progress::parse(&on_node(&now, &format!("cat {LOGS}/{claim}.log")).await?).check()?;
    environment.delete_claims(&[claim]).await
}

/// Waits until the pod runs elsewhere. Returns the last write that it found there.
async fn moved(environment: &Environment<'_>, claim: &str, old: &str) -> Result<u64> {
    is_ready(environment, old, false).await?;
    kubectl(&["taint", "node", old, TAINT, "--overwrite"]).await?;
    until("the writer runs elsewhere", LATE, async || {
        let now = environment.writer_runs(claim).await?;
        if now == old {
            return Ok(Seen::Not(format!("it is on {old}")));
        }
        let progress = Progress::parse(&on_node(&now, &format!("cat {LOGS}/{claim}.log")).await?);
        progress.check()?;
        let found = progress.verified().context("it has not verified the volume")?;
        Ok(if progress.acknowledged() > found { Seen::Done(found) } else { Seen::Not("it has not written".into()) })
    })
    .await
}

async fn is_ready(environment: &Environment<'_>, node: &str, ready: bool) -> Result<()> {
    let nodes: Api<Node> = Api::all(environment.client.clone());
    until(&format!("{node} is {}ready", if ready { "" } else { "not " }), LATE, async || {
        let conditions = nodes.get(node).await?.status.and_then(|status| status.conditions).unwrap_or_default();
        let status =
            conditions.into_iter().find(|condition| condition.type_ == "Ready").map(|condition| condition.status);
        Ok(if (status.as_deref() == Some("True")) == ready { Seen::Done(()) } else { Seen::Not(format!("{status:?}")) })
    })
    .await
}

/// Waits until the node that came back has let go of what it had.
async fn no_mount(node: &str) -> Result<()> {
    until(&format!("{node} has no mount of the volume"), SOON, async || {
        let found = on_node(node, "findmnt --noheadings --raw --output TARGET | grep csi.holdfast.dev; true").await?;
        Ok(if found.trim().is_empty() { Seen::Done(()) } else { Seen::Not(found) })
    })
    .await
}
