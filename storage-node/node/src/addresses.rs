//! Where the other nodes are, kept over restarts: a node that starts alone must find its peers without the catalogue.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use holdfast_id::NodeId;

pub(crate) struct AddressBook {
    path: PathBuf,
    addresses: BTreeMap<NodeId, String>,
}

impl AddressBook {
    pub(crate) fn open(path: PathBuf) -> Result<AddressBook> {
        let addresses = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{} cannot be read", path.display()))?,
            Err(error) if error.kind() == ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        Ok(AddressBook { path, addresses })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (NodeId, &str)> {
        self.addresses.iter().map(|(node, address)| (*node, address.as_str()))
    }

    /// True where something changed, which is then on disk.
    pub(crate) fn learn(&mut self, learnt: &[(NodeId, String)]) -> Result<bool> {
        let mut changed = false;
        for (node, address) in learnt {
            changed |= self.addresses.insert(*node, address.clone()).as_ref() != Some(address);
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
