//! What is staged on this machine, one small file per volume.
//!
//! Kubelet names a volume by its handle alone when it lets go of it; the agent and the cluster know it by its
//! identifier. The file is written, flushed, before anything is attached or bound, and removed when all of it has gone,
//! so whatever the crash, what is on the machine is in a file. A file is replaced at once: written beside, renamed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use holdfast_id::VolumeId;
use serde::{Deserialize, Serialize};

use crate::names;

const VERSION: u32 = 1;
/// A record with as many targets as pods on a node, each of a path's longest, stays below.
const RECORD_BYTES_MAX: u64 = 4 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    pub volume: VolumeId,
    pub epoch: u64,
    pub staging: PathBuf,
    pub block: bool,
    /// Where it is published, or about to be.
    pub targets: BTreeSet<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{path} cannot be used")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{path} is no record of a staged volume: {detail}; move it away only if nothing on this node uses the volume"
    )]
    Malformed { path: PathBuf, detail: String },
}

impl Record {
    pub fn new(volume: VolumeId, epoch: u64, staging: PathBuf, block: bool) -> Record {
        Record { version: VERSION, volume, epoch, staging, block, targets: BTreeSet::new() }
    }

    /// Whether kubelet may ask about the volume by this path.
    pub fn knows(&self, path: &Path) -> bool {
        self.staging == path || self.targets.contains(path)
    }
}

pub struct Records {
    directory: PathBuf,
}

impl Records {
    pub fn open(directory: PathBuf) -> Result<Records, RecordError> {
        fs::create_dir_all(&directory).map_err(|source| RecordError::Io { path: directory.clone(), source })?;
        Ok(Records { directory })
    }

    /// A name that no volume of ours can have has none.
    pub fn load(&self, name: &str) -> Result<Option<Record>, RecordError> {
        if !names::is_label(name) {
            return Ok(None);
        }
        let path = self.path(name);
        let malformed = |detail: String| RecordError::Malformed { path: path.clone(), detail };
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > RECORD_BYTES_MAX => return Err(malformed("it is too long".into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            _ => {}
        }
        let bytes = fs::read(&path).map_err(|source| RecordError::Io { path: path.clone(), source })?;
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
        if record.version != VERSION {
            return Err(malformed(format!("version {} is not known", record.version)));
        }
        Ok(Some(record))
    }

    pub fn save(&self, name: &str, record: &Record) -> Result<(), RecordError> {
        assert!(names::is_label(name), "whoever saves has looked: it becomes a file's name");
        let path = self.path(name);
        let text = serde_json::to_vec(record).expect("a record has text keys");
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
            file.write_all(&text)?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            File::open(&self.directory)?.sync_all()
        };
        write().map_err(|source| RecordError::Io { path: path.clone(), source })
    }

    pub fn remove(&self, name: &str) -> Result<(), RecordError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RecordError::Io { path, source: error }),
            _ => Ok(()),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_found_again_and_others_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path().join("volumes")).unwrap();
        assert_eq!(records.load("pvc-1").unwrap(), None);
        let id = "00000000-0000-0000-0000-000000000001".parse().unwrap();
        let mut record = Record::new(id, 7, "/staging".into(), false);
        records.save("pvc-1", &record).unwrap();
        record.targets.insert("/target".into());
        records.save("pvc-1", &record).unwrap();
        assert_eq!(records.load("pvc-1").unwrap().as_ref(), Some(&record));
        assert!(record.knows(Path::new("/target")) && record.knows(Path::new("/staging")));
        assert!(!record.knows(Path::new("/")));
        fs::write(directory.path().join("volumes/pvc-2.json"), "{}").unwrap();
        assert!(matches!(records.load("pvc-2"), Err(RecordError::Malformed { .. })));
        records.remove("pvc-1").unwrap();
        records.remove("pvc-1").unwrap();
        assert_eq!(records.load("pvc-1").unwrap(), None);
    }
}
