//! What the API server says of a cluster's workloads: pods, StatefulSets, claims, the CSI processes. I/O and reading.

use std::collections::BTreeSet;

use holdfast_crds::names::{LABEL_CLUSTER, LABEL_GROUP};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod as KubePod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};

use super::build::{RESTARTED_ANNOTATION, TEMPLATE_LABEL, made_from};
use super::layout::Layout;
use super::observed::{Machine, Observed, Pod};
use super::validate::ValidCluster;
use crate::context::Context;

/// Pods of one cluster: its members, and three on every machine.
const PODS_MAX: u32 = 5000;
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Everything about one cluster that the API server knows and its object does not say.
///
/// # Errors
/// The API server's refusal.
pub async fn observe(context: &Context, cluster: &ValidCluster) -> Result<Observed, kube::Error> {
    let layout = &cluster.layout;
    let mut observed = Observed::default();
    if cluster.groups.iter().any(|group| group.disk.is_local()) {
        // From the API server's cache: a machine that comes is seen a little later.
        let nodes = Api::<Node>::all(context.client.clone()).list(&ListParams::default().match_any()).await?;
        let machine = |node: Node| Machine { name: node.name_any(), labels: node.labels().clone() };
        observed.machines = nodes.items.into_iter().map(machine).collect();
        observed.machines.sort_by(|a, b| a.name.cmp(&b.name));
    }
    let all = ListParams::default().labels(&format!("{LABEL_CLUSTER}={}", layout.name)).limit(PODS_MAX);
    for pod in Api::<KubePod>::namespaced(context.client.clone(), &layout.namespace).list(&all).await? {
        let component = pod.labels().get("app.kubernetes.io/component").cloned().unwrap_or_default();
        let seen = read(&pod);
        if component == "storage-node" {
            observed.pods.insert(pod.name_any(), seen);
        } else {
            observed.others.push((component, pod.name_any(), seen));
        }
    }
    let sets: Api<StatefulSet> = Api::namespaced(context.client.clone(), &layout.namespace);
    for set in sets.list(&all).await? {
        let template = set.spec.template.metadata.as_ref();
        let group = template.and_then(|metadata| metadata.labels.as_ref()?.get(LABEL_GROUP));
        let replicas = set.spec.replicas.unwrap_or(0);
        observed.replicas.extend(group.map(|group| (group.clone(), replicas)));
        observed.restarted.extend(group.cloned().zip(restarted(template)));
    }
    let daemons = Api::<DaemonSet>::namespaced(context.client.clone(), &layout.namespace).list(&all).await?.items;
    for set in &daemons {
        let template = set.spec.template.metadata.as_ref();
        let component = template.and_then(|metadata| metadata.labels.as_ref()?.get("app.kubernetes.io/component"));
        observed.restarted.extend(component.cloned().zip(restarted(template)));
    }
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(context.client.clone(), &layout.namespace);
    observed.claims = claims.list(&all).await?.iter().map(|claim| claim.name_any()).collect();
    observed.csi_waits = csi_waits(context, layout, &daemons).await?;
    Ok(observed)
}

fn restarted(template: Option<&ObjectMeta>) -> Option<String> {
    template?.annotations.as_ref()?.get(RESTARTED_ANNOTATION).cloned()
}

fn read(pod: &KubePod) -> Pod {
    let status = pod.status.clone().unwrap_or_default();
    let condition = |kind: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == kind);
    let containers =
        || status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
    let ready = condition("Ready").is_some_and(|condition| condition.status == "True");
    let restarts: i32 = containers().map(|container| container.restart_count).sum();
    let waiting = containers().find_map(|container| {
        let waiting = container.state.as_ref()?.waiting.as_ref()?;
        let ended = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
        let reason = waiting.reason.clone().unwrap_or_default();
        // What it said at its end explains more than that it is started again later.
        let why = ended.and_then(|ended| ended.message.clone()).or_else(|| waiting.message.clone()).unwrap_or_default();
        Some(format!("its container {} waits: {reason} {why}", container.name).trim_end().to_owned())
    });
    let unscheduled = condition("PodScheduled").filter(|condition| condition.status == "False");
    let waits = match (ready, unscheduled, waiting) {
        (true, _, _) => String::new(),
        (_, Some(condition), _) => {
            format!("its pod is not scheduled: {}", condition.message.clone().unwrap_or_default())
        }
        (_, None, Some(why)) => why,
        (false, None, None) => "its pod is not ready".to_owned(),
    };
    Pod {
        machine: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        zone: pod.labels().get(ZONE_LABEL).cloned(),
        ready,
        terminating: pod.metadata.deletion_timestamp.is_some(),
        template: made_from(
            pod.labels().get(TEMPLATE_LABEL).map(String::as_str).unwrap_or_default(),
            restarted(Some(&pod.metadata)).as_deref(),
        ),
        waits,
        life: format!("{}/{restarts}", pod.uid().unwrap_or_default()),
    }
}

/// What the processes that bring volumes to pods still wait for.
async fn csi_waits(context: &Context, layout: &Layout, daemons: &[DaemonSet]) -> Result<Vec<String>, kube::Error> {
    let mut waits = Vec::new();
    let wanted = BTreeSet::from(["keeper", "agent", "csi-node"].map(|part| layout.part(part)));
    let mut missing = wanted;
    for set in daemons {
        let name = set.name_any();
        if !missing.remove(&name) {
            continue;
        }
        let status = set.status.clone().unwrap_or_default();
        if status.observed_generation != set.metadata.generation
            || status.number_ready < status.desired_number_scheduled
        {
            waits.push(format!("{name}: {} of {} ready", status.number_ready, status.desired_number_scheduled));
        }
    }
    let controller = layout.part("csi-controller");
    match Api::<Deployment>::namespaced(context.client.clone(), &layout.namespace).get_opt(&controller).await? {
        Some(deployment) => {
            let status = deployment.status.unwrap_or_default();
            if status.available_replicas.unwrap_or(0) < 1 {
                waits.push(format!("{controller}: not available"));
            }
        }
        None => {
            missing.insert(controller);
        }
    }
    waits.extend(missing.into_iter().map(|name| format!("{name}: not made yet")));
    Ok(waits)
}
