//! The operator against a real API server: etcd and kube-apiserver as plain processes on loopback, the chart's
//! definitions and rights applied, storage nodes as plain processes where a test needs them.
//!
//! There is no kubelet and no controller of Kubernetes: a test starts what a pod would run, from the arguments and
//! Secrets that the operator wrote ([`nodes`]). The operator acts with the rights of the chart's ServiceAccount and no
//! others. Programs are looked for in PATH; `cargo xtask test` puts them there, or leaves these tests out and says so.
//! They need root: names of pods are made to resolve by a mount of their own.

#![expect(clippy::unwrap_used, reason = "a harness of tests: a panic is how they fail")]

mod nodes;
mod objects;
mod servers;
mod wait;

mod needs_apiserver;
