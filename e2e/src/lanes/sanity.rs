//! csi-sanity against the driver as it runs in the cluster: the controller, and the node plugin of the same worker, with
//! mounted volumes and raw ones.

use std::env;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};

use crate::command::{SHORT, on_node, run as command};
use crate::environment::Environment;
use crate::lanes::Cases;
use crate::leftovers;
use crate::objects::CLUSTER;

const PROGRAM: &str = "csi-sanity";
const PLUGIN: &str = "/var/lib/kubelet/plugins/csi.holdfast.dev";
/// Several hundred requests, many of which make or delete a volume.
const LIMIT: Duration = Duration::from_secs(1800);
/// In the reasons of skipped tests: what the driver does not declare, and a limit of volumes that it does not have.
const NOT_DECLARED: [&str; 6] =
    ["Snapshot", "GroupController", "odify", "Cloning", "readonly field", "testnodevolumeattachlimit"];

pub async fn run(cases: &mut Cases<'_>) {
    let environment = cases.environment;
    for access in ["mount", "block"] {
        cases.case(&format!("sanity {access}"), async || sanity(environment, access).await).await;
    }
}

async fn sanity(environment: &Environment<'_>, access: &str) -> Result<()> {
    let (node, controller) = controller(environment).await?;
    let path = env::var_os("PATH").unwrap_or_default();
    let program = env::split_paths(&path).map(|folder| folder.join(PROGRAM)).find(|program| program.is_file());
    let program = program.with_context(|| format!("{PROGRAM} is not in PATH"))?;
    let program = program.to_str().context("PATH is not UTF-8")?;
    command("docker", &["cp", program, &format!("{node}:/usr/local/bin/{PROGRAM}")], SHORT).await?;
    // Staging and target folders lie where the node plugin sees them, under the kubelet's folder.
    let sanity = format!("{PLUGIN}/sanity-{access}");
    // xfs grows under its mount on every machine; see e2e/values.yaml. It wants 300 MiB at least.
    let parameters = format!("{sanity}/parameters.yaml");
    let write = format!("rm -rf {sanity} && mkdir -p {sanity} && echo 'csi.storage.k8s.io/fstype: xfs' >{parameters}");
    on_node(&node, &write).await?;
    let script = format!(
        "{PROGRAM} -csi.endpoint=unix://{PLUGIN}/csi.sock -csi.controllerendpoint=unix://{controller} \
         -csi.mountdir={sanity}/target -csi.stagingdir={sanity}/staging -csi.testvolumeaccesstype={access} \
         -csi.testvolumeparameters={parameters} -csi.testvolumesize=536870912 -csi.testvolumeexpandsize=805306368 \
         -ginkgo.no-color -ginkgo.v"
    );
    let outcome = command("docker", &["exec", &node, "sh", "-c", &script], LIMIT).await;
    let report = environment.run.artifacts.join(format!("csi-sanity-{access}.txt"));
    std::fs::create_dir_all(&environment.run.artifacts)?;
    let text = match &outcome {
        Ok(text) => text.clone(),
        Err(error) => format!("{error:#}"),
    };
    std::fs::write(&report, &text)?;
    on_node(&node, &format!("rm -rf {sanity}")).await?;
    for line in text.lines().filter(|line| line.contains("Passed") && line.contains("Skipped")) {
        println!("csi-sanity {access}: {}", line.trim());
    }
    if outcome.is_err() {
        let failures: Vec<&str> = text.lines().filter(|line| line.trim_start().starts_with("[FAIL]")).collect();
        bail!("{} lines of failures, see {}\n{}", failures.len(), report.display(), failures.join("\n"));
    }
    let reasons =
        text.lines().filter_map(|line| line.trim().strip_prefix("[SKIPPED] ")).filter(|why| !why.starts_with("in ["));
    let unexpected: Vec<&str> = reasons.filter(|why| !NOT_DECLARED.iter().any(|word| why.contains(word))).collect();
    ensure!(unexpected.is_empty(), "skipped, although declared: {}", unexpected.join("; "));
    leftovers::none(environment).await
}

/// The worker that the CSI controller runs on, and the controller's socket there.
async fn controller(environment: &Environment<'_>) -> Result<(String, String)> {
    let pods: Api<Pod> = environment.system();
    let pods = pods.list(&ListParams::default()).await?;
    let prefix = format!("{CLUSTER}-csi-controller-");
    let pod = pods
        .iter()
        .find(|pod| pod.name_any().starts_with(&prefix) && pod.metadata.deletion_timestamp.is_none())
        .context("no pod of the CSI controller")?;
    let uid = pod.uid().context("a pod without uid")?;
    let spec = pod.spec.as_ref().context("a pod without spec")?;
    let folder = spec.volumes.iter().flatten().find(|volume| volume.empty_dir.is_some()).context("no emptyDir")?;
    let node = spec.node_name.clone().context("the CSI controller is on no node")?;
    let socket = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/{}/csi.sock", folder.name);
    Ok((node, socket))
}
