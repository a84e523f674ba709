//! Who we are: stored credentials, challenges, tokens.
//!
//! Credentials come from Docker's own file (`$DOCKER_CONFIG/config.json`, else
//! `~/.docker/config.json`), so that `docker login` is enough: `auths` first, then the helper
//! programs of `credHelpers` and `credsStore`. They go to the registry that asks for them and
//! to the token server that it names, never by a connection without TLS (except on this
//! machine, where that was allowed), and never along a redirect.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use super::PullError;
use super::http::Http;
use crate::limits::ANSWER_BYTES;

/// How long a credential helper may take; some ask a cloud service.
const HELPER_TIME: Duration = Duration::from_secs(30);
/// Docker Hub's name in Docker's credential file.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// What is stored for a registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// A long-lived token that is exchanged for short-lived ones.
    Identity(String),
}

/// Secrets do not go into messages or logs.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials")
    }
}

impl Credentials {
    /// The value of a Basic `Authorization` header.
    pub(super) fn basic(&self) -> Option<String> {
        match self {
            Self::Password { user, password } => {
                Some(format!("Basic {}", BASE64.encode(format!("{user}:{password}"))))
            }
            Self::Identity(_) => None,
        }
    }
}

#[derive(Default, Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
    #[serde(default, rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
}

#[derive(Default, Deserialize)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

/// What Docker has stored for `host`; nothing is no error, an unreadable file is one.
pub(super) fn stored_credentials(host: &str) -> Result<Option<Credentials>, PullError> {
    let dir = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let dir = dir.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")));
    let Some(path) = dir.map(|d| d.join("config.json")) else {
        return Ok(None);
    };
    let bad = |why: String| PullError::Credentials(format!("'{}': {why}", path.display()));
    match std::fs::read(&path) {
        Ok(json) => from_config(&json, host).map_err(bad),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(e) => Err(bad(e.to_string())),
    }
}

fn from_config(json: &[u8], host: &str) -> Result<Option<Credentials>, String> {
    let config: DockerConfig = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let mine = config.auths.iter().find(|(key, _)| host_of_key(key) == host);
    if let Some((_, auth)) = mine
        && let Some(found) = auth.read()?
    {
        return Ok(Some(found));
    }
    let key = if host == "docker.io" { HUB_KEY } else { host };
    match config.helpers.get(key).or(config.store.as_ref()) {
        Some(helper) => ask_helper(helper, key),
        None => Ok(None),
    }
}

/// `https://index.docker.io/v1/` is `docker.io`; other keys may have scheme and path as well.
fn host_of_key(key: &str) -> &str {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    match bare.split('/').next().unwrap_or_default() {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

impl Auth {
    fn read(&self) -> Result<Option<Credentials>, String> {
        let given = |field: &Option<String>| field.clone().filter(|s| !s.is_empty());
        if let Some(token) = given(&self.identitytoken) {
            return Ok(Some(Credentials::Identity(token)));
        }
        if let (Some(user), Some(password)) = (given(&self.username), given(&self.password)) {
            return Ok(Some(Credentials::Password { user, password }));
        }
        let Some(auth) = given(&self.auth) else {
            return Ok(None);
        };
        let bytes = BASE64.decode(auth.trim()).map_err(|_| "'auth' is not base64".to_owned())?;
        let text = String::from_utf8(bytes).map_err(|_| "'auth' is not UTF-8".to_owned())?;
        let (user, password) = text.split_once(':').ok_or("'auth' is not USER:PASSWORD")?;
        Ok(Some(Credentials::Password {
            user: user.to_owned(),
            password: password.trim_end_matches('\0').to_owned(),
        }))
    }
}

/// Runs `docker-credential-NAME get` with the registry's name on its standard input.
fn ask_helper(name: &str, key: &str) -> Result<Option<Credentials>, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Reply {
        username: String,
        secret: String,
    }
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    {
        return Err(format!("'{name}' is no name of a credential helper"));
    }
    let program = format!("docker-credential-{name}");
    let failed = |why: String| format!("the helper '{program}' {why}");
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| failed(format!("cannot be started: {e}")))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read its input has its own way of knowing.
        stdin.write_all(key.as_bytes()).ok();
    }
    let deadline = Instant::now() + HELPER_TIME;
    let status = loop {
        match child.try_wait().map_err(|e| failed(e.to_string()))? {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill().ok();
                child.wait().ok();
                return Err(failed(format!("gave no answer in {} s", HELPER_TIME.as_secs())));
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    // "Credentials not found" is a failure too; an anonymous pull may still work.
    if !status.success() {
        return Ok(None);
    }
    let mut reply = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(ANSWER_BYTES).read_to_end(&mut reply).map_err(|e| failed(e.to_string()))?;
    }
    let reply: Reply = serde_json::from_slice(&reply).map_err(|_| failed("gave no JSON".into()))?;
    Ok(Some(match &reply.username[..] {
        "<token>" => Credentials::Identity(reply.secret),
        _ => Credentials::Password { user: reply.username, password: reply.secret },
    }))
}

/// What a server wants (RFC 9110 section 11.6.1; distribution spec, "Token Authentication").
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The best of the challenges in `WWW-Authenticate` headers.
    pub(super) fn choose(headers: &[String]) -> Option<Self> {
        let all: Vec<Self> = headers.iter().filter_map(|h| Self::parse(h)).collect();
        let bearer = all.iter().find(|c| matches!(c, Self::Bearer { .. }));
        bearer.or(all.first()).cloned()
    }

    fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut fields = parameters(rest);
        Some(Self::Bearer {
            realm: fields.remove("realm")?,
            service: fields.remove("service"),
            scope: fields.remove("scope"),
        })
    }
}

/// `a="x, y",b=z`.
fn parameters(mut text: &str) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    while let Some((key, rest)) = text.split_once('=') {
        let key = key.trim_matches([' ', ',', '\t']).to_ascii_lowercase();
        let (value, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_once(',').unwrap_or((rest, "")),
        };
        fields.insert(key, value.trim().to_owned());
        text = after;
    }
    fields
}

/// A token that is to be asked for.
pub(super) struct TokenRequest<'a> {
    pub realm: &'a str,
    pub service: Option<&'a str>,
    pub scope: &'a str,
    pub credentials: Option<&'a Credentials>,
}

impl TokenRequest<'_> {
    /// Gets a token and makes the `Authorization` header of it.
    pub(super) fn send(&self, http: &Http) -> Result<String, PullError> {
        #[derive(Deserialize)]
        struct Reply {
            token: Option<String>,
            access_token: Option<String>,
        }
        if !http.may_speak_to(self.realm) {
            let text =
                format!("the registry names the token server '{}', which is not reached by TLS", self.realm);
            return Err(PullError::Credentials(text));
        }
        let service = self.service.unwrap_or_default();
        let query = format!("service={}&scope={}", encoded(service), encoded(self.scope));
        let answer = match self.credentials {
            Some(Credentials::Identity(token)) => {
                let form = format!(
                    "grant_type=refresh_token&client_id=nacelle&{query}&refresh_token={}",
                    encoded(token)
                );
                http.token(self.realm, Some(&form), None)?
            }
            other => {
                let joint = if self.realm.contains('?') { '&' } else { '?' };
                let basic = other.and_then(Credentials::basic);
                http.token(&format!("{}{joint}{query}", self.realm), None, basic.as_deref())?
            }
        };
        let (status, host) = (answer.status, answer.host.clone());
        if status != 200 {
            return Err(PullError::Denied {
                host,
                repository: self.scope.split(':').nth(1).unwrap_or_default().to_owned(),
                status,
                detail: answer.detail(),
            });
        }
        let mut json = Vec::new();
        let read = answer.reader().take(ANSWER_BYTES).read_to_end(&mut json);
        read.map_err(|e| super::http::broken(&host, e))?;
        let reply: Option<Reply> = serde_json::from_slice(&json).ok();
        let token = reply
            .and_then(|r| r.token.or(r.access_token))
            .filter(|t| t.bytes().all(|b| b.is_ascii_graphic()));
        let text = || PullError::Credentials(format!("the token server {host} gave no token"));
        token.map(|t| format!("Bearer {t}")).ok_or_else(text)
    }
}

/// Percent-encoding of everything but unreserved characters (RFC 3986 section 2.3).
fn encoded(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(byte.into());
        } else {
            write!(out, "%{byte:02X}").ok();
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(json: &str, host: &str) -> Option<Credentials> {
        from_config(json.as_bytes(), host).unwrap()
    }

    #[test]
    fn dockers_credentials_are_found_under_all_their_names() {
        let json = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOnc="},
            "localhost:5000":{"username":"a","password":"b"},"x.example":{},
            "https://y.example/v2/":{"identitytoken":"t","auth":"dTpw"}}}"#;
        let password = |user: &str, password: &str| Credentials::Password {
            user: user.into(),
            password: password.into(),
        };
        assert!(stored(json, "docker.io") == Some(password("u", "p:w")));
        assert!(stored(json, "localhost:5000") == Some(password("a", "b")));
        assert!(stored(json, "y.example") == Some(Credentials::Identity("t".into())));
        assert!(stored(json, "x.example").is_none());
        assert!(stored("{}", "x").is_none());
        assert!(from_config(b"{", "x").is_err());
        assert!(from_config(br#"{"auths":{"x":{"auth":"%"}}}"#, "x").is_err());
        assert!(from_config(br#"{"credsStore":"../evil"}"#, "x").is_err());
    }

    #[test]
    fn challenges_are_read_with_commas_inside_quotes() {
        let header =
            r#"Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull,push""#;
        let both = ["Basic realm=\"x\"".to_owned(), header.to_owned()];
        assert_eq!(
            Challenge::choose(&both),
            Some(Challenge::Bearer {
                realm: "https://auth.example/token".into(),
                service: Some("reg".into()),
                scope: Some("repository:a/b:pull,push".into()),
            })
        );
        assert_eq!(Challenge::choose(&both[..1]), Some(Challenge::Basic));
        assert_eq!(Challenge::choose(&["Bearer x".into(), "Digest y=z".into()]), None);
        assert_eq!(encoded("a b/c:d~"), "a%20b%2Fc%3Ad~");
    }

    #[test]
    fn secrets_do_not_show() {
        let secret = Credentials::Identity("hidden".into());
        assert!(!format!("{secret:?}").contains("hidden"));
    }
}
