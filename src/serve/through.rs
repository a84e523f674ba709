//! A machine's own doors, handed through: its API, and the socket of its vsock device.
//!
//! A request for the API is read whole (so its size is known to be bounded), sent over a connection
//! of its own, and answered piece by piece as the answer comes, so that `/events` streams. The
//! connection ends with either side, so a client that gives up waiting is noticed by the monitor.
//!
//! A tunnel is the vsock socket itself: the request asks for an upgrade to `vsock`, and after status
//! 101 every byte is passed on both ways. The first line is the client's `CONNECT <port>`, as on
//! the socket. The agent is behind one of those ports: `exec` and `cp` work through it.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response, StatusCode,
    header::{ACCEPT, CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, UPGRADE},
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::{
    Service,
    answer::{Answered, Refusal, full},
    routes::Asked,
};
use crate::cli::state::{Machine, Status};

/// Longest wait for a connection to a monitor.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the head of a monitor's answer; it keeps its own for requests at 30 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(65);
/// What a tunnel speaks.
pub const TUNNEL: &str = "vsock";
/// Fields that are about one connection and not about what goes through it.
const HOP_BY_HOP: [&str; 4] = ["connection", "keep-alive", "transfer-encoding", "upgrade"];

/// Hands a request for `path` of a machine's API through.
pub async fn pass_on(service: &Arc<Service>, asked: &mut Asked, name: &str, path: &str) -> Answered {
    let machine = service.find(name).await?;
    // Answers of these have no end, or none in bounded time.
    let endless = matches!(path, "/events" | "/vm/wait" | "/vm/shutdown");
    if endless {
        asked.streams()?;
    }
    let body = asked.body().await?;
    let stream = connect(&machine, &machine.api(), "API").await?;
    let broke = |e: hyper::Error| {
        Refusal::new(StatusCode::BAD_GATEWAY, format!("The monitor of machine {name} broke off: {e}"))
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broke)?;
    // It ends when the answer was read, or nobody wants to read it.
    tokio::spawn(connection);
    let answer = sender.send_request(request(asked, path, body)?);
    let answer = if endless {
        answer.await
    } else {
        tokio::time::timeout(ANSWER_TIMEOUT, answer).await.map_err(|_| {
            let text = format!("The monitor of machine {name} did not answer");
            Refusal::new(StatusCode::GATEWAY_TIMEOUT, text)
        })?
    };
    let mut response = answer.map_err(broke)?;
    for field in HOP_BY_HOP {
        response.headers_mut().remove(field);
    }
    Ok(response.map(|body| body.map_err(std::io::Error::other).boxed_unsync()))
}

fn request(asked: &Asked, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, Refusal> {
    let query = asked.request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
    let mut request = Request::builder().method(asked.request.method()).uri(format!("{path}{query}"));
    request = request.header(HOST, "localhost");
    for field in [CONTENT_TYPE, ACCEPT] {
        if let Some(value) = asked.request.headers().get(&field) {
            request = request.header(field, value);
        }
    }
    request.body(Full::new(body)).map_err(|e| Refusal::wrong(e.to_string()))
}

/// Makes a tunnel to a machine's vsock device.
pub async fn tunnel(service: &Arc<Service>, asked: &mut Asked, name: &str) -> Answered {
    let machine = service.find(name).await?;
    let wanted = asked.request.headers().get(UPGRADE).is_some_and(|value| value == TUNNEL);
    if !wanted {
        let mut response = Refusal::new(
            StatusCode::UPGRADE_REQUIRED,
            format!("A tunnel needs 'Connection: Upgrade' and 'Upgrade: {TUNNEL}'"),
        )
        .into_response();
        response.headers_mut().insert(UPGRADE, HeaderValue::from_static(TUNNEL));
        return Ok(response);
    }
    asked.streams()?;
    let mut socket = connect(&machine, &machine.vsock(), "vsock socket").await?;
    let upgrade = hyper::upgrade::on(&mut asked.request);
    // The place among the streams is the tunnel's from now on.
    let place = asked.answering.for_the_tunnel();
    tokio::spawn(async move {
        let _place = place;
        if let Ok(client) = upgrade.await {
            // Either end may break off; that is how most tunnels end.
            let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut socket).await;
        }
    });
    let mut response = Response::new(full(Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let fields: [(HeaderName, &str); 2] = [(CONNECTION, "Upgrade"), (UPGRADE, TUNNEL)];
    for (field, value) in fields {
        response.headers_mut().insert(field, HeaderValue::from_static(value));
    }
    Ok(response)
}

/// Connects to one of a machine's sockets.
async fn connect(machine: &Machine, path: &Path, what: &str) -> Result<UnixStream, Refusal> {
    let name = &machine.record.name;
    if !matches!(machine.record.status(), Status::Running | Status::Created) {
        let status = machine.record.status().word();
        let text = format!("Machine {name} is {status}; only a running one can be asked");
        return Err(Refusal::new(StatusCode::CONFLICT, text));
    }
    let refused = |why: String| {
        Refusal::new(
            StatusCode::BAD_GATEWAY,
            format!("The {what} of machine {name} cannot be reached: {why}"),
        )
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(path)).await {
        Ok(connected) => connected.map_err(|e| refused(e.to_string())),
        Err(_) => Err(refused(format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()))),
    }
}
