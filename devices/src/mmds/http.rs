//! As much HTTP as a guest needs to read its metadata: requests without bodies.
//!
//! A request is everything up to its first empty line. It is taken apart strictly; what a
//! stricter reader and a more lenient one would understand differently is refused, and the
//! connection closed behind the answer where it is no longer clear what the next byte means.
//! Which oddities get which status follows Firecracker, for the sake of programs that know it.

/// Longest head of a request, in bytes.
pub(super) const HEAD_MAX: usize = 4096;

/// What is asked to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Put,
    /// One that HTTP servers know and this one never allows.
    Other,
}

/// A request, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request<'a> {
    pub(super) method: Method,
    /// The path, without scheme and host; empty when the target had none.
    pub(super) path: &'a str,
    /// The guest asked for JSON.
    pub(super) wants_json: bool,
    /// Minor version of the protocol, 0 or 1.
    pub(super) minor: u8,
    /// The guest expects the connection to be closed.
    pub(super) close: bool,
    headers: Vec<(&'a str, &'a str)>,
}

impl<'a> Request<'a> {
    /// The last header that has one of `names`: its name as given in `names`, and its value.
    pub(super) fn header(&self, names: &[&'static str]) -> Option<(&'static str, &'a str)> {
        self.headers.iter().rev().find_map(|(name, value)| {
            names.iter().find(|known| name.eq_ignore_ascii_case(known)).map(|known| (*known, *value))
        })
    }
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) json: bool,
    pub(super) minor: u8,
    /// The connection ends behind it.
    pub(super) close: bool,
    /// One further header.
    pub(super) header: Option<(&'static str, String)>,
    pub(super) body: String,
}

impl Response {
    /// Text with this status, on a connection that stays open.
    pub(super) fn text(status: u16, body: impl Into<String>) -> Response {
        Response { status, json: false, minor: 1, close: false, header: None, body: body.into() }
    }

    /// Text with this status, after which nothing is read.
    pub(super) fn last(status: u16, body: impl Into<String>) -> Response {
        Response { close: true, ..Response::text(status, body) }
    }

    /// The bytes to send.
    pub(super) fn encode(&self) -> Vec<u8> {
        let Response { status, minor, body, .. } = self;
        let connection = if self.close { "close" } else { "keep-alive" };
        let kind = if self.json { "application/json" } else { "text/plain" };
        let further =
            self.header.as_ref().map_or(String::new(), |(name, value)| format!("{name}: {value}\r\n"));
        format!(
            "HTTP/1.{minor} {status} {}\r\nServer: nacelle\r\nConnection: {connection}\r\n\
             {further}Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
            reason(*status),
            body.len()
        )
        .into_bytes()
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Payload Too Large",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        _ => "Unknown",
    }
}

/// Length of the request at the start of `bytes`, when all of it is there.
pub(super) fn head_len(bytes: &[u8]) -> Option<usize> {
    let ends = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
    let mut ends = ends.map(|(at, _)| at + 1);
    ends.find_map(|next| match bytes.get(next..) {
        Some([b'\n', ..]) => Some(next + 1),
        Some([b'\r', b'\n', ..]) => Some(next + 2),
        _ => None,
    })
}

/// Takes `head` apart, or says what to answer instead. `head` is a request of [`head_len`].
pub(super) fn parse(head: &[u8]) -> Result<Request<'_>, Response> {
    let invalid = || Response::last(400, "Invalid request.");
    let text = head.strip_suffix(b"\r\n\r\n").ok_or_else(invalid)?;
    let end = text.windows(2).position(|pair| pair == b"\r\n").unwrap_or(text.len());
    let (line, rest) = text.split_at_checked(end).ok_or_else(invalid)?;
    let (method, path, minor) = first_line(line)?;
    let rest = std::str::from_utf8(rest).map_err(|_| invalid())?;
    let mut request =
        Request { method, path, wants_json: false, minor, close: minor == 0, headers: Vec::new() };
    for line in rest.split("\r\n").filter(|line| !line.is_empty()) {
        let Some((name, value)) = line.split_once(':') else {
            return Err(Response::last(400, format!("A header line has no colon: {line}.")));
        };
        let (name, value) = (name.trim(), value.trim());
        understand(&mut request, name, value)?;
        request.headers.push((name, value));
    }
    Ok(request)
}

/// Method, path and minor version.
fn first_line(line: &[u8]) -> Result<(Method, &str, u8), Response> {
    let mut words = line.splitn(3, |byte| *byte == b' ');
    let (Some(method), Some(target), Some(version)) = (words.next(), words.next(), words.next()) else {
        return Err(Response::last(400, "Invalid request."));
    };
    let method = match method {
        b"GET" => Method::Get,
        b"PUT" => Method::Put,
        b"PATCH" | b"DELETE" => Method::Other,
        _ => return Err(Response::last(501, "Unsupported HTTP method.")),
    };
    if target.is_empty() {
        return Err(Response::last(400, "The URI is empty."));
    }
    let target = std::str::from_utf8(target).map_err(|_| Response::last(400, "The URI is not UTF-8."))?;
    let minor = match version {
        b"HTTP/1.0" => 0,
        b"HTTP/1.1" => 1,
        _ => return Err(Response::last(501, "Unsupported HTTP version.")),
    };
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or_default(),
        None if target.starts_with('/') => target,
        None => "",
    };
    Ok((method, path, minor))
}

/// What the headers that matter here say, or why the request cannot be served.
fn understand(request: &mut Request<'_>, name: &str, value: &str) -> Result<(), Response> {
    let is = |known: &str| name.eq_ignore_ascii_case(known);
    let wrong = || Response::last(400, format!("Invalid value of header {name}: {value}."));
    if is("accept") {
        // Anything else leaves what was asked for before.
        match value {
            "application/json" => request.wants_json = true,
            "text/plain" => request.wants_json = false,
            _ => {}
        }
    } else if is("content-length") {
        // Nothing here takes a body, so there is no use in reading one.
        match value.parse::<u32>() {
            Ok(0) => {}
            Ok(_) => return Err(Response::last(400, "Invalid request.")),
            Err(_) => return Err(wrong()),
        }
    } else if is("transfer-encoding") {
        if value != "identity" {
            return Err(Response::last(501, format!("Unsupported transfer encoding: {value}.")));
        }
    } else if is("accept-encoding") {
        let without_identity = value
            .split(',')
            .map(str::trim)
            .any(|one| one == "identity;q=0" || one == "*;q=0" && !value.contains("identity"));
        if value.is_empty() || without_identity {
            return Err(wrong());
        }
    } else if is("connection") {
        let mut words = value.split(',').map(str::trim);
        if words.clone().any(|word| word.eq_ignore_ascii_case("close")) {
            request.close = true;
        } else if words.any(|word| word.eq_ignore_ascii_case("keep-alive")) {
            request.close = false;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(head: &str) -> u16 {
        parse(head.as_bytes()).err().map_or(0, |response| response.status)
    }

    #[test]
    fn a_request_ends_with_its_first_empty_line() {
        assert_eq!(head_len(b"GET / HTTP/1.1\r\n\r\nGET"), Some(18));
        assert_eq!(head_len(b"a\n\nb"), Some(3));
        assert_eq!(head_len(b"a\n\r\nb"), Some(4));
        assert_eq!(head_len(b"\n\n"), Some(2));
        for part in [&b""[..], b"\n", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nA: b\r\n\r"] {
            assert_eq!(head_len(part), None);
        }
    }

    #[test]
    fn a_request_is_taken_apart() {
        let head = b"GET http://169.254.169.254/a/b HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\n\
                     X-METADATA-token:  abc \r\n\r\n";
        let request = parse(head).unwrap();
        assert_eq!((request.method, request.path, request.minor), (Method::Get, "/a/b", 1));
        assert!(request.wants_json && !request.close);
        assert_eq!(request.header(&["y", "x-metadata-token"]), Some(("x-metadata-token", "abc")));
        assert_eq!(request.header(&["y"]), None);
    }

    #[test]
    fn targets_without_a_path_have_an_empty_one() {
        for target in ["http://", "http://host", "*", "latest/x"] {
            let head = format!("GET {target} HTTP/1.1\r\n\r\n");
            assert_eq!(parse(head.as_bytes()).unwrap().path, "", "{target}");
        }
    }

    #[test]
    fn only_the_two_exact_media_types_count() {
        for (accept, json) in [
            ("application/json", true),
            ("text/plain", false),
            ("*/*", false),
            ("application/json, text/plain", false),
            ("application/json\r\nAccept: */*", true),
        ] {
            let head = format!("GET / HTTP/1.1\r\nAccept: {accept}\r\n\r\n");
            assert_eq!(parse(head.as_bytes()).unwrap().wants_json, json, "{accept}");
        }
    }

    #[test]
    fn what_cannot_be_served_is_refused_with_its_own_status() {
        for (head, expected) in [
            ("GET / HTTP/1.1\r\n\r\n", 0),
            ("DELETE / HTTP/1.1\r\n\r\n", 0),
            ("GET / HTTP/1.1\n\n", 400),
            ("\r\n\r\n", 400),
            ("GET /\r\n\r\n", 400),
            ("GET  HTTP/1.1\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\n\r\n", 501),
            ("HEAD / HTTP/1.1\r\n\r\n", 501),
            ("get / HTTP/1.1\r\n\r\n", 501),
            ("GET / HTTP/2.0\r\n\r\n", 501),
            ("GET / x HTTP/1.1\r\n\r\n", 501),
            ("GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nContent-Length: 1\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: 1\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 0),
            ("PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nContent-Length: 18446744073709551616\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n", 0),
            ("GET / HTTP/1.1\r\nAccept-Encoding: gzip, identity;q=0\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nAccept-Encoding: *;q=0\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nAccept-Encoding: identity, *;q=0\r\n\r\n", 0),
            ("GET / HTTP/1.1\r\nExpect: something\r\nContent-Type: x/y\r\n\r\n", 0),
        ] {
            assert_eq!(status(head), expected, "{head:?}");
        }
        assert_eq!(parse(b"GET /\xff HTTP/1.1\r\n\r\n").unwrap_err().status, 400);
        assert_eq!(parse(b"GET / HTTP/1.1\r\nA: \xff\r\n\r\n").unwrap_err().status, 400);
    }

    #[test]
    fn a_guest_that_wants_the_connection_closed_is_understood() {
        for (version, connection, close) in [
            ("1.1", "", false),
            ("1.0", "", true),
            ("1.1", "Connection: Close\r\n", true),
            ("1.0", "Connection: keep-alive\r\n", false),
            ("1.1", "Connection: TE, close\r\n", true),
        ] {
            let head = format!("GET / HTTP/{version}\r\n{connection}\r\n");
            assert_eq!(parse(head.as_bytes()).unwrap().close, close, "{head:?}");
        }
    }

    #[test]
    fn an_answer_says_how_long_it_is_and_what() {
        let response =
            Response { json: true, header: Some(("Allow", "GET".into())), ..Response::text(200, "é") };
        let text = String::from_utf8(response.encode()).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"));
        assert!(
            text.contains("\r\nAllow: GET\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\né")
        );
        assert!(text.contains("Connection: keep-alive"));
        assert!(String::from_utf8(Response::last(400, "").encode()).unwrap().contains("Connection: close"));
    }
}
