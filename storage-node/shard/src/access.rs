//! What a client may ask of a volume, by what its certificate says. Pure: role, state and request in, a verdict out.
//!
//! A `node-agent` attaches nothing: it serves what the control API has attached for its machine. An epoch has one holder
//! for ever, so looking at the epoch a request names is enough, and the log's position decides the rest: a request that
//! was let through and lands behind a later attachment is of an epoch that is over.

use std::sync::Arc;

use holdfast_protocol::session::{Epoch, Request};
use holdfast_volume::Volume;

/// Who is at the other end of a client's connection, as far as it decides what it may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientRole {
    /// May be any holder of any volume.
    Agent,
    /// May serve attachments of this holder, and make none.
    NodeAgent(Arc<str>),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denial {
    #[error("the agent of a cluster's machine attaches nothing by itself: the control API does")]
    Attach,
    #[error("epoch {} is attached by {holder}, and this is the agent of {machine}", epoch.0)]
    OtherHolder { epoch: Epoch, holder: String, machine: String },
    #[error("epoch {} has not been granted", epoch.0)]
    NotGranted { epoch: Epoch },
}

pub(crate) fn judge(role: &ClientRole, volume: &Volume, request: &Request) -> Result<(), Denial> {
    let ClientRole::NodeAgent(machine) = role else { return Ok(()) };
    let epoch = match request {
        Request::Attach { .. } => return Err(Denial::Attach),
        Request::OpenSession { epoch, .. } | Request::Detach { epoch, .. } | Request::SetFormatted { epoch, .. } => {
            *epoch
        }
        Request::Io { stamp, .. } => stamp.epoch,
    };
    if epoch > volume.epoch() {
        // It may be on its way to the log for somebody else.
        return Err(Denial::NotGranted { epoch });
    }
    match volume.attachment() {
        Some(attachment) if epoch == volume.epoch() && attachment.holder.as_str() != &**machine => {
            let (holder, machine) = (attachment.holder.to_string(), machine.to_string());
            Err(Denial::OtherHolder { epoch, holder, machine })
        }
        // Over: the volume says so itself, which ends the device of whoever had it.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use holdfast_block::{Geometry, Operation};
    use holdfast_consensus::Position;
    use holdfast_id::VolumeId;
    use holdfast_protocol::session::{Formatted, Instance, Session, Stamp};
    use holdfast_volume::{Command, Name, VolumeSpec};

    use super::*;

    fn id() -> VolumeId {
        VolumeId::from_bytes([1; 16]).unwrap()
    }

    /// Attached by `a` in epoch 1, then by `b` in epoch 2, and then detached where `free`.
    fn volume(free: bool) -> Volume {
        let geometry = Geometry::new(1 << 20, 512).unwrap();
        let mut volume = Volume::new(VolumeSpec { id: id(), name: Name::new("v").unwrap(), geometry });
        let attach = |holder: &str, instance| Command::Attach {
            holder: Name::new(holder).unwrap(),
            instance: Instance(instance),
            take_over: true,
        };
        let mut commands = vec![attach("a", 1), attach("b", 2)];
        commands.extend(free.then_some(Command::Detach { epoch: Epoch(2) }));
        for (index, command) in (1..).zip(commands) {
            volume.apply(index, &command.encode(), &Bytes::new()).unwrap();
        }
        volume
    }

    fn requests(epoch: u64) -> [Request; 4] {
        let (volume, epoch) = (id(), Epoch(epoch));
        let stamp = Stamp { epoch, session: Session(2), sequence: 1, oldest: 1 };
        [
            Request::OpenSession { volume, epoch, instance: Instance(9) },
            Request::Detach { volume, epoch },
            Request::SetFormatted { volume, epoch, formatted: Formatted::Formatting },
            Request::Io { volume, stamp, seen: Position::default(), operation: Operation::Flush },
        ]
    }

    fn verdicts(machine: &str, volume: &Volume, epoch: u64) -> Vec<Result<(), Denial>> {
        let role = ClientRole::NodeAgent(machine.into());
        requests(epoch).iter().map(|request| judge(&role, volume, request)).collect()
    }

    #[test]
    fn a_machine_has_its_own_attachment_and_no_other() {
        let volume = volume(false);
        assert_eq!(verdicts("b", &volume, 2), vec![Ok(()); 4]);
        let denial = Denial::OtherHolder { epoch: Epoch(2), holder: "b".into(), machine: "a".into() };
        assert_eq!(verdicts("a", &volume, 2), vec![Err(denial); 4]);
    }

    #[test]
    fn who_is_fenced_is_told_so_by_the_volume() {
        for free in [false, true] {
            assert_eq!(verdicts("a", &volume(free), 1), vec![Ok(()); 4]);
        }
        assert_eq!(verdicts("a", &volume(true), 2), vec![Ok(()); 4]);
    }

    /// The entry that grants it may be in the log before the request's own.
    #[test]
    fn an_epoch_to_come_is_nobodys() {
        for free in [false, true] {
            for machine in ["a", "b"] {
                let denial = Denial::NotGranted { epoch: Epoch(3) };
                assert_eq!(verdicts(machine, &volume(free), 3), vec![Err(denial); 4]);
            }
        }
    }

    #[test]
    fn only_agents_of_their_own_attach() {
        let attach = Request::Attach { volume: id(), holder: "b".into(), instance: Instance(9), take_over: false };
        for free in [false, true] {
            let volume = volume(free);
            assert_eq!(judge(&ClientRole::NodeAgent("b".into()), &volume, &attach), Err(Denial::Attach));
            assert_eq!(judge(&ClientRole::Agent, &volume, &attach), Ok(()));
            for request in [1, 2, 3].iter().flat_map(|epoch| requests(*epoch)) {
                assert_eq!(judge(&ClientRole::Agent, &volume, &request), Ok(()));
            }
        }
    }
}
