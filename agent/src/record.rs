//! What is remembered of an attachment across a restart: one small file per volume, written by a thread of its own so
//! that a slow disk under the state directory never delays another volume's I/O.
//!
//! `<state directory>/<volume>.json` is `{"version":1,"volume":"...","epoch":4,"fenced":false}`. A file is replaced at
//! once: written beside it, flushed, renamed, and the directory flushed. `lock` keeps a second agent out.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use holdfast_id::VolumeId;
use mio::Waker;
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;
/// A record is about 120 bytes; anything much longer is not one.
const RECORD_BYTES_MAX: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub epoch: u64,
    /// The epoch was lost to another attachment; the device must stay dead.
    pub fenced: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordFile {
    version: u32,
    volume: VolumeId,
    epoch: u64,
    fenced: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("another agent uses the state directory {0}")]
    Locked(PathBuf),
    #[error("cannot use {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is no attachment record: {detail}; move it away only if nothing on this machine uses the volume")]
    Malformed { path: PathBuf, detail: String },
}

/// A record became durable, or its removal did, or neither.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub volume: VolumeId,
    pub record: Option<Record>,
    pub result: Result<(), RecordError>,
}

struct Job {
    volume: VolumeId,
    record: Option<Record>,
}

/// Handle of the recording thread; jobs of one volume are done in order.
pub(crate) struct Recorder {
    jobs: Sender<Job>,
    done: Receiver<Recorded>,
    /// Jobs started and not polled.
    pending: Cell<usize>,
    /// Held as long as the agent lives.
    _lock: File,
}

impl Recorder {
    /// Takes the directory and reads every record in it. `waker` is woken when a job is done.
    pub fn open(directory: &Path, waker: Arc<Waker>) -> Result<(Recorder, BTreeMap<VolumeId, Record>), RecordError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| RecordError::Io { path, source }
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(at(directory))?;
        let lock_path = directory.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(at(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(RecordError::Locked(directory.to_owned())),
            Err(TryLockError::Error(source)) => return Err(RecordError::Io { path: lock_path, source }),
        }
        let mut records = BTreeMap::new();
        for entry in fs::read_dir(directory).map_err(at(directory))? {
            let path = entry.map_err(at(directory))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                let (volume, record) = read(&path)?;
                records.insert(volume, record);
            }
        }
        let (jobs, todo) = channel::<Job>();
        let (tell, done) = channel();
        let owned = directory.to_owned();
        std::thread::Builder::new()
            .name("records".into())
            .spawn(move || {
                for Job { volume, record } in todo {
                    let result = write(&owned, volume, record);
                    if tell.send(Recorded { volume, record, result }).is_err() || waker.wake().is_err() {
                        return;
                    }
                }
            })
            .map_err(at(directory))?;
        Ok((Recorder { jobs, done, pending: Cell::new(0), _lock: lock }, records))
    }

    /// Stores the record, or removes it for `None`.
    pub fn start(&self, volume: VolumeId, record: Option<Record>) {
        self.pending.set(self.pending.get() + 1);
        self.jobs.send(Job { volume, record }).expect("the thread ends after this handle");
    }

    pub fn poll(&self) -> Option<Recorded> {
        let recorded = self.done.try_recv().ok()?;
        self.pending.set(self.pending.get() - 1);
        Some(recorded)
    }

    pub fn is_idle(&self) -> bool {
        self.pending.get() == 0
    }
}

fn path_of(directory: &Path, volume: VolumeId) -> PathBuf {
    directory.join(format!("{volume}.json"))
}

fn read(path: &Path) -> Result<(VolumeId, Record), RecordError> {
    let io = |source| RecordError::Io { path: path.to_owned(), source };
    let malformed = |detail: String| RecordError::Malformed { path: path.to_owned(), detail };
    let length = fs::metadata(path).map_err(io)?.len();
    if length > RECORD_BYTES_MAX {
        return Err(malformed(format!("{length} bytes")));
    }
    let bytes = fs::read(path).map_err(io)?;
    let file: RecordFile = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    if file.version != VERSION {
        return Err(malformed(format!("version {} is not known here", file.version)));
    }
    if path.file_stem().and_then(|stem| stem.to_str()) != Some(&file.volume.to_string()) {
        return Err(malformed(format!("it speaks of volume {}", file.volume)));
    }
    Ok((file.volume, Record { epoch: file.epoch, fenced: file.fenced }))
}

fn write(directory: &Path, volume: VolumeId, record: Option<Record>) -> Result<(), RecordError> {
    let path = path_of(directory, volume);
    let replace = || -> io::Result<()> {
        match record {
            Some(Record { epoch, fenced }) => {
                let mut bytes = serde_json::to_vec(&RecordFile { version: VERSION, volume, epoch, fenced })?;
                bytes.push(b'\n');
                let beside = path.with_extension("new");
                let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
                file.write_all(&bytes)?;
                file.sync_all()?;
                fs::rename(&beside, &path)?;
            }
            None => match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            },
        }
        File::open(directory)?.sync_all()
    };
    replace().map_err(|source| RecordError::Io { path: path.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(n: u8) -> VolumeId {
        VolumeId::from_bytes([n; 16]).unwrap()
    }

    fn open(directory: &Path) -> Result<(mio::Poll, Recorder, BTreeMap<VolumeId, Record>), RecordError> {
        let poll = mio::Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), mio::Token(0)).unwrap());
        Recorder::open(directory, waker).map(|(recorder, records)| (poll, recorder, records))
    }

    fn finish(recorder: &Recorder) -> Recorded {
        recorder.done.recv().unwrap()
    }

    #[test]
    fn records_survive_and_removal_does_too() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Record { epoch: 4, fenced: false };
        let fenced = Record { epoch: 9, fenced: true };
        {
            let (_poll, recorder, records) = open(directory.path()).unwrap();
            assert_eq!(records, BTreeMap::new());
            for (n, record) in [(1, Some(kept)), (2, Some(kept)), (2, Some(fenced)), (3, Some(kept)), (3, None)] {
                recorder.start(volume(n), record);
                finish(&recorder).result.unwrap();
            }
            recorder.start(volume(4), None);
            finish(&recorder).result.unwrap();
        }
        let (_poll, _recorder, records) = open(directory.path()).unwrap();
        assert_eq!(records, BTreeMap::from([(volume(1), kept), (volume(2), fenced)]));
    }

    #[test]
    fn a_second_agent_is_kept_out() {
        let directory = tempfile::tempdir().unwrap();
        let first = open(directory.path()).unwrap();
        assert!(matches!(open(directory.path()), Err(RecordError::Locked(_))));
        drop(first);
        open(directory.path()).unwrap();
    }

    #[test]
    fn what_is_no_record_is_not_guessed_at() {
        let name = format!("{}.json", volume(1));
        let good = format!("{{\"version\":1,\"volume\":\"{}\",\"epoch\":4,\"fenced\":false}}", volume(1));
        let long = " ".repeat(5000);
        for bad in [
            "",
            "{",
            &good[..good.len() - 1],
            &good.replace("\"version\":1", "\"version\":2"),
            &good.replace("0101", "0202"),
            &good.replace("false", "false,\"more\":1"),
            &long,
        ] {
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join(&name), bad).unwrap();
            assert!(matches!(open(directory.path()), Err(RecordError::Malformed { .. })), "{bad}");
        }
    }

    #[test]
    fn a_file_left_half_written_beside_the_record_is_ignored() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(format!("{}.new", volume(1))), "{\"ver").unwrap();
        assert_eq!(open(directory.path()).unwrap().2, BTreeMap::new());
    }
}
