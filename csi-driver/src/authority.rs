//! Requests whose `:authority` is the path of a socket, made acceptable.
//!
//! Kubelet's plugin watcher gives gRPC the bare path of a socket, which Go's gRPC then sends, percent-encoded, as
//! `:authority` (seen with kubelet 1.37). RFC 3986 has no such host, and the HTTP/2 library below tonic resets the stream.
//! So what a client sends passes through here first, and every literal `:authority` becomes `localhost`.
//!
//! What a server sends is not touched, nor anything but that one value: the field stays in the representation it came in
//! (RFC 7541, 6.2), so the dynamic tables of both sides keep their order. A field block that cannot be walked passes as it
//! is; the library has the last word on it.

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

/// RFC 9113, 3.4.
const PREFACE_BYTES: usize = 24;
/// RFC 9113, 4.1: length (24 bits), type, flags, stream.
const HEAD_BYTES: usize = 9;
/// Largest frame that a peer may send where nothing else was agreed on (RFC 9113, 4.2).
const FRAME_BYTES_MAX: usize = 16_384;
/// RFC 9113, 6.2.
const HEADERS: u8 = 1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Index of `:authority` in the static table (RFC 7541, appendix A).
const AUTHORITY: usize = 1;
const LOCALHOST: &[u8] = b"localhost";
/// Integers of a field block are lengths and indices; none of a block that fits a frame has more than three bytes after
/// its prefix.
const INTEGER_BYTES_MAX: usize = 3;

/// The connection as the server shall see it. Ends when either side ends.
pub fn relay(client: UnixStream) -> DuplexStream {
    let (server, ours) = tokio::io::duplex(FRAME_BYTES_MAX + HEAD_BYTES);
    tokio::spawn(async move {
        let (from_client, mut to_client) = client.into_split();
        let (mut from_server, to_server) = tokio::io::split(ours);
        // Either may find the other gone: whoever waits on the connection is told by its end.
        let _ = tokio::join!(requests(from_client, to_server), async {
            let ended = tokio::io::copy(&mut from_server, &mut to_client).await;
            to_client.shutdown().await.and(ended)
        });
    });
    server
}

async fn requests(mut client: OwnedReadHalf, mut server: tokio::io::WriteHalf<DuplexStream>) -> io::Result<()> {
    let ended = frames(&mut client, &mut server).await;
    server.shutdown().await.and(ended)
}

async fn frames(client: &mut OwnedReadHalf, server: &mut tokio::io::WriteHalf<DuplexStream>) -> io::Result<()> {
    let mut preface = [0; PREFACE_BYTES];
    client.read_exact(&mut preface).await?;
    server.write_all(&preface).await?;
    let mut payload = Vec::new();
    loop {
        let mut head = [0; HEAD_BYTES];
        client.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        payload.resize(length, 0);
        client.read_exact(&mut payload).await?;
        let flags = head[4];
        if head[3] == HEADERS
            && flags & (END_HEADERS | PADDED | PRIORITY) == END_HEADERS
            && let Some(changed) = with_localhost(&payload)
            && let Ok(length) = u32::try_from(changed.len())
        {
            head[..3].copy_from_slice(&length.to_be_bytes()[1..]);
            payload = changed;
        }
        server.write_all(&head).await?;
        server.write_all(&payload).await?;
    }
}

/// The field block with `localhost` as every literal `:authority`; `None` where it cannot be walked.
fn with_localhost(block: &[u8]) -> Option<Vec<u8>> {
    let mut changed = Vec::with_capacity(block.len() + LOCALHOST.len());
    let mut rest = block;
    while let Some(&first) = rest.first() {
        let field = rest;
        // RFC 7541, 6.1 to 6.3: how many bits the integer has, and whether strings follow it.
        let (bits, is_literal) = match first {
            0x80.. => (7, false),
            0x40..0x80 => (6, true),
            0x20..0x40 => (5, false),
            _ => (4, true),
        };
        let index = integer(&mut rest, bits)?;
        if is_literal && index == 0 {
            skip_string(&mut rest)?;
        }
        if is_literal && index == AUTHORITY {
            changed.extend_from_slice(&field[..field.len() - rest.len()]);
            skip_string(&mut rest)?;
            changed.push(u8::try_from(LOCALHOST.len()).expect("nine"));
            changed.extend_from_slice(LOCALHOST);
            continue;
        }
        if is_literal {
            skip_string(&mut rest)?;
        }
        changed.extend_from_slice(&field[..field.len() - rest.len()]);
    }
    Some(changed)
}

/// RFC 7541, 5.1.
fn integer(rest: &mut &[u8], bits: u32) -> Option<usize> {
    let mask = (1usize << bits) - 1;
    let mut value = usize::from(take(rest)?) & mask;
    if value < mask {
        return Some(value);
    }
    for place in 0..INTEGER_BYTES_MAX {
        let byte = usize::from(take(rest)?);
        value += (byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// RFC 7541, 5.2; the bit before the length says how it is coded.
fn skip_string(rest: &mut &[u8]) -> Option<()> {
    let length = integer(rest, 7)?;
    *rest = rest.get(length..)?;
    Some(())
}

fn take(rest: &mut &[u8]) -> Option<u8> {
    let (&first, after) = rest.split_first()?;
    *rest = after;
    Some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The beginning of a request as kubelet 1.37 sent it: POST, http, a path, and a socket's path as the authority.
    const KUBELET: [u8; 16] =
        [0x83, 0x86, 0x45, 0x83, 0x62, 0xba, 0x2d, 0x41, 0x84, 0xa5, 0x45, 0x87, 0xb8, 0x5f, 0x81, 0x1d];

    #[test]
    fn an_authority_becomes_localhost_and_nothing_else_changes() {
        let mut expected = KUBELET[..8].to_vec();
        expected.push(9);
        expected.extend_from_slice(b"localhost");
        expected.extend_from_slice(&KUBELET[13..]);
        assert_eq!(with_localhost(&KUBELET), Some(expected));
    }

    #[test]
    fn a_block_without_a_literal_authority_stays() {
        // An indexed field, a table size update, a literal with a new name, one with an indexed name.
        let block = [0xbe, 0x3f, 0xe1, 0x1f, 0x40, 0x81, 0x11, 0x01, b'x', 0x0f, 0x10, 0x01, b'y'];
        assert_eq!(with_localhost(&block), Some(block.to_vec()));
    }

    #[test]
    fn what_is_cut_off_is_left_alone() {
        for end in 1..KUBELET.len() {
            if let Some(changed) = with_localhost(&KUBELET[..end]) {
                assert!(changed.len() <= end + LOCALHOST.len());
            }
        }
        assert_eq!(with_localhost(&KUBELET[..10]), None);
        assert_eq!(with_localhost(&[0x41, 0xff, 0xff, 0xff, 0xff, 0xff]), None);
    }
}
