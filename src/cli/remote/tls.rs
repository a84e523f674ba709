//! TLS to a service: certificates of both ends, over a blocking socket.

use std::{
    io::{self, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    path::Path,
    sync::Arc,
    time::Duration,
};

use api::client::{Connect, Stream};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};

use crate::cli::failure::{Failure, Outcome};

/// Longest wait for a connection to one of a host's addresses.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A service on TCP.
#[derive(Debug)]
pub struct Endpoint {
    name: String,
    port: u16,
    server: ServerName<'static>,
    config: Arc<ClientConfig>,
}

impl Endpoint {
    /// The service at a name or address, to be reached with the files in a directory: `ca.pem`,
    /// `cert.pem` and `key.pem`.
    pub fn new(name: String, port: u16, directory: &Path) -> Outcome<Endpoint> {
        let server = ServerName::try_from(name.clone())
            .map_err(|e| Failure::because(format!("{name:?} is no name of a host"), &e))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        let ca = directory.join("ca.pem");
        for certificate in certificates(&ca)? {
            let added = roots.add(certificate);
            added.map_err(|e| {
                Failure::because(format!("{} is no authority's certificate", ca.display()), &e)
            })?;
        }
        let (cert, key) = (directory.join("cert.pem"), directory.join("key.pem"));
        let private = PrivateKeyDer::from_pem_file(&key)
            .map_err(|e| Failure::because(format!("{} is no private key in PEM", key.display()), &e))?;
        let unusable = |e: rustls::Error| {
            let text = format!("{} and {} cannot be used together", cert.display(), key.display());
            Failure::because(text, &e)
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_root_certificates(roots)
            .with_client_auth_cert(certificates(&cert)?, private)
            .map_err(unusable)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Endpoint { name, port, server, config: Arc::new(config) })
    }
}

fn certificates(path: &Path) -> Outcome<Vec<CertificateDer<'static>>> {
    let unreadable = |e| Failure::because(format!("{} is no certificate in PEM", path.display()), &e);
    CertificateDer::pem_file_iter(path)
        .map_err(unreadable)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(unreadable)
}

impl Connect for Endpoint {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in (self.name.as_str(), self.port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(socket) => {
                    socket.set_nodelay(true)?;
                    socket.set_read_timeout(Some(CONNECT_TIMEOUT))?;
                    socket.set_write_timeout(Some(CONNECT_TIMEOUT))?;
                    let session = ClientConnection::new(Arc::clone(&self.config), self.server.clone());
                    let session = session.map_err(io::Error::other)?;
                    let mut stream = TlsStream { socket, session };
                    // Now, so that a server whom we do not trust is told from one that is slow.
                    while stream.session.is_handshaking() {
                        stream.session.complete_io(&mut stream.socket)?;
                    }
                    return Ok(Box::new(stream));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn place(&self) -> String {
        format!("{}, port {}", self.name, self.port)
    }
}

/// A session over a socket.
#[derive(Debug)]
pub struct TlsStream {
    /// What it goes over.
    pub socket: TcpStream,
    /// Its state.
    pub session: ClientConnection,
}

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        rustls::Stream::new(&mut self.session, &mut self.socket).read(buffer)
    }
}

impl Write for TlsStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let mut stream = rustls::Stream::new(&mut self.session, &mut self.socket);
        let count = stream.write(buffer)?;
        // Callers wait for answers; nothing may stay behind.
        stream.flush()?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        rustls::Stream::new(&mut self.session, &mut self.socket).flush()
    }
}

impl Stream for TlsStream {
    fn limit(&mut self, wait: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(wait)?;
        self.socket.set_write_timeout(wait)
    }
}
