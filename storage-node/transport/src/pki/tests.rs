use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

const VALID: (u64, u64) = (1_000_000_000, 2_000_000_000);

fn valid() -> Validity {
    Validity { not_before: at(VALID.0), not_after: at(VALID.1) }
}

fn authority() -> Authority {
    Authority::create("test", valid()).expect("an authority")
}

fn roots(authority: &Authority) -> Roots {
    Roots::from_pem(authority.certificate_pem()).expect("roots")
}

fn peer(role: PeerRole) -> PeerIdentity {
    PeerIdentity { role, id: 0xabc }
}

#[test]
fn what_is_issued_names_its_bearer_and_holds_as_long_as_asked() {
    let authority = authority();
    for role in [PeerRole::Node, PeerRole::Agent, PeerRole::Admin] {
        let identity = authority.issue(peer(role), valid()).expect("issued");
        assert_eq!(identity.peer(), peer(role));
        assert_eq!(identity.validity(), valid());
        identity.check(role, &roots(&authority), at(VALID.0)).expect("valid from its first second");
        identity.check(role, &roots(&authority), at(VALID.1)).expect("valid to its last second");
    }
}

#[test]
fn the_agent_of_a_machine_is_that_machine_and_no_other_role_is_one() {
    let authority = authority();
    let agent = authority.issue_node_agent(5, "machine-1", valid()).expect("issued");
    let expected = PeerIdentity { role: PeerRole::NodeAgent, id: 5 };
    assert_eq!(*agent.bearer(), Bearer { peer: expected, holder: Some("machine-1".into()) });
    agent.check(PeerRole::NodeAgent, &roots(&authority), at(VALID.0)).expect("valid");
    assert_eq!(authority.issue(peer(PeerRole::Agent), valid()).expect("issued").bearer().holder, None);
    for name in [String::new(), "m".repeat(254)] {
        assert!(matches!(authority.issue_node_agent(5, &name, valid()), Err(PkiError::NoHolder)), "{name}");
    }
}

#[test]
fn of_a_signing_request_only_the_key_counts() {
    let authority = authority();
    let key = generate_key().expect("a key");
    let request = request(&key).expect("a request");
    let sign = |request: &str| sign_request(&authority, request, PeerRole::NodeAgent, 7, "machine-1", valid());
    let certificate = sign(&request).expect("signed");
    let identity = Identity::from_pem(&certificate, &key).expect("of this key");
    assert_eq!(identity.bearer().holder.as_deref(), Some("machine-1"));
    assert_eq!((identity.peer().role, identity.peer().id), (PeerRole::NodeAgent, 7));
    identity.check(PeerRole::NodeAgent, &roots(&authority), at(VALID.0)).expect("valid");

    // Whatever else it asks for is the signer's to give.
    let pair = KeyPair::from_pem(&key).expect("a key");
    let mut greedy = params("admin", valid());
    greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let admin = peer(PeerRole::Admin).uri().try_into().expect("ascii");
    greedy.subject_alt_names = vec![SanType::URI(admin)];
    let greedy = greedy.serialize_request(&pair).expect("a request").pem().expect("text");
    let certificate = sign(&greedy).expect("signed");
    let identity = Identity::from_pem(&certificate, &key).expect("of this key");
    assert_eq!(identity.peer().role, PeerRole::NodeAgent);
    let parsed = parse(&identity.chain()[0]).expect("a certificate");
    assert!(!parsed.is_ca());
}

#[test]
fn signing_requests_that_are_none_are_refused() {
    let authority = authority();
    let sign = |request: &str| sign_request(&authority, request, PeerRole::NodeAgent, 7, "machine-1", valid());
    let good = request(&generate_key().expect("a key")).expect("a request");
    let other = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).expect("a key");
    let other = CertificateParams::default().serialize_request(&other).expect("a request").pem().expect("text");
    // One digit of the signature, which stands last.
    let at = good.rfind("-----END").expect("PEM") - 12;
    let mut forged = good.clone();
    let digit = if &good[at..=at] == "A" { "B" } else { "A" };
    forged.replace_range(at..=at, digit);
    for bad in ["", "request", &good[..good.len() / 2], &other, &forged, &" ".repeat(20_000)] {
        assert!(matches!(sign(bad), Err(PkiError::Request { .. })), "{bad}");
    }
}

#[test]
fn what_peers_would_refuse_is_found_at_home_first() {
    let authority = authority();
    let identity = authority.issue(peer(PeerRole::Agent), valid()).expect("issued");
    let check = |role, roots: &Roots, seconds| identity.check(role, roots, at(seconds));
    let refused = |result: Result<(), PkiError>| match result {
        Err(PkiError::Refused(refusal)) => refusal,
        other => panic!("a refusal was expected: {other:?}"),
    };
    let ours = roots(&authority);
    assert_eq!(refused(check(PeerRole::Agent, &ours, VALID.1 + 1)), CertificateRefusal::Expired);
    assert_eq!(refused(check(PeerRole::Agent, &ours, VALID.0 - 1)), CertificateRefusal::NotYetValid);
    let others = Authority::create("other", valid()).expect("an authority");
    assert_eq!(refused(check(PeerRole::Agent, &roots(&others), VALID.0)), CertificateRefusal::UnknownAuthority);
    assert!(matches!(
        check(PeerRole::Node, &ours, VALID.0),
        Err(PkiError::WrongRole { expected: PeerRole::Node, found: PeerRole::Agent })
    ));
}

#[test]
fn files_come_back_and_keys_are_private() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let authority = authority();
    authority.save(&path("ca.pem"), &path("ca.key")).expect("saved");
    let loaded = Authority::load(&path("ca.pem"), &path("ca.key")).expect("loaded");
    let identity = loaded.issue(peer(PeerRole::Node), valid()).expect("issued");
    // A key that everybody could read before is private after it was replaced.
    fs::write(path("node.key"), "old").expect("written");
    fs::set_permissions(path("node.key"), fs::Permissions::from_mode(0o644)).expect("set");
    identity.save(&path("node.pem"), &path("node.key")).expect("saved");
    for key in ["ca.key", "node.key"] {
        let mode = fs::metadata(path(key)).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    let again = Identity::load(&path("node.pem"), &path("node.key")).expect("loaded");
    assert_eq!(again.peer(), peer(PeerRole::Node));
    let trusted = Roots::load(&path("ca.pem")).expect("loaded");
    again.check(PeerRole::Node, &trusted, at(VALID.0)).expect("the first authority's roots trust it");
    let mut names: Vec<_> = fs::read_dir(folder.path())
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    assert_eq!(names, ["ca.key", "ca.pem", "node.key", "node.pem"]);
}

#[test]
fn files_that_do_not_fit_are_refused_with_a_reason() {
    let authority = authority();
    let one = authority.issue(peer(PeerRole::Node), valid()).expect("issued");
    let other = authority.issue(peer(PeerRole::Node), valid()).expect("issued");
    let from = |certificate: &str, key: &str| Identity::from_pem(certificate, key).expect_err("must be refused");
    assert!(matches!(from(&one.certificate_pem, &other.key_pem), PkiError::KeyMismatch));
    assert!(matches!(from("", &one.key_pem), PkiError::Pem { .. }));
    assert!(matches!(from(&one.certificate_pem, "no key"), PkiError::Pem { .. }));
    assert!(matches!(from(authority.certificate_pem(), &authority.key_pem), PkiError::NoIdentity));
    let garbled = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(matches!(from(garbled, &one.key_pem), PkiError::Malformed { .. }));
    assert!(matches!(Roots::from_pem("nothing"), Err(PkiError::NoRoots)));
    let swapped = Authority::from_pem(authority.certificate_pem(), &one.key_pem);
    assert!(matches!(swapped.err(), Some(PkiError::KeyMismatch)));
    assert!(matches!(Roots::load(Path::new("/nonexistent/ca.pem")), Err(PkiError::File { .. })));
}

#[test]
fn a_certificate_names_one_identity_only() {
    let key = new_key().expect("a key");
    let with = |uris: &[&str]| {
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().expect("ASCII"))).collect();
        identity_of(params.self_signed(&key).expect("signed").der())
    };
    let good = "holdfast://node/00000000-0000-0000-0000-000000000abc";
    assert_eq!(with(&["https://example.com/", good]).expect("one identity"), peer(PeerRole::Node));
    assert!(matches!(with(&[good, good]), Err(PkiError::SeveralIdentities)));
    assert!(matches!(with(&["https://example.com/"]), Err(PkiError::NoIdentity)));
    assert!(matches!(with(&["holdfast://node/1"]), Err(PkiError::Identity(_))));
}
