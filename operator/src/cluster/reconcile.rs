//! One look at one StorageCluster: reads, lets the pure modules decide, does what they say, writes the status.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use holdfast_api::v1::NodeState;
use holdfast_crds::names::{CLUSTER_FINALIZER, condition};
use holdfast_crds::{ClusterRef, StorageCluster, StorageClusterStatus, StorageNode, Volume};
use holdfast_id::{ClusterId, NodeId, ReplicaId};
use holdfast_transport::TlsConfigs;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::runtime::controller::Action;
use kube::runtime::reflector::Store;
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use super::authority;
use super::build::{self, Inputs};
use super::certificates::{self, CertificateError, Files, Issued, Stored};
use super::founding::{self, Founder, Record, Said, Step};
use super::layout::Layout;
use super::loss::{self, Verdict};
use super::observed::Observed;
use super::scale;
use super::status::{self, Csi};
use super::validate::{self, ValidCluster, validate};
use super::{LOOK_EVERY, changing, ending, files, projecting, storage, update, version, workloads};
use crate::conditions::Conditions;
use crate::context::{Context, FIELD_MANAGER, Running};
use crate::metrics::Metrics;
use crate::volume::adopt;
use crate::{apply, conditions};

/// While a cluster is being made, somebody waits for it.
const SOON: Duration = Duration::from_millis(500);
/// What a person has to mend.
const AGAIN: Duration = Duration::from_secs(30);
/// While it is not as asked for.
const UNREADY: Duration = Duration::from_secs(2);
const RECORD_FILE: &str = "founding.json";

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("the API server: {0}")]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    #[error("the certificates make no TLS configuration: {0}")]
    Tls(String),
    #[error(
        "the record of the founding ({name}) cannot be read: {detail}; restore it, or delete it where every disk is whole: it is then found again"
    )]
    Record { name: String, detail: String },
    #[error("no random numbers: {0}")]
    Random(getrandom::Error),
}

/// What a look needs beside the object.
pub struct Looker {
    pub context: Arc<Context>,
    pub clusters: Store<StorageCluster>,
    pub volumes: Store<Volume>,
}

/// # Errors
/// What the API server refused, or what is wrong with the certificates; the look is made again.
pub async fn reconcile(cluster: Arc<StorageCluster>, looker: Arc<Looker>) -> Result<Action, ClusterError> {
    let context = &looker.context;
    Metrics::count(&context.metrics.cluster_looks);
    let layout = layout_of(&cluster);
    if cluster.metadata.deletion_timestamp.is_some() {
        let held = ending::end(&looker, &cluster, &layout).await?;
        if let Some((reason, message)) = held {
            let mut conditions = Conditions::default();
            conditions.set(condition::DELETION_BLOCKED, true, reason, message.clone());
            conditions.reconciling("DeletionBlocked", message);
            let status = StorageClusterStatus { phase: Some("Deleting".into()), ..before(&cluster) };
            write(context, &cluster, status, &conditions).await?;
        }
        return Ok(Action::requeue(LOOK_EVERY));
    }
    if cluster.spec.paused {
        if let Some(running) = context.shared().running.get_mut(&layout.cluster_ref()) {
            running.paused = true;
        }
        let mut conditions = Conditions::default();
        conditions.unknown(condition::READY, "Paused", "spec.paused is set: nothing is changed or looked at");
        let status = StorageClusterStatus { phase: Some("Paused".into()), ..before(&cluster) };
        write(context, &cluster, status, &conditions).await?;
        return Ok(Action::await_change());
    }
    if !cluster.finalizers().iter().any(|finalizer| finalizer == CLUSTER_FINALIZER) {
        ending::finalize(context, &cluster, true).await?;
        return Ok(Action::await_change());
    }
    let others = looker.clusters.state();
    let valid = match validate(&cluster).and_then(|valid| match validate::taken(&cluster, &others) {
        None => Ok(valid),
        Some(problem) => Err(vec![problem]),
    }) {
        Ok(valid) => valid,
        Err(problems) => {
            let mut conditions = Conditions::default();
            status::invalid(&problems, &mut conditions);
            let status = StorageClusterStatus { phase: Some("Stalled".into()), ..before(&cluster) };
            write(context, &cluster, status, &conditions).await?;
            // What stands against it may go without a change of this object.
            return Ok(Action::requeue(AGAIN));
        }
    };
    look(&looker, &cluster, &valid).await
}

/// After an error: told where people look, and tried again.
pub fn on_error(cluster: Arc<StorageCluster>, error: &ClusterError, looker: Arc<Looker>) -> Action {
    Metrics::count(&looker.context.metrics.cluster_errors);
    tracing::warn!(cluster = cluster.name_any(), %error, "a cluster is looked at again");
    Action::requeue(LOOK_EVERY)
}

async fn look(looker: &Looker, cluster: &StorageCluster, valid: &ValidCluster) -> Result<Action, ClusterError> {
    let context = &looker.context;
    let layout = &valid.layout;
    let name = layout.cluster_ref();
    // Before the catalogue: an object that is missing here and whose volume is still there has to be made.
    let objects: BTreeSet<String> = looker.volumes.state().iter().map(|volume| volume.name_any()).collect();

    let mut observed = workloads::observe(context, valid).await?;
    let (record, mut members) = read_record(context, valid, &observed).await?;
    for (group, count) in &observed.replicas {
        members.extend((0..*count).map(|ordinal| layout.pod(group, ordinal)));
    }
    let members: Vec<String> = members.into_iter().collect();
    let issued = certify(context, cluster, valid, &members, &observed).await?;
    observed.node_ids = issued.node_ids.clone();
    let running = run(context, valid, &members, &observed, &issued)?;
    if record.is_some() {
        observed.catalogue = Some(storage::catalogue(&running.client).await);
    }
    let catalogue = observed.catalogue.as_ref().and_then(|catalogue| catalogue.as_ref().ok());
    let plan = scale::plan(valid, &observed, catalogue);

    let expected: Vec<String> = valid.members().into_iter().map(|(name, _)| name).collect();
    let asked = founding::asked(&expected, record.as_ref());
    ask(context, &name, &running, layout, &asked, record.as_ref(), &mut observed).await;
    let image = valid.image.as_deref().unwrap_or(&context.settings.image);
    let jump = version::obstacle(&observed.versions, image);

    let with_csi = csi(looker, cluster);
    let inputs = Inputs {
        cluster: valid,
        settings: &context.settings,
        replicas: &plan.replicas,
        machines: &observed.machines,
        with_csi: with_csi == Csi::Here,
        trust_pem: &issued.ca_pem,
    };
    let objects_wanted = build::build(&inputs);
    for object in objects_wanted.iter().filter(|object| jump.is_none() || !object.runs_pods()) {
        apply::apply(context, object).await?;
    }
    let step = founding::next(&expected, &observed.said, record.as_ref());
    observed.cluster_id = record.as_ref().map(|record| record.cluster_id.clone());
    observed.founding = Some(step.clone());
    let failure = take(context, valid, &running, record, &step, &observed).await?;

    let mut loss = Verdict::default();
    if let Some(Ok(catalogue)) = &observed.catalogue {
        let gone = projecting::project(context, valid, &observed, catalogue).await?;
        let looking = looking_since(context, cluster);
        loss = loss::judge(catalogue, &gone, looking, valid.node_loss_timeout, Timestamp::now());
        if let Some(node) = &loss.away {
            match storage::set_node_state(&running.client, node, NodeState::Away).await {
                Ok(()) => tracing::warn!(node, "it has been gone for too long: its copies are made again elsewhere"),
                Err(error) => loss.held = Some(format!("{node} has been gone for too long: {error}")),
            }
        }
        context.shared().retired.insert(name.clone(), catalogue.retired());
        adopt::adopt(context, &name, &adopt::missing(&objects, &catalogue.volumes)).await?;
        let volumes = u64::try_from(catalogue.volumes.len()).unwrap_or(u64::MAX);
        context.metrics.volumes.store(volumes, std::sync::atomic::Ordering::Relaxed);
    }
    if observed.catalogue.as_ref().is_some_and(Result::is_ok) {
        context.shared().running.insert(name.clone(), running.clone());
    }

    let mut conditions = Conditions::default();
    let mut now = status::status(valid, &observed, &with_csi, &mut conditions);
    if let Some(why) = failure {
        conditions.reconciling("MemberRefused", why);
    }
    if let Some(held) = loss.held {
        conditions.set(condition::DEGRADED, true, "TooManyGone", held);
    }
    let templates = build::templates(&objects_wanted, &observed.restarted);
    let looked = update::Looked {
        cluster: valid,
        observed: &observed,
        catalogue: observed.catalogue.as_ref().and_then(|catalogue| catalogue.as_ref().ok()),
        templates: &templates,
    };
    match jump {
        Some(jump) => {
            conditions.stalled("UnsupportedVersion", jump);
            now.phase = Some("Stalled".to_owned());
        }
        None => changing::advance(context, &running.client, &plan, &looked, &mut conditions).await?,
    }
    if now.phase.as_deref() == Some("Ready") && conditions.holds(condition::RECONCILING) {
        now.phase = Some("Updating".to_owned());
    }
    let ready = conditions.holds(condition::READY);
    write(context, cluster, now, &conditions).await?;
    Ok(Action::requeue(match step {
        Step::Wait { .. } => UNREADY,
        Step::Settled { .. } if !ready => UNREADY,
        Step::Settled { .. } | Step::Stuck { .. } => LOOK_EVERY,
        _ => SOON,
    }))
}

/// Since when this process looks at a metadata plane that answers. Of one that did not answer before, since now.
fn looking_since(context: &Context, cluster: &StorageCluster) -> Timestamp {
    let conditions = cluster.status.iter().flat_map(|status| &status.conditions);
    let mut available = conditions.filter(|found| found.type_ == condition::AVAILABLE && found.status == "True");
    available.next().map_or_else(Timestamp::now, |found| found.last_transition_time.0.max(context.started))
}

/// The record of the founding, and all who have or may have a certificate.
async fn read_record(
    context: &Context,
    valid: &ValidCluster,
    observed: &Observed,
) -> Result<(Option<Record>, BTreeSet<String>), ClusterError> {
    let layout = &valid.layout;
    let mut members: BTreeSet<String> = valid.members().into_iter().map(|(name, _)| name).collect();
    members.extend(observed.pods.keys().cloned());
    let Some(files) = files::read_config(context, &layout.namespace, &layout.founding()).await? else {
        return Ok((None, members));
    };
    let text = files.get(RECORD_FILE).map(String::as_str).unwrap_or_default();
    let record: Record = serde_json::from_str(text)
        .map_err(|error| ClusterError::Record { name: layout.founding(), detail: error.to_string() })?;
    Ok((Some(record), members))
}

/// Whole certificates, in Secrets that are there before the pods that mount them.
async fn certify(
    context: &Context,
    cluster: &StorageCluster,
    valid: &ValidCluster,
    members: &[String],
    observed: &Observed,
) -> Result<Issued, ClusterError> {
    let layout = &valid.layout;
    let now = SystemTime::now();
    let read = |name: String| async move { files::read_secret(context, &layout.namespace, &name).await };
    let bearer = format!("holdfast {}/{}", layout.namespace, layout.name);
    let known = match read(layout.authority()).await? {
        Some(authority) => authority,
        None => {
            let fresh = authority::found(&bearer, now)?;
            match files::create_secret(context, layout, &layout.authority(), &fresh).await {
                Ok(()) => fresh,
                // Somebody was faster: theirs counts.
                Err(error) if apply::is_conflict(&error) => read(layout.authority()).await?.unwrap_or_default(),
                Err(error) => return Err(error.into()),
            }
        }
    };
    let authority = authority::advance(&known, &bearer, valid.certificate_days, now)?;
    if authority != known {
        files::apply_secret(context, layout, None, &layout.authority(), &authority).await?;
        tracing::info!(cluster = layout.name, "another authority is on its way: see the Secret {}", layout.authority());
    }
    let stored = Stored {
        authority,
        nodes: read(layout.nodes_tls()).await?.unwrap_or_default(),
        csi_controller: read(layout.csi_controller_tls()).await?.unwrap_or_default(),
    };
    let known = if stored.nodes.is_empty() { remembered(context, layout).await? } else { BTreeMap::new() };
    let admin = context.shared().admins.get(&layout.cluster_ref()).cloned();
    let retired = context.shared().retired.get(&layout.cluster_ref()).cloned().unwrap_or_default();
    let forgotten: BTreeSet<String> = members
        .iter()
        .filter(|member| certificates::stored_id(&stored.nodes, member).is_some_and(|id| retired.contains(&id)))
        .filter(|member| !observed.pods.contains_key(*member) && !observed.claims.contains(&layout.claim_of(member)))
        .cloned()
        .collect();
    let issued = certificates::issue(&stored, members, &known, &forgotten, admin, valid.certificate_days, now)?;
    if issued.nodes != stored.nodes {
        files::apply_secret(context, layout, None, &layout.nodes_tls(), &issued.nodes).await?;
    }
    if issued.csi_controller != stored.csi_controller {
        let uid = cluster.metadata.uid.as_deref();
        files::apply_secret(context, layout, uid, &layout.csi_controller_tls(), &issued.csi_controller).await?;
    }
    if !issued.renewed.is_empty() {
        tracing::info!(cluster = layout.name, certificates = issued.renewed.join(", "), "certificates were issued");
    }
    context.shared().admins.insert(layout.cluster_ref(), issued.admin.clone());
    Ok(issued)
}

/// Identities of members as their StorageNodes tell them: for a Secret that was lost while the disks were not.
async fn remembered(context: &Context, layout: &Layout) -> Result<BTreeMap<String, NodeId>, ClusterError> {
    let nodes: Api<StorageNode> = Api::namespaced(context.client.clone(), &layout.namespace);
    let nodes = nodes.list(&ListParams::default()).await?;
    let ours = nodes.items.iter().filter(|node| node.spec.cluster == layout.name);
    Ok(ours.filter_map(|node| Some((node.name_any(), node.spec.node_id.parse().ok()?))).collect())
}

/// The client of the storage cluster; the former one where nothing about it changed, because it knows who leads.
fn run(
    context: &Context,
    valid: &ValidCluster,
    members: &[String],
    observed: &Observed,
    issued: &Issued,
) -> Result<Running, ClusterError> {
    let name = valid.layout.cluster_ref();
    let text = format!("{members:?} {} {}", issued.ca_pem, issued.admin.certificate_pem());
    let fingerprint = apply::fingerprint(&text);
    let known = context.running(&name).filter(|running| running.fingerprint == fingerprint);
    let client = match known {
        Some(running) => running.client,
        None => {
            let tls =
                TlsConfigs::new(&issued.admin, &issued.roots).map_err(|error| ClusterError::Tls(error.to_string()))?;
            storage::client(&valid.layout, members, tls)
        }
    };
    let by_machine = observed.pods.iter().filter_map(|(pod, seen)| Some((seen.machine.clone()?, pod.clone())));
    Ok(Running {
        client,
        fingerprint,
        nodes_by_machine: by_machine.collect(),
        default_replicas: valid.default_replicas,
        paused: false,
    })
}

/// What the members say of themselves. Who is connected to the metadata leader needs not be asked again.
async fn ask(
    context: &Context,
    name: &ClusterRef,
    running: &Running,
    layout: &Layout,
    asked: &[String],
    record: Option<&Record>,
    observed: &mut Observed,
) {
    let catalogue = observed.catalogue.as_ref().and_then(|catalogue| catalogue.as_ref().ok());
    let mut unknown = Vec::new();
    for member in asked {
        let life = observed.pods.get(member).map(|pod| pod.life.clone()).unwrap_or_default();
        let version = context.shared().versions.get(&(name.clone(), member.clone())).cloned();
        let connected = catalogue.and_then(|c| c.node(member)).filter(|node| node.connected);
        match (record.filter(|record| record.is_founded()), connected, version) {
            (Some(record), Some(node), Some((of, build))) if of == life => {
                let said = Said::Formatted {
                    node_id: node.node_id.clone(),
                    cluster_id: record.cluster_id.clone(),
                    disk_id: node.disks.last().map(|disk| disk.disk_id.clone()).unwrap_or_default(),
                };
                observed.said.insert(member.clone(), said);
                observed.versions.insert(member.clone(), build);
            }
            _ => unknown.push(member.clone()),
        }
    }
    for (member, (said, build)) in storage::probe(&running.client, layout, &unknown).await {
        if let Some(build) = build {
            let life = observed.pods.get(&member).map(|pod| pod.life.clone()).unwrap_or_default();
            context.shared().versions.insert((name.clone(), member.clone()), (life, build.clone()));
            observed.versions.insert(member.clone(), build);
        }
        observed.said.insert(member, said);
    }
}

/// Does the step; tells in words what a member refused.
async fn take(
    context: &Context,
    valid: &ValidCluster,
    running: &Running,
    record: Option<Record>,
    step: &Step,
    observed: &Observed,
) -> Result<Option<String>, ClusterError> {
    let layout = &valid.layout;
    match (step, record) {
        (Step::Mint { founders }, _) => {
            let record = mint(valid, founders, observed)?;
            tracing::info!(cluster = layout.name, id = record.cluster_id, "a storage cluster is founded");
            create_record(context, layout, &record).await?;
        }
        (Step::Adopt { cluster_id }, _) => {
            tracing::info!(cluster = layout.name, id = cluster_id, "a storage cluster was found on the disks");
            create_record(context, layout, &Record { cluster_id: cluster_id.clone(), ..Record::default() }).await?;
        }
        (Step::RecordFounded { disks }, Some(mut record)) => {
            record.founded.extend(disks.clone());
            files::apply_record(context, layout, &record_files(&record)).await?;
        }
        (Step::Found { names }, Some(record)) => {
            return Ok(storage::found(&running.client, layout, &record, names).await.err());
        }
        (Step::Join { names }, Some(record)) => {
            let said = &observed.said;
            return Ok(storage::join(&running.client, layout, &record.cluster_id, said, names).await.err());
        }
        _ => {}
    }
    Ok(None)
}

fn mint(valid: &ValidCluster, founders: &[(String, String)], observed: &Observed) -> Result<Record, ClusterError> {
    let zones: BTreeMap<String, Option<String>> =
        valid.members().into_iter().map(|(name, group)| (name, group.zone.clone())).collect();
    let mut record = Record {
        cluster_id: ClusterId::from_bytes(random()?).map(|id| id.to_string()).unwrap_or_default(),
        ..Record::default()
    };
    for (name, node_id) in founders {
        let replica_id = ReplicaId::from_bytes(random()?).map(|id| id.to_string()).unwrap_or_default();
        let zone = zones.get(name).cloned().flatten().or_else(|| observed.pods.get(name)?.zone.clone());
        record.founders.push(Founder {
            name: name.clone(),
            node_id: node_id.clone(),
            replica_id,
            zone: zone.unwrap_or_default(),
        });
    }
    Ok(record)
}

/// Sixteen random bytes that are not all zero.
fn random() -> Result<[u8; 16], ClusterError> {
    loop {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(ClusterError::Random)?;
        if bytes != [0; 16] {
            return Ok(bytes);
        }
    }
}

/// Never over one that is there: the next look goes on from that.
async fn create_record(context: &Context, layout: &Layout, record: &Record) -> Result<(), ClusterError> {
    match files::create_record(context, layout, &record_files(record)).await {
        Err(error) if !apply::is_conflict(&error) => Err(error.into()),
        _ => Ok(()),
    }
}

fn record_files(record: &Record) -> Files {
    let text = serde_json::to_string_pretty(record).expect("a record has string keys");
    Files::from([(RECORD_FILE.to_owned(), text)])
}

/// To whom the one CSI driver belongs: the cluster that was configured, else the oldest.
fn csi(looker: &Looker, cluster: &StorageCluster) -> Csi {
    let own = layout_of(cluster).cluster_ref();
    let chosen = chosen(&looker.context, &looker.clusters.state()).unwrap_or_else(|| own.clone());
    if chosen == own { Csi::Here } else { Csi::Elsewhere { cluster: format!("{}/{}", chosen.namespace, chosen.name) } }
}

/// `None`: there is no StorageCluster.
pub fn chosen<C: Borrow<StorageCluster>>(context: &Context, clusters: &[C]) -> Option<ClusterRef> {
    if let Some(configured) = &context.settings.csi_cluster {
        return Some(configured.clone());
    }
    let oldest = clusters
        .iter()
        .map(Borrow::borrow)
        .min_by_key(|cluster| (cluster.metadata.creation_timestamp.clone(), cluster.namespace(), cluster.name_any()))?;
    Some(layout_of(oldest).cluster_ref())
}

pub fn layout_of(cluster: &StorageCluster) -> Layout {
    Layout { namespace: cluster.namespace().unwrap_or_default(), name: cluster.name_any() }
}

fn before(cluster: &StorageCluster) -> StorageClusterStatus {
    cluster.status.clone().unwrap_or_default()
}

/// Only what changed is written.
async fn write(
    context: &Context,
    cluster: &StorageCluster,
    mut status: StorageClusterStatus,
    conditions: &Conditions,
) -> Result<(), ClusterError> {
    let before = before(cluster);
    status.observed_generation = cluster.metadata.generation;
    status.conditions = conditions.merge(&before.conditions, cluster.metadata.generation, Timestamp::now());
    if status == before {
        return Ok(());
    }
    let name = cluster.name_any();
    let patch = json!({
        "apiVersion": "holdfast.dev/v1alpha1",
        "kind": "StorageCluster",
        "metadata": { "name": name },
        "status": status,
    });
    let clusters: Api<StorageCluster> =
        Api::namespaced(context.client.clone(), &cluster.namespace().unwrap_or_default());
    let params = PatchParams::apply(FIELD_MANAGER).force();
    match clusters.patch_status(&name, &params, &Patch::Apply(&patch)).await {
        Ok(_) => {}
        Err(error) if apply::is_not_found(&error) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let changed = conditions::changed(&before.conditions, &status.conditions);
    context.tell(&cluster.object_ref(&()), &changed).await;
    Ok(())
}
