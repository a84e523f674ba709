//! Another host's machines, or this one's, through its service (`--host`, `NACELLE_HOST`).
//!
//! ```text
//!   --host unix:///run/nacelle/serve.sock ─┐
//!   --host tcp://build7:2377 ── mutual TLS ┴─► api::client ──► nacelle serve
//!        └ --tlsdir: ca.pem, cert.pem, key.pem      │
//!   exec, cp ──► socket of our own ── tunnel.rs ────┘ upgrade ──► the machine's vsock socket
//! ```
//!
//! What a command prints is made by the same code for either host: the service answers with what
//! the command would have read here. Commands that speak with the agent do so through a tunnel,
//! which looks to them like the machine's own socket.

mod run;
mod tls;
mod tunnel;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use api::client::{Client, ClientError, Connect};
use serde_json::{Value, json};

use super::failure::{Failure, Outcome};
pub use run::run;
pub use tunnel::Tunnel;

/// Port of a service on TCP unless said otherwise.
const PORT: u16 = 2377;
/// Longest wait for what is done when it is done.
const LONG: Duration = Duration::from_secs(365 * 86_400);

/// A service to work through.
#[derive(Debug, Clone)]
pub struct Host {
    connect: Arc<dyn Connect>,
}

impl Host {
    /// The one that is asked for: by flag, or else by `NACELLE_HOST`; none for this host as it
    /// is. `certificates` is `--tlsdir`, or else `NACELLE_CERTS`.
    pub fn chosen(flag: Option<&str>, certificates: Option<&Path>) -> Outcome<Option<Host>> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let Some(place) = flag.map(str::to_owned).or_else(|| variable("NACELLE_HOST")) else {
            return Ok(None);
        };
        let named = || variable("NACELLE_CERTS").map(PathBuf::from);
        let certificates = certificates.map(Path::to_owned).or_else(named);
        Host::at(&place, certificates.as_deref()).map(Some)
    }

    fn at(place: &str, certificates: Option<&Path>) -> Outcome<Host> {
        if let Some(path) = place.strip_prefix("unix://").filter(|path| path.starts_with('/')) {
            return Ok(Host { connect: Arc::new(PathBuf::from(path)) });
        }
        let rest = place.strip_prefix("tcp://").map(|rest| rest.trim_end_matches('/'));
        let Some((name, port)) = rest.and_then(address) else {
            return Err(Failure::new(format!(
                "The host {place:?} cannot be understood; write unix:///PATH or tcp://NAME:PORT"
            )));
        };
        let certificates = certificates.ok_or_else(|| {
            Failure::new(format!(
                "{place} needs certificates: name the directory of ca.pem, cert.pem and key.pem with --tlsdir or \
                 NACELLE_CERTS"
            ))
        })?;
        Ok(Host { connect: Arc::new(tls::Endpoint::new(name, port, certificates)?) })
    }

    /// A client of the service.
    pub fn client(&self) -> Client {
        Client::to(Arc::clone(&self.connect))
    }

    /// A client of the service for what may take as long as it likes.
    pub fn patient(&self) -> Client {
        self.client().patience(LONG)
    }

    /// All that is known of a machine, as `nacelle inspect` prints it.
    pub fn inspect(&self, word: &str) -> Outcome<Value> {
        Ok(self.client().get(&path(word, "")?)?)
    }

    /// A running machine's door to its agent, for as long as the tunnel lives.
    pub fn tunnel(&self, word: &str) -> Outcome<Tunnel> {
        Tunnel::open(self.clone(), path(word, "/tunnel")?)
    }

    /// Waits for a machine's end and returns its exit code.
    pub fn wait(&self, word: &str) -> Outcome<u8> {
        let ended: Value = self.patient().post(&path(word, "/wait")?, None::<&()>)?;
        let code = ended.get("exit_code").and_then(Value::as_u64).and_then(|code| u8::try_from(code).ok());
        code.ok_or_else(|| Failure::new(format!("The service did not say how machine {word} ended")))
    }

    /// Stops a machine.
    pub fn stop(&self, word: &str, grace: Duration) -> Outcome<()> {
        let body = json!({ "timeout_s": grace.as_secs() });
        Ok(self.patient().post(&path(word, "/stop")?, Some(&body))?)
    }

    /// Sends the command of a machine a signal.
    pub fn kill(&self, word: &str, signal: i32) -> Outcome<()> {
        let body = json!({ "signal": signal.to_string() });
        Ok(self.patient().post(&path(word, "/kill")?, Some(&body))?)
    }

    /// Suspends a machine.
    pub fn suspend(&self, word: &str) -> Outcome<()> {
        Ok(self.patient().post(&path(word, "/suspend")?, None::<&()>)?)
    }

    /// Lets a paused or suspended machine go on.
    pub fn resume(&self, word: &str) -> Outcome<()> {
        Ok(self.patient().post(&path(word, "/resume")?, None::<&()>)?)
    }

    /// Pauses a machine, or lets a paused one go on: its own `PATCH /vm`.
    pub fn set(&self, word: &str, state: &str) -> Outcome<()> {
        Ok(self.client().patch(&path(word, "/vm")?, Some(&json!({ "state": state })))?)
    }

    /// Removes a machine.
    pub fn remove(&self, word: &str, force: bool) -> Outcome<()> {
        let query = if force { "?force=true" } else { "" };
        let removed: Result<(), ClientError> = self.patient().delete(&path(word, query)?);
        Ok(removed?)
    }
}

/// The path of a machine, and what follows its name. No machine has a name that needs escapes.
pub fn path(word: &str, rest: &str) -> Outcome<String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if word.is_empty() || word == "." || word == ".." || !word.chars().all(fine) {
        return Err(Failure::new(format!("No machine is called {word:?}")));
    }
    Ok(format!("/machines/{word}{rest}"))
}

/// `NAME`, `NAME:PORT`, `ADDRESS` or `[ADDRESS]:PORT`.
fn address(text: &str) -> Option<(String, u16)> {
    let (name, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (name, port) = rest.split_once(']')?;
            (name, port.strip_prefix(':').or_else(|| port.is_empty().then_some(""))?)
        }
        None => text.split_once(':').unwrap_or((text, "")),
    };
    let port = if port.is_empty() { PORT } else { port.parse().ok().filter(|port| *port > 0)? };
    let plain = !name.is_empty() && !name.contains(['/', '@', '?', ' ']);
    plain.then(|| (name.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_name_and_perhaps_a_port() {
        let cases = [
            ("build7", Some(("build7", PORT))),
            ("build7:99", Some(("build7", 99))),
            ("10.0.0.1:99", Some(("10.0.0.1", 99))),
            ("[::1]:99", Some(("::1", 99))),
            ("[::1]", Some(("::1", PORT))),
            ("build7:0", None),
            ("build7:99999", None),
            (":99", None),
            ("[::1", None),
            ("[::1]99", None),
            ("a@b:1", None),
            ("a/b", None),
        ];
        for (text, expected) in cases {
            assert_eq!(address(text), expected.map(|(name, port)| (name.to_owned(), port)), "{text}");
        }
    }

    #[test]
    fn a_host_that_makes_no_sense_is_refused_with_the_forms_there_are() {
        for place in ["build7", "unix://relative", "http://a", "tcp://", "ssh://a"] {
            let refused = Host::at(place, None).unwrap_err().message;
            assert!(refused.contains("unix:///PATH or tcp://NAME:PORT"), "{place}: {refused}");
        }
        assert!(Host::at("tcp://a", None).unwrap_err().message.contains("--tlsdir"));
        let empty = tempfile::tempdir().unwrap();
        assert!(Host::at("tcp://a", Some(empty.path())).unwrap_err().message.contains("ca.pem"));
        assert!(Host::at("unix:///run/x", None).is_ok());
    }

    #[test]
    fn a_word_cannot_lead_anywhere_else() {
        assert_eq!(path("web-1", "/wait").unwrap(), "/machines/web-1/wait");
        for word in ["", "..", "a/b", "a?force=true", "a b", "ä"] {
            assert!(path(word, "").is_err(), "{word}");
        }
    }
}
