//! NBD server: wire, commands and session, without I/O.
