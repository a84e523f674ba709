//! Which request is which. [`TABLE`] is the whole list; `resources/serve.yaml` is compared with it.
//!
//! What follows `/machines/{name}/` belongs to the machine's own API, except the few words of
//! [`OWN`], which no machine's API uses.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::{
    Service,
    answer::{Answered, Body, Refusal, json_of},
    events, launch, logs, machines, metrics, say,
    seats::Answering,
    through,
};
use api::routes::Route;

/// Longest body of a request, in bytes.
pub const BODY_MAX: usize = 1 << 20;
/// Longest wait for a body.
const BODY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// Every path of the service, with each of its methods. `{name}` stands for a machine's name, its
/// id, or the start of its id; `{path}` for anything.
pub const TABLE: &[Route] = &[
    ("GET", "/healthz"),
    ("GET", "/version"),
    ("GET", "/events"),
    ("GET", "/metrics/openmetrics"),
    ("GET", "/machines"),
    ("POST", "/machines"),
    ("GET", "/machines/{name}"),
    ("DELETE", "/machines/{name}"),
    ("POST", "/machines/{name}/wait"),
    ("POST", "/machines/{name}/stop"),
    ("POST", "/machines/{name}/kill"),
    ("POST", "/machines/{name}/suspend"),
    ("POST", "/machines/{name}/resume"),
    ("GET", "/machines/{name}/logs"),
    ("GET", "/machines/{name}/stats"),
    ("GET", "/machines/{name}/tunnel"),
    ("*", "/machines/{name}/{path}"),
];

/// Words after a machine's name that are the service's and not the machine's.
pub const OWN: [&str; 8] = ["wait", "stop", "kill", "suspend", "resume", "logs", "stats", "tunnel"];

/// A request while it is answered.
pub struct Asked {
    /// What is asked, without its body.
    pub request: Request<()>,
    /// Its body, as far as it is still to be read.
    body: Option<Incoming>,
    /// Its connection's seat.
    pub answering: Answering,
}

impl Asked {
    /// The whole body.
    pub async fn body(&mut self) -> Result<Bytes, Refusal> {
        let Some(body) = self.body.take() else { return Ok(Bytes::new()) };
        let whole = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, BODY_MAX).collect());
        match whole.await {
            Ok(Ok(whole)) => Ok(whole.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Refusal::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("The body has more than {BODY_MAX} bytes"),
            )),
            Ok(Err(error)) => Err(Refusal::wrong(format!("The body cannot be read: {error}"))),
            Err(_) => Err(Refusal::new(
                StatusCode::REQUEST_TIMEOUT,
                format!("The body did not arrive within {} s", BODY_TIMEOUT.as_secs()),
            )),
        }
    }

    /// The body as JSON; an empty one is an empty object.
    pub async fn json<T: DeserializeOwned>(&mut self) -> Result<T, Refusal> {
        let body = self.body().await?;
        let text: &[u8] = if body.is_empty() { b"{}" } else { &body };
        serde_json::from_slice(text).map_err(|e| Refusal::wrong(api::explain_json(&e)))
    }

    /// The value of a parameter of the query; empty when it has none.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let parts = self.request.uri().query().unwrap_or_default().split('&');
        parts.map(|part| part.split_once('=').unwrap_or((part, ""))).find(|(n, _)| *n == name).map(|(_, v)| v)
    }

    /// Whether a parameter is set; `false` and `0` are not.
    pub fn flag(&self, name: &str) -> Result<bool, Refusal> {
        match self.parameter(name) {
            None | Some("false" | "0") => Ok(false),
            Some("" | "true" | "1") => Ok(true),
            Some(other) => Err(Refusal::wrong(format!("{name} is {other:?}; it must be true or false"))),
        }
    }

    /// Refuses parameters other than these.
    pub fn only(&self, known: &[&str]) -> Result<(), Refusal> {
        let parts = self.request.uri().query().unwrap_or_default().split('&').filter(|part| !part.is_empty());
        for part in parts {
            let name = part.split('=').next().unwrap_or_default();
            if !known.contains(&name) {
                let hint = api::nearest(name, known.iter().copied()).map(|n| format!("; did you mean {n}?"));
                return Err(Refusal::wrong(format!(
                    "Unknown parameter {name:?}{}",
                    hint.unwrap_or_default()
                )));
            }
        }
        Ok(())
    }

    /// The answer has no end of its own, and needs a place among those.
    pub fn streams(&mut self) -> Result<(), Refusal> {
        if self.answering.streams() {
            return Ok(());
        }
        let text = "Too many clients wait or read streams; end some, or try again later";
        Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text))
    }
}

/// Answers a request, whatever it is.
pub async fn answer(
    service: Arc<Service>,
    request: Request<Incoming>,
    answering: Answering,
    peer: String,
) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let (method, path) = (parts.method.clone(), parts.uri.path().to_owned());
    let mut asked = Asked { request: Request::from_parts(parts, ()), body: Some(body), answering };
    let answered = route(&service, &mut asked).await;
    let response = answered.unwrap_or_else(Refusal::into_response);
    if method != Method::GET {
        // Who changed what is for the journal.
        say(&format!("{peer} {method} {path} {}", response.status().as_u16()));
    }
    let Asked { answering, .. } = asked;
    Ok(response.map(|body| Held { body, _answering: answering }.boxed_unsync()))
}

async fn route(service: &Arc<Service>, asked: &mut Asked) -> Answered {
    let method = asked.request.method().clone();
    let path = asked.request.uri().path().to_owned();
    let words: Vec<&str> = path.strip_prefix('/').unwrap_or(&path).split('/').collect();
    match (method.as_str(), &words[..]) {
        ("GET", ["healthz"]) => machines::health(service).await,
        ("GET", ["version"]) => json_of(&json!({
            "nacelle_version": env!("CARGO_PKG_VERSION"),
            "firecracker_version": api::FIRECRACKER_VERSION,
        })),
        ("GET", ["events"]) => events::follow(service, asked),
        ("GET", ["metrics", "openmetrics"]) => metrics::page(service).await,
        ("GET", ["machines"]) => machines::list(service, asked).await,
        ("POST", ["machines"]) => launch::launch(service, asked).await,
        ("GET", ["machines", name]) => machines::inspect(service, name).await,
        ("DELETE", ["machines", name]) => machines::remove(service, asked, name).await,
        ("POST", ["machines", name, "wait"]) => machines::wait(service, asked, name).await,
        ("POST", ["machines", name, "stop"]) => machines::stop(service, asked, name).await,
        ("POST", ["machines", name, "kill"]) => machines::kill(service, asked, name).await,
        ("POST", ["machines", name, "suspend"]) => machines::suspend(service, asked, name).await,
        ("POST", ["machines", name, "resume"]) => machines::resume(service, name).await,
        ("GET", ["machines", name, "logs"]) => logs::read(service, asked, name).await,
        ("GET", ["machines", name, "stats"]) => machines::stats(service, name).await,
        ("GET", ["machines", name, "tunnel"]) => through::tunnel(service, asked, name).await,
        (_, ["machines", name, first, ..]) if !OWN.contains(first) => {
            let at = "/machines/".len() + name.len();
            through::pass_on(service, asked, name, path.get(at..).unwrap_or("/")).await
        }
        _ => Err(unknown(method.as_str(), &words, &path)),
    }
}

/// What to say of a request that means nothing here.
fn unknown(method: &str, words: &[&str], path: &str) -> Refusal {
    let fits = |template: &str| {
        let parts: Vec<&str> = template.trim_start_matches('/').split('/').collect();
        parts.len() == words.len() && parts.iter().zip(words).all(|(p, w)| *p == "{name}" || p == w)
    };
    let takes: Vec<&str> = TABLE.iter().filter(|(_, template)| fits(template)).map(|(m, _)| *m).collect();
    if takes.is_empty() {
        let templates = TABLE.iter().map(|(_, template)| *template);
        let hint = api::nearest(path, templates).map(|near| format!("; did you mean {near}?"));
        return Refusal::new(
            StatusCode::NOT_FOUND,
            format!("Nothing is at {path}{}", hint.unwrap_or_default()),
        );
    }
    let text = format!("{method} means nothing at {path}; this path takes {}", takes.join(" and "));
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text)
}

/// A body that keeps its connection's seat while it is sent.
struct Held {
    body: Body,
    _answering: Answering,
}

impl hyper::body::Body for Held {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, std::io::Error>>> {
        std::pin::Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_machines_api_has_a_word_that_is_the_services() {
        for (_, path) in api::routes::TABLE {
            let first = path.trim_start_matches('/').split('/').next().unwrap();
            assert!(!OWN.contains(&first), "{path}");
        }
        for (_, path) in TABLE {
            if let Some(word) = path.strip_prefix("/machines/{name}/").filter(|word| *word != "{path}") {
                assert!(OWN.contains(&word), "{path}");
            }
        }
    }

    #[test]
    fn a_wrong_method_and_a_wrong_path_are_told_apart() {
        let said = |method: &str, path: &str| {
            let words: Vec<&str> = path.trim_start_matches('/').split('/').collect();
            unknown(method, &words, path)
        };
        let wrong = said("PUT", "/machines");
        assert_eq!(wrong.status, StatusCode::METHOD_NOT_ALLOWED);
        assert!(wrong.message.ends_with("takes GET and POST"), "{}", wrong.message);
        assert!(said("GET", "/machines/a/wait").message.ends_with("takes POST"));
        let nowhere = said("GET", "/machine");
        assert_eq!(nowhere.status, StatusCode::NOT_FOUND);
        assert!(nowhere.message.contains("did you mean /machines?"), "{}", nowhere.message);
    }
}
