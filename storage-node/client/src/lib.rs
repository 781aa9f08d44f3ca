//! The client of a volume: one session to its replicas, resend, fencing; without I/O.
