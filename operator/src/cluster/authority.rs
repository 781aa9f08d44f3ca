//! The authority of a StorageCluster, and how another one takes its place without a restart of anything.
//!
//! Pure but for the random numbers of keys. The Secret holds all of it:
//!
//! | Phase | `ca.*` signs | also trusted | ends |
//! |---|---|---|---|
//! | steady | the authority | | at half of its life |
//! | announced | the authority | `next.*`, which signs nothing yet | one life of a certificate after it was minted |
//! | followed | the new one | `previous.pem` | one more life of a certificate later |
//!
//! Every process gets a certificate, and with it the bundle, within the life of one, so each phase lasts so long: when an
//! authority begins to sign, everybody trusts it, and when one is trusted no more, nobody shows what it signed.
//! Invariant: what is shown in a phase is trusted by whoever has the bundle of the phase before or after.

use std::time::{Duration, SystemTime};

use holdfast_transport::pki::{Authority, Validity};

use super::certificates::{BACKDATED, CA_FILE, CertificateError, DAY, Files};

/// An authority outlives what it signs many times over: half of it has room for two lives of the longest certificate.
const LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
const LONGEST_CERTIFICATE_DAYS: u32 = 825;
const KEY_FILE: &str = "ca.key";
const NEXT_FILE: &str = "next.pem";
const NEXT_KEY_FILE: &str = "next.key";
const PREVIOUS_FILE: &str = "previous.pem";
/// How long each phase lasts: the longest life that a certificate was given since the change began.
const PHASE_FILE: &str = "phase-days";

const _: () = assert!(LIFE.as_secs() / 2 > 2 * LONGEST_CERTIFICATE_DAYS as u64 * 86_400);

/// A new authority, as the Secret holds it.
///
/// # Errors
/// No random numbers.
pub fn found(name: &str, now: SystemTime) -> Result<Files, CertificateError> {
    let authority = mint(name, now)?;
    Ok(Files::from([
        (CA_FILE.to_owned(), authority.certificate_pem().to_owned()),
        (KEY_FILE.to_owned(), authority.key_pem().to_owned()),
    ]))
}

fn mint(name: &str, now: SystemTime) -> Result<Authority, CertificateError> {
    let validity = Validity { not_before: now - BACKDATED, not_after: now + LIFE };
    Authority::create(name, validity).map_err(CertificateError::Issue)
}

/// Who signs now.
///
/// # Errors
/// It is not whole.
pub fn signer(files: &Files) -> Result<Authority, CertificateError> {
    pair(files, CA_FILE, KEY_FILE)
}

fn pair(files: &Files, certificate: &'static str, key: &'static str) -> Result<Authority, CertificateError> {
    let file = |name: &'static str| files.get(name).ok_or(CertificateError::NoAuthority { file: name });
    Authority::from_pem(file(certificate)?, file(key)?).map_err(CertificateError::Authority)
}

/// Everybody who is trusted now, PEM; the signer first.
pub fn bundle(files: &Files) -> String {
    [CA_FILE, NEXT_FILE, PREVIOUS_FILE].into_iter().filter_map(|name| files.get(name)).map(String::as_str).collect()
}

/// What the Secret should hold now; to be written before anything is issued from it.
///
/// # Errors
/// It is not whole, or no random numbers.
pub fn advance(files: &Files, name: &str, certificate_days: u32, now: SystemTime) -> Result<Files, CertificateError> {
    let mut files = files.clone();
    let signer = signer(&files)?;
    let changing = files.contains_key(NEXT_FILE) || files.contains_key(PREVIOUS_FILE);
    let recorded = files.get(PHASE_FILE).and_then(|days| days.parse().ok()).unwrap_or(0);
    let days = certificate_days.max(recorded);
    if changing {
        files.insert(PHASE_FILE.to_owned(), days.to_string());
    }
    let phase = DAY * days + BACKDATED;
    if files.contains_key(PREVIOUS_FILE) {
        if now >= signer.validity().not_before + phase * 2 {
            files.remove(PREVIOUS_FILE);
            files.remove(PHASE_FILE);
        }
    } else if files.contains_key(NEXT_FILE) {
        let next = pair(&files, NEXT_FILE, NEXT_KEY_FILE)?;
        if now >= next.validity().not_before + phase {
            let previous = files.insert(CA_FILE.to_owned(), next.certificate_pem().to_owned());
            files.extend(previous.map(|previous| (PREVIOUS_FILE.to_owned(), previous)));
            files.insert(KEY_FILE.to_owned(), next.key_pem().to_owned());
            files.remove(NEXT_FILE);
            files.remove(NEXT_KEY_FILE);
        }
    } else if now >= signer.validity().not_before + LIFE / 2 {
        let next = mint(name, now)?;
        files.insert(NEXT_FILE.to_owned(), next.certificate_pem().to_owned());
        files.insert(NEXT_KEY_FILE.to_owned(), next.key_pem().to_owned());
        files.insert(PHASE_FILE.to_owned(), days.to_string());
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use holdfast_transport::PeerRole;
    use holdfast_transport::pki::{Identity, Roots};

    use super::super::certificates::{Issued, Stored, issue};
    use super::*;

    const HALF: u64 = 5 * 365;

    fn at(days: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000) + Duration::from_secs(days * 86_400)
    }

    /// What the Secrets come to on that day.
    fn look(stored: &mut Stored, days: u32, day: u64) -> Issued {
        stored.authority = advance(&stored.authority, "holdfast", days, at(day)).unwrap();
        let members = ["main-main-0".to_owned()];
        let issued = issue(stored, &members, &BTreeMap::new(), &BTreeSet::new(), None, days, at(day)).unwrap();
        stored.nodes = issued.nodes.clone();
        issued
    }

    fn shown(issued: &Issued) -> Identity {
        Identity::from_pem(&issued.nodes["main-main-0.pem"], &issued.nodes["main-main-0.key"]).unwrap()
    }

    fn trusted(issued: &Issued, identity: &Identity, day: u64) -> bool {
        identity.check(PeerRole::Node, &Roots::from_pem(&issued.nodes[CA_FILE]).unwrap(), at(day)).is_ok()
    }

    #[test]
    fn another_authority_takes_over_and_nobody_is_ever_refused() {
        let mut stored = Stored { authority: found("holdfast", at(0)).unwrap(), ..Stored::default() };
        let mut former = look(&mut stored, 90, HALF - 60);
        let (mut bundles, mut ids) = (Vec::new(), BTreeSet::new());
        for day in (HALF - 59)..(HALF + 260) {
            let now = look(&mut stored, 90, day);
            assert!(trusted(&former, &shown(&now), day), "day {day}: who has yesterday's bundle refuses today's");
            assert!(trusted(&now, &shown(&former), day), "day {day}: who has today's bundle refuses yesterday's");
            bundles.push(now.nodes[CA_FILE].matches("BEGIN CERTIFICATE").count());
            ids.insert(now.node_ids["main-main-0"]);
            former = now;
        }
        bundles.dedup();
        assert_eq!(bundles, [1, 2, 1]);
        assert_eq!(ids.len(), 1, "the identity is for life");
        assert_ne!(stored.authority[CA_FILE], found("holdfast", at(0)).unwrap()[CA_FILE]);
        assert_eq!(stored.authority.len(), 2, "nothing of the change is left");
    }

    #[test]
    fn a_certificate_of_longer_life_is_waited_for_though_the_setting_changed() {
        let mut files = found("holdfast", at(0)).unwrap();
        files = advance(&files, "holdfast", 400, at(HALF)).unwrap();
        files = advance(&files, "holdfast", 10, at(HALF + 200)).unwrap();
        assert!(files.contains_key(NEXT_FILE), "certificates of 400 days are still about");
        files = advance(&files, "holdfast", 10, at(HALF + 401)).unwrap();
        assert!(files.contains_key(PREVIOUS_FILE));
    }

    #[test]
    fn nothing_changes_before_half_of_its_life_is_over() {
        let files = found("holdfast", at(0)).unwrap();
        assert_eq!(advance(&files, "holdfast", 90, at(HALF - 1)).unwrap(), files);
        let begun = advance(&files, "holdfast", 90, at(HALF)).unwrap();
        assert_eq!(signer(&begun).unwrap().certificate_pem(), files[CA_FILE]);
        assert_eq!(advance(&begun, "holdfast", 90, at(HALF + 1)).unwrap(), begun);
    }
}
