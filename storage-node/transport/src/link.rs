//! One connection without its socket: handshake, greeting, frames in, frames out, farewell.
//!
//! Driven by `Transport` with bytes from a socket, and by the tests with bytes from another link.
//!
//! Stages only go forward: `Handshake` (TLS) -> `Greeting` (our hello is queued) -> `Open` -> `Finishing` (nothing is
//! taken any more, the rest of the queue and the farewell go out).

use std::io::IoSlice;

use holdfast_id::ClusterId;

use crate::close::{CODE_GOODBYE, CloseReason};
use crate::frame::{Class, Frame, FrameError, KIND_CLOSE, KIND_HELLO, KIND_MIN, Limits};
use crate::hello::{Demands, Hello, close_code, close_frame};
use crate::identity::Bearer;
use crate::inbox::Inbox;
use crate::outbox::{Full, Outbox, QueueBytes};
use crate::outgoing::Outgoing;
use crate::tls::{RECORD_BYTES, TlsSession};

/// Input kept because its record or handshake message is incomplete. The longest of either has 64 KiB.
const LEFTOVER_BYTES_MAX: usize = 80 << 10;

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LinkEvent {
    Connected(Peer),
    Frame(Frame),
}

/// What the greeting settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub bearer: Bearer,
    pub version: u16,
    pub boot: u64,
    pub cluster: Option<ClusterId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Handshake,
    Greeting,
    Open,
    Finishing,
}

pub(crate) struct Link {
    /// `None` on a Unix socket.
    tls: Option<TlsSession>,
    stage: Stage,
    hello: Hello,
    demands: Demands,
    inbox: Inbox,
    outbox: Outbox,
    /// The beginning of a TLS record whose end has not come yet.
    leftover: Vec<u8>,
    /// TLS has been told that nothing more is sent, or there is nobody to tell.
    ended: bool,
    /// TLS has failed: what it had to say is said, and it must not be used again.
    broken: bool,
}

impl Link {
    pub fn new(tls: Option<TlsSession>, hello: Hello, demands: Demands, queue_bytes: QueueBytes) -> Link {
        let mut link = Link {
            stage: Stage::Handshake,
            hello,
            demands,
            inbox: Inbox::new(Limits::GREETING),
            outbox: Outbox::new(queue_bytes),
            leftover: Vec::new(),
            ended: false,
            broken: false,
            tls,
        };
        if link.tls.is_none() {
            link.greet();
        }
        link
    }

    pub fn is_open(&self) -> bool {
        self.stage == Stage::Open
    }

    /// Lets TLS begin; a client speaks first.
    pub fn start(&mut self, out: &mut Outgoing) -> Result<(), CloseReason> {
        match &mut self.tls {
            Some(tls) => tls.decrypt(&mut [], out, &mut |_| ()).map(|_| ()).inspect_err(|_| self.broken = true),
            None => Ok(()),
        }
    }

    /// Puts what is left of earlier input to the front of `buffer`; new input goes after it, then all of it to
    /// [`Link::on_bytes`].
    ///
    /// # Panics
    /// If `buffer` is not longer than [`LEFTOVER_BYTES_MAX`].
    pub fn begin_read(&mut self, buffer: &mut [u8]) -> usize {
        assert!(buffer.len() > LEFTOVER_BYTES_MAX, "there must be room for new input");
        buffer[..self.leftover.len()].copy_from_slice(&self.leftover);
        self.leftover.len()
    }

    /// Takes everything received so far that `begin_read` and the socket put into `input`.
    pub fn on_bytes(
        &mut self,
        input: &mut [u8],
        out: &mut Outgoing,
        on_event: &mut dyn FnMut(LinkEvent),
    ) -> Result<(), CloseReason> {
        self.leftover.clear();
        if self.stage == Stage::Finishing {
            return Ok(());
        }
        let mut ended = false;
        let mut outcome = Ok(());
        match &mut self.tls {
            None => self.inbox.extend(input),
            Some(tls) => match tls.decrypt(input, out, &mut |bytes| self.inbox.extend(bytes)) {
                Ok(decrypted) => {
                    let leftover = &input[decrypted.consumed..];
                    if leftover.len() > LEFTOVER_BYTES_MAX {
                        return Err(CloseReason::Tls { detail: "a handshake message comes in too many pieces".into() });
                    }
                    self.leftover.extend_from_slice(leftover);
                    ended = decrypted.ended;
                }
                Err(reason) => {
                    self.broken = true;
                    outcome = Err(reason);
                }
            },
        }
        if outcome.is_ok() {
            self.greet_if_secure()?;
        }
        // What came before a failure counts: often it says why the peer gave up.
        self.take_frames(on_event)?;
        outcome?;
        if ended { Err(CloseReason::Vanished) } else { Ok(()) }
    }

    /// Where the next bytes of a plaintext stream can be read to the place where they stay: that place. Whatever was
    /// read goes to [`Link::on_payload`].
    pub fn payload(&mut self) -> Option<&mut Vec<u8>> {
        if self.is_plain() && self.stage == Stage::Open { self.inbox.long() } else { None }
    }

    pub fn on_payload(&mut self, on_event: &mut dyn FnMut(LinkEvent)) -> Result<(), CloseReason> {
        self.inbox.on_long_read();
        self.take_frames(on_event)
    }

    fn take_frames(&mut self, on_event: &mut dyn FnMut(LinkEvent)) -> Result<(), CloseReason> {
        while let Some((_, frame)) = self.inbox.next()? {
            self.on_frame(frame, on_event)?;
        }
        Ok(())
    }

    /// Bytes go over the socket as they are.
    pub fn is_plain(&self) -> bool {
        self.tls.is_none()
    }

    /// Who is not whom we expect gets no hello: it must not believe that we are connected.
    fn greet_if_secure(&mut self) -> Result<(), CloseReason> {
        let Some(tls) = self.tls.as_ref().filter(|tls| self.stage == Stage::Handshake && !tls.is_handshaking()) else {
            return Ok(());
        };
        let found = tls.peer();
        self.stage = Stage::Greeting;
        let found = found?.peer;
        if let Some(expected) = self.demands.expected.filter(|expected| *expected != found) {
            return Err(CloseReason::WrongIdentity { expected, found });
        }
        self.greet();
        Ok(())
    }

    fn greet(&mut self) {
        self.stage = Stage::Greeting;
        self.outbox.push(Class::Control, self.hello.encode()).expect("an empty queue takes any frame");
    }

    fn on_frame(&mut self, frame: Frame, on_event: &mut dyn FnMut(LinkEvent)) -> Result<(), CloseReason> {
        match (self.stage, frame.kind) {
            (_, KIND_CLOSE) => Err(CloseReason::from_code(close_code(&frame.meta)?)),
            (Stage::Greeting, KIND_HELLO) => {
                let theirs = Hello::decode(&frame.meta)?;
                let certified = self.tls.as_ref().map(TlsSession::peer);
                let version = self.demands.judge(&self.hello, &theirs, certified)?;
                self.stage = Stage::Open;
                self.inbox.set_limits(Limits::OPEN);
                let Hello { bearer, boot, cluster, .. } = theirs;
                on_event(LinkEvent::Connected(Peer { bearer, version, boot, cluster }));
                Ok(())
            }
            (Stage::Open, KIND_MIN..) => {
                on_event(LinkEvent::Frame(frame));
                Ok(())
            }
            (_, kind) => Err(FrameError::UnexpectedKind { kind }.into()),
        }
    }

    /// Only while open, and only frames within the limits.
    pub fn send(&mut self, class: Class, frame: Frame) -> Result<(), Full> {
        assert!(self.is_open(), "frames are queued only once the greeting is over");
        self.outbox.push(class, frame)
    }

    pub fn take_writable(&mut self) -> bool {
        self.stage == Stage::Open && self.outbox.take_writable()
    }

    /// The queue, then a goodbye; nothing is taken any more.
    pub fn finish(&mut self) {
        self.end_with(CODE_GOODBYE);
    }

    /// Forgets the queue and tells the peer why, where there is a code for it.
    pub fn abort(&mut self, reason: &CloseReason) {
        // Before that the queue holds our hello at most, from which the peer may see for itself what is wrong.
        if self.stage == Stage::Open {
            self.outbox.forget();
        }
        match reason.told_as().and_then(|refusal| refusal.code()) {
            Some(code) => self.end_with(code),
            None => {
                self.stage = Stage::Finishing;
                self.ended = true;
            }
        }
    }

    fn end_with(&mut self, code: u16) {
        if matches!(self.stage, Stage::Greeting | Stage::Open) {
            self.outbox.push_last(close_frame(code));
        }
        self.ended |= self.stage == Stage::Handshake;
        self.stage = Stage::Finishing;
    }

    /// Whether [`Link::fill`], or [`Link::slices`], has something to write.
    pub fn has_output(&self) -> bool {
        !self.broken && (!self.outbox.is_empty() || (self.stage == Stage::Finishing && !self.ended))
    }

    /// Without TLS: the next bytes to write, as they lie; returns how many slices of them.
    pub fn slices<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        self.outbox.slices(slices)
    }

    /// So many bytes of [`Link::slices`] are written.
    pub fn on_written(&mut self, count: usize) {
        self.outbox.advance(count);
        self.ended |= self.stage == Stage::Finishing && self.outbox.is_empty();
    }

    /// With TLS: moves queued frames to `out` while it has room: many small ones share a record.
    pub fn fill(&mut self, out: &mut Outgoing) -> Result<(), CloseReason> {
        let Some(tls) = self.tls.as_mut().filter(|tls| !self.broken && !tls.is_handshaking()) else { return Ok(()) };
        fill_encrypted(tls, &mut self.outbox, &mut self.leftover, out)?;
        if self.stage == Stage::Finishing && !self.ended && self.outbox.is_empty() {
            self.ended = true;
            tls.end(&mut self.leftover, out)?;
        }
        Ok(())
    }
}

fn fill_encrypted(
    tls: &mut TlsSession,
    outbox: &mut Outbox,
    leftover: &mut [u8],
    out: &mut Outgoing,
) -> Result<(), CloseReason> {
    let mut staging = std::mem::take(&mut out.staging);
    let mut outcome = Ok(());
    while outcome.is_ok()
        && out.has_room()
        && let Some(piece) = outbox.front()
    {
        // Long pieces are encrypted where they lie, short ones are gathered until a record is full.
        let count = if staging.is_empty() && piece.len() >= RECORD_BYTES {
            outcome = tls.encrypt(&piece[..RECORD_BYTES], leftover, out);
            RECORD_BYTES
        } else {
            let count = piece.len().min(RECORD_BYTES - staging.len());
            staging.extend_from_slice(&piece[..count]);
            if staging.len() == RECORD_BYTES {
                outcome = tls.encrypt(&staging, leftover, out);
                staging.clear();
            }
            count
        };
        outbox.advance(count);
    }
    if outcome.is_ok() && !staging.is_empty() {
        outcome = tls.encrypt(&staging, leftover, out);
    }
    staging.clear();
    out.staging = staging;
    outcome
}

#[cfg(test)]
mod tests;
