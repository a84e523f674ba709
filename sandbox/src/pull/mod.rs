//! # Pulling from a registry
//!
//! The read side of the OCI distribution specification 1.1: manifests and blobs by HTTPS, with
//! Docker's token protocol. Two requests give the manifest (an index first, often), one the
//! configuration, one each layer. Every byte is checked against the digest that named it, and
//! nothing that fails the check is kept.
//!
//! ```text
//!   resolve ──► GET manifests/TAG ──► index? GET manifests/DIGEST ──► GET blobs/CONFIG
//!   blob ─────► GET blobs/DIGEST ──► (redirect, without credentials) ──► file, hashed on the way
//! ```
//!
//! ## Why not `oci-client`
//! Measured on two cores of the build machine, from nothing: `oci-client` 0.18 with ring instead
//! of aws-lc brings 194 packages and takes 89 s (debug) and 94 s (release, fat LTO), 5.3 MB
//! stripped; a client on `ureq` 3.5 with the same TLS brings 56 packages and takes 30 s and
//! 31 s, 3.1 MB. The whole project has three minutes. And `oci-client` is asynchronous: the
//! command line would carry a tokio runtime for four requests. What it would have saved are the
//! files of this module, of which the distribution specification fixes most.

mod auth;
mod http;

use std::io::{Read, Write};
use std::sync::Mutex;

use auth::{Challenge, Credentials};
use http::{Answer, Http};

use crate::digest::{Digest, Hashing};
use crate::limits::{INDEX_DEPTH, Limits, TRIES};
use crate::manifest::{ACCEPT, Descriptor, Manifest, ManifestError};
use crate::reference::Reference;

/// Why an image cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The server cannot be reached, or stops answering.
    #[error("{host} cannot be reached or does not answer properly")]
    Connection {
        /// The server.
        host: String,
        /// Why.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The server refuses.
    #[error("{host} refuses access to '{repository}' (status {status}): {detail}")]
    Denied {
        /// The registry.
        host: String,
        /// The repository.
        repository: String,
        /// HTTP status.
        status: u16,
        /// What the server says, and what may help.
        detail: String,
    },
    /// There is no such image.
    #[error("{host} has no image '{name}'")]
    NotFound {
        /// The registry.
        host: String,
        /// What was asked for.
        name: String,
    },
    /// Any other answer.
    #[error("{host} answers with status {status}: {detail}")]
    Status {
        /// The server.
        host: String,
        /// HTTP status.
        status: u16,
        /// What the server says.
        detail: String,
    },
    /// The content is not what its name says.
    #[error("{host} sent wrong content for the {what} {expected}: its digest is {actual}; nothing was kept")]
    Digest {
        /// The registry.
        host: String,
        /// Which part.
        what: &'static str,
        /// The digest asked for.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
    },
    /// More or fewer bytes than declared or allowed.
    #[error("{host} sent {actual} bytes for the {what}, where {expected} were declared or allowed")]
    Size {
        /// The registry.
        host: String,
        /// Which part.
        what: String,
        /// Bytes that came; where there were too many, one more than allowed.
        actual: u64,
        /// Bytes declared or allowed.
        expected: u64,
    },
    /// A manifest that is none.
    #[error("The manifest of '{name}' cannot be used")]
    Manifest {
        /// The image.
        name: String,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// A registry on this machine that does not speak TLS.
    #[error(
        "{host} does not speak TLS: a registry on this machine may be used without, when it is allowed as insecure"
    )]
    NotTls {
        /// The registry.
        host: String,
    },
    /// A registry without TLS that is not on this machine.
    #[error("{host} is not on this machine: without TLS only localhost, 127.0.0.0/8 and [::1] are allowed")]
    PlainHttp {
        /// The registry.
        host: String,
    },
    /// A redirect that must not or cannot be followed.
    #[error("{host} redirects {why}")]
    Redirect {
        /// The server.
        host: String,
        /// What is wrong with the redirect.
        why: &'static str,
    },
    /// Stored credentials that cannot be used.
    #[error("The registry credentials cannot be used: {0}")]
    Credentials(String),
    /// The received bytes cannot be written.
    #[error("The received layer cannot be written")]
    Write(#[source] std::io::Error),
}

/// What a reference stands for.
#[derive(Debug)]
pub(crate) struct Resolved {
    pub config: Vec<u8>,
    pub layers: Vec<Descriptor>,
}

/// A connection to one repository of one registry.
pub(crate) struct Registry<'a> {
    http: Http,
    reference: &'a Reference,
    limits: &'a Limits,
    credentials: Option<Credentials>,
    /// The `Authorization` header that worked last.
    authorization: Mutex<Option<String>>,
}

impl<'a> Registry<'a> {
    /// Prepares; nothing is sent yet.
    pub(crate) fn new(
        reference: &'a Reference,
        limits: &'a Limits,
        insecure: bool,
    ) -> Result<Self, PullError> {
        let http = Http::new(reference.host(), insecure)?;
        let credentials = auth::stored_credentials(reference.host())?;
        Ok(Self { http, reference, limits, credentials, authorization: Mutex::new(None) })
    }

    fn host(&self) -> String {
        self.reference.host().to_owned()
    }

    /// Finds the image for this host: configuration and layers.
    pub(crate) fn resolve(&self) -> Result<Resolved, PullError> {
        let mut wanted = self.reference.digest().cloned();
        let mut name = match (&wanted, self.reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        for _ in 0..=INDEX_DEPTH {
            let json = self.manifest(&name, wanted.as_ref())?;
            let manifest = Manifest::parse(&json, self.limits).map_err(|e| self.unusable(e))?;
            match manifest {
                Manifest::Image { config, layers } => {
                    let config = self.config(&config)?;
                    return Ok(Resolved { config, layers });
                }
                Manifest::Index(entries) => {
                    let digest = entries.into_iter().next().map(|e| e.descriptor.digest);
                    name = digest.as_ref().map(Digest::to_string).unwrap_or_default();
                    wanted = digest;
                }
            }
        }
        Err(self.unusable(ManifestError::Syntax("indexes are nested too deep".into())))
    }

    fn unusable(&self, source: ManifestError) -> PullError {
        PullError::Manifest { name: self.reference.to_string(), source }
    }

    fn manifest(&self, name: &str, wanted: Option<&Digest>) -> Result<Vec<u8>, PullError> {
        let path = format!("/v2/{}/manifests/{name}", self.reference.repository());
        let (json, promised) = self.small("manifest", &path, Some(ACCEPT))?;
        let promised = promised.as_deref().and_then(Digest::parse);
        for expected in wanted.into_iter().chain(&promised) {
            self.check("manifest", expected, Digest::of(&json))?;
        }
        Ok(json)
    }

    fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>, PullError> {
        let path = format!("/v2/{}/blobs/{}", self.reference.repository(), descriptor.digest);
        let (json, _) = self.small("configuration", &path, None)?;
        self.check("configuration", &descriptor.digest, Digest::of(&json))?;
        Ok(json)
    }

    fn check(&self, what: &'static str, expected: &Digest, actual: Digest) -> Result<(), PullError> {
        if *expected == actual {
            return Ok(());
        }
        Err(PullError::Digest { host: self.host(), what, expected: expected.clone(), actual })
    }

    /// A document that fits into memory, and the digest that its header promises.
    fn small(
        &self,
        what: &str,
        path: &str,
        accept: Option<&str>,
    ) -> Result<(Vec<u8>, Option<String>), PullError> {
        let limit = self.limits.manifest_bytes;
        http::with_retries(TRIES, || {
            let answer = self.get(path, accept)?;
            let promised = answer.header("docker-content-digest");
            let host = answer.host.clone();
            let mut bytes = Vec::new();
            let read = answer.reader().take(limit.saturating_add(1)).read_to_end(&mut bytes);
            read.map_err(|e| http::broken(&host, e))?;
            if bytes.len() as u64 > limit {
                return Err(PullError::Size {
                    host,
                    what: what.to_owned(),
                    actual: bytes.len() as u64,
                    expected: limit,
                });
            }
            Ok((bytes, promised))
        })
    }

    /// Fetches a layer into what `target` makes for each try, and hands that back complete and
    /// checked. `progress` gets the bytes so far.
    pub(crate) fn blob<T: Write>(
        &self,
        descriptor: &Descriptor,
        target: impl Fn() -> std::io::Result<T>,
        progress: impl Fn(u64),
    ) -> Result<T, PullError> {
        let path = format!("/v2/{}/blobs/{}", self.reference.repository(), descriptor.digest);
        http::with_retries(TRIES, || {
            let mut target = target().map_err(PullError::Write)?;
            let answer = self.get(&path, None)?;
            let host = answer.host.clone();
            let limit = descriptor.size;
            let mut reader = Hashing::new(answer.reader().take(limit.saturating_add(1)));
            let mut buffer = vec![0; 128 << 10];
            progress(0);
            loop {
                let n = reader.read(&mut buffer).map_err(|e| http::broken(&host, e))?;
                if n == 0 {
                    break;
                }
                target.write_all(&buffer[..n]).map_err(PullError::Write)?;
                progress(reader.count().min(limit));
            }
            let (actual, count) = reader.finish().map_err(|e| http::broken(&host, e))?;
            if count != limit {
                return Err(PullError::Size {
                    host,
                    what: format!("layer {}", descriptor.digest),
                    actual: count,
                    expected: limit,
                });
            }
            self.check("layer", &descriptor.digest, actual)?;
            Ok(target)
        })
    }

    /// One request to the registry, with authentication where it is asked for.
    fn get(&self, path: &str, accept: Option<&str>) -> Result<Answer, PullError> {
        let known = self.authorization();
        let answer = self.http.get(path, accept, known.as_deref())?;
        if answer.status != 401 {
            return self.judge(answer, path);
        }
        let challenges = answer.headers("www-authenticate");
        let Some(challenge) = Challenge::choose(&challenges) else {
            return self.judge(answer, path);
        };
        let repository = self.reference.repository();
        let Some(fresh) = self.answer_to(&challenge, repository)? else {
            return self.judge(answer, path);
        };
        self.set_authorization(&fresh);
        let answer = self.http.get(path, accept, Some(&fresh))?;
        self.judge(answer, path)
    }

    /// Stands in for `docker login`.
    #[cfg(test)]
    pub(crate) fn set_password(&mut self, user: &str, password: &str) {
        let (user, password) = (user.to_owned(), password.to_owned());
        self.credentials = Some(Credentials::Password { user, password });
    }

    pub(crate) fn set_authorization(&self, header: &str) {
        if let Ok(mut slot) = self.authorization.lock() {
            *slot = Some(header.to_owned());
        }
    }

    fn authorization(&self) -> Option<String> {
        self.authorization.lock().ok()?.clone()
    }

    /// The header that answers a challenge; `None` where there is nothing to answer with.
    fn answer_to(&self, challenge: &Challenge, repository: &str) -> Result<Option<String>, PullError> {
        match challenge {
            Challenge::Basic => Ok(self.credentials.as_ref().and_then(Credentials::basic)),
            Challenge::Bearer { realm, service, scope } => {
                let fallback = format!("repository:{repository}:pull");
                let scope = scope.as_deref().unwrap_or(&fallback);
                let request = auth::TokenRequest {
                    realm,
                    service: service.as_deref(),
                    scope,
                    credentials: self.credentials.as_ref(),
                };
                request.send(&self.http).map(Some)
            }
        }
    }

    /// Turns every answer but success into an error.
    fn judge(&self, answer: Answer, path: &str) -> Result<Answer, PullError> {
        let (status, host) = (answer.status, answer.host.clone());
        match status {
            200 => Ok(answer),
            404 if path.contains("/manifests/") => {
                Err(PullError::NotFound { host: self.host(), name: self.reference.to_string() })
            }
            401 | 403 => {
                let said = answer.detail();
                let advice = match &self.credentials {
                    Some(_) => "the stored credentials are not accepted",
                    None => "the image may not exist, or needs 'docker login' first",
                };
                Err(PullError::Denied {
                    host,
                    repository: self.reference.repository().to_owned(),
                    status,
                    detail: if said.is_empty() { advice.into() } else { format!("{said}; {advice}") },
                })
            }
            _ => Err(PullError::Status { host, status, detail: answer.detail() }),
        }
    }
}
