//! HTTP/1 as the monitor's API speaks it: the types of the wire, a parser, a serialiser.
//!
//! ```text
//!   bytes ──► Parser ──► Request ──► (routes) ──► Response ──► Response::head ──► bytes
//!              │ refuses: BadRequest
//! ```
//!
//! Shared by the server (`nacelle vmm`), which drives it from non-blocking sockets, and by
//! [`crate::client`], which drives it from a blocking stream. Nothing here does input or
//! output, so every byte sequence a peer may send can be tried in a test.
//!
//! What is understood is what published clients of Firecracker send: HTTP/1.0 and 1.1,
//! bodies with an exact `Content-Length`, `Expect: 100-continue`, pipelining, targets in
//! origin form (`/path?query`) or absolute form (`http://host/path`). A request body in
//! chunks is refused with a reason, where Firecracker takes the chunks for the next request.
//! Where the standard leaves a choice, the strict one is taken: a second `Content-Length`, a
//! sign or a list in it, a folded header or a space before the colon refuse the request,
//! because a proxy in front may have read them differently.
//!
//! Everything has a cap: a head is at most [`MAX_HEAD`] bytes with [`MAX_HEADERS`] fields,
//! a body what the server allows, and a parser holds no more memory than what has arrived,
//! plus a quarter.

mod parser;
mod request;
mod response;

pub use parser::{BadRequest, MAX_HEAD, MAX_HEADERS, Parser};
pub use request::{Method, Request, Version};
pub use response::{CHUNK_END, CONTINUE, Framing, Response, chunk_head, reason};

pub(crate) use parser::{has_token, trimmed};
