use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use rustix::net::SendFlags;
use serde_json::json;

use super::*;

const SOON: Duration = Duration::from_secs(20);

struct Peer(OwnedFd);

impl Peer {
    fn connect(path: &Path) -> Peer {
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let socket = socket.unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        Peer(socket)
    }

    fn send(&self, request: &Request, file: Option<&File>) {
        packet::send(&self.0, request, file.map(AsFd::as_fd), SendFlags::empty()).unwrap();
    }

    fn reply(&self) -> (Reply, Option<OwnedFd>) {
        packet::receive(&self.0, RecvFlags::DONTWAIT).unwrap().expect("the connection is open")
    }

    fn has_ended(&self) -> bool {
        match packet::receive::<Reply>(&self.0, RecvFlags::DONTWAIT) {
            Ok(None) => true,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => true,
            _ => false,
        }
    }
}

fn keeper() -> (tempfile::TempDir, Keeper, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keeper.sock");
    (directory, Keeper::bind(&path).unwrap(), path)
}

fn id(n: u128) -> VolumeId {
    VolumeId::from_bytes(n.to_be_bytes()).unwrap()
}

fn put(volume: VolumeId) -> Request {
    Request::Put { version: KEEPER_VERSION, volume, note: json!({ "epoch": 7 }) }
}

const TAKE: Request = Request::Take { version: KEEPER_VERSION };

/// One request and its reply; the keeper's turn ends once it has answered.
fn ask(keeper: &mut Keeper, peer: &Peer, request: &Request, file: Option<&File>) -> (Reply, Option<OwnedFd>) {
    keeper.turn(Duration::ZERO).unwrap();
    peer.send(request, file);
    keeper.turn(SOON).unwrap();
    peer.reply()
}

#[test]
fn a_descriptor_goes_to_the_successor_and_not_before_its_owner_is_gone() {
    let (directory, mut keeper, path) = keeper();
    let file_path = directory.path().join("file");
    let mut file = File::create_new(&file_path).unwrap();
    let first = Peer::connect(&path);
    assert_eq!(ask(&mut keeper, &first, &put(id(1)), Some(&file)).0, Reply::Done);
    let second = Peer::connect(&path);
    assert_eq!(ask(&mut keeper, &second, &TAKE, None).0, Reply::Busy);
    assert_eq!(ask(&mut keeper, &second, &put(id(1)), Some(&file)).0, Reply::Busy);
    let drop_request = Request::Drop { version: KEEPER_VERSION, volume: id(1) };
    assert_eq!(ask(&mut keeper, &second, &drop_request, None).0, Reply::Busy);
    drop(first);
    let (reply, taken) = ask(&mut keeper, &second, &TAKE, None);
    assert_eq!(reply, Reply::Taken { volume: id(1), note: json!({ "epoch": 7 }) });
    // The very same open file, not another one.
    file.write_all(b"written through the first").unwrap();
    let taken = File::from(taken.expect("a descriptor comes with it"));
    assert_ne!(taken.as_raw_fd(), file.as_raw_fd());
    assert_eq!(rustix::fs::tell(&taken).unwrap(), 25);
    assert_eq!(ask(&mut keeper, &second, &TAKE, None).0, Reply::Nothing);
    assert_eq!(ask(&mut keeper, &second, &drop_request, None).0, Reply::Done);
    assert!(keeper.entries.is_empty());
}

#[test]
fn what_is_no_request_ends_the_connection_and_loses_nothing() {
    let (directory, mut keeper, path) = keeper();
    let file = File::create_new(directory.path().join("file")).unwrap();
    let owner = Peer::connect(&path);
    assert_eq!(ask(&mut keeper, &owner, &put(id(1)), Some(&file)).0, Reply::Done);
    let long = vec![b' '; 20 << 10];
    for bytes in [&b"{"[..], b"[]", br#"{"request":"put"}"#, br#"{"request":"take","version":1,"more":2}"#, &long] {
        let hostile = Peer::connect(&path);
        keeper.turn(SOON).unwrap();
        rustix::net::send(&hostile.0, bytes, SendFlags::empty()).unwrap();
        keeper.turn(SOON).unwrap();
        assert!(hostile.has_ended(), "{}", String::from_utf8_lossy(&bytes[..bytes.len().min(40)]));
    }
    assert_eq!(keeper.connections.len(), 1);
    assert_eq!(keeper.entries.len(), 1);
    let (reply, _) = ask(&mut keeper, &owner, &Request::Take { version: 2 }, None);
    assert!(matches!(reply, Reply::Refused { .. }), "{reply:?}");
    let (reply, _) = ask(&mut keeper, &owner, &put(id(2)), None);
    assert!(matches!(reply, Reply::Refused { .. }), "{reply:?}");
}

#[test]
fn connections_and_keepers_are_limited() {
    let (_directory, mut keeper, path) = keeper();
    let mut peers = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        peers.push(Peer::connect(&path));
        keeper.turn(SOON).unwrap();
    }
    let one_more = Peer::connect(&path);
    keeper.turn(SOON).unwrap();
    assert!(one_more.has_ended());
    assert!(peers.iter().all(|peer| !peer.has_ended()));
    assert!(matches!(Keeper::bind(&path), Err(KeeperError::Running(_))));
}

#[test]
fn a_descriptor_in_error_is_kept_for_its_owner_only() {
    let (_directory, mut keeper, path) = keeper();
    let owner = Peer::connect(&path);
    // The write end of a pipe without a reader is in the error state, as the descriptor of an ended file system is.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let writer = File::from(OwnedFd::from(writer));
    assert_eq!(ask(&mut keeper, &owner, &put(id(1)), Some(&writer)).0, Reply::Done);
    keeper.turn(Duration::ZERO).unwrap();
    assert_eq!(keeper.entries.len(), 1, "a file system that is not made yet is in that state too");
    drop(owner);
    keeper.turn(SOON).unwrap();
    assert!(keeper.entries.is_empty());
}
