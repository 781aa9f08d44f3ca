//! What a transmission request asks for, and how failures are told.

use holdfast_block::{Error, Geometry, REQUEST_BYTES_MAX, ZEROES_BYTES_MAX};

use crate::option::Negotiated;
use crate::session::PAYLOAD_BYTES_MAX;
use crate::wire::{Errno, RequestHeader, command_code, command_flag};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    WriteZeroes,
    Trim,
    Flush,
}

impl Kind {
    /// Longest part of it that is one request to the volume.
    pub fn part_bytes_max(self) -> u64 {
        match self {
            Kind::Read | Kind::Write | Kind::Flush => u64::from(REQUEST_BYTES_MAX),
            Kind::WriteZeroes | Kind::Trim => ZEROES_BYTES_MAX,
        }
    }
}

/// A request that failed before it reached the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rejected {
    pub errno: Errno,
    pub message: &'static str,
}

const fn invalid(message: &'static str) -> Rejected {
    Rejected { errno: Errno::Invalid, message }
}

/// Checks everything about a request but its payload. A disconnect is not a request and never comes here.
pub(crate) fn check(header: &RequestHeader, geometry: Geometry, negotiated: Negotiated) -> Result<Kind, Rejected> {
    let (kind, flags) = match header.command {
        command_code::READ if negotiated.structured => (Kind::Read, command_flag::DF),
        command_code::READ => (Kind::Read, 0),
        command_code::WRITE => (Kind::Write, 0),
        command_code::FLUSH => (Kind::Flush, 0),
        command_code::TRIM => (Kind::Trim, 0),
        command_code::WRITE_ZEROES => (Kind::WriteZeroes, command_flag::NO_HOLE),
        _ => return Err(invalid("unknown command")),
    };
    // "Command flags": FUA is valid with every command once it is offered.
    if header.flags & !(flags | command_flag::FUA) != 0 {
        return Err(invalid("a flag that this command does not have"));
    }
    let (offset, length) = (header.offset, u64::from(header.length));
    if kind == Kind::Flush {
        return if (offset, length) == (0, 0) { Ok(kind) } else { Err(invalid("a flush has no range")) };
    }
    let unit = u64::from(geometry.logical_block_bytes);
    if length == 0 || !offset.is_multiple_of(unit) || !length.is_multiple_of(unit) {
        return Err(reject(Error::Misaligned, kind, "offset or length is no multiple of the minimum block size"));
    }
    if offset.checked_add(length).is_none_or(|end| end > geometry.size_bytes) {
        return Err(reject(Error::OutOfRange, kind, "the range lies beyond the end of the export"));
    }
    if matches!(kind, Kind::Read | Kind::Write) && length > u64::from(PAYLOAD_BYTES_MAX) {
        return Err(reject(Error::TooLarge, kind, "longer than 32 MiB"));
    }
    Ok(kind)
}

fn reject(error: Error, kind: Kind, message: &'static str) -> Rejected {
    Rejected { errno: errno(error, kind), message }
}

/// "Error values". What a request can fail with, in the protocol's numbers.
pub(crate) fn errno(error: Error, kind: Kind) -> Errno {
    match (error, kind) {
        (Error::OutOfRange, Kind::Write | Kind::WriteZeroes) => Errno::NoSpace,
        (Error::OutOfRange, Kind::Read | Kind::Trim | Kind::Flush) => Errno::Invalid,
        (Error::Misaligned | Error::TooLarge, _) => Errno::Invalid,
        (Error::NoSpace, _) => Errno::NoSpace,
        // Not ESHUTDOWN, on which clients reconnect: a fenced device stays, and fails.
        (Error::Fenced | Error::Corrupt | Error::Unavailable, _) => Errno::Io,
    }
}
