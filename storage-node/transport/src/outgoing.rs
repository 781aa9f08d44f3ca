//! Bytes on their way to a socket, in a buffer that connections pass around.
//!
//! A connection holds one only while its socket does not take more; so idle connections cost no buffer.

/// No more is put in once this many bytes wait: large enough for one system call to carry many frames, small enough
/// that an urgent frame does not queue behind long.
pub(crate) const OUTGOING_BYTES: usize = 128 << 10;

#[derive(Default)]
pub(crate) struct Outgoing {
    /// Initialised over its whole length, so that ciphertext can be written in place; `[start, end)` waits.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// Small pieces are gathered here to share a TLS record. Empty between calls.
    pub staging: Vec<u8>,
}

impl Outgoing {
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub fn has_room(&self) -> bool {
        self.end - self.start < OUTGOING_BYTES
    }

    pub fn waiting(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub fn consume(&mut self, count: usize) {
        self.start += count;
        assert!(self.start <= self.end, "more bytes were written than waited");
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }

    /// At least `count` bytes to be written to; [`Outgoing::filled`] says how many were.
    pub fn spare(&mut self, count: usize) -> &mut [u8] {
        if self.bytes.len() - self.end < count {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            let needed = self.end + count;
            if self.bytes.len() < needed {
                self.bytes.resize(needed.max(OUTGOING_BYTES + OUTGOING_BYTES / 4), 0);
            }
        }
        &mut self.bytes[self.end..]
    }

    pub fn filled(&mut self, count: usize) {
        self.end += count;
        assert!(self.end <= self.bytes.len(), "more bytes were filled than there was room for");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_the_order_they_came_in() {
        let mut outgoing = Outgoing::default();
        let (mut expected, mut got) = (Vec::new(), Vec::new());
        for round in 0..200u32 {
            let piece = vec![round as u8; (round as usize * 977) % 5000];
            expected.extend_from_slice(&piece);
            outgoing.spare(piece.len())[..piece.len()].copy_from_slice(&piece);
            outgoing.filled(piece.len());
            let count = outgoing.waiting().len().min(3000);
            got.extend_from_slice(&outgoing.waiting()[..count]);
            outgoing.consume(count);
        }
        got.extend_from_slice(outgoing.waiting());
        assert_eq!(got, expected);
    }
}
