//! `GET /machines/{name}/logs`: what a machine said, and goes on saying.
//!
//! Plain text by default, both of the container's streams in the order they came. A client that
//! accepts [`ENTRIES`] gets them apart and with times, in the format of the log itself
//! (`cli/log.rs`): stream (1 byte), milliseconds since 1970 (8 bytes), length (4 bytes), bytes;
//! numbers little-endian.
//!
//! A thread reads the log and hands on one piece at a time: a slow client slows it down, and one
//! that is gone ends it.

use std::{io, sync::Arc};

use bytes::Bytes;
use hyper::{StatusCode, header::ACCEPT};
use tokio::sync::mpsc::{self, Receiver, Sender};

use super::{
    Service,
    answer::{Answered, Refusal, stream},
    routes::Asked,
};
use crate::cli::{
    log::{ENTRIES, Entry},
    logs::{LogError, Source, Wanted},
    state::Machine,
};

/// Passes a log on.
pub async fn read(service: &Arc<Service>, asked: &mut Asked, name: &str) -> Answered {
    asked.only(&["follow", "tail", "since", "source"])?;
    let wanted = wanted(asked)?;
    asked.streams()?;
    let machine = service.find(name).await?;
    if wanted.since.is_some() && wanted.file(&machine).is_some() {
        return Err(Refusal::wrong("since is for the container's output; other logs have no times of ours"));
    }
    let framed = asked.request.headers().get(ACCEPT).is_some_and(|value| value == ENTRIES);
    let turn = Arc::clone(&service.logs).try_acquire_owned().map_err(|_| {
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "Too many logs are read; end some, or try again later")
    })?;
    let (pieces, received) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || {
        let _turn = turn;
        if let Err(LogError::Read(failure)) = pass_on(&wanted, &machine, framed, &pieces) {
            // The head is out; all that is left is to break off, so that it is no good end.
            let _ = pieces.blocking_send(Err(io::Error::other(failure.to_string())));
        }
    });
    let kind = if framed { ENTRIES } else { "application/octet-stream" };
    Ok(stream(Pieces(received), kind))
}

fn wanted(asked: &Asked) -> Result<Wanted, Refusal> {
    let source = asked.parameter("source").unwrap_or("container");
    let source = serde_json::from_value::<Source>(source.into()).map_err(|_| {
        Refusal::wrong(format!("source is {source:?}; it must be container, kernel or monitor"))
    })?;
    let number = |name: &str| match asked.parameter(name) {
        None => Ok(None),
        Some(word) => word.parse::<u64>().map(Some).map_err(|_| {
            let what = if name == "tail" { "a number of lines" } else { "milliseconds since 1970" };
            Refusal::wrong(format!("{name} is {word:?}; it must be {what}"))
        }),
    };
    let tail = number("tail")?.map(|lines| usize::try_from(lines).unwrap_or(usize::MAX));
    Ok(Wanted { source, follow: asked.flag("follow")?, tail, since: number("since")? })
}

fn pass_on(
    wanted: &Wanted,
    machine: &Machine,
    framed: bool,
    pieces: &Sender<io::Result<Bytes>>,
) -> Result<(), LogError> {
    let send = |bytes: Vec<u8>| {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        pieces.blocking_send(Ok(bytes.into())).map_err(gone)
    };
    let heard = || !pieces.is_closed();
    match wanted.file(machine) {
        None => wanted
            .entries(machine, &heard, &mut |entry| send(if framed { entry.to_bytes() } else { entry.bytes })),
        Some(name) => wanted.text(machine, name, &heard, &mut |part| {
            let entry = |bytes: &[u8]| Entry::out(0, bytes).to_bytes();
            send(if framed { entry(part) } else { part.to_vec() })
        }),
    }
}

/// What comes out of a channel, as a stream.
struct Pieces(Receiver<io::Result<Bytes>>);

impl futures_core::Stream for Pieces {
    type Item = io::Result<Bytes>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}
