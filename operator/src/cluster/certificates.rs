//! The certificates of a StorageCluster: what there has to be, what is renewed now, and the issuing of it.
//!
//! Pure but for the random numbers of keys and identities; Secrets are read and written elsewhere. Invariants: a member
//! keeps its identity for its life, because its disk was formatted for it, so a renewal never mints one; a certificate
//! that still counts is not replaced before two thirds of its life are over; what the authority did not sign, or is
//! over, is replaced at once. Processes read the files again by themselves, so a renewal restarts nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use holdfast_id::NodeId;
use holdfast_transport::pki::{Authority, Identity, PkiError, Roots, Validity};
use holdfast_transport::{PeerIdentity, PeerRole};

use super::authority;

/// Clocks of machines differ; a certificate counts from a little before it was made.
pub const BACKDATED: Duration = Duration::from_secs(300);
pub const DAY: Duration = Duration::from_secs(86_400);

/// Contents of a Secret or ConfigMap, as text.
pub type Files = BTreeMap<String, String>;

/// Names of the files of one process.
pub const CA_FILE: &str = "ca.pem";

/// What stands in the Secrets now; empty where there is none.
#[derive(Clone, Debug, Default)]
pub struct Stored {
    pub authority: Files,
    pub nodes: Files,
    pub csi_controller: Files,
}

/// What should stand there.
pub struct Issued {
    pub nodes: Files,
    pub csi_controller: Files,
    /// The operator's own certificate, never stored.
    pub admin: Identity,
    pub roots: Roots,
    /// Everybody who is trusted, PEM.
    pub ca_pem: String,
    /// Of each member.
    pub node_ids: BTreeMap<String, NodeId>,
    /// What was issued now, in words.
    pub renewed: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error(
        "the Secret of the authority holds no {file}: restore it from a backup, or delete it to have a new one made"
    )]
    NoAuthority { file: &'static str },
    #[error("the authority of the Secret cannot be used: {0}")]
    Authority(#[source] PkiError),
    #[error("cannot issue a certificate: {0}")]
    Issue(#[source] PkiError),
    #[error("no random numbers: {0}")]
    Random(getrandom::Error),
}

/// Makes whole what is missing, over, or about to be.
///
/// `members` are all that have or are to have a pod; `known` are identities remembered elsewhere, for a Secret that was
/// lost while the disks were not; `forgotten` are members that get a new identity, because the former one never comes
/// back and nothing of it is left. `previous_admin` is the certificate the operator uses now.
///
/// # Errors
/// The authority is not whole, or no random numbers.
pub fn issue(
    stored: &Stored,
    members: &[String],
    known: &BTreeMap<String, NodeId>,
    forgotten: &BTreeSet<String>,
    previous_admin: Option<Identity>,
    life_days: u32,
    now: SystemTime,
) -> Result<Issued, CertificateError> {
    let authority = authority::signer(&stored.authority)?;
    let ca_pem = authority::bundle(&stored.authority);
    let roots = Roots::from_pem(&ca_pem).map_err(CertificateError::Authority)?;
    let signer = Roots::from_pem(authority.certificate_pem()).map_err(CertificateError::Authority)?;
    let issuer = Issuer { authority: &authority, signer: &signer, days: life_days, now };
    let mut renewed = Vec::new();

    let mut nodes = Files::from([(CA_FILE.to_owned(), ca_pem.clone())]);
    let mut node_ids = BTreeMap::new();
    for member in members {
        let (certificate, key) = (format!("{member}.pem"), format!("{member}.key"));
        let stored = read(&stored.nodes, &certificate, &key).filter(|_| !forgotten.contains(member));
        let id = match (stored.as_ref().and_then(node_id), known.get(member)) {
            (Some(id), _) => id,
            (None, Some(id)) => *id,
            (None, None) => mint()?,
        };
        let identity = issuer.keep_or_issue(stored, PeerRole::Node, id, member, &mut renewed)?;
        nodes.insert(certificate, identity.certificate_pem().to_owned());
        nodes.insert(key, identity.key_pem().to_owned());
        node_ids.insert(member.clone(), id);
    }

    let controller = read(&stored.csi_controller, "tls.pem", "tls.key");
    let controller = issuer.keep_or_issue(controller, PeerRole::Admin, mint()?, "the CSI controller", &mut renewed)?;
    let csi_controller = Files::from([
        (CA_FILE.to_owned(), ca_pem.clone()),
        ("tls.pem".to_owned(), controller.certificate_pem().to_owned()),
        ("tls.key".to_owned(), controller.key_pem().to_owned()),
    ]);
    let admin = issuer.keep_or_issue(previous_admin, PeerRole::Admin, mint()?, "the operator", &mut renewed)?;
    Ok(Issued { nodes, csi_controller, admin, roots, ca_pem, node_ids, renewed })
}

struct Issuer<'a> {
    authority: &'a Authority,
    /// What another one signed is replaced.
    signer: &'a Roots,
    days: u32,
    now: SystemTime,
}

impl Issuer<'_> {
    /// `fresh` is the identity of a certificate that replaces one that cannot be read, or none.
    fn keep_or_issue(
        &self,
        stored: Option<Identity>,
        role: PeerRole,
        fresh: NodeId,
        whose: &str,
        renewed: &mut Vec<String>,
    ) -> Result<Identity, CertificateError> {
        let mut id = fresh.as_u128();
        if let Some(stored) = stored {
            if stored.check(role, self.signer, self.now).is_ok() && !is_due(stored.validity(), self.now) {
                return Ok(stored);
            }
            if stored.peer().role == role {
                id = stored.peer().id;
            }
        }
        renewed.push(whose.to_owned());
        let peer = PeerIdentity { role, id };
        self.authority.issue(peer, validity(self.now, self.days)).map_err(CertificateError::Issue)
    }
}

/// Of a certificate made now.
pub fn validity(now: SystemTime, days: u32) -> Validity {
    Validity { not_before: now - BACKDATED, not_after: now + DAY * days }
}

/// Two thirds of its life are over.
fn is_due(validity: Validity, now: SystemTime) -> bool {
    let life = validity.not_after.duration_since(validity.not_before).unwrap_or_default();
    now >= validity.not_before + life * 2 / 3
}

/// The identity that a member has by its Secret.
pub fn stored_id(nodes: &Files, member: &str) -> Option<NodeId> {
    node_id(&read(nodes, &format!("{member}.pem"), &format!("{member}.key"))?)
}

fn node_id(identity: &Identity) -> Option<NodeId> {
    let peer = identity.peer();
    (peer.role == PeerRole::Node).then(|| NodeId::from_bytes(peer.id.to_be_bytes())).flatten()
}

fn read(files: &Files, certificate: &str, key: &str) -> Option<Identity> {
    Identity::from_pem(files.get(certificate)?, files.get(key)?).ok()
}

/// An identifier that was never used.
pub fn mint() -> Result<NodeId, CertificateError> {
    loop {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(CertificateError::Random)?;
        if let Some(id) = NodeId::from_bytes(bytes) {
            return Ok(id);
        }
    }
}

/// As a certificate has it.
pub fn random_id() -> Result<u128, CertificateError> {
    mint().map(NodeId::as_u128)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Duration = Duration::from_secs(1_800_000_000);

    fn at(days: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + START + Duration::from_secs(days * 86_400)
    }

    fn members(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("main-main-{i}")).collect()
    }

    fn first() -> (Stored, Issued) {
        let mut stored = Stored { authority: authority::found("holdfast", at(0)).unwrap(), ..Stored::default() };
        let issued = issue(&stored, &members(3), &BTreeMap::new(), &BTreeSet::new(), None, 90, at(0)).unwrap();
        stored.nodes = issued.nodes.clone();
        stored.csi_controller = issued.csi_controller.clone();
        (stored, issued)
    }

    fn again(stored: &Stored, count: usize, admin: &Identity, day: u64) -> Issued {
        issue(stored, &members(count), &BTreeMap::new(), &BTreeSet::new(), Some(admin.clone()), 90, at(day)).unwrap()
    }

    #[test]
    fn what_counts_is_kept_until_two_thirds_of_its_life_are_over() {
        let (stored, issued) = first();
        assert_eq!(issued.renewed.len(), 5);
        let kept = again(&stored, 3, &issued.admin, 59);
        assert_eq!(kept.renewed, Vec::<String>::new());
        assert_eq!((&kept.nodes, &kept.csi_controller), (&stored.nodes, &stored.csi_controller));
        let renewed = again(&stored, 3, &issued.admin, 61);
        assert_eq!(renewed.renewed.len(), 5);
        assert_eq!(renewed.node_ids, issued.node_ids, "an identity is for life");
        let member = Identity::from_pem(&renewed.nodes["main-main-1.pem"], &renewed.nodes["main-main-1.key"]).unwrap();
        member.check(PeerRole::Node, &renewed.roots, at(140)).unwrap();
    }

    #[test]
    fn a_new_member_gets_one_and_one_that_left_loses_it() {
        let (stored, issued) = first();
        let grown = again(&stored, 4, &issued.admin, 1);
        assert_eq!(grown.renewed, ["main-main-3"]);
        let shrunk = again(&stored, 2, &issued.admin, 1);
        assert_eq!(shrunk.nodes.len(), 5, "the bundle and two pairs");
    }

    #[test]
    fn a_name_whose_former_bearer_never_comes_back_gets_another_identity() {
        let (stored, issued) = first();
        let forgotten = BTreeSet::from(["main-main-2".to_owned()]);
        let admin = Some(issued.admin.clone());
        let again = issue(&stored, &members(3), &BTreeMap::new(), &forgotten, admin, 90, at(1)).unwrap();
        assert_eq!(again.renewed, ["main-main-2"]);
        assert_ne!(again.node_ids["main-main-2"], issued.node_ids["main-main-2"]);
        assert_eq!(again.node_ids["main-main-1"], issued.node_ids["main-main-1"]);
    }

    #[test]
    fn another_authority_renews_everything_under_the_same_identities() {
        let (mut stored, issued) = first();
        stored.authority = authority::found("holdfast", at(1)).unwrap();
        let renewed = again(&stored, 3, &issued.admin, 1);
        assert_eq!(renewed.renewed.len(), 5);
        assert_eq!(renewed.node_ids, issued.node_ids);
        assert_ne!(renewed.ca_pem, issued.ca_pem);
    }

    #[test]
    fn a_lost_secret_gets_the_identities_that_are_remembered() {
        let (mut stored, issued) = first();
        stored.nodes.clear();
        let renewed = issue(&stored, &members(3), &issued.node_ids, &BTreeSet::new(), None, 90, at(1)).unwrap();
        assert_eq!(renewed.node_ids, issued.node_ids);
    }

    #[test]
    fn an_authority_that_is_not_whole_is_an_error_and_not_replaced() {
        let (mut stored, _) = first();
        stored.authority.remove("ca.key");
        assert!(matches!(
            issue(&stored, &members(1), &BTreeMap::new(), &BTreeSet::new(), None, 90, at(0)),
            Err(CertificateError::NoAuthority { file: "ca.key" })
        ));
    }
}
