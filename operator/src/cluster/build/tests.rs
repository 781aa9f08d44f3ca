use super::*;
use crate::cluster::validate::tests::{cluster, three};
use crate::cluster::validate::validate;

pub(crate) fn settings() -> Settings {
    use clap::Parser as _;
    Settings::parse_from([
        "holdfast-operator",
        "--image=holdfast:1",
        "--provisioner-image=provisioner:6",
        "--attacher-image=attacher:4",
        "--resizer-image=resizer:2",
        "--namespace=holdfast-system",
        "--pod-name=operator-0",
    ])
}

fn machines() -> Vec<Machine> {
    let machine = |name: &str, role: &str| Machine {
        name: name.to_owned(),
        labels: BTreeMap::from([
            ("kubernetes.io/hostname".to_owned(), name.to_owned()),
            ("role".to_owned(), role.to_owned()),
        ]),
    };
    vec![machine("worker-1", "storage"), machine("worker-2", "storage"), machine("worker-3", "web")]
}

fn built(cluster: &ValidCluster, with_csi: bool) -> Vec<Object> {
    let settings = settings();
    let replicas = BTreeMap::new();
    build(&Inputs {
        cluster,
        settings: &settings,
        replicas: &replicas,
        machines: &machines(),
        with_csi,
        trust_pem: "PEM\n",
    })
}

/// The reviewer reads a difference of what is installed. To write it anew: `BLESS=1 cargo test -p holdfast-operator`.
fn golden(name: &str, objects: &[Object]) {
    let text: String = objects
        .iter()
        .map(|object| format!("---\n{}", serde_saphyr::to_string(&object.0).unwrap()))
        .collect::<Vec<_>>()
        .join("");
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name);
    if std::env::var_os("BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(expected == text, "{} differs; write it anew with BLESS=1 and read the difference", path.display());
}

#[test]
fn a_small_cluster_with_csi() {
    golden("three.yaml", &built(&three(), true));
}

#[test]
fn groups_settings_and_no_csi() {
    let asked = cluster(
        "  image: holdfast:2\n  members: {replicas: 1, nodeSelector: {disk: ssd}, zone: a}\n  storage: \
         {volumeClaimTemplate: {size: 1Gi}}\n  disruption: {manageBudget: false}\n  nodeGroups:\n  - name: big\n    \
         replicas: 2\n    resources: {requests: {cpu: 500m, memory: 1Gi}}\n    tolerations: [{key: storage, operator: \
         Exists}]\n    storage: {volumeClaimTemplate: {size: 1Ti, storageClassName: local}}\n",
    );
    golden("groups.yaml", &built(&validate(&asked).unwrap(), false));
}

fn on_machines() -> ValidCluster {
    let asked = cluster(
        "  members: {replicas: 2, nodeSelector: {role: storage}}\n  storage: {devices: [{path: /dev/disk/by-id/x}]}\n  \
         nodeGroups:\n  - {name: files, replicas: 1, storage: {hostPath: {path: /data, size: 2Gi}}}\n",
    );
    validate(&asked).unwrap()
}

#[test]
fn disks_of_machines() {
    golden("machines.yaml", &built(&on_machines(), false));
}

/// Through the types of the API and back: a field that the API does not know would be dropped by it without a word.
#[test]
fn the_api_knows_every_field() {
    use k8s_openapi::api::{
        apps::v1 as apps, core::v1 as core, policy::v1 as policy, rbac::v1 as rbac, storage::v1 as storage,
    };
    fn through<T: serde::de::DeserializeOwned + serde::Serialize>(value: &Value) -> Value {
        serde_json::to_value(serde_json::from_value::<T>(value.clone()).unwrap()).unwrap()
    }
    for object in [built(&three(), true), built(&on_machines(), false)].concat() {
        let value = &object.0;
        let back = match object.kind() {
            "ServiceAccount" => through::<core::ServiceAccount>(value),
            "ConfigMap" => through::<core::ConfigMap>(value),
            "Service" => through::<core::Service>(value),
            "PodDisruptionBudget" => through::<policy::PodDisruptionBudget>(value),
            "StatefulSet" => through::<apps::StatefulSet>(value),
            "DaemonSet" => through::<apps::DaemonSet>(value),
            "Deployment" => through::<apps::Deployment>(value),
            "PersistentVolume" => through::<core::PersistentVolume>(value),
            "StorageClass" => through::<storage::StorageClass>(value),
            "CSIDriver" => through::<storage::CSIDriver>(value),
            "ClusterRoleBinding" => through::<rbac::ClusterRoleBinding>(value),
            "RoleBinding" => through::<rbac::RoleBinding>(value),
            other => panic!("{other} is built and not checked"),
        };
        assert_same(&format!("{}/{}", object.kind(), object.name()), value, &back);
    }
}

/// The types write empty lists and maps in their own way; everything else must be there.
fn assert_same(at: &str, ours: &Value, theirs: &Value) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (key, value) in ours {
                assert_same(&format!("{at}.{key}"), value, theirs.get(key).unwrap_or(&Value::Null));
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            assert_eq!(ours.len(), theirs.len(), "{at}");
            ours.iter().zip(theirs).enumerate().for_each(|(i, (a, b))| assert_same(&format!("{at}[{i}]"), a, b));
        }
        (Value::Object(ours), Value::Null) if ours.is_empty() => {}
        (Value::Array(ours), Value::Null) if ours.is_empty() => {}
        _ => assert_eq!(ours, theirs, "{at}"),
    }
}

#[test]
fn two_members_never_share_a_machine_and_the_template_is_the_same_for_all() {
    for object in built(&three(), true).iter().filter(|object| object.kind() == "StatefulSet") {
        let spec = &object.0["spec"]["template"]["spec"];
        let terms = &spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        assert_eq!(terms[0]["topologyKey"], "kubernetes.io/hostname");
        assert!(terms[0]["labelSelector"]["matchLabels"].get("holdfast.dev/group").is_none(), "over all groups");
    }
}

#[test]
fn a_restart_that_a_person_asked_for_makes_another_template() {
    let objects = built(&three(), true);
    let before = templates(&objects, &BTreeMap::new());
    let after = templates(&objects, &BTreeMap::from([("agent".to_owned(), "noon".to_owned())]));
    let changed: Vec<&String> = before.keys().filter(|key| before[*key] != after[*key]).collect();
    assert_eq!(changed, ["agent"]);
    assert_eq!(after["agent"], made_from(&before["agent"], Some("noon")));
}
