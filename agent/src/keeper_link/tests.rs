use std::fs::File;

use serde_json::json;

use super::*;
use crate::keeper::Keeper;

fn link(socket: &Path) -> KeeperLink {
    KeeperLink::new(KeeperConfig { socket: socket.to_owned(), program: None })
}

fn volume() -> VolumeId {
    VolumeId::from_bytes([1; 16]).unwrap()
}

#[test]
fn a_keeper_that_others_run_is_connected_to_and_never_started() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("keeper.sock");
    let mut first = link(&socket);
    assert!(matches!(first.ensure(), Err(KeeperLinkError::Io { .. })));
    assert!(!socket.exists() && first.child.is_none());
    assert!(first.take_left(false).unwrap().is_empty(), "where nothing can be left nobody is waited for");
    let (path, found) = (socket.clone(), std::sync::mpsc::channel());
    // It may come after it is asked for: where something may be left, it is waited for.
    let successor = std::thread::spawn(move || found.0.send(link(&path).take_left(true).map(|left| left.len())));
    let path = socket.clone();
    std::thread::spawn(move || Keeper::run(&path, false));
    assert_eq!(found.1.recv().unwrap().unwrap(), 0);
    successor.join().unwrap().unwrap();
    assert!(first.ensure().unwrap());
    let file = File::create_new(directory.path().join("file")).unwrap();
    first.put(volume(), json!({ "epoch": 3 }), file.as_fd()).unwrap();
    drop(first);
    let left = link(&socket).take_left(true).unwrap();
    assert_eq!((left.len(), left[0].volume, &left[0].note), (1, volume(), &json!({ "epoch": 3 })));
}
