//! What people may write, and what the operator makes of it.

use std::time::{Duration, SystemTime};

use holdfast_transport::pki::{Authority, Validity};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::nodes::{Member, renew, run};
use crate::objects::{Kind, clusters, condition, disks, kind, nodes, version, volumes};
use crate::servers::{NAMESPACE, Process, Servers};
use crate::wait::until;

/// Looks at an object that nobody touches: as many as find out whether one of them writes.
const LOOKS: u64 = 3;

fn claim(size: &str) -> Value {
    json!({"volumeClaimTemplate": {"size": size}})
}

fn volume(size: &str, more: Value) -> Value {
    let mut spec = json!({"clusterRef": {"namespace": NAMESPACE, "name": "main"}, "size": size});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    spec
}

/// Each with the words that the refusal must have.
async fn refused(kind: &Kind, name: &str, spec: Value, words: &str) {
    let refusal = kind.try_create(name, spec.clone()).await.expect_err(&spec.to_string());
    assert!(refusal.contains(words), "{spec}: {refusal}");
}

async fn refused_change(kind: &Kind, name: &str, spec: Value, words: &str) {
    let refusal = kind.try_change(name, spec.clone()).await.expect_err(&spec.to_string());
    assert!(refusal.contains(words), "{spec}: {refusal}");
}

#[tokio::test]
async fn what_cannot_be_meant_is_refused_and_the_message_says_what_to_do() {
    let servers = Servers::start().await;
    let clusters = clusters(&servers.client);
    let one_of = "give exactly one of volumeClaimTemplate, devices and hostPath";
    refused(&clusters, "main", json!({"storage": {}}), one_of).await;
    let two =
        json!({"storage": {"volumeClaimTemplate": {"size": "2Gi"}, "hostPath": {"path": "/data", "size": "2Gi"}}});
    refused(&clusters, "main", two, one_of).await;
    refused(&clusters, "main", json!({"storage": claim("500Mi")}), "a storage node needs at least 1Gi").await;
    let members = |replicas: i32| json!({"storage": claim("2Gi"), "members": {"replicas": replicas}});
    refused(&clusters, "main", members(0), "should be greater than or equal to 1").await;
    refused(&clusters, "main", members(65), "should be less than or equal to 64").await;
    let group = json!({"storage": claim("2Gi"), "nodeGroups": [{"name": "main"}]});
    refused(&clusters, "main", group, "the group 'main' is that of spec.members").await;
    let copies = json!({"storage": claim("2Gi"), "defaults": {"replicas": 6}});
    refused(&clusters, "main", copies, "should be less than or equal to 5").await;
    let relative = json!({"storage": {"hostPath": {"path": "data", "size": "2Gi"}}});
    refused(&clusters, "main", relative, "should match").await;
    let timeout = |text: &str| json!({"storage": claim("2Gi"), "disruption": {"nodeLossTimeout": text}});
    refused(&clusters, "main", timeout("soon"), "a duration such as 10m").await;
    refused(&clusters, "main", timeout("-1m"), "a duration such as 10m").await;
    let spec = json!({"storage": claim("2Gi")});
    refused(&clusters, &"a".repeat(41), spec.clone(), "at most 40 characters").await;
    refused(&clusters, "1st", spec.clone(), "begin with a letter").await;
    clusters.create("main", spec).await;
    let size = "the size of claims cannot be changed";
    refused_change(&clusters, "main", json!({"storage": claim("3Gi")}), size).await;
    let other = json!({"storage": {"volumeClaimTemplate": null, "hostPath": {"path": "/data", "size": "2Gi"}}});
    refused_change(&clusters, "main", other, "the kind of storage cannot be changed").await;

    let volumes = volumes(&servers.client);
    refused(&volumes, "v", volume("0", json!({})), "a volume has a size").await;
    for (replicas, words) in [(0, "greater than or equal to 1"), (6, "less than or equal to 5")] {
        refused(&volumes, "v", volume("1Gi", json!({"replicas": replicas})), words).await;
    }
    refused(&volumes, "v", volume("1Gi", json!({"logicalBlockSize": 1000})), "512 or 4096 bytes").await;
    refused(&volumes, "v", volume("1Gi", json!({"placement": {"spread": "rack"}})), "Unsupported value").await;
    refused(&volumes, &"v".repeat(64), volume("1Gi", json!({})), "at most 63 characters").await;
    volumes.create("v", volume("2Gi", json!({}))).await;
    refused_change(&volumes, "v", json!({"size": "1Gi"}), "a volume cannot shrink: make a smaller one and copy").await;
    refused_change(&volumes, "v", json!({"logicalBlockSize": 512}), "block size of a volume cannot be changed").await;
    refused_change(&volumes, "v", json!({"clusterRef": {"name": "other"}}), "cannot be moved to another cluster").await;
    volumes.change("v", json!({"size": "3Gi"})).await;
}

/// Without storage nodes: what is said of what cannot start, and that nothing is written while nothing changes.
#[tokio::test]
async fn a_cluster_without_pods_says_what_it_waits_for_and_writes_nothing_meanwhile() {
    let servers = Servers::start().await;
    let _operator = servers.operator(&[]);
    let clusters = clusters(&servers.client);
    clusters.create("main", json!({"storage": claim("2Gi")})).await;
    let message = clusters.until_condition("main", "Reconciling", "True", "WaitingForMembers").await;
    assert!(message.contains("main-main-0: it has no pod yet"), "{message}");

    // A process that cannot start says why, by the last words that kubelet found in its log.
    let pods: Api<Pod> = Api::namespaced(servers.client.clone(), NAMESPACE);
    let why = "the disk /dev/sdb is that of node 7a of cluster 5c";
    broken_pod(&servers, &pods, why).await;
    clusters
        .until("main", "the reason of a pod that ends again and again", |cluster| {
            condition(cluster, "Reconciling")?["message"].as_str().filter(|message| message.contains(why)).map(|_| ())
        })
        .await;
    unchanged(&servers, "StorageCluster").await;

    clusters.create("second", json!({"storage": claim("2Gi")})).await;
    let message = clusters.until_condition("second", "CSIReady", "False", "AnotherCluster").await;
    assert!(message.contains("storage/main"), "{message}");

    let volumes = volumes(&servers.client);
    volumes.create("early", volume("1Gi", json!({}))).await;
    let message = volumes.until_condition("early", "Reconciling", "True", "ClusterNotReady").await;
    assert!(message.contains("StorageCluster storage/main"), "{message}");
    unchanged(&servers, "Volume").await;
    volumes.delete("early").await;
    let message = volumes.until_condition("early", "DeletionBlocked", "True", "ClusterNotReady").await;
    assert!(message.contains("StorageCluster storage/main"), "{message}");
}

/// Every machine's disk becomes a PersistentVolume that its pod never leaves; another cluster's is not touched.
#[tokio::test]
async fn disks_of_machines_are_bound_to_them_and_to_the_older_cluster() {
    let servers = Servers::start().await;
    let _operator = servers.operator(&[]);
    let machines: Api<Node> = Api::all(servers.client.clone());
    for (name, role) in [("worker-1", "storage"), ("worker-2", "web")] {
        let labels = json!({"kubernetes.io/hostname": name, "role": role});
        let node = serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).unwrap();
        machines.create(&PostParams::default(), &node).await.unwrap();
    }
    let clusters = clusters(&servers.client);
    let on = |device: &str| json!({"members": {"nodeSelector": {"role": "storage"}}, "storage": {"devices": [{"path": device}]}});
    clusters.create("old", on("/dev/sdb")).await;
    clusters.until_condition("old", "Reconciling", "True", "WaitingForMembers").await;
    let disks = kind::<PersistentVolume>(&servers.client, None);
    let names: Vec<String> = disks.list().await.iter().map(|disk| version(disk).0).collect();
    assert_eq!(names, ["storage.old.main.worker-1"]);
    let disk = disks.get(&names[0]).await.unwrap().data["spec"].clone();
    let term = &disk["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0];
    assert_eq!((&term["values"], &disk["local"]["path"]), (&json!(["worker-1"]), &json!("/dev/sdb")));
    let sets = kind::<StatefulSet>(&servers.client, Some(NAMESPACE));
    let claim = sets.get("old-main").await.unwrap().data["spec"]["volumeClaimTemplates"][0]["spec"].clone();
    assert_eq!((&claim["storageClassName"], &claim["volumeMode"]), (&disk["storageClassName"], &json!("Block")));

    clusters.create("young", on("/dev/sdb")).await;
    let message = clusters.until_condition("young", "Stalled", "True", "DevicesTaken").await;
    assert!(message.contains("/dev/sdb belongs to the StorageCluster storage/old"), "{message}");
    assert!(sets.get("young-main").await.is_none(), "nothing of it is started");
    unchanged(&servers, "StorageCluster").await;
}

async fn broken_pod(servers: &Servers, pods: &Api<Pod>, why: &str) {
    let sets: Api<StatefulSet> = Api::namespaced(servers.client.clone(), NAMESPACE);
    let template = sets.get("main-main").await.unwrap().spec.template;
    let mut pod: Pod = serde_json::from_value(json!({"metadata": {"name": "main-main-0"}})).unwrap();
    pod.metadata.labels = template.metadata.unwrap().labels;
    let mut spec = template.spec.unwrap();
    // Its claim is not there, and nobody is to mount it.
    spec.containers[0].volume_mounts = None;
    spec.priority_class_name = None;
    pod.spec = Some(spec);
    pods.create(&PostParams::default(), &pod).await.unwrap();
    let status = json!({"status": {"containerStatuses": [{
        "name": "storage-node", "image": "", "imageID": "", "ready": false, "restartCount": 3,
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}},
        "lastState": {"terminated": {"exitCode": 1, "message": why}},
    }]}});
    pods.patch_status("main-main-0", &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
}

/// While the operator looks again and again, nothing that it keeps is written.
async fn unchanged(servers: &Servers, looked_at: &str) {
    let seen = async || {
        let client = &servers.client;
        let mut seen: Vec<(String, String)> = Vec::new();
        let kinds = [
            clusters(client),
            volumes(client),
            nodes(client),
            disks(client),
            kind::<StatefulSet>(client, Some(NAMESPACE)),
            kind::<Secret>(client, Some(NAMESPACE)),
        ];
        for kind in kinds {
            seen.extend(kind.list().await.iter().map(version));
        }
        let events: Api<Event> = Api::all(client.clone());
        let events = events.list(&ListParams::default()).await.unwrap().items.len();
        (seen, events)
    };
    let look = async |count: u64| {
        let first = servers.looks(looked_at).unwrap();
        until("the operator looks again", async || match servers.looks(looked_at)? - first {
            looks if looks >= count => Ok(()),
            looks => Err(format!("{looks} looks")),
        })
        .await;
    };
    // What is under way when this begins, or the storage cluster does by itself, ends: then nothing is written any more.
    until("nothing is written", async || {
        let before = seen().await;
        look(LOOKS).await;
        let after = seen().await;
        if before == after { Ok(()) } else { Err(format!("{before:?}\n{after:?}")) }
    })
    .await;
}

/// Two groups in two zones, two members each.
const MEMBERS: [(&str, u32); 4] = [("main", 0), ("main", 1), ("b", 0), ("b", 1)];

fn members(cluster: &'static str) -> Vec<Member> {
    let member = |(index, (group, ordinal)): (usize, (&'static str, u32))| Member {
        cluster,
        group,
        ordinal,
        index: u32::try_from(index).unwrap() + 1,
    };
    MEMBERS.into_iter().enumerate().map(member).collect()
}

fn two_zones() -> Value {
    json!({
        "members": {"replicas": 2, "zone": "a"},
        "nodeGroups": [{"name": "b", "replicas": 2, "zone": "b"}],
        "storage": claim("1Gi"),
        "deletionPolicy": "Delete",
    })
}

#[tokio::test]
async fn a_cluster_of_storage_nodes_from_its_founding_to_its_end() {
    let servers = Servers::start().await;
    let members = members("main");
    let hosts: Vec<_> = members.iter().map(Member::host).collect();
    let _operator = servers.operator(&hosts);
    let clusters = clusters(&servers.client);
    clusters.create("main", two_zones()).await;
    let mut processes: Vec<Option<Process>> = Vec::new();
    for member in &members {
        processes.push(Some(run(&servers, member).await));
    }
    clusters.until_condition("main", "Ready", "True", "Ready").await;
    let status = clusters.get("main").await.unwrap().data["status"].clone();
    assert_eq!((&status["readyMembers"], &status["phase"]), (&json!("4/4"), &json!("Ready")));
    assert_eq!((nodes(&servers.client).list().await.len(), disks(&servers.client).list().await.len()), (4, 4));

    volumes_come_grow_and_are_refused(&servers).await;
    unchanged(&servers, "StorageCluster").await;
    paused(&servers, &clusters).await;
    a_jump_of_versions(&servers, &clusters).await;
    another_authority(&servers, &clusters, &members).await;
    clusters.change("main", json!({"disruption": {"nodeLossTimeout": "1s"}})).await;
    a_node_is_lost_and_returns(&servers, &members, &mut processes).await;
    clusters.change("main", json!({"disruption": {"nodeLossTimeout": "10m"}})).await;
    a_member_leaves_and_another_takes_its_name(&servers, &clusters, &members[3], &mut processes[3]).await;
    it_is_deleted(&servers, &clusters).await;
}

async fn volumes_come_grow_and_are_refused(servers: &Servers) {
    let volumes = volumes(&servers.client);
    volumes.create("data", volume("64Mi", json!({}))).await;
    volumes.until_condition("data", "Ready", "True", "Healthy").await;
    let status = volumes.get("data").await.unwrap().data["status"].clone();
    assert_eq!((&status["readyReplicas"], &status["state"]), (&json!("3/3"), &json!("Detached")));

    for (name, size, more, words) in [
        ("five-copies", "64Mi", json!({"replicas": 5}), "5 replicas need 5 nodes"),
        ("three-zones", "64Mi", json!({"placement": {"spread": "zone"}}), "need 3 zones"),
        ("too-large", "1Ti", json!({}), "have 0"),
    ] {
        volumes.create(name, volume(size, more)).await;
        let message = volumes.until_condition(name, "Stalled", "True", "NoPlacement").await;
        assert!(message.contains(words), "{name}: {message}");
        let error = volumes.get(name).await.unwrap().data["status"]["lastError"].clone();
        assert_eq!(error["code"], "NoPlacement", "{error}");
        until("an event says it too", async || {
            let events: Api<Event> = Api::all(servers.client.clone());
            let events = events.list(&ListParams::default()).await.map_err(|error| error.to_string())?;
            let told = |event: &Event| {
                let of = event.regarding.as_ref().and_then(|regarding| regarding.name.as_deref());
                of == Some(name) && event.reason.as_deref() == Some("NoPlacement")
            };
            events.items.iter().any(told).then_some(()).ok_or_else(|| format!("{} events", events.items.len()))
        })
        .await;
        volumes.delete(name).await;
        volumes.until_gone(name).await;
    }

    volumes.change("data", json!({"size": "128Mi"})).await;
    volumes.until("data", "has grown", |volume| (volume.data["status"]["size"] == json!("128Mi")).then_some(())).await;
}

async fn paused(servers: &Servers, clusters: &Kind) {
    clusters.change("main", json!({"paused": true})).await;
    clusters.until_condition("main", "Ready", "Unknown", "Paused").await;
    let sets = kind::<StatefulSet>(&servers.client, Some(NAMESPACE));
    let before: Vec<(String, String)> = sets.list().await.iter().map(version).collect();
    clusters.change("main", json!({"members": {"tolerations": [{"key": "x", "operator": "Exists"}]}})).await;
    clusters.until_condition("main", "Ready", "Unknown", "Paused").await;
    let after: Vec<(String, String)> = sets.list().await.iter().map(version).collect();
    assert_eq!(before, after, "paused, nothing is changed");
    clusters.change("main", json!({"paused": false})).await;
    sets.until("main-main", "has what was asked for meanwhile", |set| {
        set.data["spec"]["template"]["spec"]["tolerations"].as_array().map(|_| ())
    })
    .await;
    clusters.until_condition("main", "Ready", "True", "Ready").await;
}

async fn a_jump_of_versions(servers: &Servers, clusters: &Kind) {
    clusters.change("main", json!({"image": "registry.example/holdfast:9.7.0"})).await;
    let message = clusters.until_condition("main", "Stalled", "True", "UnsupportedVersion").await;
    assert!(message.contains("9.7"), "{message}");
    let sets: Api<StatefulSet> = Api::namespaced(servers.client.clone(), NAMESPACE);
    let image = sets.get("main-main").await.unwrap().spec.template.spec.unwrap().containers[0].image.clone();
    assert_eq!(image.as_deref(), Some("holdfast:test"), "nothing starts from it");
    clusters.change("main", json!({"image": null})).await;
    clusters.until_condition("main", "Ready", "True", "Ready").await;
}

/// The phases of a change, with their time taken away; the processes are never started again.
async fn another_authority(servers: &Servers, clusters: &Kind, members: &[Member]) {
    let secrets: Api<Secret> = Api::namespaced(servers.client.clone(), NAMESPACE);
    let bundle = async || {
        let secret = secrets.get("main-nodes-tls").await.map_err(|error| error.to_string())?;
        let text = secret.data.unwrap_or_default().remove("ca.pem").ok_or("no bundle")?;
        String::from_utf8(text.0).map_err(|error| error.to_string())
    };
    let change = async |data: Value| {
        let patch = Patch::Merge(json!({ "stringData": data }));
        secrets.patch("main-ca", &PatchParams::default(), &patch).await.unwrap();
    };
    let (now, day) = (SystemTime::now(), Duration::from_secs(86_400));
    let validity = Validity { not_before: now - day * 100, not_after: now + day * 1000 };
    let next = Authority::create("next", validity).unwrap();
    change(json!({"next.pem": next.certificate_pem(), "next.key": next.key_pem(), "phase-days": "200"})).await;
    let announced = async || match bundle().await? {
        text if text.ends_with(next.certificate_pem()) && text.len() > next.certificate_pem().len() => Ok(()),
        text => Err(text),
    };
    until("the next authority is announced", announced).await;
    renew(servers, members).await;

    change(json!({"phase-days": "1"})).await;
    let signs = async || match bundle().await? {
        text if text.starts_with(next.certificate_pem()) && text.len() > next.certificate_pem().len() => Ok(()),
        text => Err(text),
    };
    until("the next authority signs", signs).await;
    renew(servers, members).await;
    let volumes = volumes(&servers.client);
    volumes.create("after", volume("64Mi", json!({}))).await;
    volumes.until_condition("after", "Ready", "True", "Healthy").await;
    volumes.delete("after").await;
    volumes.until_gone("after").await;
    clusters.until_condition("main", "Ready", "True", "Ready").await;
}

/// The member that holds a copy of `data` and leads nothing that this has to wait for.
async fn a_node_is_lost_and_returns(servers: &Servers, members: &[Member], processes: &mut [Option<Process>]) {
    let (volumes, nodes) = (volumes(&servers.client), nodes(&servers.client));
    let holders = |volume: &DynamicObject| -> Vec<String> {
        let replicas = volume.data["status"]["replicas"].as_array().cloned().unwrap_or_default();
        replicas.iter().filter_map(|replica| Some(replica["node"].as_str()?.to_owned())).collect()
    };
    let held = holders(&volumes.get("data").await.unwrap());
    let lost = members.iter().position(|member| held.contains(&member.name())).unwrap();
    let name = members[lost].name();
    processes[lost] = None;
    nodes.until(&name, "is away", |node| (node.data["status"]["state"] == "Away").then_some(())).await;
    volumes
        .until("data", "is whole on the others", |volume| {
            let whole = volume.data["status"]["readyReplicas"] == "3/3" && volume.data["status"]["health"] == "Healthy";
            (whole && !holders(volume).contains(&name)).then_some(())
        })
        .await;
    processes[lost] = Some(run(servers, &members[lost]).await);
    nodes.until(&name, "takes copies again", |node| (node.data["status"]["state"] == "Active").then_some(())).await;
    nodes.until_condition(&name, "Ready", "True", "Connected").await;
}

async fn a_member_leaves_and_another_takes_its_name(
    servers: &Servers,
    clusters: &Kind,
    last: &Member,
    process: &mut Option<Process>,
) {
    let (sets, nodes) = (kind::<StatefulSet>(&servers.client, Some(NAMESPACE)), nodes(&servers.client));
    let group = |replicas: i32| json!({"nodeGroups": [{"name": "b", "replicas": replicas, "zone": "b"}]});
    let former = nodes.get(&last.name()).await.unwrap().data["spec"]["nodeId"].clone();
    clusters.change("main", group(1)).await;
    sets.until("main-b", "has one pod less", |set| (set.data["spec"]["replicas"] == 1).then_some(())).await;
    nodes.until_gone(&last.name()).await;
    clusters.until_condition("main", "Ready", "True", "Ready").await;
    *process = None;
    std::fs::remove_dir_all(servers.folder.path().join(last.name())).unwrap();

    clusters.change("main", group(2)).await;
    sets.until("main-b", "has that pod again", |set| (set.data["spec"]["replicas"] == 2).then_some(())).await;
    *process = Some(run(servers, last).await);
    nodes.until_condition(&last.name(), "Ready", "True", "Connected").await;
    assert_ne!(nodes.get(&last.name()).await.unwrap().data["spec"]["nodeId"], former, "a new disk is a new identity");
    clusters.until_condition("main", "Ready", "True", "Ready").await;
}

async fn it_is_deleted(servers: &Servers, clusters: &Kind) {
    let volumes = volumes(&servers.client);
    clusters.delete("main").await;
    let message = clusters.until_condition("main", "DeletionBlocked", "True", "VolumesExist").await;
    assert!(message.contains("data"), "{message}");
    volumes.delete("data").await;
    volumes.until_gone("data").await;
    clusters.until_gone("main").await;
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(servers.client.clone(), NAMESPACE);
    assert_eq!(claims.list(&ListParams::default()).await.unwrap().items.len(), 0);
}
