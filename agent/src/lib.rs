//! The attach agent: a client of volumes that serves them as devices.
