//! What a `VolumeCapability` asks for, checked: one writer machine, as a file system or as a raw device.

use holdfast_host::file_system::{FileSystem, FileSystemError};

use crate::csi::VolumeCapability;
use crate::csi::volume_capability::AccessType;
use crate::csi::volume_capability::access_mode::Mode;

/// How a volume is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    pub kind: Kind,
    /// The volume itself is only read.
    pub read_only: bool,
    /// At one place at a time.
    pub single_writer: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Block,
    Mount {
        /// `None`: the volume's own, or the default.
        file_system: Option<FileSystem>,
        options: Vec<String>,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum CapabilityError {
    #[error("a volume capability is missing")]
    Missing,
    #[error("the volume capability says neither block nor mount")]
    NoKind,
    #[error("the volume capability has no access mode")]
    NoMode,
    #[error("access mode {0} is not supported: a volume is used on one node at a time")]
    Mode(&'static str),
    #[error(transparent)]
    FileSystem(#[from] FileSystemError),
    #[error("a mount group is not supported: kubelet changes the group (fsGroupPolicy File)")]
    MountGroup,
}

impl Access {
    pub fn of(capability: Option<&VolumeCapability>) -> Result<Access, CapabilityError> {
        let capability = capability.ok_or(CapabilityError::Missing)?;
        let kind = match capability.access_type.as_ref().ok_or(CapabilityError::NoKind)? {
            AccessType::Block(_) => Kind::Block,
            AccessType::Mount(mount) => {
                if !mount.volume_mount_group.is_empty() {
                    return Err(CapabilityError::MountGroup);
                }
                let file_system = match mount.fs_type.as_str() {
                    "" => None,
                    name => Some(name.parse()?),
                };
                Kind::Mount { file_system, options: mount.mount_flags.clone() }
            }
        };
        let mode = capability.access_mode.as_ref().ok_or(CapabilityError::NoMode)?.mode();
        let (read_only, single_writer) = match mode {
            Mode::SingleNodeWriter | Mode::SingleNodeMultiWriter => (false, false),
            Mode::SingleNodeReaderOnly => (true, false),
            Mode::SingleNodeSingleWriter => (false, true),
            Mode::Unknown => return Err(CapabilityError::NoMode),
            Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => {
                return Err(CapabilityError::Mode(mode.as_str_name()));
            }
        };
        Ok(Access { kind, read_only, single_writer })
    }

    /// Every capability of a list, of which there must be one at least.
    pub fn of_all(capabilities: &[VolumeCapability]) -> Result<Vec<Access>, CapabilityError> {
        if capabilities.is_empty() {
            return Err(CapabilityError::Missing);
        }
        capabilities.iter().map(|capability| Access::of(Some(capability))).collect()
    }

    pub fn is_block(&self) -> bool {
        self.kind == Kind::Block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};

    fn capability(mode: Mode, access_type: AccessType) -> VolumeCapability {
        VolumeCapability { access_mode: Some(AccessMode { mode: mode.into() }), access_type: Some(access_type) }
    }

    #[test]
    fn only_modes_of_one_node_are_taken() {
        for (mode, expected) in [
            (Mode::SingleNodeWriter, Some((false, false))),
            (Mode::SingleNodeMultiWriter, Some((false, false))),
            (Mode::SingleNodeSingleWriter, Some((false, true))),
            (Mode::SingleNodeReaderOnly, Some((true, false))),
            (Mode::Unknown, None),
            (Mode::MultiNodeReaderOnly, None),
            (Mode::MultiNodeSingleWriter, None),
            (Mode::MultiNodeMultiWriter, None),
        ] {
            let access = Access::of(Some(&capability(mode, AccessType::Block(BlockVolume {}))));
            assert_eq!(access.ok().map(|access| (access.read_only, access.single_writer)), expected, "{mode:?}");
        }
    }

    #[test]
    fn file_systems_that_are_not_made_here_are_refused() {
        let of = |fs_type: &str| {
            let mount = MountVolume { fs_type: fs_type.into(), ..MountVolume::default() };
            Access::of(Some(&capability(Mode::SingleNodeWriter, AccessType::Mount(mount)))).map(|access| access.kind)
        };
        assert_eq!(of("").unwrap(), Kind::Mount { file_system: None, options: vec![] });
        assert_eq!(of("xfs").unwrap(), Kind::Mount { file_system: Some(FileSystem::Xfs), options: vec![] });
        assert!(matches!(of("btrfs"), Err(CapabilityError::FileSystem(_))));
        assert!(matches!(Access::of_all(&[]), Err(CapabilityError::Missing)));
    }
}
