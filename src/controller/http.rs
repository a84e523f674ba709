//! HTTP requests of the machine's own API socket.
//!
//! Most are parsed and rendered by [`api::routes`] and carried out like any other request.
//! Served here are those that are not one question and one answer: streams and waits.

use std::time::{Duration, Instant};

use api::{
    Fault, FaultKind, Reply, Request,
    http::{self, Response},
    routes,
};
use serde::Deserialize;

use super::Controller;
use crate::{
    phase::Phase,
    server::{Answer, Server, Ticket},
    vm::handed::unasked,
};

/// How long a guest has to shut itself down when nothing else is said.
const SHUTDOWN_SECONDS: u64 = 30;

/// The body of `PUT /vm/shutdown`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shutdown {
    /// Seconds until the machine is ended whatever the guest does.
    #[serde(default = "shutdown_seconds")]
    timeout_s: u64,
}

fn shutdown_seconds() -> u64 {
    SHUTDOWN_SECONDS
}

impl Controller {
    /// Serves what clients of the socket have sent.
    pub(super) fn serve(&mut self) -> std::io::Result<()> {
        // The server is taken out while it calls back, because what it calls needs the rest.
        let Some(mut server) = self.server.take() else { return Ok(()) };
        self.serving = true;
        let served = server.serve(&mut |request, ticket| self.answer(request, ticket));
        self.serving = false;
        self.attend(&mut server);
        self.server = Some(server);
        served
    }

    /// Passes on what was announced while the server was busy calling.
    fn attend(&mut self, server: &mut Server) {
        for (kind, details) in std::mem::take(&mut self.unannounced) {
            self.events.add(kind, details, Some(server));
        }
        for (ticket, response) in self.removals.unanswered.drain(..) {
            server.answer(ticket, &response);
        }
        self.waiting.retain(|ticket| server.is_open(*ticket));
    }

    fn answer(&mut self, mut request: http::Request, ticket: Ticket) -> Answer {
        let asked = Instant::now();
        let route = self.metrics.api.asked(request.method.name(), &request.path);
        self.arrived = std::mem::take(&mut request.descriptors);
        let answer = self.carry_out(&request, ticket);
        // Those of a request that was refused before anybody looked at them.
        self.arrived.clear();
        if let Answer::Now(response) | Answer::Stream(response) = &answer {
            let deprecated = response.header("Deprecation").is_some();
            self.metrics.api.answered(route, response.status, asked.elapsed(), deprecated);
        }
        answer
    }

    fn carry_out(&mut self, request: &http::Request, ticket: Ticket) -> Answer {
        match (request.method, request.path.as_str()) {
            (_, "/healthz" | "/events" | "/vm/wait" | "/vm/shutdown") if !self.arrived.is_empty() => {
                Answer::Now(rendered(&Err(unasked(self.arrived.len()))))
            }
            (http::Method::Get, "/healthz") => Answer::Now(Response::value(&self.info())),
            (http::Method::Get, "/events") => self.follow(request, ticket),
            (http::Method::Post, "/vm/wait") => match routes::nothing(&request.body) {
                Ok(()) => {
                    self.waiting.push(ticket);
                    Answer::Later
                }
                Err(fault) => Answer::Now(rendered(&Err(fault))),
            },
            (http::Method::Put, "/vm/shutdown") => self.shut_down(request, ticket),
            (http::Method::Put, "/snapshot/create") => self.create_for(request, ticket),
            (http::Method::Delete, path) if path.starts_with("/snapshot/") => Answer::Now(self.ask(request)),
            (http::Method::Delete, _) => self.delete(request, ticket),
            _ => Answer::Now(self.ask(request)),
        }
    }

    pub(super) fn ask(&mut self, request: &http::Request) -> Response {
        log::debug!("{} {}", request.method, request.path);
        let parsed = routes::parse(request.method.name(), &request.path, &request.body);
        let (outcome, deprecation) = match parsed {
            Ok(parsed) => (self.obey(parsed.request), parsed.deprecation),
            Err(fault) => (Err(fault), None),
        };
        if let Err(fault) = &outcome {
            log::warn!("{} {} was refused: {fault}", request.method, request.path);
        }
        let mut response = rendered(&outcome);
        if let Some(text) = deprecation {
            log::warn!("{text}");
            response = response.with("Deprecation", "true");
        }
        response
    }

    /// Answered when the device is gone: that is when its file or tap is free.
    fn delete(&mut self, request: &http::Request, ticket: Ticket) -> Answer {
        let parsed = routes::parse("DELETE", &request.path, &request.body);
        let removal = parsed.as_ref().ok().and_then(|parsed| super::plug::removes(&parsed.request));
        match (removal, request.query.as_str()) {
            (Some(_), "force=true") if !self.arrived.is_empty() => {
                Answer::Now(rendered(&Err(unasked(self.arrived.len()))))
            }
            (Some((kind, id)), "force=true") => Answer::Now(rendered(&self.force_device(kind, id))),
            (Some((kind, id)), "" | "force=false") => {
                let response = self.ask(request);
                let waits = response.status == 204 && self.wait_for_removal(kind, id, ticket);
                if waits { Answer::Later } else { Answer::Now(response) }
            }
            (Some(_), other) => {
                let text = format!("The query of DELETE is {other:?}; it can be force=true or force=false");
                Answer::Now(rendered(&Err(Fault::new(FaultKind::Invalid, text))))
            }
            (None, _) => Answer::Now(self.ask(request)),
        }
    }

    fn follow(&mut self, request: &http::Request, ticket: Ticket) -> Answer {
        let since = request.query.split('&').find_map(|part| part.strip_prefix("since="));
        let seen = match since.map(str::parse::<u64>).transpose() {
            Ok(seen) => seen.unwrap_or(0),
            Err(_) => {
                let text = "since is no number; it is the sequence of the last event that was read";
                return Answer::Now(rendered(&Err(Fault::new(FaultKind::Invalid, text))));
            }
        };
        let backlog = self.events.backlog(seen);
        self.events.subscribe(ticket);
        Answer::Stream(Response::text("application/x-ndjson", backlog))
    }

    fn shut_down(&mut self, request: &http::Request, ticket: Ticket) -> Answer {
        let body = if request.body.is_empty() { b"{}" } else { &request.body[..] };
        let asked = serde_json::from_slice::<Shutdown>(body)
            .map_err(|e| Fault::new(FaultKind::Invalid, api::explain_json(&e)))
            .and_then(|shutdown| {
                // A guest that stands still cannot hear; there is nothing to wait for.
                let wait = match self.phase {
                    Phase::Running => self.obey(Request::PowerButton).map(|_| shutdown.timeout_s)?,
                    _ => 0,
                };
                let now = Instant::now();
                self.phase.after(crate::phase::Verb::Stop)?;
                Ok(now.checked_add(Duration::from_secs(wait)).unwrap_or(now))
            });
        match asked {
            Ok(deadline) => {
                self.deadline = Some(self.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
                self.waiting.push(ticket);
                Answer::Later
            }
            Err(fault) => Answer::Now(rendered(&Err(fault))),
        }
    }
}

pub(super) fn rendered(outcome: &Result<Reply, Fault>) -> Response {
    let rendered = routes::render(outcome);
    match rendered.content_type {
        "" => Response::done(),
        "application/json" => Response::json(rendered.status, rendered.body),
        other => Response::text(other, rendered.body),
    }
}
