//! Option haggling: what a client may ask before transmission, and the answers.

use bytes::{Buf, BufMut, BytesMut};
use holdfast_block::{PHYSICAL_BLOCK_BYTES, REQUEST_BYTES_MAX};

use crate::session::Export;
use crate::wire::{self, STRING_BYTES_MAX, info_code, option_code, reply_code, transmission_flag};

/// Longest option data that is looked at; an honest one is a name and a few numbers. Longer data is skipped.
pub(crate) const OPTION_BYTES_MAX: u32 = 64 << 10;

/// What the haggling has settled so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Negotiated {
    pub structured: bool,
    /// The client does without the zeroes after `EXPORT_NAME`.
    pub no_zeroes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Haggle,
    Transmit,
    /// The client wants to go; close once the answer is out.
    Abort,
    /// `EXPORT_NAME` has no way to say no.
    UnknownExport,
}

/// Why an option's data is refused, as a reply code.
struct Refused(u32);

impl Negotiated {
    pub fn transmission_flags(self) -> u16 {
        let flags = transmission_flag::HAS_FLAGS
            | transmission_flag::SEND_FLUSH
            | transmission_flag::SEND_FUA
            | transmission_flag::SEND_TRIM
            | transmission_flag::SEND_WRITE_ZEROES
            | transmission_flag::CAN_MULTI_CONN;
        if self.structured { flags | transmission_flag::SEND_DF } else { flags }
    }

    /// Answers one option with all its data.
    pub fn on_option(&mut self, export: &Export, option: u32, data: &[u8], out: &mut BytesMut) -> Next {
        match option {
            option_code::EXPORT_NAME => return self.export_name(export, data, out),
            option_code::ABORT => {
                wire::put_option_reply(out, option, reply_code::ACK, &[]);
                return Next::Abort;
            }
            _ => {}
        }
        let answer = match option {
            option_code::LIST => list(export, data, out),
            option_code::INFO | option_code::GO => self.info(export, option, data, out),
            option_code::STRUCTURED_REPLY => match data {
                [] => {
                    self.structured = true;
                    Ok(())
                }
                _ => Err(Refused(reply_code::ERR_INVALID)),
            },
            option_code::LIST_META_CONTEXT | option_code::SET_META_CONTEXT => self.meta_context(export, data),
            // STARTTLS among them: the socket is a local one, guarded by its permissions.
            _ => Err(Refused(reply_code::ERR_UNSUP)),
        };
        match answer {
            Ok(()) => {
                wire::put_option_reply(out, option, reply_code::ACK, &[]);
                if option == option_code::GO { Next::Transmit } else { Next::Haggle }
            }
            Err(Refused(code)) => {
                wire::put_option_reply(out, option, code, &[]);
                Next::Haggle
            }
        }
    }

    fn export_name(&self, export: &Export, data: &[u8], out: &mut BytesMut) -> Next {
        if !export.is_named(data) {
            return Next::UnknownExport;
        }
        out.put_u64(export.geometry().size_bytes);
        out.put_u16(self.transmission_flags());
        if !self.no_zeroes {
            out.put_bytes(0, wire::EXPORT_NAME_ZEROES);
        }
        Next::Transmit
    }

    fn info(&self, export: &Export, option: u32, mut data: &[u8], out: &mut BytesMut) -> Result<(), Refused> {
        let name = take_string(&mut data)?;
        let count = data.try_get_u16().map_err(invalid)?;
        if data.len() != 2 * usize::from(count) {
            return Err(Refused(reply_code::ERR_INVALID));
        }
        if !export.is_named(name) {
            return Err(Refused(reply_code::ERR_UNKNOWN));
        }
        let mut name_wanted = false;
        while data.has_remaining() {
            name_wanted |= data.get_u16() == info_code::NAME;
        }
        let mut info = BytesMut::new();
        info.put_u16(info_code::EXPORT);
        info.put_u64(export.geometry().size_bytes);
        info.put_u16(self.transmission_flags());
        wire::put_option_reply(out, option, reply_code::INFO, &info);
        info.clear();
        // Told unasked too: "Size constraints" are then known to a client that can honour them.
        info.put_u16(info_code::BLOCK_SIZE);
        info.put_u32(export.geometry().logical_block_bytes);
        info.put_u32(PHYSICAL_BLOCK_BYTES);
        info.put_u32(REQUEST_BYTES_MAX);
        wire::put_option_reply(out, option, reply_code::INFO, &info);
        if name_wanted {
            info.clear();
            info.put_u16(info_code::NAME);
            info.put_slice(export.name().as_bytes());
            wire::put_option_reply(out, option, reply_code::INFO, &info);
        }
        Ok(())
    }

    /// There is no context to list or to select; the syntax is checked all the same.
    fn meta_context(&self, export: &Export, mut data: &[u8]) -> Result<(), Refused> {
        if !self.structured {
            return Err(Refused(reply_code::ERR_INVALID));
        }
        let name = take_string(&mut data)?;
        let count = data.try_get_u32().map_err(invalid)?;
        for _ in 0..count {
            take_string(&mut data)?;
        }
        if data.has_remaining() {
            return Err(Refused(reply_code::ERR_INVALID));
        }
        if !export.is_named(name) {
            return Err(Refused(reply_code::ERR_UNKNOWN));
        }
        Ok(())
    }
}

fn list(export: &Export, data: &[u8], out: &mut BytesMut) -> Result<(), Refused> {
    if !data.is_empty() {
        return Err(Refused(reply_code::ERR_INVALID));
    }
    let mut server = BytesMut::new();
    server.put_u32(u32::try_from(export.name().len()).expect("names are at most 4096 bytes"));
    server.put_slice(export.name().as_bytes());
    wire::put_option_reply(out, option_code::LIST, reply_code::SERVER, &server);
    Ok(())
}

fn take_string<'a>(data: &mut &'a [u8]) -> Result<&'a [u8], Refused> {
    let length = data.try_get_u32().map_err(invalid)? as usize;
    if length > STRING_BYTES_MAX {
        return Err(Refused(reply_code::ERR_TOO_BIG));
    }
    let (string, rest) = data.split_at_checked(length).ok_or(Refused(reply_code::ERR_INVALID))?;
    *data = rest;
    Ok(string)
}

fn invalid(_: bytes::TryGetError) -> Refused {
    Refused(reply_code::ERR_INVALID)
}
