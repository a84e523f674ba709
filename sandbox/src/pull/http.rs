//! HTTP as a registry needs it: one origin, redirects followed by hand so that credentials stay
//! with the origin that asked for them, a deadline on every silence, and tries that end.

use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use ureq::http::{HeaderMap, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::PullError;
use crate::limits::{ANSWER_BYTES, CONNECT_TIME, REDIRECTS, SILENCE_TIME};

/// Where distributions keep their certificate bundle.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// A client of one registry.
pub(super) struct Http {
    agent: Agent,
    /// `https://registry-1.docker.io`.
    origin: String,
}

/// A response whose body has not been read.
pub(super) struct Answer {
    pub status: u16,
    pub host: String,
    headers: HeaderMap,
    body: Body,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<String> {
        self.headers(name).into_iter().next()
    }

    pub(super) fn headers(&self, name: &str) -> Vec<String> {
        let values = self.headers.get_all(name).iter();
        values.filter_map(|v| v.to_str().ok().map(str::to_owned)).collect()
    }

    pub(super) fn reader(self) -> impl Read {
        // The callers cap what they read; the client's own limit is below a layer's size.
        self.body.into_with_config().limit(u64::MAX).reader()
    }

    /// What the server says about an error, in one line: the message of an OCI error body
    /// (distribution spec, "Error Codes"), or the start of any other text.
    pub(super) fn detail(self) -> String {
        let mut bytes = Vec::new();
        self.reader().take(ANSWER_BYTES).read_to_end(&mut bytes).ok();
        let json: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
        let message = json.as_ref().and_then(|j| {
            let error = j.pointer("/errors/0");
            let text = error.and_then(|e| e.get("message").or_else(|| e.get("code")));
            text.or_else(|| j.get("details")).and_then(|m| m.as_str())
        });
        let text = message.map_or_else(|| String::from_utf8_lossy(&bytes).into_owned(), str::to_owned);
        let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
        line.trim().to_owned()
    }
}

impl Http {
    /// A client for the registry `host` (as in a reference).
    pub(super) fn new(host: &str, insecure: bool) -> Result<Self, PullError> {
        let origin = match host {
            "docker.io" => "https://registry-1.docker.io".to_owned(),
            _ if insecure && is_this_machine(host) => format!("http://{host}"),
            _ if insecure => {
                return Err(PullError::PlainHttp { host: host.to_owned() });
            }
            _ => format!("https://{host}"),
        };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(CONNECT_TIME))
            .timeout_connect(Some(CONNECT_TIME))
            .timeout_send_request(Some(SILENCE_TIME))
            .timeout_recv_response(Some(SILENCE_TIME))
            .timeout_per_read(Some(SILENCE_TIME))
            .user_agent(concat!("nacelle/", env!("CARGO_PKG_VERSION")));
        let config = if origin.starts_with("https") {
            config.tls_config(TlsConfig::builder().root_certs(roots(host)).build())
        } else {
            // A proxy is for other machines.
            config.proxy(None)
        };
        Ok(Self { agent: config.build().new_agent(), origin })
    }

    /// Whether this client may only speak to this machine.
    pub(super) fn is_plain(&self) -> bool {
        self.origin.starts_with("http://")
    }

    /// Asks the registry for `path`. The `authorization` goes to the registry alone.
    pub(super) fn get(
        &self,
        path: &str,
        accept: Option<&str>,
        authorization: Option<&str>,
    ) -> Result<Answer, PullError> {
        let mut url = format!("{}{path}", self.origin);
        for _ in 0..=REDIRECTS {
            let same_origin = origin_of(&url).is_some_and(|o| o == self.origin);
            let mut request = self.agent.get(&url);
            if let Some(accept) = accept {
                request = request.header("accept", accept);
            }
            if let Some(value) = authorization.filter(|_| same_origin) {
                request = request.header("authorization", value);
            }
            let answer = answer(&url, request.call())?;
            if !matches!(answer.status, 301 | 302 | 303 | 307 | 308) {
                return Ok(answer);
            }
            let host = answer.host.clone();
            let bad = |why| PullError::Redirect { host, why };
            let Some(location) = answer.header("location") else {
                return Err(bad("without saying where"));
            };
            let Some(next) = join(&url, &location) else {
                return Err(bad("to something that is no HTTP address"));
            };
            if !self.may_speak_to(&next) {
                return Err(bad("from an encrypted connection to one that is not"));
            }
            url = next;
        }
        Err(PullError::Redirect { host: host_of(&url), why: "too often" })
    }

    /// HTTPS goes anywhere; plain HTTP only where it was allowed, and only to this machine.
    pub(super) fn may_speak_to(&self, url: &str) -> bool {
        url.starts_with("https://") || self.is_plain() && is_this_machine(&host_of(url))
    }

    /// A request to a token server: GET, or POST where there is a form.
    pub(super) fn token(
        &self,
        url: &str,
        form: Option<&str>,
        basic: Option<&str>,
    ) -> Result<Answer, PullError> {
        let call = match form {
            Some(form) => {
                let kind = "application/x-www-form-urlencoded";
                self.agent.post(url).header("content-type", kind).send(form)
            }
            None => {
                let mut request = self.agent.get(url);
                if let Some(basic) = basic {
                    request = request.header("authorization", basic);
                }
                request.call()
            }
        };
        answer(url, call)
    }
}

fn answer(url: &str, result: Result<ureq::http::Response<Body>, ureq::Error>) -> Result<Answer, PullError> {
    let host = host_of(url);
    match result {
        Ok(response) => {
            let (parts, body) = response.into_parts();
            Ok(Answer { status: parts.status.as_u16(), host, headers: parts.headers, body })
        }
        // What rustls says when the other side answers with something else than TLS; its type is
        // not to be had through the client.
        Err(ureq::Error::Io(e))
            if is_bad_data(&e) && e.to_string().contains("corrupt message") && is_this_machine(&host) =>
        {
            Err(PullError::NotTls { host })
        }
        Err(source) => Err(PullError::Connection { host, source: Box::new(source) }),
    }
}

fn is_bad_data(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidData
}

/// A body that broke off.
pub(super) fn broken(host: &str, error: io::Error) -> PullError {
    PullError::Connection { host: host.to_owned(), source: Box::new(ureq::Error::Io(error)) }
}

/// Repeats what failed for reasons that pass: the network, an overloaded server.
pub(super) fn with_retries<T>(
    tries: u32,
    mut action: impl FnMut() -> Result<T, PullError>,
) -> Result<T, PullError> {
    let mut wait = Duration::from_millis(300);
    for _ in 1..tries {
        match action() {
            Err(error) if passes(&error) => {
                std::thread::sleep(wait);
                wait *= 5;
            }
            other => return other,
        }
    }
    action()
}

fn passes(error: &PullError) -> bool {
    match error {
        // A wrong certificate or name stays wrong.
        PullError::Connection { source, .. } => match &**source {
            ureq::Error::Io(e) => !is_bad_data(e),
            ureq::Error::Timeout(_) | ureq::Error::Protocol(_) | ureq::Error::ConnectionFailed => true,
            _ => false,
        },
        PullError::Status { status, .. } => matches!(status, 408 | 429 | 500..),
        _ => false,
    }
}

/// Whether a host with an optional port is this machine.
pub(super) fn is_this_machine(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// `scheme://host:port` of a URL.
pub(super) fn origin_of(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    Some(format!("{}://{}", uri.scheme_str()?, uri.authority()?))
}

/// `host:port` of a URL, without a user that may stand before it.
pub(super) fn host_of(url: &str) -> String {
    let uri: Option<Uri> = url.parse().ok();
    let authority = uri.as_ref().and_then(Uri::authority).map(ureq::http::uri::Authority::as_str);
    let authority = authority.unwrap_or_default();
    authority.rsplit_once('@').map_or(authority, |(_, host)| host).to_owned()
}

/// The target of a redirect (RFC 3986 section 5.2, for the forms that servers send).
fn join(base: &str, location: &str) -> Option<String> {
    let origin = origin_of(base)?;
    let whole = if location.starts_with("https://") || location.starts_with("http://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{}:{location}", origin.split(':').next()?)
    } else if location.starts_with('/') {
        format!("{origin}{location}")
    } else if location.contains("://") || location.is_empty() {
        return None;
    } else {
        let path = base.split(['?', '#']).next()?;
        format!("{}/{location}", path.rsplit_once('/')?.0)
    };
    origin_of(&whole)?;
    Some(whole)
}

/// The certificates to trust: `SSL_CERT_FILE` or the system's bundle, with Docker's own place
/// for the registry's authority added; Mozilla's built-in set where the system has none.
fn roots(host: &str) -> RootCerts {
    let named = std::env::var_os("SSL_CERT_FILE").map(Into::into);
    let system = named.or_else(|| BUNDLES.iter().map(|b| Path::new(b).to_owned()).find(|p| p.exists()));
    let mut certificates = system.map_or_else(Vec::new, |path| read_certificates(&path));
    if certificates.is_empty() {
        return RootCerts::WebPki;
    }
    let own = Path::new("/etc/docker/certs.d").join(host).join("ca.crt");
    certificates.extend(read_certificates(&own));
    RootCerts::new_with_certs(&certificates)
}

fn read_certificates(path: &Path) -> Vec<ureq::tls::Certificate<'static>> {
    let pem = std::fs::read(path).unwrap_or_default();
    let items = parse_pem(&pem).filter_map(Result::ok);
    items
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_spoken_to_without_tls() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:1", "127.9.9.9", "[::1]:5000", "[::1]"] {
            assert!(is_this_machine(host), "{host}");
        }
        for host in
            ["example.org", "10.0.0.1:5000", "localhost.example.org", "[::2]:1", "127.0.0.1.example.org", ""]
        {
            assert!(!is_this_machine(host), "{host}");
        }
        assert!(matches!(Http::new("10.0.0.1:5000", true), Err(PullError::PlainHttp { .. })));
    }

    #[test]
    fn an_encrypted_connection_is_never_left_for_a_plain_one() {
        let encrypted = Http::new("registry.example", false).unwrap();
        assert!(encrypted.may_speak_to("https://cdn.example/x"));
        assert!(!encrypted.may_speak_to("http://cdn.example/x"));
        assert!(!encrypted.may_speak_to("http://localhost/x"));
        let plain = Http::new("localhost:5000", true).unwrap();
        assert!(plain.may_speak_to("http://127.0.0.1:1/x"));
        assert!(!plain.may_speak_to("http://cdn.example/x"));
    }

    #[test]
    fn redirects_are_joined_to_where_they_came_from() {
        let base = "https://a.example:8/v2/x?q=/1";
        for (location, whole) in [
            ("https://b.example/y", Some("https://b.example/y")),
            ("//b.example/y", Some("https://b.example/y")),
            ("/y?z", Some("https://a.example:8/y?z")),
            ("y", Some("https://a.example:8/v2/y")),
            ("ftp://b.example", None),
            ("", None),
        ] {
            assert_eq!(join(base, location).as_deref(), whole, "{location}");
        }
    }
}
