//! Leader election: of several operators one acts, by a Lease of the API server.
//!
//! Whether another one still holds the lease is judged by our own clock from when we saw it change last, so that clocks
//! that differ do no harm. A holder that cannot renew in time ends its process: whatever it was about to write is then
//! refused or repeated by the next one, since every step is idempotent. Decisions are [`Election::on_seen`]; the rest is
//! I/O.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use tokio::time::Instant;

use crate::apply::{is_conflict, is_not_found};

const LEASE: &str = "holdfast-operator";
/// Of silence, after which others take it.
///
/// Long, because nothing hurries: volumes serve without an operator, one that ends in order releases the lease, and an
/// API server under load may well be silent for half a minute.
const DURATION: Duration = Duration::from_secs(60);
/// A holder that could not renew for so long ends.
const RENEW_WITHIN: Duration = Duration::from_secs(40);
const TRY_EVERY: Duration = Duration::from_secs(3);

// Before another one may begin, we have ended.
const _: () = assert!(RENEW_WITHIN.as_secs() + TRY_EVERY.as_secs() < DURATION.as_secs());

/// What one of several operators knows of the lease.
#[derive(Debug, Default)]
struct Election {
    /// Holder and renewal as they were seen last, and when that was new.
    seen: Option<(String, Option<MicroTime>, Instant)>,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Take,
    Wait,
}

impl Election {
    /// The lease as it stands.
    fn on_seen(&mut self, us: &str, spec: &LeaseSpec, now: Instant) -> Verdict {
        let holder = spec.holder_identity.clone().unwrap_or_default();
        if holder.is_empty() || holder == us {
            return Verdict::Take;
        }
        match &self.seen {
            Some((known, renewed, since)) if *known == holder && *renewed == spec.renew_time => {
                if now.duration_since(*since) >= DURATION { Verdict::Take } else { Verdict::Wait }
            }
            _ => {
                self.seen = Some((holder, spec.renew_time.clone(), now));
                Verdict::Wait
            }
        }
    }
}

/// Waits until the lease is ours.
pub async fn acquire(client: kube::Client, namespace: &str, us: &str) {
    let leases: Api<Lease> = Api::namespaced(client, namespace);
    let mut election = Election::default();
    loop {
        match attempt(&leases, &mut election, us).await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "the lease cannot be read"),
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
}

/// Renews it; ends when it is lost.
pub async fn keep(client: kube::Client, namespace: &str, us: &str) {
    let leases: Api<Lease> = Api::namespaced(client, namespace);
    let mut election = Election::default();
    let mut renewed = Instant::now();
    while renewed.elapsed() < RENEW_WITHIN {
        tokio::time::sleep(TRY_EVERY).await;
        let left = RENEW_WITHIN.saturating_sub(renewed.elapsed());
        match tokio::time::timeout(left, attempt(&leases, &mut election, us)).await {
            Ok(Ok(true)) => renewed = Instant::now(),
            // Written by another at the same time: by us, as a rule, in an answer that came too late.
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the lease cannot be renewed"),
            Err(_) => return,
        }
    }
}

/// Lets the next one begin at once.
pub async fn release(client: kube::Client, namespace: &str, us: &str) {
    let leases: Api<Lease> = Api::namespaced(client, namespace);
    let released = async {
        let mut lease = leases.get(LEASE).await?;
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() == Some(us) {
            spec.holder_identity = None;
            leases.replace(LEASE, &PostParams::default(), &lease).await?;
        }
        Ok::<(), kube::Error>(())
    };
    if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(3), released).await {
        tracing::info!(%error, "the lease was not released; it ends by itself");
    }
}

/// Whether it is ours now. What two write at once, one of them has to write again.
async fn attempt(leases: &Api<Lease>, election: &mut Election, us: &str) -> Result<bool, kube::Error> {
    let result = match leases.get(LEASE).await {
        Ok(mut lease) => {
            let spec = lease.spec.get_or_insert_default();
            if election.on_seen(us, spec, Instant::now()) == Verdict::Wait {
                return Ok(false);
            }
            claim(spec, us, MicroTime(Timestamp::now()));
            leases.replace(LEASE, &PostParams::default(), &lease).await
        }
        Err(error) if is_not_found(&error) => {
            let mut spec = LeaseSpec::default();
            claim(&mut spec, us, MicroTime(Timestamp::now()));
            let mut lease = Lease { spec: Some(spec), ..Lease::default() };
            lease.metadata.name = Some(LEASE.to_owned());
            leases.create(&PostParams::default(), &lease).await
        }
        Err(error) => return Err(error),
    };
    match result {
        Ok(_) => Ok(true),
        Err(error) if is_conflict(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn claim(spec: &mut LeaseSpec, us: &str, now: MicroTime) {
    if spec.holder_identity.as_deref() != Some(us) {
        spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
        spec.acquire_time = Some(now.clone());
    }
    spec.holder_identity = Some(us.to_owned());
    spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
    spec.renew_time = Some(now);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(by: &str, second: i64) -> LeaseSpec {
        let mut spec = LeaseSpec::default();
        claim(&mut spec, by, MicroTime(Timestamp::from_second(second).unwrap()));
        spec
    }

    #[test]
    fn a_lease_is_taken_when_its_holder_was_silent_for_its_duration_by_our_clock() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut election = Election::default();
        assert_eq!(election.on_seen("us", &held("them", 100), at(0)), Verdict::Wait);
        assert_eq!(election.on_seen("us", &held("them", 100), at(59)), Verdict::Wait);
        assert_eq!(election.on_seen("us", &held("them", 102), at(59)), Verdict::Wait, "renewed");
        assert_eq!(election.on_seen("us", &held("them", 102), at(118)), Verdict::Wait);
        assert_eq!(election.on_seen("us", &held("them", 102), at(119)), Verdict::Take);
    }

    #[test]
    fn a_free_lease_and_our_own_are_taken_at_once() {
        let mut election = Election::default();
        assert_eq!(election.on_seen("us", &LeaseSpec::default(), Instant::now()), Verdict::Take);
        assert_eq!(election.on_seen("us", &held("us", 1), Instant::now()), Verdict::Take);
    }
}
