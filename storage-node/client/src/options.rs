//! What a client is told at its start, and the times it keeps.

use std::time::Duration;

use holdfast_id::{NodeId, VolumeId};
use holdfast_protocol::session::{Epoch, Instance, SESSION_WINDOW};

/// How the session begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Take a new epoch; `take_over` fences a live holder instead of being refused.
    Attach { take_over: bool },
    /// The holder's next process: the same epoch, a new session.
    Resume { epoch: Epoch },
}

#[derive(Clone, Debug)]
pub struct ClientOptions {
    pub volume: VolumeId,
    /// The nodes that hold the volume's replicas; at least one.
    pub replicas: Vec<NodeId>,
    /// Who attaches, in words an operator knows: told to whoever is refused because of it.
    pub holder: String,
    /// New and random for every client: it makes the opening request idempotent.
    pub instance: Instance,
    pub mode: Mode,
    /// Requests that may be outstanding, of every kind; 1 to [`SESSION_WINDOW`].
    pub window: u64,
    /// A leader that has answered nothing for so long while requests wait is doubted: the other replicas are asked.
    /// Nothing is taken away from it before another one leads, so this may be short.
    pub quiet: Duration,
    /// A request without an answer is sent again to the same leader after this long, then after twice as long, up to
    /// eight times. Longer than any healthy commit: it only covers an answer that was lost without its connection.
    pub resend: Duration,
    /// Fail a request with `Unavailable` when it has waited so long; `None` waits for ever.
    pub unavailable_after: Option<Duration>,
    /// Spreads the searches of many volumes that lost the same node.
    pub seed: u64,
}

impl ClientOptions {
    /// Two missed heartbeats of the nodes; three tiny messages are then sent, so a false doubt is cheap.
    pub const QUIET: Duration = Duration::from_millis(200);
    /// Above the worst flush of a disk that has not been given up.
    pub const RESEND: Duration = Duration::from_secs(2);

    /// The options with their defaults: the whole window, no time limit.
    pub fn new(
        volume: VolumeId,
        replicas: Vec<NodeId>,
        holder: String,
        instance: Instance,
        mode: Mode,
    ) -> ClientOptions {
        // Sixteen random bytes are at hand, and nothing about the seed need be secret.
        let seed = instance.0 as u64;
        ClientOptions {
            volume,
            replicas,
            holder,
            instance,
            mode,
            window: SESSION_WINDOW,
            quiet: Self::QUIET,
            resend: Self::RESEND,
            unavailable_after: None,
            seed,
        }
    }
}
