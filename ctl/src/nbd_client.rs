//! A small blocking NBD client over a Unix socket: what the demo and the dev checks use where no kernel device is.
//!
//! Fixed newstyle negotiation with `NBD_OPT_GO`, simple replies, one request at a time. Public specification:
//! NetworkBlockDevice/nbd, `doc/proto.md`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;

/// Longest option reply believed; ours are tens of bytes.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;

pub struct NbdClient {
    stream: UnixStream,
    cookie: u64,
    size_bytes: u64,
}

impl NbdClient {
    /// `wait` bounds every single read and write of the socket.
    pub fn connect(socket: &Path, export: &str, wait: Duration) -> Result<NbdClient> {
        let stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(wait))?;
        stream.set_write_timeout(Some(wait))?;
        let mut client = NbdClient { stream, cookie: 0, size_bytes: 0 };
        client.negotiate(export)?;
        Ok(client)
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn negotiate(&mut self, export: &str) -> Result<()> {
        ensure!(self.u64()? == NBDMAGIC && self.u64()? == IHAVEOPT, "the socket does not speak NBD");
        let flags = self.u16()?;
        ensure!(flags & FLAG_FIXED_NEWSTYLE != 0, "the server does not offer fixed newstyle negotiation");
        let mut hello = u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)).to_be_bytes().to_vec();
        hello.extend(IHAVEOPT.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        let name = export.as_bytes();
        hello.extend((name.len() as u32 + 6).to_be_bytes());
        hello.extend((name.len() as u32).to_be_bytes());
        hello.extend(name);
        hello.extend(0u16.to_be_bytes());
        self.stream.write_all(&hello)?;
        loop {
            ensure!(self.u64()? == OPTION_REPLY_MAGIC, "the server left the negotiation");
            let _option = self.u32()?;
            let kind = self.u32()?;
            let length = self.u32()?;
            ensure!(length <= OPTION_REPLY_BYTES_MAX, "an option reply of {length} bytes is not believed");
            let mut body = vec![0; length as usize];
            self.stream.read_exact(&mut body)?;
            match kind {
                REP_ACK => return Ok(()),
                REP_INFO if body.len() >= 12 && body[..2] == INFO_EXPORT.to_be_bytes() => {
                    self.size_bytes = u64::from_be_bytes(body[2..10].try_into()?);
                }
                REP_INFO => {}
                kind if kind & REP_ERROR != 0 => {
                    bail!("the server refuses export {export:?}: {}", String::from_utf8_lossy(&body))
                }
                kind => bail!("unknown option reply {kind}"),
            }
        }
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>> {
        self.request(CMD_READ, offset, length, &[])?;
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.request(CMD_WRITE, offset, u32::try_from(data.len())?, data)
    }

    pub fn flush(&mut self) -> Result<()> {
        self.request(CMD_FLUSH, 0, 0, &[])
    }

    fn request(&mut self, command: u16, offset: u64, length: u32, data: &[u8]) -> Result<()> {
        self.send(command, offset, length, data)?;
        ensure!(self.u32()? == SIMPLE_REPLY_MAGIC, "a reply that is no simple reply");
        let error = self.u32()?;
        ensure!(self.u64()? == self.cookie, "a reply to another request");
        ensure!(error == 0, "the device answers errno {error} to command {command} at {offset}+{length}");
        Ok(())
    }

    fn send(&mut self, command: u16, offset: u64, length: u32, data: &[u8]) -> Result<()> {
        self.cookie += 1;
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(0u16.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request).context("send to the NBD socket")
    }

    fn u16(&mut self) -> Result<u16> {
        let mut bytes = [0; 2];
        self.stream.read_exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        // A courtesy: the server sees the end of the connection all the same.
        let _ = self.send(CMD_DISC, 0, 0, &[]);
    }
}
