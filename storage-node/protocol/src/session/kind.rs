//! The numbers of the session protocol's messages. A number is never given to another message.

macro_rules! kinds {
    ($(#[$doc:meta])* $lookup:ident: $($name:ident = $value:literal, $text:literal;)*) => {
        $(pub const $name: u16 = $value;)*
        $(#[$doc])*
        pub fn $lookup(kind: u16) -> Option<&'static str> {
            match kind {
                $($name => Some($text),)*
                _ => None,
            }
        }
    };
}

kinds! {
    /// The name of a request's kind in messages to people; `None` where it is no request.
    request_name:
    ATTACH = 0x0101, "Attach";
    OPEN_SESSION = 0x0102, "OpenSession";
    DETACH = 0x0103, "Detach";
    SET_FORMATTED = 0x0104, "SetFormatted";
    READ = 0x0111, "Read";
    WRITE = 0x0112, "Write";
    WRITE_ZEROES = 0x0113, "WriteZeroes";
    DISCARD = 0x0114, "Discard";
    FLUSH = 0x0115, "Flush";
}

kinds! {
    /// The name of a reply's kind in messages to people; `None` where it is no reply.
    reply_name:
    ATTACHED = 0x0201, "Attached";
    DETACHED = 0x0202, "Detached";
    FORMATTED_SET = 0x0203, "FormattedSet";
    REFUSED = 0x0204, "Refused";
    NOT_LEADER = 0x0205, "NotLeader";
    LEADING = 0x0206, "Leading";
    RESIZED = 0x0207, "Resized";
    REPLICAS = 0x0208, "Replicas";
    IO_DONE = 0x0211, "IoDone";
}
