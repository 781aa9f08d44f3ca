//! How an agent comes by its certificate: it asks who enrols machines, with a token that says who it is, and asks again
//! when two thirds of the certificate's life are over.
//!
//! The key is made here and never leaves the machine. A certificate is put in place only once it has proven to be for
//! this key, this machine and the authorities that came with it; the agent looks at the files by itself. What is there
//! and still counts is used while nobody answers.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use holdfast_api::channel;
use holdfast_api::v1::EnrollRequest;
use holdfast_api::v1::enrollment_client::EnrollmentClient;
use holdfast_transport::PeerRole;
use holdfast_transport::pki::{self, Identity, Roots, Validity};
use tokio::signal::unix::{SignalKind, signal};

/// The connection and the call together, each.
const CALL_WITHIN: Duration = Duration::from_secs(10);
/// After a failure; doubled each time, up to the maximum.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// A token of a service account has about a thousand bytes.
const TOKEN_BYTES_MAX: u64 = 64 << 10;
/// The clock may be set, or the authority replaced, before a renewal is due.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(60);

/// Where to enrol, and as whom.
#[derive(Clone, Debug)]
pub struct Enrolment {
    /// `host:port`; a name is resolved at each attempt.
    pub address: String,
    /// Read at each attempt: it is replaced while the agent runs.
    pub token: PathBuf,
    /// Whom to believe the first time, and again should the authority change.
    pub ca: PathBuf,
    /// Where certificate, key and authorities are kept.
    pub pki: PathBuf,
    pub holder: String,
}

/// Waits for the first certificate where none counts, then renews in the background for the life of the process. `None`:
/// a signal to end came first.
///
/// # Errors
/// What no patience mends: the folder cannot be written.
pub fn begin(enrolment: Enrolment) -> Result<Option<()>> {
    fs::create_dir_all(&enrolment.pki).with_context(|| format!("create {}", enrolment.pki.display()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    if enrolment.current(SystemTime::now()).is_err() {
        tracing::info!(address = enrolment.address, "no certificate that counts: enrolling");
        let enrolled = runtime.block_on(async {
            let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            tokio::select! {
                () = enrolment.until_enrolled() => anyhow::Ok(true),
                _ = terminate.recv() => Ok(false),
                _ = interrupt.recv() => Ok(false),
            }
        })?;
        if !enrolled {
            return Ok(None);
        }
    }
    std::thread::Builder::new()
        .name("enrolment".into())
        .spawn(move || runtime.block_on(enrolment.keep()))
        .context("start a thread")?;
    Ok(Some(()))
}

impl Enrolment {
    async fn keep(&self) {
        loop {
            let now = SystemTime::now();
            let wait = match self.current(now) {
                Ok(validity) => renewal(validity).duration_since(now).unwrap_or_default(),
                Err(_) => Duration::ZERO,
            };
            if wait > Duration::ZERO {
                tokio::time::sleep(wait.min(LOOK_AT_LEAST_EVERY)).await;
                continue;
            }
            self.until_enrolled().await;
            // A certificate that is due again at once must not make this a busy loop.
            tokio::time::sleep(RETRY_MAX).await;
        }
    }

    async fn until_enrolled(&self) {
        let mut pause = RETRY_MIN;
        loop {
            match self.enrol().await {
                Ok(validity) => {
                    let until = validity.not_after.duration_since(SystemTime::now()).unwrap_or_default();
                    tracing::info!(valid_seconds = until.as_secs(), "enrolled");
                    return;
                }
                Err(error) => tracing::warn!("not enrolled: {error:#}"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Of the certificate in place, where it counts now.
    fn current(&self, now: SystemTime) -> Result<Validity> {
        let identity = Identity::load(&self.file("pem"), &self.file("key"))?;
        self.check(&identity, &Roots::load(&self.pki.join("ca.pem"))?, now)?;
        // A cluster that was made anew under the same name has another authority than what this machine kept.
        self.check(&identity, &Roots::load(&self.ca)?, now)?;
        Ok(identity.validity())
    }

    fn check(&self, identity: &Identity, roots: &Roots, now: SystemTime) -> Result<()> {
        identity.check(PeerRole::NodeAgent, roots, now)?;
        let certified = identity.bearer().holder.as_deref().unwrap_or_default();
        ensure!(certified == self.holder, "the certificate is that of machine {certified}, this is {}", self.holder);
        Ok(())
    }

    async fn enrol(&self) -> Result<Validity> {
        let key = self.key()?;
        let token = self.token()?;
        let roots = Roots::load(&self.ca)?;
        let channel = channel::connect_as_stranger(&self.address, &roots, CALL_WITHIN).await?;
        let request = EnrollRequest { csr_pem: pki::request(&key)?, token };
        let answer = EnrollmentClient::new(channel).enroll(request).await;
        let answer = answer.map_err(|status| anyhow::anyhow!("refused: {}", status.message()))?.into_inner();
        let identity = Identity::from_pem(&answer.certificate_pem, &key).context("the answer")?;
        self.check(&identity, &Roots::from_pem(&answer.ca_pem).context("the answer")?, SystemTime::now())
            .context("the answer")?;
        // Between the two the former certificate may be of an authority that is trusted no more: whoever reads both then
        // finds that, and looks again.
        pki::write(&self.pki.join("ca.pem"), &answer.ca_pem, 0o644)?;
        pki::write(&self.file("pem"), &answer.certificate_pem, 0o644)?;
        Ok(identity.validity())
    }

    /// The machine's key; made once, so that certificate and key never have to be replaced together.
    fn key(&self) -> Result<String> {
        let path = self.file("key");
        match pki::read(&path) {
            Ok(key) if pki::request(&key).is_ok() => return Ok(key),
            Ok(_) => tracing::warn!(path = %path.display(), "it holds no key: a new one is made"),
            Err(pki::PkiError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        let key = pki::generate_key()?;
        pki::write(&path, &key, 0o600)?;
        Ok(key)
    }

    fn token(&self) -> Result<String> {
        let shown = || self.token.display().to_string();
        let length = fs::metadata(&self.token).with_context(shown)?.len();
        ensure!(length <= TOKEN_BYTES_MAX, "{}: longer than 64 KiB, which no token is", shown());
        Ok(fs::read_to_string(&self.token).with_context(shown)?.trim().to_owned())
    }

    fn file(&self, suffix: &str) -> PathBuf {
        credential_file(&self.pki, &self.holder, suffix)
    }
}

/// Where an agent's certificate (`pem`) or key (`key`) is.
pub fn credential_file(pki: &Path, holder: &str, suffix: &str) -> PathBuf {
    pki.join(format!("agent-{holder}.{suffix}"))
}

/// Two thirds of the life: the last one is for whoever enrols to come back.
fn renewal(validity: Validity) -> SystemTime {
    let life = validity.not_after.duration_since(validity.not_before).unwrap_or_default();
    validity.not_before + life * 2 / 3
}

#[cfg(test)]
mod tests;
