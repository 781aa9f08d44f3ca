//! One RPC per volume at a time.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// Names that something works on now. Nothing waits here: who comes second is told so and comes again.
#[derive(Clone, Default)]
pub struct Locks {
    held: Arc<Mutex<BTreeSet<String>>>,
}

/// Ends the work when it is dropped.
pub struct Guard {
    held: Arc<Mutex<BTreeSet<String>>>,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another request works on {0}")]
pub struct Locked(pub String);

impl Locks {
    pub fn lock(&self, name: &str) -> Result<Guard, Locked> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if !held.insert(name.to_owned()) {
            return Err(Locked(name.to_owned()));
        }
        Ok(Guard { held: self.held.clone(), name: name.to_owned() })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_held_once_until_its_guard_goes() {
        let locks = Locks::default();
        let guard = locks.lock("a").unwrap();
        assert!(locks.lock("b").is_ok());
        assert_eq!(locks.clone().lock("a").err(), Some(Locked("a".into())));
        drop(guard);
        assert!(locks.lock("a").is_ok());
    }
}
