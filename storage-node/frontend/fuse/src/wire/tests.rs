//! Bytes as Linux `include/uapi/linux/fuse.h` lays them out, written down by hand.

use super::*;

/// `struct fuse_in_header` and a body.
pub(crate) fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u32_le((IN_HEADER_BYTES + body.len()) as u32);
    out.put_u32_le(opcode);
    out.put_u64_le(unique);
    out.put_u64_le(node);
    out.put_bytes(0xEE, 16); // uid, gid, pid, total_extlen, padding: of no interest here
    out.put_slice(body);
    out.freeze()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn operation(opcode: u32, body: &[u8]) -> Operation {
    let message = Message::decode(&request(opcode, 77, FILE_NODE, body)).unwrap();
    assert_eq!((message.unique, message.node), (77, FILE_NODE));
    message.operation
}

/// Fields of 4 (`u32`) or 8 bytes (`u64`), little-endian.
macro_rules! fields {
    ($($value:expr),* $(,)?) => {{
        let mut out = Vec::new();
        $(out.extend_from_slice(&$value.to_le_bytes());)*
        out
    }};
}

#[test]
fn requests_are_read_field_by_field() {
    // struct fuse_init_in: major, minor, max_readahead, flags, flags2, unused[11].
    let mut init = fields![7u32, 45u32, 0x20000u32, 0x4000_0001u32, 0x80u32];
    init.resize(64, 0);
    let flags = init_flags::HAS_RESEND | init_flags::INIT_EXT | init_flags::ASYNC_READ;
    assert_eq!(operation(26, &init), Operation::Init { major: 7, minor: 45, max_readahead: 0x20000, flags });
    let low = Operation::Init { major: 7, minor: 45, max_readahead: 0x20000, flags: 0x4000_0001 };
    assert_eq!(operation(26, &init[..16]), low, "kernels before FUSE_INIT_EXT");
    assert_eq!(operation(1, b"name\0"), Operation::Lookup { name: Bytes::from_static(b"name") });
    // struct fuse_read_in: fh, offset, size, read_flags, lock_owner, flags, padding.
    let read = fields![2u64, 0x1_0000_0200u64, 4096u32, 0u32, 0u64, 0u32, 0u32];
    assert_eq!(operation(15, &read), Operation::Read { offset: 0x1_0000_0200, size: 4096 });
    // struct fuse_write_in: fh, offset, size, write_flags, lock_owner, flags, padding; data.
    let mut write = fields![2u64, 512u64, 4u32, 0u32, 0u64, 0u32, 0u32];
    write.extend_from_slice(b"data");
    assert_eq!(operation(16, &write), Operation::Write { offset: 512, data: Bytes::from_static(b"data") });
    // struct fuse_fallocate_in: fh, offset, length, mode, padding.
    for (mode, zeroes) in
        [(3u32, Zeroes::Punch), (0x11, Zeroes::Zero), (0, Zeroes::Unsupported), (8, Zeroes::Unsupported)]
    {
        let body = fields![2u64, 8192u64, 4096u64, mode, 0u32];
        assert_eq!(operation(43, &body), Operation::Allocate { offset: 8192, length: 4096, zeroes });
    }
    for (opcode, expected) in [
        (3, Operation::GetAttributes),
        (14, Operation::Open),
        (27, Operation::Open),
        (20, Operation::Synchronize),
        (17, Operation::FileSystemStatus),
        (18, Operation::Release),
        (29, Operation::Release),
        (2, Operation::Forget),
        (42, Operation::Forget),
        (36, Operation::Interrupt),
        (38, Operation::Destroy),
        (4, Operation::Other { opcode: 4 }),
        (u32::MAX, Operation::Other { opcode: u32::MAX }),
    ] {
        assert_eq!(operation(opcode, &[0; 64]), expected);
    }
}

#[test]
fn every_truncation_is_an_error_or_a_request_without_a_body() {
    let mut write = fields![2u64, 512u64, 4u32, 0u32, 0u64, 0u32, 0u32];
    write.extend_from_slice(b"data");
    let whole = request(16, 1, 2, &write);
    for length in 0..whole.len() {
        assert!(Message::decode(&whole.slice(..length)).is_err(), "the header says more than {length} bytes");
    }
    for (opcode, needed) in [(15, 40), (16, 40), (26, 16), (43, 32)] {
        for length in 0..needed {
            let error = Message::decode(&request(opcode, 1, 2, &vec![0; length])).unwrap_err();
            assert_eq!(error, WireError::Body { opcode, needed, actual: length });
        }
    }
    assert_eq!(operation(1, b""), Operation::Lookup { name: Bytes::new() });
    // A write whose size and data differ is no write, however large it claims to be.
    let huge = fields![2u64, 0u64, u32::MAX, 0u32, 0u64, 0u32, 0u32];
    assert!(matches!(Message::decode(&request(16, 1, 2, &huge)), Err(WireError::Body { .. })));
}

#[test]
fn replies_are_laid_out_as_the_kernel_reads_them() {
    // struct fuse_out_header: len, error, unique.
    assert_eq!(hex(&Reply::error(1, Errno::Eio).header), "10000000fbffffff0100000000000000");
    assert_eq!(hex(&Reply::empty(2).header), "10000000000000000200000000000000");
    let data = Reply::data(3, Bytes::from_static(b"abcd"));
    assert_eq!((hex(&data.header), &data.data[..]), ("14000000000000000300000000000000".into(), &b"abcd"[..]));
    assert_eq!(hex(&Reply::written(4, 0x1000).header), "180000000000000004000000000000000010000000000000");
    // struct fuse_open_out: fh, open_flags, padding.
    assert_eq!(hex(&Reply::open(5, 2).header), "2000000000000000050000000000000002000000000000006100000000000000");
    assert_eq!(hex(&Reply::resend().header), "10000000070000000000000000000000");
}

#[test]
fn longer_replies_have_their_fields_where_the_header_file_has_them() {
    fn at(reply: &Reply, offset: usize) -> u64 {
        (&reply.header[OUT_HEADER_BYTES + offset..]).get_u64_le()
    }
    let attributes = Attributes { node: 2, size_bytes: 0x1234_5000, mode: 0o100_600 };
    // struct fuse_init_out: max_background at 16, max_write at 20, time_gran at 24, max_pages at 28, flags2 at 32.
    let init = Reply::init(1, 40, 0x20000, init_flags::HAS_RESEND | init_flags::BIG_WRITES, 1 << 20);
    assert_eq!(init.header.len(), OUT_HEADER_BYTES + 64);
    assert_eq!(at(&init, 0), 40 << 32 | 7);
    assert_eq!(at(&init, 8), 0x20 << 32 | 0x20000);
    assert_eq!(at(&init, 16), (1 << 20) << 32 | 192 << 16 | 256);
    assert_eq!(at(&init, 24), 256 << 32 | 1);
    assert_eq!(at(&init, 32) as u32, 0x80);
    // struct fuse_attr: ino 0, size 8, blocks 16, mode 60, nlink 64, blksize 80; 88 bytes.
    for (reply, base, length) in [(Reply::attributes(1, &attributes), 16, 104), (Reply::entry(1, &attributes), 40, 128)]
    {
        assert_eq!(reply.header.len(), OUT_HEADER_BYTES + length);
        assert_eq!((&reply.header[..4]).get_u32_le() as usize, reply.header.len());
        assert_eq!(at(&reply, base), 2);
        assert_eq!(at(&reply, base + 8), 0x1234_5000);
        assert_eq!(at(&reply, base + 16), 0x1234_5000 / 512);
        assert_eq!(at(&reply, base + 60), 1 << 32 | 0o100_600);
        assert_eq!(at(&reply, base + 80) as u32, 4096);
    }
    assert_eq!(at(&Reply::entry(1, &attributes), 0), 2, "nodeid");
    assert_eq!(at(&Reply::entry(1, &attributes), 16), 0, "entry_valid: never cached");
    assert_eq!(at(&Reply::entry(1, &attributes), 24), 0, "attr_valid: never cached");
    assert_eq!(at(&Reply::attributes(1, &attributes), 0), 0, "attr_valid: never cached");
    // struct fuse_kstatfs: five u64, then bsize, namelen, frsize.
    let status = Reply::file_system_status(1, 99);
    assert_eq!(status.header.len(), OUT_HEADER_BYTES + 80);
    assert_eq!((at(&status, 0), at(&status, 40)), (99, 255 << 32 | 4096));
}
