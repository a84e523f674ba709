//! Mutual TLS: which files, and what is asked of both ends.
//!
//! TLS 1.3 alone, because both ends are ours or curl's; a client must have a certificate of the
//! given authority, and any such client may do everything.

use std::{
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};

use super::say;
use crate::cli::{
    failure::{Failure, Outcome},
    serve::Args,
};

/// The three files without which there is no TCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    cert: PathBuf,
    key: PathBuf,
    ca: PathBuf,
}

impl Files {
    /// Where to listen on TCP, and the files; none when that is not asked for.
    pub fn of(args: &Args) -> Outcome<Option<(SocketAddr, Files)>> {
        let given = [&args.tls_cert, &args.tls_key, &args.tls_ca];
        match (args.listen, given) {
            (None, [None, None, None]) => Ok(None),
            (None, _) => {
                Err(Failure::new("TLS files are for TCP: add --listen ADDR:PORT, or leave them out"))
            }
            (Some(address), [Some(cert), Some(key), Some(ca)]) => {
                Ok(Some((address, Files { cert: cert.clone(), key: key.clone(), ca: ca.clone() })))
            }
            (Some(_), given) => {
                let flags = ["--tls-cert", "--tls-key", "--tls-ca"];
                let missing = flags.into_iter().zip(given).filter(|(_, file)| file.is_none());
                let missing: Vec<&str> = missing.map(|(flag, _)| flag).collect();
                Err(Failure::new(format!(
                    "--listen needs mutual TLS, and {} is missing; 'nacelle certs DIR' makes the files",
                    missing.join(" and ")
                )))
            }
        }
    }

    /// What the server asks of a connection.
    pub fn config(&self) -> Outcome<Arc<ServerConfig>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca)? {
            let added = roots.add(certificate);
            added.map_err(|e| {
                Failure::because(format!("{} is no authority's certificate", self.ca.display()), &e)
            })?;
        }
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
        let verifier =
            verifier.map_err(|e| Failure::because(format!("{} cannot be used", self.ca.display()), &e))?;
        let unusable = |e: rustls::Error| {
            let text = format!("{} and {} cannot be used together", self.cert.display(), self.key.display());
            Failure::because(text, &e)
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(certificates(&self.cert)?, private_key(&self.key)?)
            .map_err(unusable)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Sessions that are taken up again would outlive what is asked of a certificate now.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

fn certificates(path: &Path) -> Outcome<Vec<CertificateDer<'static>>> {
    let unreadable = |e| Failure::because(format!("{} is no certificate in PEM", path.display()), &e);
    let found = CertificateDer::pem_file_iter(path).map_err(unreadable)?;
    let found = found.collect::<Result<Vec<_>, _>>().map_err(unreadable)?;
    if found.is_empty() {
        return Err(Failure::new(format!("{} has no certificate in PEM", path.display())));
    }
    Ok(found)
}

fn private_key(path: &Path) -> Outcome<PrivateKeyDer<'static>> {
    if std::fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o077 != 0) {
        say(&format!("{} can be read by others than its owner; make it mode 0600", path.display()));
    }
    PrivateKeyDer::from_pem_file(path)
        .map_err(|e| Failure::because(format!("{} is no private key in PEM", path.display()), &e))
}
