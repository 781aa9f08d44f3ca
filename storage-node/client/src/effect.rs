//! What the driver of a client has to do, in order.

use holdfast_block::{Completion, Geometry};
use holdfast_id::NodeId;
use holdfast_protocol::session::{Epoch, Formatted, Refusal, Request, Session};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientEffect {
    /// To a node that is connected; if the connection is gone by now, drop it: [`crate::Client::on_closed`] resends.
    Send {
        to: NodeId,
        request: Request,
    },
    Complete(Completion),
    /// The session is open. Told once.
    Attached {
        epoch: Epoch,
        session: Session,
        geometry: Geometry,
        formatted: Formatted,
    },
    /// The opening request was refused; the client has ended.
    Refused(Refusal),
    /// Another attachment or session has taken over; the client has ended, every request fails with `Fenced`.
    Fenced,
    /// The attachment is over by our own wish; the client has ended.
    Detached,
    FormattedSet(Formatted),
    /// The volume's replicas are on exactly these nodes now, at these addresses: connect to those that are new, and let
    /// go of the others.
    Replicas(Vec<(NodeId, String)>),
    /// There may be replicas on these nodes, too, at these addresses: connect to them.
    MoreReplicas(Vec<(NodeId, String)>),
    /// Told only where the geometry differs from the one told before.
    Resized(Geometry),
}
