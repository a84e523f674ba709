//! The service as a guest meets it, over frames.

mod abuse;
mod guest;
mod traffic;
