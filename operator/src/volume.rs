//! Volumes: each object to calls on the metadata plane, and back to its status.
//!
//! A volume's name there is the object's name. Looks come with every change of the object or of its attachment in
//! Kubernetes; besides, settled volumes are looked at in turn, so that all of them together cost a few calls a second.
//! Decisions are pure ([`decide`], [`project`]); [`reconcile`] does the I/O; [`adopt`] makes objects of volumes that have
//! none.
//!
//! What holds:
//! 1. Data is deleted only while the object is being deleted, nobody has the volume attached, and by its identifier
//!    where that is known.
//! 2. A volume that was there and is gone is never made again in silence: an empty volume in the place of data is loss
//!    that nobody sees.
//! 3. A volume without an object gets one; it is never deleted for the lack of one.

pub mod adopt;
pub mod decide;
pub mod project;
pub mod reconcile;
