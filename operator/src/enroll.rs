//! Certificates for agents: each machine's agent proves with its pod's token which machine it is on.
//!
//! Served by every operator, leading or not, for the StorageCluster that the CSI driver belongs to. The API server judges
//! the token ([`TokenReview`], audience [`TOKEN_AUDIENCE`]); of its answer the service account must be that of the
//! cluster's agents, and the machine is the one that the pod is bound to. What the caller says of itself counts nothing
//! ([`judge`]); of its request only the public key is used. Tokens and keys are never logged.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use holdfast_api::channel;
use holdfast_api::v1::enrollment_server::{Enrollment, EnrollmentServer};
use holdfast_api::v1::{EnrollRequest, EnrollResponse};
use holdfast_crds::{ClusterRef, StorageCluster};
use holdfast_transport::pki::{self, Authority, Roots};
use holdfast_transport::{PeerIdentity, PeerRole, TlsConfigs};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::ResourceExt as _;
use kube::api::{Api, ListParams, PostParams};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::cluster::authority;
use crate::cluster::build::TOKEN_AUDIENCE;
use crate::cluster::certificates::{self, validity};
use crate::cluster::files;
use crate::cluster::layout::Layout;
use crate::context::Context;
use crate::metrics::Metrics;

/// Where Kubernetes says which machine a pod's token is bound to.
const NODE_CLAIM: &str = "authentication.kubernetes.io/node-name";
/// Looks for another authority, cluster or lifetime.
const REFRESH_EVERY: Duration = Duration::from_secs(15);
/// Looks for the first one.
const FIND_EVERY: Duration = Duration::from_secs(3);
/// One judgement of the API server.
const REVIEW_WITHIN: Duration = Duration::from_secs(10);
/// Longest token that is passed on.
const TOKEN_BYTES_MAX: usize = 64 << 10;
/// The certificate that is shown to agents is made anew with each change, and at the latest after half of this.
const SERVER_LIFE_DAYS: u32 = 2;

/// Who signs now.
#[derive(Clone)]
struct Signer {
    cluster: ClusterRef,
    authority: Arc<Authority>,
    /// Everybody who is trusted.
    ca_pem: String,
    days: u32,
}

struct Service {
    context: Arc<Context>,
    signer: Arc<Mutex<Option<Signer>>>,
}

/// Serves until the process ends; begins once there is an authority to sign with.
pub async fn serve(context: Arc<Context>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(context.settings.enroll).await?;
    let signer = Arc::new(Mutex::new(None));
    let (tell, mut told) = watch::channel(None);
    let (of, by) = (Arc::clone(&context), Arc::clone(&signer));
    tokio::spawn(async move { refresh(&of, &by, &tell).await });
    let first = told.wait_for(Option::is_some).await?.clone();
    let Some(first) = first else { unreachable!("waited for one") };
    let (configs, receiver) = watch::channel(first);
    tokio::spawn(async move {
        while told.changed().await.is_ok() {
            if let Some(next) = told.borrow_and_update().clone() {
                configs.send_replace(next);
            }
        }
    });
    let service = EnrollmentServer::new(Service { context, signer });
    tonic::transport::Server::builder()
        .timeout(REVIEW_WITHIN * 2)
        .add_service(service)
        .serve_with_incoming(channel::incoming_strangers(listener, receiver))
        .await?;
    Ok(())
}

/// Keeps signer and certificate those of the cluster that agents belong to.
async fn refresh(context: &Context, signer: &Mutex<Option<Signer>>, tell: &watch::Sender<Option<TlsConfigs>>) {
    let mut shown: Option<(String, u32, SystemTime)> = None;
    loop {
        match find(context).await {
            Ok(Some((found, ca_pem))) => {
                let now = SystemTime::now();
                let fresh = shown.as_ref().is_some_and(|(pem, days, at)| {
                    *pem == ca_pem
                        && *days == found.days
                        && now.duration_since(*at).is_ok_and(|age| age < Duration::from_secs(86_400))
                });
                if !fresh {
                    match show(&found, &ca_pem, now) {
                        Ok(configs) => {
                            *signer.lock().unwrap_or_else(PoisonError::into_inner) = Some(found.clone());
                            shown = Some((ca_pem, found.days, now));
                            tell.send_replace(Some(configs));
                        }
                        Err(error) => tracing::warn!(%error, "no certificate to show to agents"),
                    }
                }
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the authority of the agents' cluster cannot be read"),
        }
        tokio::time::sleep(if shown.is_some() { REFRESH_EVERY } else { FIND_EVERY }).await;
    }
}

async fn find(context: &Context) -> anyhow::Result<Option<(Signer, String)>> {
    let clusters: Api<StorageCluster> = Api::all(context.client.clone());
    let clusters = clusters.list(&ListParams::default()).await?.items;
    let Some(name) = crate::cluster::reconcile::chosen(context, &clusters) else { return Ok(None) };
    let layout = Layout::new(&name);
    let object = clusters
        .iter()
        .find(|c| c.name_any() == name.name && c.namespace().as_deref() == Some(name.namespace.as_str()));
    let days = object.map_or(1, |cluster| cluster.spec.security.certificate_days);
    let Some(secret) = files::read_secret(context, &layout.namespace, &layout.authority()).await? else {
        return Ok(None);
    };
    let authority = authority::signer(&secret)?;
    let ca_pem = authority::bundle(&secret);
    let days = u32::try_from(days).unwrap_or(1).max(1);
    Ok(Some((Signer { cluster: name, authority: Arc::new(authority), days, ca_pem: ca_pem.clone() }, ca_pem)))
}

fn show(signer: &Signer, ca_pem: &str, now: SystemTime) -> anyhow::Result<TlsConfigs> {
    let peer = PeerIdentity { role: PeerRole::Admin, id: certificates::random_id()? };
    let identity = signer.authority.issue_server(peer, validity(now, SERVER_LIFE_DAYS))?;
    Ok(TlsConfigs::new(&identity, &Roots::from_pem(ca_pem)?)?)
}

/// The machine of an agent, by the API server's judgement of its token.
///
/// # Errors
/// Why it gets no certificate; said to the caller.
fn judge(status: &TokenReviewStatus, cluster: &ClusterRef) -> Result<String, String> {
    if status.authenticated != Some(true) {
        let why = status.error.clone().unwrap_or_default();
        return Err(format!("the token is not accepted: {why}"));
    }
    if !status.audiences.iter().flatten().any(|audience| audience == TOKEN_AUDIENCE) {
        return Err(format!("the token is not for the audience {TOKEN_AUDIENCE}"));
    }
    let user = status.user.clone().unwrap_or_default();
    let expected = format!("system:serviceaccount:{}:{}", cluster.namespace, Layout::new(cluster).part("agent"));
    let found = user.username.unwrap_or_default();
    if found != expected {
        return Err(format!("the token is that of {found}; agents of this cluster are {expected}"));
    }
    let nodes = user.extra.unwrap_or_default().remove(NODE_CLAIM).unwrap_or_default();
    match &nodes[..] {
        [node] if !node.is_empty() => Ok(node.clone()),
        _ => {
            Err("the token is not bound to a pod on a node: Kubernetes 1.33 or later and a projected token are needed"
                .to_owned())
        }
    }
}

#[tonic::async_trait]
impl Enrollment for Service {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        let EnrollRequest { csr_pem, token } = request.into_inner();
        let result = self.issue(&csr_pem, token).await;
        let metrics = &self.context.metrics;
        Metrics::count(if result.is_ok() { &metrics.enrolments } else { &metrics.enrolments_refused });
        if let Err(status) = &result {
            tracing::warn!(reason = status.message(), "an agent gets no certificate");
        }
        result.map(Response::new)
    }
}

impl Service {
    async fn issue(&self, csr_pem: &str, token: String) -> Result<EnrollResponse, Status> {
        if token.is_empty() || token.len() > TOKEN_BYTES_MAX {
            return Err(Status::invalid_argument("there is no token, or it is longer than 64 KiB"));
        }
        let signer = self.signer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(signer) = signer else { return Err(Status::unavailable("there is no authority yet")) };
        let review = TokenReview {
            spec: TokenReviewSpec { token, audiences: Some(vec![TOKEN_AUDIENCE.to_owned()]) },
            ..TokenReview::default()
        };
        let reviews: Api<TokenReview> = Api::all(self.context.client.clone());
        let params = PostParams::default();
        let review = tokio::time::timeout(REVIEW_WITHIN, reviews.create(&params, &review))
            .await
            .map_err(|_| Status::unavailable("the API server does not answer"))?
            .map_err(|error| Status::unavailable(format!("the API server does not judge the token: {error}")))?;
        let node = judge(&review.status.unwrap_or_default(), &signer.cluster).map_err(Status::permission_denied)?;
        let id = certificates::random_id().map_err(|error| Status::internal(error.to_string()))?;
        let life = validity(SystemTime::now(), signer.days);
        let certificate_pem = pki::sign_request(&signer.authority, csr_pem, PeerRole::NodeAgent, id, &node, life)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        tracing::info!(node, "an agent gets a certificate");
        Ok(EnrollResponse { certificate_pem, ca_pem: signer.ca_pem })
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    fn cluster() -> ClusterRef {
        ClusterRef { namespace: "storage".into(), name: "main".into() }
    }

    fn good() -> TokenReviewStatus {
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![TOKEN_AUDIENCE.to_owned()]),
            user: Some(UserInfo {
                username: Some("system:serviceaccount:storage:main-agent".into()),
                extra: Some([(NODE_CLAIM.to_owned(), vec!["worker-1".to_owned()])].into()),
                ..UserInfo::default()
            }),
            ..TokenReviewStatus::default()
        }
    }

    #[test]
    fn the_machine_is_that_of_the_tokens_pod() {
        assert_eq!(judge(&good(), &cluster()).as_deref(), Ok("worker-1"));
    }

    #[test]
    fn anything_else_gets_no_certificate() {
        let changed = |change: &dyn Fn(&mut TokenReviewStatus)| {
            let mut status = good();
            change(&mut status);
            judge(&status, &cluster())
        };
        assert!(changed(&|status| status.authenticated = None).is_err());
        assert!(changed(&|status| status.audiences = Some(vec!["https://kubernetes.default.svc".into()])).is_err());
        assert!(changed(&|status| status.audiences = None).is_err());
        let user = |name: &'static str| {
            move |status: &mut TokenReviewStatus| status.user.as_mut().unwrap().username = Some(name.to_owned())
        };
        for name in ["system:serviceaccount:other:main-agent", "system:serviceaccount:storage:main-nodes", "admin", ""]
        {
            assert!(changed(&user(name)).is_err(), "{name}");
        }
        let nodes = |names: Vec<String>| {
            move |status: &mut TokenReviewStatus| {
                status.user.as_mut().unwrap().extra = Some([(NODE_CLAIM.to_owned(), names.clone())].into());
            }
        };
        for names in [vec![], vec![String::new()], vec!["a".to_owned(), "b".to_owned()]] {
            assert!(changed(&nodes(names)).is_err());
        }
        assert!(changed(&|status| status.user = None).is_err());
    }
}
