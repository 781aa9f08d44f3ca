//! What kubelet asks for, checked and in our words. Pure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use holdfast_agent::NodeAddress;
use holdfast_host::file_system::FileSystem;
use holdfast_id::VolumeId;

use super::error::NodeError;
use crate::capability::{Access, Kind};
use crate::context;
use crate::csi;
use crate::names;

/// What `ControllerPublishVolume` has granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub volume: VolumeId,
    pub epoch: u64,
    pub nodes: Vec<NodeAddress>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    pub name: String,
    pub grant: Grant,
    pub staging: PathBuf,
    pub access: Access,
    pub mkfs_options: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    pub stage: Stage,
    pub target: PathBuf,
    pub read_only: bool,
}

impl Stage {
    pub fn of(request: &csi::NodeStageVolumeRequest) -> Result<Stage, NodeError> {
        let name = name(&request.volume_id)?;
        if !names::is_label(&name) {
            return Err(NodeError::NotOurs(name));
        }
        let staging = path("staging_target_path", &request.staging_target_path)?;
        let mut access = Access::of(request.volume_capability.as_ref())?;
        default_file_system(&mut access, &request.volume_context)?;
        let grant = Grant::of(&request.publish_context)?;
        let mkfs_options = words(request.volume_context.get(context::MKFS_OPTIONS));
        Ok(Stage { name, grant, staging, access, mkfs_options })
    }
}

impl Publish {
    pub fn of(request: csi::NodePublishVolumeRequest) -> Result<Publish, NodeError> {
        let target = path("target_path", &request.target_path)?;
        let stage = Stage::of(&csi::NodeStageVolumeRequest {
            volume_id: request.volume_id,
            publish_context: request.publish_context,
            staging_target_path: request.staging_target_path,
            volume_capability: request.volume_capability,
            secrets: BTreeMap::new(),
            volume_context: request.volume_context,
        })?;
        Ok(Publish { read_only: request.readonly || stage.access.read_only, stage, target })
    }
}

impl Grant {
    fn of(publish_context: &BTreeMap<String, String>) -> Result<Grant, NodeError> {
        let get = |key| publish_context.get(key).ok_or(NodeError::Missing("publish_context"));
        let volume = parse("publish_context.volumeId", get(context::VOLUME_ID)?)?;
        let epoch = parse("publish_context.epoch", get(context::EPOCH)?)?;
        let nodes = serde_json::from_str(get(context::NODES)?)
            .map_err(|error| NodeError::Malformed { what: "publish_context.nodes", detail: error.to_string() })?;
        Ok(Grant { volume, epoch, nodes })
    }
}

/// A volume's handle, which is the name of its object.
pub fn name(volume_id: &str) -> Result<String, NodeError> {
    if volume_id.is_empty() {
        return Err(NodeError::Missing("volume_id"));
    }
    Ok(volume_id.to_owned())
}

/// A path by which a CO asks about a volume; one that is not absolute is no place of any volume, which the answer says.
pub fn place(what: &'static str, text: &str) -> Result<PathBuf, NodeError> {
    if text.is_empty() { Err(NodeError::Missing(what)) } else { Ok(PathBuf::from(text)) }
}

/// A path at which something is made or taken away.
pub fn path(what: &'static str, text: &str) -> Result<PathBuf, NodeError> {
    if text.is_empty() {
        return Err(NodeError::Missing(what));
    }
    let path = Path::new(text);
    if !path.is_absolute() {
        return Err(NodeError::NotAbsolute { what, path: path.to_owned() });
    }
    Ok(path.to_owned())
}

fn parse<T: FromStr>(what: &'static str, text: &str) -> Result<T, NodeError>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| NodeError::Malformed { what, detail: error.to_string() })
}

fn default_file_system(access: &mut Access, volume_context: &BTreeMap<String, String>) -> Result<(), NodeError> {
    if let Kind::Mount { file_system: file_system @ None, .. } = &mut access.kind
        && let Some(name) = volume_context.get(context::FILE_SYSTEM)
    {
        *file_system = Some(name.parse::<FileSystem>()?);
    }
    Ok(())
}

fn words(text: Option<&String>) -> Vec<String> {
    text.map(|text| text.split_whitespace().map(str::to_owned).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csi::VolumeCapability;
    use crate::csi::volume_capability::access_mode::Mode;
    use crate::csi::volume_capability::{AccessMode, AccessType, MountVolume};

    fn request() -> csi::NodeStageVolumeRequest {
        let id = "00000000-0000-0000-0000-000000000001";
        let pairs = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        csi::NodeStageVolumeRequest {
            volume_id: "pvc-1".into(),
            publish_context: pairs(&[
                ("volumeId", id),
                ("epoch", "3"),
                ("nodes", &format!(r#"[{{"node":"{id}","address":"127.0.0.1:7700"}}]"#)),
            ]),
            staging_target_path: "/staging".into(),
            volume_capability: Some(VolumeCapability {
                access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
                access_type: Some(AccessType::Mount(MountVolume::default())),
            }),
            secrets: BTreeMap::new(),
            volume_context: pairs(&[("fsType", "xfs"), ("mkfsOptions", " -m  reflink=0 ")]),
        }
    }

    #[test]
    fn a_request_is_taken_apart() {
        let stage = Stage::of(&request()).unwrap();
        assert_eq!((stage.grant.epoch, stage.grant.nodes.len()), (3, 1));
        assert_eq!(stage.access.kind, Kind::Mount { file_system: Some(FileSystem::Xfs), options: vec![] });
        assert_eq!(stage.mkfs_options, ["-m", "reflink=0"]);
    }

    #[test]
    fn what_is_missing_or_malformed_is_named() {
        let refused = |change: &dyn Fn(&mut csi::NodeStageVolumeRequest)| {
            let mut request = request();
            change(&mut request);
            let status = tonic::Status::from(Stage::of(&request).expect_err("refused"));
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
            status.message().to_owned()
        };
        assert!(refused(&|r| r.volume_id.clear()).contains("volume_id"));
        assert!(refused(&|r| r.staging_target_path.clear()).contains("staging_target_path"));
        assert!(refused(&|r| r.staging_target_path = "staging".into()).contains("absolute"));
        assert!(refused(&|r| r.volume_capability = None).contains("capability"));
        assert!(refused(&|r| r.publish_context.clear()).contains("publish_context"));
        assert!(refused(&|r| drop(r.publish_context.insert("epoch".into(), "-1".into()))).contains("epoch"));
        assert!(refused(&|r| drop(r.publish_context.insert("nodes".into(), "[".into()))).contains("nodes"));
        assert!(refused(&|r| drop(r.volume_context.insert("fsType".into(), "ntfs".into()))).contains("ntfs"));
    }
}
