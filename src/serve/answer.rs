//! Answers and refusals as they go out: JSON, faults in Firecracker's style, streams.

use std::{convert::Infallible, io};

use api::Fault;
use bytes::Bytes;
use futures_core::Stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Response, StatusCode,
    body::Frame,
    header::{CONTENT_TYPE, HeaderValue},
};
use serde::Serialize;
use serde_json::json;

use crate::cli::failure::Failure;

/// The body of an answer.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;
/// What a route comes to.
pub type Answered = Result<Response<Body>, Refusal>;

/// Why a request did not happen, as it is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The status code.
    pub status: StatusCode,
    /// What was wrong and what would be right.
    pub message: String,
}

impl Refusal {
    /// A refusal with a status and a sentence.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into() }
    }

    /// The request is wrong.
    pub fn wrong(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, message)
    }

    /// Something failed here.
    pub fn failed(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// A failure with the status it deserves.
    pub fn of(status: StatusCode, failure: &Failure) -> Refusal {
        let causes = failure.causes.iter().map(|cause| format!(": {cause}")).collect::<String>();
        Refusal::new(status, format!("{}{causes}", failure.message))
    }

    /// The answer.
    pub fn into_response(self) -> Response<Body> {
        let mut response = whole(json!({ "fault_message": self.message }).to_string(), "application/json");
        *response.status_mut() = self.status;
        response
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        Refusal::of(StatusCode::BAD_REQUEST, &failure)
    }
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Refusal {
        Refusal::wrong(fault.to_string())
    }
}

/// A value as JSON.
pub fn json_of(value: &impl Serialize) -> Answered {
    let text = serde_json::to_string(value).map_err(|e| Refusal::failed(e.to_string()))?;
    Ok(whole(text, "application/json"))
}

/// Nothing to say but that it happened.
pub fn done() -> Response<Body> {
    let mut response = Response::new(full(Bytes::new()));
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// A whole text.
pub fn whole(text: impl Into<Bytes>, kind: &'static str) -> Response<Body> {
    let mut response = Response::new(full(text.into()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// A body whose pieces come by and by.
pub fn stream(
    pieces: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    kind: &'static str,
) -> Response<Body> {
    let body = StreamBody::new(Frames(Box::pin(pieces))).boxed_unsync();
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// A body of these bytes.
pub fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// Pieces as frames of a body.
struct Frames<S>(std::pin::Pin<Box<S>>);

impl<S: Stream<Item = io::Result<Bytes>>> Stream for Frames<S> {
    type Item = io::Result<Frame<Bytes>>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(context).map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_refusal_has_firecrackers_shape_and_its_causes() {
        let failure =
            Failure { causes: vec!["No such file".to_owned()], ..Failure::new("It cannot be read") };
        let response = Refusal::of(StatusCode::NOT_FOUND, &failure).into_response();
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(&body[..], br#"{"fault_message":"It cannot be read: No such file"}"#);
    }
}
