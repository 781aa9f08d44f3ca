//! Objects for volumes that have none: a lost object is a projection that can be made again.

use std::collections::BTreeSet;

use holdfast_api::v1;
use holdfast_crds::{ClusterRef, Placement, Volume, VolumeSpec};
use kube::api::{Api, PostParams};

use super::decide::ADOPTED;
use crate::apply;
use crate::context::Context;
use holdfast_crds::quantity;

/// Volumes whose object is missing. `objects` are names that were read *before* the catalogue was: an object that is not
/// among them, of a volume that still is, was missing then.
pub fn missing<'a>(objects: &BTreeSet<String>, volumes: &'a [v1::Volume]) -> Vec<&'a v1::Volume> {
    volumes
        .iter()
        .filter(|volume| volume.state() == v1::VolumeState::Ready && !objects.contains(&volume.name))
        .collect()
}

/// The object of a volume, as if somebody had asked for what is there.
fn object(cluster: &ClusterRef, volume: &v1::Volume) -> Volume {
    let spec = VolumeSpec {
        cluster_ref: cluster.clone(),
        size: quantity::exact(volume.size_bytes),
        replicas: i32::try_from(volume.replicas_wanted).ok(),
        logical_block_size: i32::try_from(volume.logical_block_bytes).ok(),
        placement: Placement::default(),
        qos: None,
        source: None,
    };
    let mut object = Volume::new(&volume.name, spec);
    let mut annotations = std::collections::BTreeMap::from([(ADOPTED.to_owned(), volume.volume_id.clone())]);
    let kept = volume.labels.iter().filter(|(key, _)| key.starts_with("holdfast.dev/pv"));
    annotations.extend(kept.map(|(key, value)| (key.clone(), value.clone())));
    object.metadata.annotations = Some(annotations);
    object
}

/// Makes the objects that are missing; one that was made meanwhile is as good.
///
/// # Errors
/// The API server's refusal.
pub async fn adopt(context: &Context, cluster: &ClusterRef, missing: &[&v1::Volume]) -> Result<(), kube::Error> {
    let volumes: Api<Volume> = Api::all(context.client.clone());
    for volume in missing {
        match volumes.create(&PostParams::default(), &object(cluster, volume)).await {
            Ok(_) => tracing::info!(volume = volume.name, "a volume without an object got one"),
            Err(error) if apply::is_conflict(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::decide::tests::found;
    use super::*;

    #[test]
    fn only_whole_volumes_without_an_object_get_one() {
        let mut leaving = found("b");
        (leaving.name, leaving.state) = ("leaving".into(), v1::VolumeState::Deleting.into());
        let volumes = [found("a"), leaving];
        assert_eq!(missing(&BTreeSet::new(), &volumes), [&volumes[0]]);
        assert!(missing(&BTreeSet::from(["pvc-1".to_owned()]), &volumes).is_empty());
    }

    #[test]
    fn the_object_asks_for_what_is_there_and_remembers_which_volume_it_is() {
        let cluster = ClusterRef { namespace: "storage".into(), name: "main".into() };
        let object = object(&cluster, &found("a"));
        let wanted = super::super::decide::wanted(&object, 3).unwrap();
        assert_eq!((wanted.size_bytes, wanted.known_id.as_deref(), wanted.adopted), (1 << 30, Some("a"), true));
    }
}
