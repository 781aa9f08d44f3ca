//! The messages of the kernel's FUSE protocol that a block device in one file needs, bit by bit.
//!
//! Source: Linux `include/uapi/linux/fuse.h`, protocol 7.31 and later; every struct here cites its name there. All
//! fields are in the machine's byte order, which is little-endian on every machine this is built for.

use bytes::{Buf, BufMut, Bytes, BytesMut};

#[cfg(not(target_endian = "little"))]
compile_error!("the FUSE wire structs are written little-endian");

/// `struct fuse_in_header`.
pub const IN_HEADER_BYTES: usize = 40;
/// `struct fuse_out_header`.
pub const OUT_HEADER_BYTES: usize = 16;
/// `struct fuse_write_in`; data follows it.
pub const WRITE_IN_BYTES: usize = 40;

pub const KERNEL_VERSION: u32 = 7;
/// The protocol this build was written against; the kernel uses the lower of both ends' minors.
pub const KERNEL_MINOR_VERSION: u32 = 40;
/// `FUSE_INIT_EXT` and with it the second half of the flags.
pub const KERNEL_MINOR_VERSION_MIN: u32 = 36;

pub const ROOT_NODE: u64 = 1;
pub const FILE_NODE: u64 = 2;

/// `FUSE_UNIQUE_RESEND`: set in `unique` of a request that an earlier process may have seen; echoed unchanged.
pub const UNIQUE_RESEND: u64 = 1 << 63;

/// `FUSE_NOTIFY_RESEND`: asks the kernel to send every unanswered request again.
const NOTIFY_RESEND: i32 = 7;

/// `FUSE_*` flags of INIT, of both words.
pub mod init_flags {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const HAS_RESEND: u64 = 1 << 39;
}

/// `FOPEN_*`.
mod open_flags {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const NOFLUSH: u32 = 1 << 5;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// `FALLOC_FL_*` of Linux `include/uapi/linux/falloc.h`.
mod fallocate_mode {
    pub const KEEP_SIZE: u32 = 0x01;
    pub const PUNCH_HOLE: u32 = 0x02;
    pub const ZERO_RANGE: u32 = 0x10;
}

/// Errors as the kernel numbers them; replies carry them negated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Errno {
    Enoent = 2,
    Eio = 5,
    Einval = 22,
    Enospc = 28,
    Enosys = 38,
    Eopnotsupp = 95,
    Etimedout = 110,
}

/// Why the kernel's bytes are no request; the connection cannot go on after one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("a request of {length} bytes is shorter than its header")]
    Short { length: usize },
    #[error("a request says {stated} bytes and has {actual}")]
    Length { stated: u32, actual: usize },
    #[error("opcode {opcode} has a body of {actual} bytes, {needed} are needed")]
    Body { opcode: u32, needed: usize, actual: usize },
}

/// One request of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub unique: u64,
    pub node: u64,
    pub operation: Operation,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Lookup {
        name: Bytes,
    },
    GetAttributes,
    Open,
    Read {
        offset: u64,
        size: u32,
    },
    Write {
        offset: u64,
        data: Bytes,
    },
    Synchronize,
    Allocate {
        offset: u64,
        length: u64,
        zeroes: Zeroes,
    },
    FileSystemStatus,
    Release,
    /// The kernel waits for no answer.
    Forget,
    /// Asks to give up a request; it may be ignored, and is: a write must not be half done.
    Interrupt,
    Destroy,
    Other {
        opcode: u32,
    },
}

/// What an `fallocate` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroes {
    Punch,
    Zero,
    Unsupported,
}

fn body(opcode: u32, body: &[u8], needed: usize) -> Result<&[u8], WireError> {
    if body.len() < needed { Err(WireError::Body { opcode, needed, actual: body.len() }) } else { Ok(body) }
}

impl Message {
    /// `request` is exactly what one read of the descriptor returned; data is shared, not copied.
    ///
    /// # Errors
    /// The bytes break the protocol.
    pub fn decode(request: &Bytes) -> Result<Message, WireError> {
        if request.len() < IN_HEADER_BYTES {
            return Err(WireError::Short { length: request.len() });
        }
        let mut header = &request[..IN_HEADER_BYTES];
        let stated = header.get_u32_le();
        let opcode = header.get_u32_le();
        let unique = header.get_u64_le();
        let node = header.get_u64_le();
        if stated as usize != request.len() {
            return Err(WireError::Length { stated, actual: request.len() });
        }
        let rest = request.slice(IN_HEADER_BYTES..);
        let operation = match opcode {
            // FUSE_INIT: `struct fuse_init_in`, of which old kernels send the first 16 bytes.
            26 => {
                let mut fields = body(opcode, &rest, 16)?;
                let (major, minor) = (fields.get_u32_le(), fields.get_u32_le());
                let (max_readahead, low) = (fields.get_u32_le(), fields.get_u32_le());
                let high = if fields.len() >= 4 { fields.get_u32_le() } else { 0 };
                Operation::Init { major, minor, max_readahead, flags: u64::from(high) << 32 | u64::from(low) }
            }
            // FUSE_LOOKUP: the name and a zero byte.
            1 => Operation::Lookup { name: rest.slice(..rest.len().saturating_sub(1)) },
            3 => Operation::GetAttributes,
            // FUSE_OPEN and FUSE_OPENDIR.
            14 | 27 => Operation::Open,
            // FUSE_READ: `struct fuse_read_in`.
            15 => {
                let mut fields = &body(opcode, &rest, 40)?[8..];
                Operation::Read { offset: fields.get_u64_le(), size: fields.get_u32_le() }
            }
            // FUSE_WRITE: `struct fuse_write_in` and the data.
            16 => {
                let mut fields = &body(opcode, &rest, WRITE_IN_BYTES)?[8..];
                let (offset, size) = (fields.get_u64_le(), fields.get_u32_le() as usize);
                if rest.len() - WRITE_IN_BYTES != size {
                    return Err(WireError::Body { opcode, needed: WRITE_IN_BYTES + size, actual: rest.len() });
                }
                Operation::Write { offset, data: rest.slice(WRITE_IN_BYTES..) }
            }
            // FUSE_FSYNC.
            20 => Operation::Synchronize,
            // FUSE_FALLOCATE: `struct fuse_fallocate_in`.
            43 => {
                let mut fields = &body(opcode, &rest, 32)?[8..];
                let (offset, length, mode) = (fields.get_u64_le(), fields.get_u64_le(), fields.get_u32_le());
                let zeroes = match mode & !fallocate_mode::KEEP_SIZE {
                    fallocate_mode::PUNCH_HOLE => Zeroes::Punch,
                    fallocate_mode::ZERO_RANGE => Zeroes::Zero,
                    _ => Zeroes::Unsupported,
                };
                Operation::Allocate { offset, length, zeroes }
            }
            17 => Operation::FileSystemStatus,
            // FUSE_RELEASE and FUSE_RELEASEDIR.
            18 | 29 => Operation::Release,
            // FUSE_FORGET and FUSE_BATCH_FORGET.
            2 | 42 => Operation::Forget,
            36 => Operation::Interrupt,
            38 => Operation::Destroy,
            opcode => Operation::Other { opcode },
        };
        Ok(Message { unique, node, operation })
    }
}

/// The reply's header and, for a read, its data: written together with one `writev`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub header: Bytes,
    pub data: Bytes,
}

impl Reply {
    pub fn error(unique: u64, errno: Errno) -> Reply {
        Reply { header: header(0, -(errno as i32), unique).freeze(), data: Bytes::new() }
    }

    pub fn data(unique: u64, data: Bytes) -> Reply {
        Reply { header: header(data.len(), 0, unique).freeze(), data }
    }

    fn fields(unique: u64, fields: &[u8]) -> Reply {
        let mut out = header(fields.len(), 0, unique);
        out.put_slice(fields);
        Reply { header: out.freeze(), data: Bytes::new() }
    }

    pub fn empty(unique: u64) -> Reply {
        Self::fields(unique, &[])
    }

    /// `struct fuse_init_out`.
    pub fn init(unique: u64, minor: u32, max_readahead: u32, flags: u64, max_write: u32) -> Reply {
        /// Requests the kernel keeps in flight for asynchronous I/O.
        const MAX_BACKGROUND: u16 = 256;
        const PAGE_BYTES: u32 = 4096;
        let mut out = BytesMut::with_capacity(64);
        out.put_u32_le(KERNEL_VERSION);
        out.put_u32_le(minor);
        out.put_u32_le(max_readahead);
        out.put_u32_le(flags as u32);
        out.put_u16_le(MAX_BACKGROUND);
        out.put_u16_le(MAX_BACKGROUND / 4 * 3);
        out.put_u32_le(max_write);
        out.put_u32_le(1); // time_gran: nanoseconds
        out.put_u16_le((max_write / PAGE_BYTES) as u16);
        out.put_u16_le(0); // map_alignment
        out.put_u32_le((flags >> 32) as u32);
        out.put_bytes(0, 64 - out.len());
        Self::fields(unique, &out)
    }

    /// `struct fuse_entry_out`, never cached: the size can grow.
    pub fn entry(unique: u64, attributes: &Attributes) -> Reply {
        let mut out = BytesMut::with_capacity(128);
        out.put_u64_le(attributes.node);
        out.put_bytes(0, 32);
        attributes.put(&mut out);
        Self::fields(unique, &out)
    }

    /// `struct fuse_attr_out`, never cached.
    pub fn attributes(unique: u64, attributes: &Attributes) -> Reply {
        let mut out = BytesMut::with_capacity(104);
        out.put_bytes(0, 16);
        attributes.put(&mut out);
        Self::fields(unique, &out)
    }

    /// `struct fuse_open_out`; the handle is the node.
    pub fn open(unique: u64, node: u64) -> Reply {
        let mut out = BytesMut::with_capacity(16);
        out.put_u64_le(node);
        out.put_u32_le(open_flags::DIRECT_IO | open_flags::NOFLUSH | open_flags::PARALLEL_DIRECT_WRITES);
        out.put_u32_le(0);
        Self::fields(unique, &out)
    }

    /// `struct fuse_write_out`.
    pub fn written(unique: u64, size: u32) -> Reply {
        let mut out = BytesMut::with_capacity(8);
        out.put_u32_le(size);
        out.put_u32_le(0);
        Self::fields(unique, &out)
    }

    /// `struct fuse_statfs_out`: one file system of `blocks` of 4096 bytes, nothing free.
    pub fn file_system_status(unique: u64, blocks: u64) -> Reply {
        let mut out = BytesMut::with_capacity(80);
        for value in [blocks, 0, 0, 2, 0] {
            out.put_u64_le(value);
        }
        for value in [4096, 255, 4096, 0] {
            out.put_u32_le(value);
        }
        out.put_bytes(0, 24);
        Self::fields(unique, &out)
    }

    /// The notification that makes the kernel send unanswered requests again; written before any request is read.
    pub fn resend() -> Reply {
        Reply { header: header(0, NOTIFY_RESEND, 0).freeze(), data: Bytes::new() }
    }
}

fn header(body_bytes: usize, error: i32, unique: u64) -> BytesMut {
    let mut out = BytesMut::with_capacity(OUT_HEADER_BYTES + body_bytes.min(128));
    out.put_u32_le((OUT_HEADER_BYTES + body_bytes) as u32);
    out.put_i32_le(error);
    out.put_u64_le(unique);
    out
}

/// `struct fuse_attr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    pub node: u64,
    pub size_bytes: u64,
    /// Type and permissions as in `st_mode`.
    pub mode: u32,
}

impl Attributes {
    fn put(&self, out: &mut BytesMut) {
        out.put_u64_le(self.node);
        out.put_u64_le(self.size_bytes);
        out.put_u64_le(self.size_bytes / 512);
        out.put_bytes(0, 3 * 8 + 3 * 4); // times
        out.put_u32_le(self.mode);
        out.put_u32_le(1); // links
        out.put_bytes(0, 3 * 4); // owner, group, device
        out.put_u32_le(4096);
        out.put_u32_le(0); // flags
    }
}

#[cfg(test)]
pub(crate) mod tests;
