use bytes::{BufMut, BytesMut};

use super::*;
use crate::wire::tests::request;
use crate::wire::{OUT_HEADER_BYTES, UNIQUE_RESEND};

const SIZE: u64 = 1 << 30;

fn session() -> Session {
    Session::new("volume".into(), Geometry::new(SIZE, 4096).unwrap())
}

fn fields(parts: &[u64]) -> BytesMut {
    let mut out = BytesMut::new();
    parts.iter().for_each(|part| out.put_u64_le(*part));
    out
}

fn write(unique: u64, offset: u64, data: &[u8]) -> Bytes {
    let mut body = fields(&[FILE_NODE, offset, data.len() as u64, 0, 0]);
    body.put_slice(data);
    request(16, unique, FILE_NODE, &body)
}

fn read(unique: u64, offset: u64, size: u32) -> Bytes {
    request(15, unique, FILE_NODE, &fields(&[FILE_NODE, offset, u64::from(size), 0, 0]))
}

fn allocate(unique: u64, offset: u64, length: u64, mode: u64) -> Bytes {
    request(43, unique, FILE_NODE, &fields(&[FILE_NODE, offset, length, mode]))
}

fn requests(session: &mut Session, bytes: &Bytes) -> Vec<Request> {
    match session.on_request(bytes).unwrap() {
        Input::Requests(requests) => requests,
        other => panic!("{other:?}"),
    }
}

fn reply(session: &mut Session, bytes: &Bytes) -> Reply {
    match session.on_request(bytes).unwrap() {
        Input::Reply(reply) => reply,
        other => panic!("{other:?}"),
    }
}

fn done(request: &Request) -> Completion {
    Completion { id: request.id, result: Ok(Bytes::new()) }
}

#[test]
fn a_request_sent_again_is_answered_with_the_bit_that_says_so() {
    let mut session = session();
    let again = 42 | UNIQUE_RESEND;
    let parts = requests(&mut session, &write(again, 4096, &[7; 4096]));
    assert_eq!(parts[0].operation, Block::Write { offset: 4096, data: Bytes::from(vec![7; 4096]) });
    assert_eq!(session.on_completion(done(&parts[0])), Some(Reply::written(again, 4096)));
    assert_eq!(reply(&mut session, &request(3, again, FILE_NODE, &[0; 16])).header[8..16], again.to_le_bytes());
}

#[test]
fn the_same_number_twice_within_one_process_gets_both_its_answers() {
    let mut session = session();
    let first = requests(&mut session, &read(9, 0, 4096));
    let second = requests(&mut session, &read(9, 0, 4096));
    assert_ne!(first[0].id, second[0].id);
    assert_eq!(session.outstanding(), 2);
    let data = Bytes::from(vec![1; 4096]);
    for request in [&second[0], &first[0]] {
        let completion = Completion { id: request.id, result: Ok(data.clone()) };
        assert_eq!(session.on_completion(completion), Some(Reply::data(9, data.clone())));
    }
    assert_eq!(session.outstanding(), 0);
    assert_eq!(session.on_completion(done(&first[0])), None, "what is answered is forgotten");
}

#[test]
fn a_long_discard_is_split_and_answered_once_with_its_worst_part() {
    let mut session = session();
    let parts = requests(&mut session, &allocate(5, 4096, 2 * ZEROES_BYTES_MAX + 8192, 3));
    let ranges: Vec<_> = parts
        .iter()
        .map(|part| match part.operation {
            Block::Discard { offset, length } => (offset, length),
            ref other => panic!("{other:?}"),
        })
        .collect();
    let step = ZEROES_BYTES_MAX;
    assert_eq!(ranges, [(4096, step), (4096 + step, step), (4096 + 2 * step, 8192)]);
    assert_eq!(session.on_completion(done(&parts[2])), None);
    let failed = Completion { id: parts[0].id, result: Err(Error::NoSpace) };
    assert_eq!(session.on_completion(failed), None);
    assert_eq!(session.on_completion(done(&parts[1])), Some(Reply::error(5, Errno::Enospc)));
    let zero = requests(&mut session, &allocate(6, 0, 4096, 0x11));
    assert_eq!(zero[0].operation, Block::WriteZeroes { offset: 0, length: 4096 });
    assert_eq!(reply(&mut session, &allocate(7, 0, 4096, 0)), Reply::error(7, Errno::Eopnotsupp));
    assert_eq!(reply(&mut session, &allocate(8, SIZE, 4096, 3)), Reply::error(8, Errno::Einval));
    assert_eq!(reply(&mut session, &allocate(9, u64::MAX, u64::MAX, 3)), Reply::error(9, Errno::Einval));
}

#[test]
fn what_lies_outside_the_volume_is_refused_or_empty() {
    let mut session = session();
    assert_eq!(reply(&mut session, &read(1, SIZE, 4096)), Reply::data(1, Bytes::new()));
    assert_eq!(reply(&mut session, &read(2, u64::MAX, 4096)), Reply::data(2, Bytes::new()));
    let last = requests(&mut session, &read(3, SIZE - 4096, 8192));
    assert_eq!(last[0].operation, Block::Read { offset: SIZE - 4096, length: 4096 });
    assert_eq!(reply(&mut session, &write(4, SIZE, &[0; 4096])), Reply::error(4, Errno::Einval));
    assert_eq!(reply(&mut session, &write(5, 512, &[0; 4096])), Reply::error(5, Errno::Einval));
}

#[test]
fn a_grown_volume_takes_what_lies_beyond_its_old_end() {
    let mut session = session();
    session.set_geometry(Geometry::new(2 * SIZE, 4096).unwrap());
    assert_eq!(requests(&mut session, &write(1, SIZE, &[1; 4096])).len(), 1);
    let attributes = reply(&mut session, &request(3, 2, FILE_NODE, &[0; 16]));
    let size = OUT_HEADER_BYTES + 16 + 8;
    assert_eq!(attributes.header[size..size + 8], (2 * SIZE).to_le_bytes());
}

#[test]
fn errors_of_the_volume_have_their_numbers() {
    let mut session = session();
    for (error, errno) in [
        (Error::Fenced, Errno::Eio),
        (Error::Corrupt, Errno::Eio),
        (Error::NoSpace, Errno::Enospc),
        (Error::Unavailable, Errno::Etimedout),
    ] {
        let parts = requests(&mut session, &request(20, 3, FILE_NODE, &[0; 16]));
        assert_eq!(parts[0].operation, Block::Flush);
        let completion = Completion { id: parts[0].id, result: Err(error) };
        assert_eq!(session.on_completion(completion), Some(Reply::error(3, errno)));
    }
}

#[test]
fn one_name_is_found_and_the_rest_of_a_file_system_is_not_there() {
    let mut session = session();
    let found = reply(&mut session, &request(1, 1, ROOT_NODE, b"volume\0"));
    assert_eq!(found.header[OUT_HEADER_BYTES..OUT_HEADER_BYTES + 8], FILE_NODE.to_le_bytes());
    assert_eq!(reply(&mut session, &request(1, 2, ROOT_NODE, b"volumes\0")), Reply::error(2, Errno::Enoent));
    assert_eq!(reply(&mut session, &request(1, 3, FILE_NODE, b"volume\0")), Reply::error(3, Errno::Enoent));
    assert_eq!(reply(&mut session, &request(9, 4, ROOT_NODE, b"file\0")), Reply::error(4, Errno::Enosys));
    assert_eq!(session.on_request(&request(36, 5, 0, &[0; 8])), Ok(Input::Nothing));
    assert_eq!(session.on_request(&request(2, 6, FILE_NODE, &[0; 8])), Ok(Input::Nothing));
    assert_eq!(session.on_request(&request(38, 7, 0, &[])), Ok(Input::End));
    assert!(session.on_request(&Bytes::from_static(b"short")).is_err());
}

#[test]
fn the_kernel_is_asked_for_what_it_offers_and_no_more() {
    let init = |minor: u32, low: u32, high: u32| {
        let mut body = BytesMut::new();
        [7, minor, 4096, low, high].iter().for_each(|field| body.put_u32_le(*field));
        body.put_bytes(0, 44);
        request(26, 1, 0, &body)
    };
    let mut session = session();
    assert!(!session.resends());
    let offered =
        (init_flags::HAS_RESEND | init_flags::INIT_EXT | init_flags::BIG_WRITES | 1 << 1) & u64::from(u32::MAX);
    let answer = reply(&mut session, &init(45, offered as u32, (init_flags::HAS_RESEND >> 32) as u32));
    assert!(session.resends());
    let expected = init_flags::HAS_RESEND | init_flags::INIT_EXT | init_flags::BIG_WRITES;
    assert_eq!(answer, Reply::init(1, KERNEL_MINOR_VERSION, 4096, expected, REQUEST_BYTES_MAX));
    assert_eq!(reply(&mut session, &init(35, 0, 0)), Reply::error(1, Errno::Einval), "before FUSE_INIT_EXT");
    reply(&mut session, &init(36, init_flags::INIT_EXT as u32, 0));
    assert!(!session.resends());
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn whatever_is_asked_only_what_fits_the_volume_reaches_it_and_each_is_answered_once() {
    let geometry = Geometry::new(SIZE, 4096).unwrap();
    let (mut session, mut seed, mut waiting) = (session(), 1, Vec::new());
    let (mut passed, mut answered) = (0, 0);
    for _ in 0..50_000 {
        let dice = random(&mut seed);
        let opcodes = [15u32, 16, 43, 20, 26, 1, 3, 36, dice as u32 >> 8];
        let opcode = opcodes[dice as usize % opcodes.len()];
        let near = |at: u64| [0, 4096, SIZE - 4096, SIZE, 512, u64::MAX, at][at as usize % 7];
        let lengths = [4096, 1 << 20, (1 << 20) + 4096, 1 << 30, u64::from(u32::MAX)];
        let length = lengths[random(&mut seed) as usize % lengths.len()];
        let mut body = fields(&[FILE_NODE, near(random(&mut seed)), length, random(&mut seed) % 20, 0]);
        if opcode == 16 && length <= 1 << 20 {
            body.put_bytes(1, length as usize);
        }
        body.truncate(body.len().saturating_sub(if dice >> 40 & 15 == 0 {
            (random(&mut seed) % 48) as usize
        } else {
            0
        }));
        let whole = request(opcode, random(&mut seed) % 1000, FILE_NODE, &body);
        let length = if dice >> 44 & 31 == 0 { random(&mut seed) as usize % whole.len() } else { whole.len() };
        if let Ok(Input::Requests(requests)) = session.on_request(&whole.slice(..length)) {
            passed += 1;
            assert!(!requests.is_empty());
            for request in &requests {
                assert_eq!(geometry.check(&request.operation), Ok(()));
            }
            waiting.extend(requests);
        }
        while waiting.len() > 64 {
            let request = waiting.swap_remove(random(&mut seed) as usize % waiting.len());
            answered += u32::from(session.on_completion(done(&request)).is_some());
        }
    }
    answered += waiting.iter().filter(|request| session.on_completion(done(request)).is_some()).count() as u32;
    assert!(passed > 5_000, "{passed}");
    assert_eq!((answered, session.outstanding()), (passed, 0));
}
