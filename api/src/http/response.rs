//! An answer, and how it is written.

use std::{borrow::Cow, io::Write};

use serde::Serialize;

/// What every answer says it comes from. Published clients look for it.
const SERVER: &str = "Firecracker API";

/// The interim answer to `Expect: 100-continue`: the sender may send its body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";

/// What ends a body in chunks.
pub const CHUNK_END: &[u8] = b"0\r\n\r\n";

/// The line that opens a chunk of `length` bytes. The chunk is followed by `\r\n`.
pub fn chunk_head(length: usize) -> String {
    format!("{length:x}\r\n")
}

/// How a reader finds the end of the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// `Content-Length`, from the body in the response.
    Length,
    /// `Transfer-Encoding: chunked`: the length is not known yet.
    Chunks,
    /// The connection closes (a reader that speaks HTTP/1.0 knows no chunks).
    Close,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code, 200 to 599.
    pub status: u16,
    /// The type of the body. Not sent with an answer that has no body.
    pub content_type: Cow<'static, str>,
    /// The body; empty with status 204.
    pub body: Vec<u8>,
    /// Further fields, such as `Allow`, `Deprecation` or `Retry-After`.
    pub headers: Vec<(Cow<'static, str>, Cow<'static, str>)>,
}

impl Response {
    /// An answer with a body of type `application/json`, which `body` must be the text of.
    pub fn json(status: u16, body: impl Into<Vec<u8>>) -> Response {
        Response {
            status,
            content_type: Cow::Borrowed("application/json"),
            body: body.into(),
            headers: Vec::new(),
        }
    }

    /// Status 200 and a value as JSON; status 500 with a fault if it has no JSON form (a map
    /// with keys that are no strings, say).
    pub fn value(value: &(impl Serialize + ?Sized)) -> Response {
        match serde_json::to_vec(value) {
            Ok(body) => Response::json(200, body),
            Err(e) => Response::fault(500, &format!("The answer cannot be written as JSON: {e}")),
        }
    }

    /// Status 204: done, and nothing to say.
    pub fn done() -> Response {
        Response::json(204, Vec::new())
    }

    /// An error with its text in `fault_message`, as clients of Firecracker expect it.
    pub fn fault(status: u16, message: &str) -> Response {
        Response::json(status, serde_json::json!({ "fault_message": message }).to_string())
    }

    /// Status 200 and a text of another type, such as that of OpenMetrics.
    pub fn text(content_type: &'static str, body: impl Into<Vec<u8>>) -> Response {
        Response { content_type: Cow::Borrowed(content_type), ..Response::json(200, body) }
    }

    /// This answer with one more field.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Cow<'static, str>>) -> Response {
        self.headers.push((Cow::Borrowed(name), value.into()));
        self
    }

    /// The value of a field, by its name in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_ref())
    }

    /// Appends everything that goes before the body to `out`.
    ///
    /// Status 204 has neither length nor type (RFC 9110 section 8.6). Control characters in a
    /// field, which could start another field, are left out.
    pub fn head(&self, keep_alive: bool, framing: Framing, out: &mut Vec<u8>) {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        // Writing to a vector cannot fail.
        let _ = write!(
            out,
            "HTTP/1.1 {} {}\r\nServer: {SERVER}\r\nConnection: {connection}\r\n",
            self.status,
            reason(self.status)
        );
        for (name, value) in &self.headers {
            out.extend(visible(name));
            out.extend_from_slice(b": ");
            out.extend(visible(value));
            out.extend_from_slice(b"\r\n");
        }
        if self.status != 204 {
            out.extend_from_slice(b"Content-Type: ");
            out.extend(visible(&self.content_type));
            out.extend_from_slice(b"\r\n");
            let _ = match framing {
                Framing::Length => write!(out, "Content-Length: {}\r\n", self.body.len()),
                Framing::Chunks => write!(out, "Transfer-Encoding: chunked\r\n"),
                Framing::Close => Ok(()),
            };
        }
        out.extend_from_slice(b"\r\n");
    }
}

fn visible(text: &str) -> impl Iterator<Item = u8> {
    text.bytes().filter(|b| *b >= b' ' && *b != 0x7f)
}

/// The words that go with a status code; empty for one that the API does not use.
pub fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        412 => "Precondition Failed",
        413 => "Payload Too Large",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(response: &Response, keep_alive: bool, framing: Framing) -> String {
        let mut out = Vec::new();
        response.head(keep_alive, framing, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_answer_without_content_has_no_length_and_no_type() {
        let head = written(&Response::done(), true, Framing::Length);
        assert_eq!(
            head,
            "HTTP/1.1 204 No Content\r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
        );
    }

    #[test]
    fn an_answer_says_how_long_its_body_is_and_what_it_is() {
        let response = Response::value(&["a"]).with("Deprecation", "true");
        let head = written(&response, false, Framing::Length);
        assert_eq!(response.body, br#"["a"]"#);
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("Connection: close\r\nDeprecation: true\r\n"), "{head}");
        assert!(head.ends_with("Content-Type: application/json\r\nContent-Length: 5\r\n\r\n"), "{head}");
        assert_eq!(response.header("deprecation"), Some("true"));
    }

    #[test]
    fn a_fault_survives_quotes_and_line_ends() {
        let response = Response::fault(400, "No \"x\"\nhere");
        assert_eq!(response.body, br#"{"fault_message":"No \"x\"\nhere"}"#);
    }

    #[test]
    fn a_field_cannot_smuggle_another_one() {
        let response = Response::done().with("Allow", "GET\r\nX: y");
        assert!(written(&response, true, Framing::Length).contains("\r\nAllow: GETX: y\r\n\r\n"));
    }

    #[test]
    fn a_stream_says_that_it_comes_in_chunks() {
        let head = written(&Response::text("text/plain", ""), true, Framing::Chunks);
        assert!(head.ends_with("Transfer-Encoding: chunked\r\n\r\n"));
        assert_eq!(chunk_head(255), "ff\r\n");
    }
}
