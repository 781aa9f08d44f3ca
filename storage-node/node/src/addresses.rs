//! Where the other nodes are, kept over restarts: a node that starts alone must find its peers without the catalogue.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use holdfast_id::NodeId;
use holdfast_shard::NodeAddress;
use serde::{Deserialize, Serialize};

/// `peers.json` in the node's folder.
pub(crate) struct AddressBook {
    path: PathBuf,
    addresses: BTreeMap<NodeId, Address>,
}

/// Where one node is, `host:port` each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Address {
    pub(crate) peer: String,
    pub(crate) api: String,
}

impl AddressBook {
    pub(crate) fn open(dir: &Path) -> Result<AddressBook> {
        let path = dir.join("peers.json");
        let addresses = match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).with_context(|| format!("{} cannot be read", path.display()))?
            }
            Err(error) if error.kind() == ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        Ok(AddressBook { path, addresses })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (NodeId, &Address)> {
        self.addresses.iter().map(|(node, address)| (*node, address))
    }

    /// True where something changed, which is then on disk.
    pub(crate) fn learn(&mut self, learnt: &[NodeAddress]) -> Result<bool> {
        let mut changed = false;
        for NodeAddress { node, peer, api } in learnt {
            let address = Address { peer: peer.clone(), api: api.clone() };
            changed |= self.addresses.insert(*node, address.clone()) != Some(address);
        }
        if changed {
            self.store()?;
        }
        Ok(changed)
    }

    fn store(&self) -> Result<()> {
        let temporary = self.path.with_extension("new");
        let mut file = fs::File::create(&temporary).with_context(|| format!("create {}", temporary.display()))?;
        file.write_all(&serde_json::to_vec_pretty(&self.addresses)?)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path).with_context(|| format!("replace {}", self.path.display()))?;
        if let Some(folder) = self.path.parent() {
            fs::File::open(folder)?.sync_all()?;
        }
        Ok(())
    }
}
