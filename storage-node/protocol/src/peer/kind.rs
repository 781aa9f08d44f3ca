//! The numbers of the peer messages. A number is never given to another message.

pub const HEARTBEAT: u16 = 0x0301;
pub const HEARTBEAT_REPLY: u16 = 0x0302;
pub const RAFT: u16 = 0x0303;
pub const CONTROL: u16 = 0x0304;
pub const DELTA: u16 = 0x0305;
pub const REPAIR_REQUEST: u16 = 0x0306;
pub const REPAIR_REPLY: u16 = 0x0307;
