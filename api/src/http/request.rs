//! A request, complete with its body and the descriptors that came with it.

use std::{fmt, os::fd::OwnedFd};

/// What a request wants done with its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// Read.
    Get,
    /// Create or replace, or do an action once.
    Put,
    /// Change some fields.
    Patch,
    /// Ask for something that is neither (nacelle's own calls).
    Post,
    /// Remove.
    Delete,
    /// Any method the API has no use for, such as HEAD or OPTIONS.
    Other,
}

impl Method {
    /// The method with this name. Names are case-sensitive (RFC 9110 section 9.1).
    pub fn named(name: &str) -> Method {
        match name {
            "GET" => Method::Get,
            "PUT" => Method::Put,
            "PATCH" => Method::Patch,
            "POST" => Method::Post,
            "DELETE" => Method::Delete,
            _ => Method::Other,
        }
    }

    /// The name on the wire; `OTHER` for methods that are not known.
    pub fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
            Method::Post => "POST",
            Method::Delete => "DELETE",
            Method::Other => "OTHER",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which HTTP/1 a peer speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0: the connection closes after the answer unless asked otherwise, no chunks.
    Http10,
    /// HTTP/1.1.
    Http11,
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub method: Method,
    /// What to do it with: starts with `/`, as it was sent (percent escapes not decoded),
    /// without the query.
    pub path: String,
    /// What followed the first `?`, not decoded; empty if there was none.
    pub query: String,
    /// The body; empty if there was none or its length was 0.
    pub body: Vec<u8>,
    /// What the sender speaks.
    pub version: Version,
    /// Whether the sender wants to use the connection again.
    pub keep_alive: bool,
    /// Descriptors that were sent along (`SCM_RIGHTS`), in the order of sending, all with
    /// close-on-exec. A parser leaves this empty; the server fills it.
    pub descriptors: Vec<OwnedFd>,
}
