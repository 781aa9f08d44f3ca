//! Where the blocks of groups live: slots, maps, checkpoints and the allocator of one disk.
