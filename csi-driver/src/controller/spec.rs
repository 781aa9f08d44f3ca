//! From `CreateVolumeRequest` to the Volume that is wanted. Pure.

use std::collections::BTreeMap;

use holdfast_crds::{ClusterRef, Placement, Spread, Volume, VolumeSpec, quantity};

use crate::capability::{Access, CapabilityError};
use crate::csi::{CapacityRange, CreateVolumeRequest, TopologyRequirement};
use crate::{TOPOLOGY_NODE, context, names};

/// Keys of a StorageClass that are ours; any other key that begins so is a mistake, and not passed over.
const PREFIX: &str = "holdfast.dev/";
const REPLICAS: &str = "holdfast.dev/replicas";
const BLOCK: &str = "holdfast.dev/logicalBlockSize";
const SPREAD: &str = "holdfast.dev/spread";
const CLUSTER: &str = "holdfast.dev/cluster";
const MKFS_OPTIONS: &str = "holdfast.dev/mkfsOptions";
/// The provisioner takes it into the capability; other COs leave it here.
const FILE_SYSTEM: &str = "csi.storage.k8s.io/fstype";
/// What the provisioner tells with `--extra-create-metadata`, and the annotation that keeps it.
const METADATA: [(&str, &str); 3] = [
    ("csi.storage.k8s.io/pv/name", "holdfast.dev/pv"),
    ("csi.storage.k8s.io/pvc/name", "holdfast.dev/pvc"),
    ("csi.storage.k8s.io/pvc/namespace", "holdfast.dev/pvc-namespace"),
];

/// Sizes are whole multiples: what people count in, and far above the 4 KiB that the cluster needs.
const STEP_BYTES: u64 = 1 << 20;
pub const SIZE_BYTES_MIN: u64 = 1 << 20;
pub const SIZE_BYTES_MAX: u64 = 64 << 40;
/// Where the request names none.
const SIZE_BYTES_DEFAULT: u64 = 1 << 30;

#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("name is missing")]
    NoName,
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    #[error("the class's parameter {key} is {value:?}: {expected}")]
    Parameter { key: String, value: String, expected: &'static str },
    #[error("the class's parameter {0} is not known: replicas, logicalBlockSize, spread, cluster and mkfsOptions are")]
    UnknownParameter(String),
    #[error("a volume of cluster {wanted} cannot be made here: this driver belongs to {ours}")]
    OtherCluster { wanted: String, ours: String },
    #[error("volumes made of snapshots or other volumes are not supported")]
    Source,
    #[error("mutable parameters are not supported")]
    Mutable,
    #[error("a capacity range has positive numbers, the required one not above the limit")]
    Range,
    #[error("no size of whole MiB from {SIZE_BYTES_MIN} to {SIZE_BYTES_MAX} bytes is within the capacity range")]
    Size,
}

/// What a class asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Class {
    pub replicas: Option<i32>,
    pub logical_block_size: Option<i32>,
    pub spread: Spread,
    pub volume_context: BTreeMap<String, String>,
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    pub object: String,
    pub spec: VolumeSpec,
    pub annotations: BTreeMap<String, String>,
    pub volume_context: BTreeMap<String, String>,
    size: Sizes,
}

/// Sizes that would do, `[required, limit]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// The one to make.
    pub bytes: u64,
    required: u64,
    limit: u64,
}

impl Wanted {
    /// `ours`: the cluster that this driver belongs to.
    pub fn of(request: &CreateVolumeRequest, ours: &ClusterRef) -> Result<Wanted, SpecError> {
        if request.name.is_empty() {
            return Err(SpecError::NoName);
        }
        Access::of_all(&request.volume_capabilities)?;
        if request.volume_content_source.is_some() {
            return Err(SpecError::Source);
        }
        if !request.mutable_parameters.is_empty() {
            return Err(SpecError::Mutable);
        }
        let class = Class::of(&request.parameters, ours)?;
        let size = Sizes::of(request.capacity_range.as_ref())?;
        let annotation = |(key, annotation): (&str, &str)| {
            Some((annotation.to_owned(), request.parameters.get(key).filter(|value| !value.is_empty())?.clone()))
        };
        Ok(Wanted {
            object: names::object_name(&request.name),
            spec: VolumeSpec {
                cluster_ref: ours.clone(),
                size: quantity::exact(size.bytes),
                replicas: class.replicas,
                logical_block_size: class.logical_block_size,
                placement: Placement {
                    preferred_nodes: preferred(request.accessibility_requirements.as_ref()),
                    spread: class.spread,
                },
                qos: None,
                source: None,
            },
            annotations: METADATA.into_iter().filter_map(annotation).collect(),
            volume_context: class.volume_context,
            size,
        })
    }

    /// Why a volume that has the name already is another one; `None`: it is what is wanted.
    pub fn differs(&self, present: &Volume) -> Option<String> {
        let (ours, theirs) = (&self.spec, &present.spec);
        if ours.cluster_ref != theirs.cluster_ref {
            return Some("it belongs to another cluster".into());
        }
        match quantity::bytes(&theirs.size) {
            Ok(bytes) if (self.size.required..=self.size.limit).contains(&bytes) => {}
            _ => return Some(format!("it has {}, not {}", theirs.size.0, ours.size.0)),
        }
        if ours.replicas != theirs.replicas {
            return Some("it has another number of copies".into());
        }
        if ours.logical_block_size != theirs.logical_block_size {
            return Some("it has another logical block size".into());
        }
        (ours.placement.spread != theirs.placement.spread).then(|| "its copies are spread otherwise".into())
    }
}

impl Class {
    pub fn of(parameters: &BTreeMap<String, String>, ours: &ClusterRef) -> Result<Class, SpecError> {
        let mut class = Class::default();
        for (key, value) in parameters {
            let refuse = |expected| SpecError::Parameter { key: key.clone(), value: value.clone(), expected };
            match key.as_str() {
                REPLICAS => {
                    let number = value.parse().ok().filter(|number| (1..=5).contains(number));
                    class.replicas = Some(number.ok_or_else(|| refuse("1 to 5 are possible"))?);
                }
                BLOCK => {
                    let number = value.parse().ok().filter(|number| matches!(number, 512 | 4096));
                    class.logical_block_size = Some(number.ok_or_else(|| refuse("512 and 4096 are possible"))?);
                }
                SPREAD => {
                    class.spread = match value.as_str() {
                        "node" => Spread::Node,
                        "zone" => Spread::Zone,
                        _ => return Err(refuse("node and zone are possible")),
                    };
                }
                CLUSTER => {
                    let name = format!("{}/{}", ours.namespace, ours.name);
                    if *value != name {
                        return Err(SpecError::OtherCluster { wanted: value.clone(), ours: name });
                    }
                }
                MKFS_OPTIONS => drop(class.volume_context.insert(context::MKFS_OPTIONS.into(), value.clone())),
                FILE_SYSTEM if matches!(value.as_str(), "ext4" | "xfs") => {
                    class.volume_context.insert(context::FILE_SYSTEM.into(), value.clone());
                }
                FILE_SYSTEM if !value.is_empty() => return Err(refuse("ext4 and xfs are possible")),
                _ if key.starts_with(PREFIX) => return Err(SpecError::UnknownParameter(key.clone())),
                // Somebody else's.
                _ => {}
            }
        }
        Ok(class)
    }
}

impl Sizes {
    pub fn of(range: Option<&CapacityRange>) -> Result<Sizes, SpecError> {
        let range = range.copied().unwrap_or_default();
        let number = |bytes: i64| u64::try_from(bytes).map_err(|_| SpecError::Range);
        let (required, limit) = (number(range.required_bytes)?, number(range.limit_bytes)?);
        let limit = if limit == 0 { u64::MAX } else { limit };
        if required > limit {
            return Err(SpecError::Range);
        }
        let wanted = if required == 0 { SIZE_BYTES_DEFAULT.min(limit) } else { required.max(SIZE_BYTES_MIN) };
        // A limit alone is met from below.
        let bytes = if required == 0 { wanted / STEP_BYTES * STEP_BYTES } else { wanted.next_multiple_of(STEP_BYTES) };
        if !(SIZE_BYTES_MIN..=SIZE_BYTES_MAX).contains(&bytes) || bytes > limit {
            return Err(SpecError::Size);
        }
        Ok(Sizes { bytes, required, limit })
    }
}

/// The machine whose pod waits for the volume. What the CO would take next says nothing about where copies lie well,
/// and what is merely possible prefers nobody.
fn preferred(requirement: Option<&TopologyRequirement>) -> Vec<String> {
    let first = requirement.and_then(|requirement| requirement.preferred.first());
    first.and_then(|topology| topology.segments.get(TOPOLOGY_NODE)).cloned().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csi::volume_capability::access_mode::Mode;
    use crate::csi::volume_capability::{AccessMode, AccessType, MountVolume};
    use crate::csi::{Topology, VolumeCapability};

    const GIB: i64 = 1 << 30;

    fn ours() -> ClusterRef {
        ClusterRef { namespace: "holdfast".into(), name: "main".into() }
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn request() -> CreateVolumeRequest {
        CreateVolumeRequest {
            name: "pvc-1".into(),
            capacity_range: Some(CapacityRange { required_bytes: GIB, limit_bytes: 0 }),
            volume_capabilities: vec![VolumeCapability {
                access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
                access_type: Some(AccessType::Mount(MountVolume::default())),
            }],
            ..CreateVolumeRequest::default()
        }
    }

    fn present(spec: VolumeSpec) -> Volume {
        Volume::new("pvc-1", spec)
    }

    #[test]
    fn a_class_becomes_a_spec() {
        let mut request = request();
        request.parameters = map(&[
            (REPLICAS, "2"),
            (BLOCK, "512"),
            (SPREAD, "zone"),
            (CLUSTER, "holdfast/main"),
            (MKFS_OPTIONS, "-m 1"),
            (FILE_SYSTEM, "xfs"),
            ("csi.storage.k8s.io/pvc/name", "data"),
            ("example.com/other", "x"),
        ]);
        let topology = |node: &str| Topology { segments: map(&[(TOPOLOGY_NODE, node)]) };
        let preferred = vec![topology("b"), topology("a")];
        request.accessibility_requirements = Some(TopologyRequirement { requisite: vec![topology("c")], preferred });
        let wanted = Wanted::of(&request, &ours()).unwrap();
        assert_eq!((wanted.object.as_str(), wanted.spec.size.0.as_str()), ("pvc-1", "1Gi"));
        assert_eq!((wanted.spec.replicas, wanted.spec.logical_block_size), (Some(2), Some(512)));
        assert_eq!(wanted.spec.placement.spread, Spread::Zone);
        assert_eq!(wanted.spec.placement.preferred_nodes, ["b"]);
        assert_eq!(wanted.volume_context, map(&[("fsType", "xfs"), ("mkfsOptions", "-m 1")]));
        assert_eq!(wanted.annotations, map(&[("holdfast.dev/pvc", "data")]));
    }

    #[test]
    fn mistakes_of_a_class_are_refused_by_name() {
        for (key, value) in [
            ("holdfast.dev/replica", "3"),
            (REPLICAS, "6"),
            (REPLICAS, "three"),
            (BLOCK, "1024"),
            (SPREAD, "host"),
            (CLUSTER, "other/main"),
            (FILE_SYSTEM, "btrfs"),
        ] {
            let error = Class::of(&map(&[(key, value)]), &ours()).expect_err(key).to_string();
            assert!(error.contains(value) || error.contains(key), "{error}");
        }
    }

    #[test]
    fn sizes_are_rounded_within_the_range() {
        let of = |required_bytes, limit_bytes| {
            Sizes::of(Some(&CapacityRange { required_bytes, limit_bytes })).map(|sizes| sizes.bytes).ok()
        };
        assert_eq!(Sizes::of(None).unwrap().bytes, SIZE_BYTES_DEFAULT);
        assert_eq!(of(0, 0), Some(SIZE_BYTES_DEFAULT));
        assert_eq!(of(1, 0), Some(SIZE_BYTES_MIN));
        assert_eq!(of(GIB + 1, 0), Some(GIB as u64 + STEP_BYTES));
        assert_eq!(of(GIB + 1, GIB + 1), None, "no whole MiB is within");
        assert_eq!(of(0, GIB / 2 + 5), Some(GIB as u64 / 2));
        assert_eq!(of(GIB, GIB - 1), None);
        assert_eq!(of(-1, 0), None);
        assert_eq!(of(1 << 60, 0), None);
        assert_eq!(of(0, 4096), None);
    }

    #[test]
    fn the_same_name_is_the_same_volume_only_where_it_would_do() {
        let wanted = Wanted::of(&request(), &ours()).unwrap();
        assert_eq!(wanted.differs(&present(wanted.spec.clone())), None);
        let larger = VolumeSpec { size: quantity::exact(2 << 30), ..wanted.spec.clone() };
        assert_eq!(wanted.differs(&present(larger.clone())), None, "no limit was given");
        let mut bounded = request();
        bounded.capacity_range = Some(CapacityRange { required_bytes: GIB, limit_bytes: GIB });
        assert!(Wanted::of(&bounded, &ours()).unwrap().differs(&present(larger)).is_some());
        let smaller = VolumeSpec { size: quantity::exact(1 << 29), ..wanted.spec.clone() };
        assert!(wanted.differs(&present(smaller)).is_some());
        let fewer = VolumeSpec { replicas: Some(1), ..wanted.spec.clone() };
        assert!(wanted.differs(&present(fewer)).is_some());
        let elsewhere = VolumeSpec { cluster_ref: ClusterRef::default(), ..wanted.spec.clone() };
        assert!(wanted.differs(&present(elsewhere)).is_some());
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        let refused = |change: &dyn Fn(&mut CreateVolumeRequest)| {
            let mut request = request();
            change(&mut request);
            Wanted::of(&request, &ours()).is_err()
        };
        assert!(refused(&|request| request.name.clear()));
        assert!(refused(&|request| request.volume_capabilities.clear()));
        assert!(refused(&|request| request.volume_content_source = Some(Default::default())));
        assert!(refused(&|request| drop(request.mutable_parameters.insert("a".into(), "b".into()))));
    }
}
