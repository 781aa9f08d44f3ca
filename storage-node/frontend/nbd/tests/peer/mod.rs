//! The client's side of the protocol, written independently of the server's code.
#![allow(dead_code, reason = "each test file uses its part")]

use std::io::IoSlice;

use bytes::Bytes;
use holdfast_block::{Completion, Error, Geometry, Request, RequestId};
use holdfast_nbd::{Export, Session};

pub const EXPORT_NAME: u32 = 1;
pub const ABORT: u32 = 2;
pub const LIST: u32 = 3;
pub const INFO: u32 = 6;
pub const GO: u32 = 7;
pub const STRUCTURED_REPLY: u32 = 8;
pub const LIST_META_CONTEXT: u32 = 9;
pub const SET_META_CONTEXT: u32 = 10;

pub const ACK: u32 = 1;
pub const SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const ERR_UNSUP: u32 = 0x8000_0001;
pub const ERR_INVALID: u32 = 0x8000_0003;
pub const ERR_UNKNOWN: u32 = 0x8000_0006;
pub const ERR_TOO_BIG: u32 = 0x8000_0009;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const FAST_ZERO: u16 = 16;

pub const EXPORT_BYTES: u64 = 4 << 20;

pub fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

pub fn option(code: u32, data: &[u8]) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &code.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

pub fn option_reply(code: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_be_bytes();
    [&hex("0003e889045565a9")[..], &code.to_be_bytes(), &reply.to_be_bytes(), &length, data].concat()
}

pub fn info_request(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = [&(name.len() as u32).to_be_bytes()[..], name, &(wanted.len() as u16).to_be_bytes()].concat();
    wanted.iter().for_each(|info| data.extend(info.to_be_bytes()));
    data
}

pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    [
        &hex("25609513")[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

pub struct Peer {
    pub session: Session,
}

impl Peer {
    pub fn with_size(size_bytes: u64) -> Peer {
        let geometry = Geometry::new(size_bytes, 512).unwrap();
        Peer { session: Session::new(Export::new("disk".into(), geometry).unwrap()) }
    }

    pub fn greeted() -> Peer {
        Peer::with_size(EXPORT_BYTES)
    }

    pub fn haggling() -> Peer {
        let mut peer = Peer::greeted();
        peer.take();
        peer.send(&[3_u32.to_be_bytes().to_vec()]);
        peer
    }

    pub fn transmitting(structured: bool) -> Peer {
        Peer::transmitting_with(EXPORT_BYTES, structured)
    }

    pub fn transmitting_with(size_bytes: u64, structured: bool) -> Peer {
        let mut peer = Peer::with_size(size_bytes);
        peer.send(&[3_u32.to_be_bytes().to_vec()]);
        if structured {
            peer.send(&[option(STRUCTURED_REPLY, &[])]);
        }
        peer.send(&[option(GO, &info_request(b"disk", &[]))]);
        peer.take();
        assert!(peer.session.is_transmitting());
        peer
    }

    pub fn send(&mut self, pieces: &[Vec<u8>]) {
        self.session.receive(&pieces.concat());
    }

    /// Everything the server has to say now, taken in small and uneven bites.
    pub fn take(&mut self) -> Vec<u8> {
        let mut sent = Vec::new();
        loop {
            let mut slices = [IoSlice::new(&[]); 3];
            let filled = self.session.output(&mut slices);
            let mut bite = 0;
            for slice in &slices[..filled] {
                let taken = slice.len().min((1 << 19) + 7);
                sent.extend_from_slice(&slice[..taken]);
                bite += taken;
                if taken < slice.len() {
                    break;
                }
            }
            if bite == 0 {
                return sent;
            }
            self.session.on_sent(bite);
        }
    }

    /// The error number of the one chunk that is there, which must be a final error to `cookie`.
    pub fn take_error_chunk(&mut self, cookie: u64) -> u32 {
        let sent = self.take();
        assert_eq!(&sent[..8], hex("668e33ef 0001 8001"), "{sent:02x?}");
        assert_eq!(&sent[8..16], cookie.to_be_bytes());
        let number = |at: usize| u32::from_be_bytes(sent[at..at + 4].try_into().unwrap());
        let message = usize::from(u16::from_be_bytes([sent[24], sent[25]]));
        assert_eq!((number(16) as usize, sent.len()), (6 + message, 26 + message));
        assert!(std::str::from_utf8(&sent[26..]).is_ok_and(|text| !text.is_empty()));
        number(20)
    }

    pub fn poll(&mut self) -> Request {
        self.session.poll_request().expect("a request to the volume")
    }

    pub fn complete(&mut self, id: RequestId, result: Result<Vec<u8>, Error>) {
        self.session.on_completion(Completion { id, result: result.map(Bytes::from) });
    }
}
