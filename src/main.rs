//! nacelle.
fn main() {}
