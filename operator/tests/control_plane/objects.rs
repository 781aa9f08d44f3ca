//! Objects of the API as JSON: what is asked of the API server, and what it says.

use holdfast_crds::{StorageCluster, StorageDisk, StorageNode, Volume};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::ApiResource;
use kube::{Client, Resource, ResourceExt as _};
use serde_json::{Value, json};

use crate::servers::NAMESPACE;
use crate::wait::until;

/// The objects of one kind.
pub struct Kind {
    api: Api<DynamicObject>,
    resource: ApiResource,
    namespace: Option<&'static str>,
}

pub fn clusters(client: &Client) -> Kind {
    kind::<StorageCluster>(client, Some(NAMESPACE))
}

pub fn volumes(client: &Client) -> Kind {
    kind::<Volume>(client, None)
}

pub fn nodes(client: &Client) -> Kind {
    kind::<StorageNode>(client, Some(NAMESPACE))
}

pub fn disks(client: &Client) -> Kind {
    kind::<StorageDisk>(client, Some(NAMESPACE))
}

/// Of another group, by its definition in Rust.
pub fn kind<K: Resource<DynamicType = ()>>(client: &Client, namespace: Option<&'static str>) -> Kind {
    let resource = ApiResource::erase::<K>(&());
    let api = match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    Kind { api, resource, namespace }
}

impl Kind {
    /// The refusal in words.
    pub async fn try_create(&self, name: &str, spec: Value) -> Result<(), String> {
        let object = json!({
            "apiVersion": self.resource.api_version,
            "kind": self.resource.kind,
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": spec,
        });
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        self.api.create(&PostParams::default(), &object).await.map(|_| ()).map_err(|error| error.to_string())
    }

    pub async fn create(&self, name: &str, spec: Value) {
        self.try_create(name, spec).await.unwrap();
    }

    pub async fn try_change(&self, name: &str, spec: Value) -> Result<(), String> {
        let patch = Patch::Merge(json!({ "spec": spec }));
        let changed = self.api.patch(name, &PatchParams::default(), &patch).await;
        changed.map(|_| ()).map_err(|error| error.to_string())
    }

    pub async fn change(&self, name: &str, spec: Value) {
        self.try_change(name, spec).await.unwrap();
    }

    pub async fn delete(&self, name: &str) {
        self.api.delete(name, &DeleteParams::default()).await.unwrap();
    }

    pub async fn get(&self, name: &str) -> Option<DynamicObject> {
        self.api.get_opt(name).await.unwrap()
    }

    pub async fn list(&self) -> Vec<DynamicObject> {
        self.api.list(&ListParams::default()).await.unwrap().items
    }

    /// Waits until the object satisfies the question, which says what it misses.
    pub async fn until<T>(&self, name: &str, what: &str, mut ask: impl FnMut(&DynamicObject) -> Option<T>) -> T {
        until(&format!("{} {name}: {what}", self.resource.kind), async || {
            let object = self.api.get(name).await.map_err(|error| error.to_string())?;
            ask(&object).ok_or_else(|| object.data["status"].to_string())
        })
        .await
    }

    /// Waits for a condition that is about the spec as it is now, and gives its message.
    pub async fn until_condition(&self, name: &str, kind: &str, status: &str, reason: &str) -> String {
        self.until(name, &format!("{kind}={status} {reason}"), |object| {
            let (generation, found) = (object.metadata.generation, condition(object, kind)?);
            let current = found["observedGeneration"].as_i64() == generation || found["observedGeneration"].is_null();
            let matches = current && found["status"] == status && found["reason"] == reason;
            matches.then(|| found["message"].as_str().unwrap_or_default().to_owned())
        })
        .await
    }

    pub async fn until_gone(&self, name: &str) {
        until(&format!("{} {name} is gone", self.resource.kind), async || match self.get(name).await {
            None => Ok(()),
            Some(object) => Err(object.data["status"].to_string()),
        })
        .await;
    }
}

pub fn condition<'a>(object: &'a DynamicObject, kind: &str) -> Option<&'a Value> {
    object.data["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)
}

/// Changes with every write of the object.
pub fn version(object: &DynamicObject) -> (String, String) {
    (object.name_any(), object.resource_version().unwrap_or_default())
}
