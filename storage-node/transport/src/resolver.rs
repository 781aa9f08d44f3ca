//! [`Resolver`]: names to addresses, off the owner's thread, which must never wait for a name server.
//!
//! Each lookup has a thread of its own: one that hangs holds no other up. At most one per node is under way.

use std::collections::BTreeSet;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use holdfast_id::NodeId;

/// From `host:port` to where it is now, best first.
pub type Lookup = fn(&str) -> io::Result<Vec<SocketAddr>>;

/// A node, and where it is.
pub type Found = (NodeId, io::Result<Vec<SocketAddr>>);

/// Driven by its owner, which keeps it for as long as it looks for anybody.
pub struct Resolver {
    lookup: Lookup,
    /// Called by the threads once there is something to take.
    wake: Arc<dyn Fn() + Send + Sync>,
    sender: Sender<Found>,
    receiver: Receiver<Found>,
    under_way: BTreeSet<NodeId>,
}

impl Resolver {
    /// `wake` ends the owner's wait once there is something to [`Resolver::take`].
    pub fn new(lookup: Lookup, wake: Arc<dyn Fn() + Send + Sync>) -> Resolver {
        let (sender, receiver) = channel();
        Resolver { lookup, wake, sender, receiver, under_way: BTreeSet::new() }
    }

    pub fn is_under_way(&self, node: NodeId) -> bool {
        self.under_way.contains(&node)
    }

    /// By the system's own resolver.
    pub fn of_the_system(wake: Arc<dyn Fn() + Send + Sync>) -> Resolver {
        Resolver::new(|address| address.to_socket_addrs().map(Iterator::collect), wake)
    }

    /// The answer comes from [`Resolver::take`], also where no thread can be had.
    pub fn ask(&mut self, node: NodeId, address: &str) {
        if !self.under_way.insert(node) {
            return;
        }
        let (lookup, address) = (self.lookup, address.to_owned());
        let (wake, sender) = (Arc::clone(&self.wake), self.sender.clone());
        let started = std::thread::Builder::new().name("resolve".into()).spawn(move || {
            // It fails only where the data thread has ended.
            let _ = sender.send((node, lookup(&address)));
            wake();
        });
        if let Err(error) = started {
            let _ = self.sender.send((node, Err(error)));
            (self.wake)();
        }
    }

    /// What was found since the last call.
    pub fn take(&mut self) -> Vec<Found> {
        let found: Vec<Found> = self.receiver.try_iter().collect();
        for (node, _) in &found {
            self.under_way.remove(node);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};

    use super::*;

    /// Answers `slow` only once it may.
    static RELEASED: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

    fn lookup(address: &str) -> io::Result<Vec<SocketAddr>> {
        if address.starts_with("slow") {
            let released = RELEASED.0.lock().unwrap();
            drop(RELEASED.1.wait_while(released, |released| !*released).unwrap());
        }
        if address.starts_with("nowhere") {
            Err(io::ErrorKind::NotFound.into())
        } else {
            Ok(vec![([10, 0, 0, 1], 7).into()])
        }
    }

    #[test]
    fn a_name_that_hangs_holds_no_other_up() {
        let node = |number| NodeId::from_bytes([number; 16]).unwrap();
        let (woken, wakes) = channel();
        let woken = Mutex::new(woken);
        let mut resolver = Resolver::new(lookup, Arc::new(move || woken.lock().unwrap().send(()).unwrap()));
        resolver.ask(node(1), "slow:1");
        // Not asked again while it is under way.
        resolver.ask(node(1), "nowhere:1");
        resolver.ask(node(2), "quick:1");
        wakes.recv().unwrap();
        let found = resolver.take();
        assert_eq!((found.len(), found[0].0), (1, node(2)));
        assert!(resolver.is_under_way(node(1)) && !resolver.is_under_way(node(2)));
        resolver.ask(node(3), "nowhere:1");
        wakes.recv().unwrap();
        assert!(resolver.take().pop().unwrap().1.is_err());
        *RELEASED.0.lock().unwrap() = true;
        RELEASED.1.notify_all();
        wakes.recv().unwrap();
        let (of, found) = resolver.take().pop().unwrap();
        assert_eq!((of, found.unwrap()), (node(1), vec![([10, 0, 0, 1], 7).into()]));
        assert!(wakes.try_recv().is_err(), "three lookups");
    }
}
