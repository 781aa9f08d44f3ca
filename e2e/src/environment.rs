//! The Kubernetes cluster, Holdfast installed in it, and what lanes ask of both.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use holdfast_crds::{StorageCluster, StorageDisk, StorageNode, Volume};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, Client, Resource, ResourceExt as _};

use crate::Run;
use crate::command::{kubectl, on_node, run};
use crate::leftovers;
use crate::objects::{self, CLUSTER, LOGS, Mode, SYSTEM, WORK};
use crate::progress::Progress;
use crate::wait::{Seen, until};

/// For what takes seconds where the machine is idle. Limits are no expectations: they end tests of what hangs.
pub const SOON: Duration = Duration::from_secs(300);
/// For what starts many containers one after the other.
pub const LATE: Duration = Duration::from_secs(900);
const RELEASE: &str = "holdfast";

pub struct Environment<'a> {
    pub run: &'a Run,
    pub client: Client,
}

impl<'a> Environment<'a> {
    pub async fn new(run: &'a Run) -> Result<Environment<'a>> {
        let client = Client::try_default().await.context("no cluster: KUBECONFIG")?;
        Ok(Environment { run, client })
    }

    pub fn system<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), SYSTEM)
    }

    pub fn work<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), WORK)
    }

    pub fn volumes(&self) -> Api<Volume> {
        Api::all(self.client.clone())
    }

    /// Installs or upgrades to an image, makes the StorageCluster where there is none, and waits until all is ready.
    pub async fn install(&self, image: &str) -> Result<()> {
        let (repository, tag) = image.rsplit_once(':').context("--image has no tag")?;
        let chart = self.run.chart.to_str().context("--chart is not UTF-8")?;
        let started = Instant::now();
        let releases = run("helm", &["list", "--namespace", SYSTEM, "--short"], SOON).await?;
        let verb = if releases.lines().any(|release| release == RELEASE) { "upgrade" } else { "install" };
        let (repository, tag) = (format!("image.repository={repository}"), format!("image.tag={tag}"));
        let values = self.run.values.to_str().context("--values is not UTF-8")?;
        let arguments = [
            verb,
            RELEASE,
            chart,
            "--namespace",
            SYSTEM,
            "--create-namespace",
            "--values",
            values,
            "--set-string",
            &repository,
            "--set-string",
            &tag,
            "--wait",
            "--timeout",
            "10m",
        ];
        run("helm", &arguments, LATE).await?;
        println!("helm {verb}: {:.1} s", started.elapsed().as_secs_f64());
        let clusters: Api<StorageCluster> = self.system();
        if clusters.get_opt(CLUSTER).await?.is_none() {
            let started = Instant::now();
            clusters.create(&PostParams::default(), &objects::storage_cluster(3)?).await?;
            self.cluster_ready().await?;
            println!("StorageCluster ready after {:.1} s", started.elapsed().as_secs_f64());
        }
        self.runs(image).await?;
        self.cluster_ready().await?;
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        if namespaces.get_opt(WORK).await?.is_none() {
            kubectl(&["create", "namespace", WORK]).await?;
        }
        Ok(())
    }

    /// Waits until every pod has this image: after an upgrade the operator replaces them one by one.
    async fn runs(&self, image: &str) -> Result<()> {
        let (repository, _) = image.rsplit_once(':').context("--image has no tag")?;
        let pods: Api<Pod> = self.system();
        until("every pod has the image", LATE, async || {
            for pod in pods.list(&ListParams::default()).await? {
                let ours = |image: &&str| image.starts_with(&format!("{repository}:"));
                let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
                if let Some(other) =
                    containers.filter_map(|c| c.image.as_deref()).filter(ours).find(|had| *had != image)
                {
                    return Ok(Seen::Not(format!("{} has {other}", pod.name_any())));
                }
            }
            Ok(Seen::Done(()))
        })
        .await
    }

    /// Removes everything, the data too, and looks for what stayed behind.
    pub async fn uninstall(&self) -> Result<()> {
        let clusters: Api<StorageCluster> = self.system();
        let _ = clusters.delete(CLUSTER, &DeleteParams::default()).await;
        until("the StorageCluster is gone", LATE, async || {
            Ok(match clusters.get_opt(CLUSTER).await? {
                None => Seen::Done(()),
                Some(cluster) => Seen::Not(conditions(cluster.status.map(|status| status.conditions))),
            })
        })
        .await?;
        let claims: Api<PersistentVolumeClaim> = self.system();
        until("deletionPolicy Delete leaves no claim", LATE, async || {
            let left: Vec<String> = claims.list(&ListParams::default()).await?.iter().map(|c| c.name_any()).collect();
            Ok(if left.is_empty() { Seen::Done(()) } else { Seen::Not(format!("{left:?}")) })
        })
        .await?;
        run("helm", &["uninstall", RELEASE, "--namespace", SYSTEM, "--wait"], LATE).await?;
        kubectl(&[
            "delete",
            "crd",
            "--ignore-not-found",
            "storageclusters.holdfast.dev",
            "volumes.holdfast.dev",
            "storagenodes.holdfast.dev",
            "storagedisks.holdfast.dev",
        ])
        .await?;
        run("kubectl", &["delete", "namespace", WORK, SYSTEM, "--ignore-not-found"], LATE).await?;
        leftovers::none(self).await
    }

    pub async fn cluster_ready(&self) -> Result<()> {
        let clusters: Api<StorageCluster> = self.system();
        until("the StorageCluster is Ready", LATE, async || {
            let cluster = clusters.get(CLUSTER).await?;
            let generation = cluster.metadata.generation;
            let status = cluster.status.unwrap_or_default();
            let current = status.observed_generation == generation;
            if current && is_true(&status.conditions, "Ready") {
                return Ok(Seen::Done(()));
            }
            Ok(Seen::Not(conditions(Some(status.conditions))))
        })
        .await
    }

    /// The nodes that pods may run on.
    pub async fn workers(&self) -> Result<Vec<String>> {
        self.nodes("!node-role.kubernetes.io/control-plane").await
    }

    /// The nodes with these labels.
    pub async fn nodes(&self, selector: &str) -> Result<Vec<String>> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        Ok(nodes.list(&ListParams::default().labels(selector)).await?.iter().map(|node| node.name_any()).collect())
    }

    /// The Volume behind a claim, which is bound.
    pub async fn volume_of(&self, claim: &str) -> Result<Volume> {
        let claims: Api<PersistentVolumeClaim> = self.work();
        let volume =
            claims.get(claim).await?.spec.and_then(|spec| spec.volume_name).context("the claim is not bound")?;
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let source = volumes.get(&volume).await?.spec.and_then(|spec| spec.csi).context("no CSI volume")?;
        Ok(self.volumes().get(&source.volume_handle).await?)
    }

    /// The machine of each copy of a volume, and which of them leads.
    pub async fn copies_of(&self, claim: &str) -> Result<Copies> {
        let nodes: Api<StorageNode> = self.system();
        let nodes = nodes.list(&ListParams::default()).await?;
        let machines: BTreeMap<String, String> =
            nodes.iter().filter_map(|node| Some((node.name_any(), node.status.as_ref()?.node.clone()?))).collect();
        let status = self.volume_of(claim).await?.status.unwrap_or_default();
        let mut copies = Copies::default();
        for replica in status.replicas {
            let machine = machines.get(&replica.node).with_context(|| format!("{} has no machine", replica.node))?;
            if replica.role == "Leader" {
                copies.leader = Some(replica.node.clone());
            }
            copies.machines.insert(replica.node, machine.clone());
        }
        Ok(copies)
    }

    /// The command line, beside the storage cluster: the controller has the certificates.
    pub async fn holdfast(&self, words: &[&str]) -> Result<String> {
        let controller = format!("deploy/{CLUSTER}-csi-controller");
        let exec = ["exec", "--namespace", SYSTEM, &controller, "--container", "driver", "--", "holdfast"];
        kubectl(&[&exec[..], words].concat()).await
    }

    /// The storage node that leads a claim's volume now, where one does; a Volume's status is some seconds old.
    pub async fn leader(&self, claim: &str) -> Result<Option<String>> {
        let name = self.volume_of(claim).await?.name_any();
        let volume: serde_json::Value =
            serde_json::from_str(&self.holdfast(&["volume", "get", &name, "--json"]).await?)?;
        Ok(volume["leader"].as_str().map(str::to_owned))
    }

    /// Waits until every copy of a claim's volume is current.
    pub async fn whole(&self, claim: &str) -> Result<()> {
        until(&format!("the volume of {claim} is whole"), LATE, async || {
            let status = self.volume_of(claim).await?.status.unwrap_or_default();
            let (health, copies) = (status.health.unwrap_or_default(), status.ready_replicas.unwrap_or_default());
            let mut counts = copies.split('/');
            if health == "Healthy" && counts.next() == counts.next() {
                return Ok(Seen::Done(()));
            }
            Ok(Seen::Not(format!("{health}, {copies}: {}", conditions(Some(status.conditions)))))
        })
        .await
    }

    pub async fn create_claim(&self, name: &str, mode: Mode, size: &str) -> Result<()> {
        self.forget_progress(name).await?;
        let claims: Api<PersistentVolumeClaim> = self.work();
        claims.create(&PostParams::default(), &objects::claim(name, mode, size)?).await?;
        Ok(())
    }

    /// Starts a writer on a claim and waits until its pod runs. Returns the node.
    pub async fn start_writer(&self, claim: &str, mode: Mode, node: Option<&str>) -> Result<String> {
        let sets: Api<StatefulSet> = self.work();
        let set = objects::writer(claim, mode, &self.run.tests_image, node)?;
        sets.create(&PostParams::default(), &set).await?;
        self.writer_runs(claim).await
    }

    /// Waits until the writer's pod runs, and returns its node.
    pub async fn writer_runs(&self, claim: &str) -> Result<String> {
        let pods: Api<Pod> = self.work();
        until(&format!("the writer of {claim} runs"), SOON, async || {
            let Some(pod) = pods.get_opt(&format!("{claim}-0")).await? else { return Ok(Seen::Not("no pod".into())) };
            let status = pod.status.unwrap_or_default();
            let phase = status.phase.unwrap_or_default();
            let running = phase == "Running" && pod.metadata.deletion_timestamp.is_none();
            match pod.spec.and_then(|spec| spec.node_name) {
                Some(node) if running => Ok(Seen::Done(node)),
                node => Ok(Seen::Not(format!("{phase} on {node:?}"))),
            }
        })
        .await
    }

    /// Ends a writer in good order.
    pub async fn stop_writer(&self, claim: &str) -> Result<()> {
        let sets: Api<StatefulSet> = self.work();
        sets.delete(claim, &DeleteParams::foreground()).await?;
        let pods: Api<Pod> = self.work();
        until(&format!("the writer of {claim} is gone"), SOON, async || {
            Ok(match (sets.get_opt(claim).await?, pods.get_opt(&format!("{claim}-0")).await?) {
                (None, None) => Seen::Done(()),
                (_, pod) => {
                    Seen::Not(format!("pod {:?}", pod.and_then(|pod| pod.status).and_then(|status| status.phase)))
                }
            })
        })
        .await
    }

    /// What the writers of a claim reported, on whichever nodes they ran.
    pub async fn progress(&self, claim: &str) -> Result<Progress> {
        let mut logs = String::new();
        for node in self.workers().await? {
            logs.push_str(&on_node(&node, &format!("cat {LOGS}/{claim}.log 2>/dev/null || true")).await?);
        }
        Ok(Progress::parse(&logs))
    }

    /// Waits until the writer of a claim has acknowledged that many further writes, and checks all that was reported.
    pub async fn written(&self, claim: &str, further: u64) -> Result<Progress> {
        let before = self.progress(claim).await?.acknowledged();
        until(&format!("the writer of {claim} goes on"), SOON, async || {
            let progress = self.progress(claim).await?;
            let now = progress.acknowledged();
            // A writer that failed writes nothing more.
            if progress.check().is_err() || now >= before + further {
                return Ok(Seen::Done(()));
            }
            Ok(Seen::Not(format!("{} of {further} further writes", now - before)))
        })
        .await?;
        let progress = self.progress(claim).await?;
        progress.check()?;
        Ok(progress)
    }

    /// Removes the logs of a claim's writers: what a run that was broken off has left would be taken for this one's.
    async fn forget_progress(&self, claim: &str) -> Result<()> {
        for node in self.workers().await? {
            on_node(&node, &format!("rm -f {LOGS}/{claim}.log")).await?;
        }
        Ok(())
    }

    /// Deletes claims and waits until nothing of their volumes is left: no object, no copy, no device, no mount.
    pub async fn delete_claims(&self, claims: &[&str]) -> Result<()> {
        let api: Api<PersistentVolumeClaim> = self.work();
        let mut volumes = Vec::new();
        for claim in claims {
            volumes.push(self.volume_of(claim).await?);
            api.delete(claim, &DeleteParams::default()).await?;
        }
        until("the Volumes are gone", SOON, async || {
            for volume in &volumes {
                if let Some(volume) = self.volumes().get_opt(&volume.name_any()).await? {
                    return Ok(Seen::Not(conditions(volume.status.map(|status| status.conditions))));
                }
            }
            Ok(Seen::Done(()))
        })
        .await?;
        let disks: Api<StorageDisk> = self.system();
        until("the disks hold no copy", SOON, async || {
            for disk in disks.list(&ListParams::default()).await? {
                let replicas = disk.status.as_ref().and_then(|status| status.replicas);
                if replicas != Some(0) {
                    return Ok(Seen::Not(format!("{} has {replicas:?}", disk.name_any())));
                }
            }
            Ok(Seen::Done(()))
        })
        .await?;
        for claim in claims {
            self.forget_progress(claim).await?;
        }
        leftovers::none(self).await
    }
}

/// Where the copies of a volume are.
#[derive(Debug, Default)]
pub struct Copies {
    /// Machine by storage node.
    pub machines: BTreeMap<String, String>,
    /// The storage node that leads.
    pub leader: Option<String>,
}

impl Copies {
    pub fn different_machines(&self) -> usize {
        self.machines.values().collect::<BTreeSet<_>>().len()
    }
}

pub fn is_true(conditions: &[Condition], kind: &str) -> bool {
    conditions.iter().any(|condition| condition.type_ == kind && condition.status == "True")
}

/// For people.
fn conditions(conditions: Option<Vec<Condition>>) -> String {
    let each = |c: Condition| format!("{}={} {}: {}", c.type_, c.status, c.reason, c.message);
    conditions.unwrap_or_default().into_iter().map(each).collect::<Vec<_>>().join("; ")
}
