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
    cases.case("node stopped", async || lost(environment, "node-stopped", Fault::Stop).await).await;
    cases.case("node hung", async || lost(environment, "node-hung", Fault::Hang).await).await;
}

#[derive(Clone, Copy)]
enum Fault {
    /// The machine stops, and starts again.
    Stop,
    /// Every process of the machine stops where it is, with its writes on the way, and goes on later. Not `docker pause`:
    /// a cgroup does not freeze while a process in it waits for I/O that a frozen one serves.
    Hang,
}

impl Fault {
    async fn strike(self, node: &str) -> Result<()> {
        match self {
            Fault::Stop => command("docker", &["stop", node], SHORT).await.map(drop),
            Fault::Hang => on_node(node, "kill -STOP -1").await.map(drop),
        }
    }

    async fn end(self, node: &str) -> Result<()> {
        match self {
            Fault::Stop => command("docker", &["start", node], SHORT).await.map(drop),
            Fault::Hang => on_node(node, "kill -CONT -1").await.map(drop),
        }
    }
}

/// The machine of a pod that writes goes away and comes back.
async fn lost(environment: &Environment<'_>, claim: &str, fault: Fault) -> Result<()> {
    environment.create_claim(claim, Mode::Ext4, "1Gi").await?;
    let old = environment.start_writer(claim, Mode::Ext4, None).await?;
    environment.written(claim, 200).await?;
    fault.strike(&old).await?;
    let moved = moved(environment, claim, &old).await;
    // Back in any case: other tests need it.
    fault.end(&old).await?;
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
