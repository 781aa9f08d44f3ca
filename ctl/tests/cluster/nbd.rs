//! The two halves of an NBD connection, for requests in flight. Public specification: NetworkBlockDevice/nbd,
//! `doc/proto.md`; fixed newstyle with `NBD_OPT_GO`, simple replies.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const HANDSHAKE_FLAGS: u32 = 3;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
/// A command flag: done only when it is on stable storage.
pub const FUA: u16 = 1;
pub const EIO: u32 = 5;

pub struct Sender(UnixStream);

pub struct Receiver(UnixStream);

pub struct Reply {
    pub error: u32,
    pub cookie: u64,
}

/// Negotiates the default export.
pub fn connect(socket: &Path) -> io::Result<(Sender, Receiver)> {
    let mut stream = UnixStream::connect(socket)?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    assert_eq!(greeting[..8], NBDMAGIC.to_be_bytes());
    assert_eq!(greeting[8..16], IHAVEOPT.to_be_bytes());
    let mut hello = HANDSHAKE_FLAGS.to_be_bytes().to_vec();
    hello.extend(IHAVEOPT.to_be_bytes());
    hello.extend(OPT_GO.to_be_bytes());
    // Six bytes: the length of an empty name, and no wish for information.
    hello.extend(6u32.to_be_bytes());
    hello.extend([0; 6]);
    stream.write_all(&hello)?;
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head)?;
        assert_eq!(head[..8], OPTION_REPLY_MAGIC.to_be_bytes());
        let mut body = vec![0; be_u32(&head[16..]) as usize];
        stream.read_exact(&mut body)?;
        match be_u32(&head[12..16]) {
            REP_ACK => return Ok((Sender(stream.try_clone()?), Receiver(stream))),
            REP_INFO => {}
            kind => panic!("option reply {kind:#x}: {}", String::from_utf8_lossy(&body)),
        }
    }
}

impl Sender {
    pub fn send(
        &mut self,
        command: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> io::Result<()> {
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        self.0.write_all(&request)
    }

    pub fn close(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Receiver {
    /// The data of a read that succeeded is taken with [`Receiver::data`].
    pub fn reply(&mut self) -> io::Result<Reply> {
        let mut head = [0; 16];
        self.0.read_exact(&mut head)?;
        assert_eq!(be_u32(&head), SIMPLE_REPLY_MAGIC);
        let cookie = u64::from_be_bytes(head[8..].try_into().expect("eight bytes"));
        Ok(Reply { error: be_u32(&head[4..8]), cookie })
    }

    pub fn data(&mut self, length: u32) -> io::Result<Vec<u8>> {
        let mut data = vec![0; length as usize];
        self.0.read_exact(&mut data)?;
        Ok(data)
    }
}

fn be_u32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}
