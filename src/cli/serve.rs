//! `nacelle serve` and `nacelle certs`: this process becomes the program `nacelle-serve`.
//!
//! The service needs a runtime and a TLS server, whose code and relocations every start of a
//! monitor would pay for if they were in the same file. So they are in a second one, and here is
//! only what both have: the flags.

use std::{env, net::SocketAddr, os::unix::process::CommandExt, path::PathBuf, process::Command};

use clap::Args as ClapArgs;

use super::failure::{Failure, Outcome, doing};

/// Names this program to `nacelle-serve`, which launches machines by it.
pub const PROGRAM: &str = "NACELLE_PROGRAM";

/// Serve this host's machines over HTTP
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Unix socket to listen on [default: serve.sock in the state directory]
    #[arg(long, value_name = "PATH")]
    pub sock: Option<PathBuf>,
    /// Listen on TCP, too, with mutual TLS only
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// The server's certificate, and those between it and its authority, in PEM
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, in PEM
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// The authority whose clients are let in, in PEM
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
}

/// Make certificates for 'nacelle serve' and its clients
#[derive(Debug, Clone, ClapArgs)]
#[command(after_help = "\
Files: ca.pem, ca-key.pem, server-cert.pem, server-key.pem; cert.pem and key.pem for a client.\n\
A client needs ca.pem, cert.pem and key.pem in the directory of --tlsdir or NACELLE_CERTS.")]
pub struct CertsArgs {
    /// Where to put them; no file that is there already is replaced
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Name of the server, for clients to call it by, besides localhost and this host's own
    #[arg(long, value_name = "HOST")]
    pub name: Vec<String>,
    /// Address of the server, besides those of the loopback device
    #[arg(long, value_name = "ADDR")]
    pub ip: Vec<std::net::IpAddr>,
    /// Days until they expire
    #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub days: u32,
}

/// Becomes the other program, with the arguments of this one.
pub fn become_service() -> Outcome<u8> {
    let own = doing(env::current_exe(), || "The path of this program cannot be found".to_owned())?;
    let named = env::var_os("NACELLE_SERVE").filter(|v| !v.is_empty()).map(PathBuf::from);
    let program = match named {
        Some(path) => path,
        None => super::kernel::beside(&own, "nacelle-serve").map_err(|places| {
            Failure::new(format!(
                "The service was not found at {places}; install nacelle-serve there or name it with NACELLE_SERVE"
            ))
        })?,
    };
    let error = Command::new(&program).args(env::args_os().skip(1)).env(PROGRAM, &own).exec();
    Err(Failure::because(format!("{} cannot be started", program.display()), &error))
}
