//! `nacelle certs`: an authority, and certificates of it for a server and a client.
//!
//! The names are Docker's, so that what knows its directories knows these: `ca.pem`, and for a
//! client `cert.pem` and `key.pem`. Nothing that is there is replaced: the files are made under
//! the condition that they do not exist, keys for their owner alone. All keys are ECDSA on P-256,
//! which curl, openssl and rustls all take.

use std::{
    fs::{self, File},
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::cli::{
    failure::{Failure, Outcome, doing},
    serve::CertsArgs,
    state,
    when::rfc3339,
};

/// Seconds of a day.
const DAY: u64 = 86_400;

/// Makes them.
pub fn make(args: &CertsArgs) -> Outcome<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&args.dir);
    doing(made, || format!("{} cannot be made", args.dir.display()))?;
    let names = ["ca.pem", "ca-key.pem", "server-cert.pem", "server-key.pem", "cert.pem", "key.pem"];
    let there: Vec<&str> =
        names.into_iter().filter(|name| args.dir.join(name).symlink_metadata().is_ok()).collect();
    if !there.is_empty() {
        return Err(Failure::new(format!(
            "{} has {} already, which are not replaced; choose another directory",
            args.dir.display(),
            there.join(", ")
        )));
    }
    let files = certificates(args).map_err(|e| Failure::because("The certificates cannot be made", &e))?;
    let mut written: Vec<PathBuf> = Vec::new();
    for (name, text) in names.into_iter().zip(files) {
        let path = args.dir.join(name);
        let private = name.contains("key");
        if let Err(error) = write(&path, &text, private) {
            for path in written {
                // A set that is not whole is of no use.
                let _ = fs::remove_file(path);
            }
            return Err(Failure::because(format!("{} cannot be written", path.display()), &error));
        }
        written.push(path);
    }
    let dir = args.dir.display();
    println!(
        "On this host:   nacelle serve --listen ADDR:PORT --tls-cert {dir}/server-cert.pem \
         --tls-key {dir}/server-key.pem --tls-ca {dir}/ca.pem\n\
         On another one: copy ca.pem, cert.pem and key.pem there, then\n                \
         nacelle --host tcp://HOST:PORT --tlsdir DIR ls\n\
         {dir}/ca-key.pem signs further ones; keep it apart from the rest"
    );
    Ok(())
}

fn write(path: &Path, text: &str, private: bool) -> std::io::Result<()> {
    let mode = if private { 0o600 } else { 0o644 };
    let mut file = File::options().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// The texts, in the order of the files.
fn certificates(args: &CertsArgs) -> Result<[String; 6], rcgen::Error> {
    let serial = state::fresh_id().unwrap_or_default();
    let serial = serial.get(..8).unwrap_or_default();
    let mut ca = params(args, &format!("nacelle authority {serial}"));
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_key = KeyPair::generate()?;
    let ca_certificate = ca.self_signed(&ca_key)?;
    let ca_key_text = ca_key.serialize_pem();
    let issuer = Issuer::new(ca, ca_key);

    let mut server = params(args, "nacelle server");
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let names = server_names(args);
    for name in &names {
        server.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
    }
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let addresses = loopback.into_iter().chain(args.ip.iter().copied());
    server.subject_alt_names.extend(addresses.map(SanType::IpAddress));
    let (server, server_key) = signed(&server, &issuer)?;

    let mut client = params(args, "nacelle client");
    client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let (client, client_key) = signed(&client, &issuer)?;
    Ok([ca_certificate.pem(), ca_key_text, server, server_key, client, client_key])
}

/// `localhost`, what this host calls itself, and what was asked for.
fn server_names(args: &CertsArgs) -> Vec<String> {
    let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let mut names = vec!["localhost".to_owned()];
    for name in [own.trim()].into_iter().chain(args.name.iter().map(String::as_str)) {
        if !name.is_empty() && !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}

fn params(args: &CertsArgs, name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    // From yesterday: other hosts' clocks differ.
    let from_day = |(year, month, day)| rcgen::date_time_ymd(year, month, day);
    params.not_before = from_day(day(state::now().saturating_sub(DAY)));
    params.not_after = from_day(day(state::now().saturating_add(u64::from(args.days) * DAY)));
    params
}

/// The day of a moment, in seconds since 1970.
fn day(seconds: u64) -> (i32, u8, u8) {
    let text = rfc3339(seconds.saturating_mul(1000));
    let part = |range: std::ops::Range<usize>| text.get(range).and_then(|digits| digits.parse::<u16>().ok());
    let (year, month, day) = (part(0..4).unwrap_or(9999), part(5..7).unwrap_or(1), part(8..10).unwrap_or(1));
    let small = |number: u16| u8::try_from(number).unwrap_or(1);
    (year.into(), small(month), small(day))
}

fn signed(
    params: &CertificateParams,
    issuer: &Issuer<'_, KeyPair>,
) -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, issuer)?;
    Ok((certificate.pem(), key.serialize_pem()))
}
