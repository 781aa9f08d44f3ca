//! WAL, chunks, map, checkpoint and recovery of one disk.
