//! The storage node: composition of shard, transport, disk and API.
