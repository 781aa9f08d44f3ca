use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};

use holdfast_api::v1::EnrollResponse;
use holdfast_api::v1::enrollment_server::{Enrollment, EnrollmentServer};
use holdfast_transport::pki::{Authority, sign_request};
use holdfast_transport::{PeerIdentity, TlsConfigs};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn around_now() -> Validity {
    let now = SystemTime::now();
    Validity { not_before: now - HOUR, not_after: now + HOUR }
}

fn authority() -> Authority {
    Authority::create("test", around_now()).unwrap()
}

/// Signs for `holder` whoever brings the token `good`.
struct Signer {
    authority: Authority,
    /// What it says is to be trusted.
    told: String,
    holder: &'static str,
    calls: Arc<Mutex<Vec<String>>>,
}

#[tonic::async_trait]
impl Enrollment for Signer {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        let request = request.into_inner();
        self.calls.lock().unwrap().push(request.csr_pem.clone());
        if request.token != "good" {
            return Err(Status::unauthenticated("a bad token"));
        }
        let role = PeerRole::NodeAgent;
        let certificate = sign_request(&self.authority, &request.csr_pem, role, 1, self.holder, around_now());
        let certificate_pem = certificate.map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(EnrollResponse { certificate_pem, ca_pem: self.told.clone() }))
    }
}

struct World {
    enrolment: Enrolment,
    calls: Arc<Mutex<Vec<String>>>,
    dir: TempDir,
}

/// Somebody of that role enrols machines as `holder`.
async fn world(role: PeerRole, holder: &'static str) -> World {
    world_of(authority(), None, role, holder).await
}

async fn world_of(authority: Authority, told: Option<String>, role: PeerRole, holder: &'static str) -> World {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let roots = authority.certificate_pem().to_owned();
    let identity = authority.issue_server(PeerIdentity { role, id: 9 }, around_now()).unwrap();
    let tls = TlsConfigs::new(&identity, &Roots::from_pem(&roots).unwrap()).unwrap();
    let calls = Arc::default();
    let signer = Signer { authority, told: told.unwrap_or_else(|| roots.clone()), holder, calls: Arc::clone(&calls) };
    tokio::spawn(async move {
        let (_keep, tls) = watch::channel(tls);
        let incoming = channel::incoming_strangers(listener, tls);
        Server::builder().add_service(EnrollmentServer::new(signer)).serve_with_incoming(incoming).await
    });
    let path = |name: &str| dir.path().join(name);
    fs::write(path("token"), "good\n").unwrap();
    fs::write(path("operator-ca.pem"), &roots).unwrap();
    let enrolment = Enrolment {
        address,
        token: path("token"),
        ca: path("operator-ca.pem"),
        pki: dir.path().to_owned(),
        holder: "machine-1".into(),
    };
    World { enrolment, calls, dir }
}

fn text(world: &World, name: &str) -> String {
    fs::read_to_string(world.dir.path().join(name)).unwrap_or_default()
}

#[tokio::test]
async fn a_machine_gets_a_certificate_for_the_key_that_it_keeps() {
    let world = world(PeerRole::Admin, "machine-1").await;
    assert!(world.enrolment.current(SystemTime::now()).is_err());
    world.enrolment.enrol().await.unwrap();
    world.enrolment.current(SystemTime::now()).unwrap();
    let key = text(&world, "agent-machine-1.key");
    let mode = fs::metadata(world.dir.path().join("agent-machine-1.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    world.enrolment.enrol().await.unwrap();
    assert_eq!(text(&world, "agent-machine-1.key"), key);
    assert!(world.calls.lock().unwrap().iter().all(|request| !request.contains("PRIVATE")));
}

#[tokio::test]
async fn what_counts_is_used_while_nobody_enrols() {
    let world = world(PeerRole::Admin, "machine-1").await;
    world.enrolment.enrol().await.unwrap();
    let away = Enrolment { address: "127.0.0.1:1".into(), ..world.enrolment.clone() };
    assert!(away.enrol().await.is_err());
    away.current(SystemTime::now()).unwrap();
    assert!(away.current(SystemTime::now() + 2 * HOUR).is_err(), "it is over by then");
    // A start does not wait for anybody.
    let begun = tokio::task::spawn_blocking(move || begin(away)).await.unwrap();
    assert_eq!(begun.unwrap(), Some(()));
}

#[tokio::test]
async fn what_a_former_cluster_of_that_name_left_does_not_count() {
    let former = world(PeerRole::Admin, "machine-1").await;
    former.enrolment.enrol().await.unwrap();
    let anew = world(PeerRole::Admin, "machine-1").await;
    let enrolment = Enrolment { pki: former.enrolment.pki.clone(), ..anew.enrolment.clone() };
    assert!(enrolment.current(SystemTime::now()).is_err());
    enrolment.enrol().await.unwrap();
    enrolment.current(SystemTime::now()).unwrap();
}

#[tokio::test]
async fn a_bad_answer_replaces_nothing() {
    let good = world(PeerRole::Admin, "machine-1").await;
    good.enrolment.enrol().await.unwrap();
    let before = text(&good, "agent-machine-1.pem");
    let elsewhere = Authority::create("other", around_now()).unwrap();
    let untrusted = world_of(authority(), Some(elsewhere.certificate_pem().to_owned()), PeerRole::Admin, "machine-1");
    for (bad, why) in [
        (world(PeerRole::Admin, "machine-2").await, "another machine's certificate"),
        (world(PeerRole::Node, "machine-1").await, "a storage node enrols nobody"),
        (untrusted.await, "the certificate is not of the authority that is told"),
    ] {
        let enrolment = Enrolment { pki: good.enrolment.pki.clone(), ..bad.enrolment.clone() };
        assert!(enrolment.enrol().await.is_err(), "{why}");
        assert_eq!(text(&good, "agent-machine-1.pem"), before, "{why}");
    }
    let stranger = Enrolment { ca: good.dir.path().join("strangers.pem"), ..good.enrolment.clone() };
    fs::write(&stranger.ca, elsewhere.certificate_pem()).unwrap();
    let asked = good.calls.lock().unwrap().len();
    assert!(stranger.enrol().await.is_err(), "not the authority that was to be believed");
    assert_eq!(good.calls.lock().unwrap().len(), asked, "the token was shown to nobody");
}

#[tokio::test]
async fn a_refused_token_is_read_again() {
    let world = world(PeerRole::Admin, "machine-1").await;
    fs::write(&world.enrolment.token, "old").unwrap();
    let error = world.enrolment.enrol().await.unwrap_err();
    assert!(error.to_string().contains("a bad token"), "{error:#}");
    fs::write(&world.enrolment.token, "good").unwrap();
    world.enrolment.enrol().await.unwrap();
}

#[test]
fn a_third_of_the_life_is_left_to_renew_in() {
    let at = |hours: u32| SystemTime::UNIX_EPOCH + HOUR * hours;
    assert_eq!(renewal(Validity { not_before: at(10), not_after: at(40) }), at(30));
    let backwards = Validity { not_before: at(40), not_after: at(10) };
    assert_eq!(renewal(backwards), at(40));
}
