//! The two state machines as the replica layer drives them.

use std::sync::Arc;

use bytes::Bytes;
use holdfast_consensus::LogIndex;
use holdfast_metadata::{ApplyError, Catalogue};
use holdfast_replica::{Applied, Keeping, LogCommand, StateMachine};
use holdfast_store::group::{OUT_OF_PLACE_BYTES_MIN, PayloadAt};
use holdfast_volume::{Command, DecodeError, Mutation, Outcome, Volume};

pub(crate) struct VolumeMachine {
    pub(crate) volume: Volume,
}

impl StateMachine for VolumeMachine {
    type Outcome = Outcome;
    type Error = DecodeError;

    fn apply(&mut self, index: LogIndex, command: &LogCommand) -> Result<Applied<Outcome>, DecodeError> {
        let applied = self.volume.apply(index.0, &command.header, &command.payload)?;
        let mutations = applied.mutations.into_iter().map(|mutation| match mutation {
            Mutation::Write { first_block, data, checksums } => {
                holdfast_store::group::Mutation::Write { first_block, data, checksums }
            }
            Mutation::Zero { first_block, count, discard } => {
                holdfast_store::group::Mutation::Zero { first_block, count, discard }
            }
        });
        let keeping = applied.keeping.map(|keeping| match keeping {
            holdfast_volume::Keeping::Keep => Keeping::Keep,
            holdfast_volume::Keeping::Drop { index } => Keeping::Drop { index },
        });
        Ok(Applied { outcome: applied.outcome, mutations: mutations.collect(), keeping })
    }

    fn payload_at(command: &LogCommand) -> Option<PayloadAt> {
        // Shorter ones stay in the log wherever they go.
        if command.payload.len() < OUT_OF_PLACE_BYTES_MIN {
            return None;
        }
        match Command::decode(&command.header) {
            Ok(decoded @ Command::Write { .. }) if decoded.payload_bytes() != command.payload.len() => None,
            Ok(Command::Write { first_block, checksums, .. }) => Some(PayloadAt { first_block, checksums }),
            // What cannot be applied is found out when it is.
            Ok(_) | Err(_) => None,
        }
    }

    fn encode_state(&self) -> Bytes {
        self.volume.encode_state()
    }

    fn snapshots(&self) -> Vec<u64> {
        self.volume.snapshots().iter().map(|snapshot| snapshot.index).collect()
    }

    fn decode_state(state: &Bytes) -> Result<VolumeMachine, String> {
        let volume = Volume::decode_state(state).map_err(|error| error.to_string())?;
        Ok(VolumeMachine { volume })
    }
}

pub(crate) struct CatalogueMachine {
    /// Whoever asked for it may still look at it: a change then makes a new one.
    pub(crate) catalogue: Arc<Catalogue>,
}

impl StateMachine for CatalogueMachine {
    type Outcome = holdfast_metadata::Outcome;
    type Error = ApplyError;

    fn apply(&mut self, index: LogIndex, command: &LogCommand) -> Result<Applied<Self::Outcome>, ApplyError> {
        let outcome = Arc::make_mut(&mut self.catalogue).apply(index.0, &command.header)?;
        Ok(Applied { outcome, mutations: Vec::new(), keeping: None })
    }

    fn payload_at(_: &LogCommand) -> Option<PayloadAt> {
        None
    }

    fn encode_state(&self) -> Bytes {
        Bytes::from(self.catalogue.encode_state())
    }

    fn snapshots(&self) -> Vec<u64> {
        Vec::new()
    }

    fn decode_state(state: &Bytes) -> Result<CatalogueMachine, String> {
        let catalogue = Catalogue::decode_state(state).map_err(|error| error.to_string())?;
        Ok(CatalogueMachine { catalogue: Arc::new(catalogue) })
    }
}

// What a volume proposes and reads, the store takes: a request of 1 MiB that is not aligned touches 257 blocks.
const _: () = assert!(holdfast_volume::command::PAYLOAD_BYTES_MAX <= holdfast_store::group::PAYLOAD_BYTES_MAX);
const _: () = assert!(
    holdfast_block::REQUEST_BYTES_MAX / holdfast_block::PHYSICAL_BLOCK_BYTES < holdfast_store::chunk::READ_BLOCKS_MAX
);
const _: () = assert!(holdfast_volume::volume::SNAPSHOTS_MAX <= holdfast_store::chunk::SNAPSHOTS_MAX);
