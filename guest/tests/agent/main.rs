//! The real agent, driven by the real client, in namespaces of this host.
//!
//! The container's root is this host's own root directory, read through an overlay in memory,
//! so that the tests need nothing but a shell and coreutils. Making namespaces needs root;
//! without it each test says so and passes.

mod archives;
mod fixture;
mod hostile;
mod identity;
mod processes;
mod streams;
