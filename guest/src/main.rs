//! `nacelle-agent`: process 1 of a machine. See [`agent`].

mod agent;

fn main() {
    agent::run();
}
