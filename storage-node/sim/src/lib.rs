//! A whole cluster in one thread: network, disks, clocks, workloads, faults, checkers.
