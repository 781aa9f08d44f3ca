//! What a Volume needs next. Pure.

use holdfast_api::v1;
use holdfast_crds::{Spread, Volume};

use holdfast_crds::quantity;

/// Of the storage cluster's unit of size.
const SIZE_UNIT: u64 = 4096;
const SIZE_MIN: u64 = 1 << 20;
const DEFAULT_BLOCK: u32 = 4096;
/// Annotation of an object that was made for a volume that had none: its identifier.
pub const ADOPTED: &str = "holdfast.dev/adopted-volume-id";

/// What is asked for, in the storage cluster's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub name: String,
    pub size_bytes: u64,
    pub replicas: u32,
    /// Not the cluster's default, which may change after the volume was made.
    pub replicas_asked: bool,
    pub block_bytes: u32,
    pub spread: &'static str,
    /// Identifier of the volume that the object is known to be; never another one's.
    pub known_id: Option<String>,
    /// The object was made for the volume, not the volume for the object.
    pub adopted: bool,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Create,
    Grow {
        volume_id: String,
        size_bytes: u64,
    },
    SetReplicas {
        volume_id: String,
        replicas: u32,
    },
    /// Delete by identifier, or by name where none was ever told.
    Delete {
        volume: String,
    },
    /// The object may go: nothing of the volume is left.
    Release,
    Settled,
    /// Deletion has to wait.
    Blocked {
        reason: &'static str,
        message: String,
    },
    /// Only a person can help.
    Stuck {
        reason: &'static str,
        message: String,
    },
}

/// # Errors
/// A size that cannot be read, in words.
pub fn wanted(volume: &Volume, default_replicas: i32) -> Result<Wanted, String> {
    let spec = &volume.spec;
    let asked = quantity::bytes(&spec.size).map_err(|error| error.to_string())?;
    let annotation = volume.metadata.annotations.as_ref().and_then(|annotations| annotations.get(ADOPTED)).cloned();
    let told = volume.status.as_ref().and_then(|status| status.volume_id.clone());
    Ok(Wanted {
        name: volume.metadata.name.clone().unwrap_or_default(),
        size_bytes: asked.max(SIZE_MIN).next_multiple_of(SIZE_UNIT),
        replicas: u32::try_from(spec.replicas.unwrap_or(default_replicas)).unwrap_or(1),
        replicas_asked: spec.replicas.is_some(),
        block_bytes: spec.logical_block_size.and_then(|size| u32::try_from(size).ok()).unwrap_or(DEFAULT_BLOCK),
        spread: match spec.placement.spread {
            Spread::Node => "node",
            Spread::Zone => "zone",
        },
        adopted: annotation.is_some(),
        known_id: told.or(annotation),
    })
}

/// `found`: the volume of this name, as the storage cluster has it now.
pub fn next(wanted: &Wanted, deleting: bool, found: Option<&v1::Volume>) -> Step {
    let ours = found.filter(|volume| wanted.known_id.as_ref().is_none_or(|id| *id == volume.volume_id));
    if deleting {
        return match ours {
            // Of another volume of that name nothing is ours to delete.
            None => Step::Release,
            Some(volume) if !volume.attached_to.is_empty() && volume.state() != v1::VolumeState::Deleting => {
                Step::Blocked {
                    reason: "Attached",
                    message: format!(
                        "{} has it attached (epoch {}); its data is deleted once that has ended: delete the pods that use \
                         it",
                        volume.attached_to, volume.epoch
                    ),
                }
            }
            Some(volume) => Step::Delete { volume: volume.volume_id.clone() },
        };
    }
    match (ours, found, &wanted.known_id) {
        (Some(volume), _, _) => exists(wanted, volume),
        (None, Some(other), Some(known)) => Step::Stuck {
            reason: "AnotherVolume",
            message: format!(
                "the storage cluster has volume {} under this name, not {known}: delete this object and make \
                              another one under another name",
                other.volume_id
            ),
        },
        (None, None, Some(known)) => Step::Stuck {
            reason: "VolumeLost",
            message: format!(
                "the storage cluster no longer has volume {known}: it was deleted there. Restore it from a \
                              backup under another name, and delete this object"
            ),
        },
        (None, None, None) => Step::Create,
        (None, Some(_), None) => unreachable!("without a known identifier every volume of the name is ours"),
    }
}

fn exists(wanted: &Wanted, volume: &v1::Volume) -> Step {
    if volume.state() == v1::VolumeState::Deleting {
        return Step::Stuck {
            reason: "Deleted",
            message: "it is being deleted in the storage cluster, not by this object: delete this object".to_owned(),
        };
    }
    let mut differences = Vec::new();
    if volume.logical_block_bytes != wanted.block_bytes && !wanted.adopted {
        differences.push(format!("blocks of {} bytes, not {}", volume.logical_block_bytes, wanted.block_bytes));
    }
    let copies_differ = volume.replicas_wanted != wanted.replicas && wanted.replicas_asked;
    // A volume that has the name by chance is not changed.
    if copies_differ && wanted.known_id.is_none() {
        differences.push(format!("{} copies, not {}", volume.replicas_wanted, wanted.replicas));
    }
    if !differences.is_empty() {
        return Step::Stuck {
            reason: "AlreadyExists",
            message: format!(
                "the storage cluster has a volume of this name with {}, and is not this object's: give this \
                              object another name",
                differences.join(" and ")
            ),
        };
    }
    if volume.size_bytes < wanted.size_bytes {
        return Step::Grow { volume_id: volume.volume_id.clone(), size_bytes: wanted.size_bytes };
    }
    if copies_differ {
        return Step::SetReplicas { volume_id: volume.volume_id.clone(), replicas: wanted.replicas };
    }
    Step::Settled
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn object(extra: &str) -> Volume {
        serde_saphyr::from_str(&format!(
            "apiVersion: holdfast.dev/v1alpha1\nkind: Volume\nmetadata: {{name: pvc-1, uid: u, generation: 2}}\nspec: \
             {{clusterRef: {{namespace: storage, name: main}}, size: 1Gi}}\n{extra}"
        ))
        .unwrap()
    }

    pub(crate) fn found(id: &str) -> v1::Volume {
        v1::Volume {
            volume_id: id.into(),
            name: "pvc-1".into(),
            size_bytes: 1 << 30,
            logical_block_bytes: 4096,
            replicas_wanted: 3,
            state: v1::VolumeState::Ready.into(),
            ..v1::Volume::default()
        }
    }

    fn step(extra: &str, deleting: bool, found: Option<&v1::Volume>) -> Step {
        next(&wanted(&object(extra), 3).unwrap(), deleting, found)
    }

    const KNOWN: &str = "status: {volumeId: a}";

    #[test]
    fn a_new_volume_is_created_and_a_known_one_never_again() {
        assert_eq!(step("", false, None), Step::Create);
        assert_eq!(step("", false, Some(&found("a"))), Step::Settled, "created, and not told yet");
        assert!(matches!(step(KNOWN, false, None), Step::Stuck { reason: "VolumeLost", .. }));
        assert!(matches!(step(KNOWN, false, Some(&found("b"))), Step::Stuck { reason: "AnotherVolume", .. }));
    }

    #[test]
    fn an_adopted_volume_is_never_created() {
        let mut adopted = object("");
        adopted.metadata.annotations = Some([(ADOPTED.to_owned(), "a".to_owned())].into());
        let wanted = wanted(&adopted, 3).unwrap();
        assert!(matches!(next(&wanted, false, None), Step::Stuck { reason: "VolumeLost", .. }));
        let mut odd = found("a");
        (odd.logical_block_bytes, odd.replicas_wanted) = (512, 1);
        assert_eq!(next(&wanted, false, Some(&odd)), Step::Settled);
    }

    #[test]
    fn it_grows_and_what_it_cannot_become_is_said() {
        let mut small = found("a");
        small.size_bytes = 1 << 29;
        assert_eq!(step(KNOWN, false, Some(&small)), Step::Grow { volume_id: "a".into(), size_bytes: 1 << 30 });
        let mut large = found("a");
        large.size_bytes = 1 << 31;
        assert_eq!(step(KNOWN, false, Some(&large)), Step::Settled);
        let mut other = found("a");
        other.replicas_wanted = 2;
        assert_eq!(step("", false, Some(&other)), Step::Settled, "the default has changed since");
        other.logical_block_bytes = 512;
        assert!(matches!(step("", false, Some(&other)), Step::Stuck { reason: "AlreadyExists", .. }));
    }

    #[test]
    fn copies_are_changed_of_its_own_volume_only() {
        let asked = |replicas: i32, status: &str| {
            let mut asked = object(status);
            asked.spec.replicas = Some(replicas);
            next(&wanted(&asked, 1).unwrap(), false, Some(&found("a")))
        };
        assert_eq!(asked(2, KNOWN), Step::SetReplicas { volume_id: "a".into(), replicas: 2 });
        assert_eq!(asked(3, KNOWN), Step::Settled);
        assert!(matches!(asked(2, ""), Step::Stuck { reason: "AlreadyExists", .. }));
    }

    #[test]
    fn data_is_deleted_by_identifier_and_never_while_somebody_has_it() {
        assert_eq!(step(KNOWN, true, Some(&found("a"))), Step::Delete { volume: "a".into() });
        assert_eq!(step("", true, Some(&found("a"))), Step::Delete { volume: "a".into() });
        assert_eq!(step(KNOWN, true, None), Step::Release);
        assert_eq!(step(KNOWN, true, Some(&found("b"))), Step::Release, "another volume of that name is not ours");
        let mut attached = found("a");
        attached.attached_to = "worker-1".into();
        let blocked = step(KNOWN, true, Some(&attached));
        assert!(matches!(&blocked, Step::Blocked { message, .. } if message.contains("worker-1")), "{blocked:?}");
        attached.state = v1::VolumeState::Deleting.into();
        assert_eq!(step(KNOWN, true, Some(&attached)), Step::Delete { volume: "a".into() });
    }

    #[test]
    fn sizes_are_rounded_up_to_what_a_volume_can_have() {
        let mut odd = object("");
        for (size, expected) in [("1", 1 << 20), ("1048577", (1 << 20) + 4096), ("1Gi", 1 << 30)] {
            odd.spec.size.0 = size.into();
            assert_eq!(wanted(&odd, 3).unwrap().size_bytes, expected, "{size}");
        }
        odd.spec.size.0 = "much".into();
        assert!(wanted(&odd, 3).is_err());
    }
}
