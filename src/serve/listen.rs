//! Where connections come from, and what each one may take.

use std::{
    fs::{self, File},
    io,
    net::SocketAddr,
    os::{fd::AsRawFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
};
use tokio_rustls::TlsAcceptor;

use super::{
    Service, routes, say,
    seats::{SEATS, Seats, Taken},
    tls, watch,
};
use crate::cli::failure::{Failure, Outcome, doing};

/// Longest wait for the head of a request, which is also how long a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest head, in bytes, and most that is buffered of a connection each way.
const BUFFER: usize = 16 << 10;
/// Most fields of a head.
const FIELDS: usize = 64;
/// Longest wait for a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that may wait to be accepted; the kernel's own cap is `net.core.somaxconn`.
const BACKLOG: i32 = 1024;
/// Rest when the system has no descriptors left.
const REST: Duration = Duration::from_millis(100);

/// The unix socket, and the lock that says it is ours.
pub struct Unix {
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
    #[expect(dead_code, reason = "its lock ends with it")]
    lock: File,
}

impl Unix {
    /// Listens at `path`, for this user alone. A socket that a killed service left behind is
    /// replaced; one that is served, or something else at that path, is not.
    pub fn bind(path: &Path) -> Outcome<Unix> {
        let shown = path.display();
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&name);
        let lock = doing(lock, || format!("The lock of the socket {shown} cannot be made"))?;
        // SAFETY: the descriptor is open.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            return Err(Failure::new(format!(
                "Another 'nacelle serve' listens on {shown}; end it first, or choose another --sock"
            )));
        }
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => {
                if std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(Failure::new(format!(
                        "Another program listens on {shown}; choose another --sock"
                    )));
                }
                doing(fs::remove_file(path), || format!("The old socket {shown} cannot be removed"))?;
            }
            Ok(_) => {
                return Err(Failure::new(format!(
                    "{shown} is there and is no socket; choose another --sock"
                )));
            }
            Err(_) => {}
        }
        let listener = doing(listen(path), || format!("The socket {shown} cannot be made"))?;
        Ok(Unix { listener, path: path.to_owned(), lock })
    }
}

fn listen(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The mode of an unbound socket is what bind creates the file with, so that it never has a
    // wider one.
    rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(0o600))?;
    net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

impl Drop for Unix {
    fn drop(&mut self) {
        // The lock is still held, so it is still ours.
        let _ = fs::remove_file(&self.path);
    }
}

/// The TCP socket with what TLS needs.
pub struct Tcp {
    listener: std::net::TcpListener,
    acceptor: TlsAcceptor,
}

impl Tcp {
    /// Listens at `address`.
    pub fn bind(address: SocketAddr, files: &tls::Files) -> Outcome<Tcp> {
        let acceptor = TlsAcceptor::from(files.config()?);
        let listener = std::net::TcpListener::bind(address);
        let listener = doing(listener, || format!("Nobody can listen on {address}"))?;
        doing(listener.set_nonblocking(true), || format!("The socket of {address} cannot be set up"))?;
        Ok(Tcp { listener, acceptor })
    }
}

/// Serves until a signal ends it.
pub async fn run(service: Arc<Service>, unix: Unix, tcp: Option<Tcp>) -> io::Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    tokio::spawn(watch::run(Arc::clone(&service)));
    let listener = UnixListener::from_std(unix.listener.try_clone()?)?;
    tokio::spawn(accept_unix(listener, Arc::clone(&service)));
    say(&format!("listening on {}", unix.path.display()));
    if let Some(tcp) = tcp {
        let listener = TcpListener::from_std(tcp.listener)?;
        say(&format!("listening on {}, with mutual TLS", listener.local_addr()?));
        tokio::spawn(accept_tcp(listener, tcp.acceptor, service));
    }
    tell_manager();
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    drop(unix);
    Ok(())
}

/// Tells the service manager, if there is one, that requests can come (sd_notify(3)).
fn tell_manager() {
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else { return };
    let text = path.to_string_lossy();
    let address = match text.strip_prefix('@') {
        Some(name) => <SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name.as_bytes()),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|to| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &to));
    if let Err(error) = sent {
        say(&format!("The service manager cannot be told: {error}"));
    }
}

async fn accept_unix(listener: UnixListener, service: Arc<Service>) {
    let seats = Seats::new(SEATS);
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(REST).await;
            continue;
        };
        if let Some(taken) = seats.take() {
            tokio::spawn(converse(stream, Arc::clone(&service), taken, "unix".to_owned()));
        }
    }
}

async fn accept_tcp(listener: TcpListener, acceptor: TlsAcceptor, service: Arc<Service>) {
    let seats = Seats::new(SEATS);
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            tokio::time::sleep(REST).await;
            continue;
        };
        let Some(taken) = seats.take() else { continue };
        let _ = stream.set_nodelay(true);
        keep_alive(&stream);
        let (acceptor, service) = (acceptor.clone(), Arc::clone(&service));
        tokio::spawn(async move {
            let shaken = tokio::select! {
                shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)) => shaken,
                () = taken.put_out() => return,
            };
            match shaken {
                Ok(Ok(stream)) => converse(stream, service, taken, peer.to_string()).await,
                Ok(Err(error)) => say(&format!("{peer} was turned away: {error}")),
                Err(_) => {}
            }
        });
    }
}

/// A peer whose host is gone without a word is noticed after some two minutes.
fn keep_alive(stream: &tokio::net::TcpStream) {
    let options = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 60),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 15),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 4),
    ];
    for (level, name, value) in options {
        // SAFETY: the descriptor is open and the value is a C integer of the size that is said.
        // Where the kernel refuses, connections are just not probed.
        unsafe {
            libc::setsockopt(
                stream.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            );
        }
    }
}

/// Serves one connection until either end has enough.
async fn converse(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    service: Arc<Service>,
    taken: Taken,
    peer: String,
) {
    let seat = taken.seat();
    let answer = service_fn(move |request: hyper::Request<Incoming>| {
        routes::answer(Arc::clone(&service), request, seat.answering(), peer.clone())
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_headers(FIELDS).max_buf_size(BUFFER);
    let connection = http.serve_connection(TokioIo::new(stream), answer).with_upgrades();
    tokio::select! {
        // A client that breaks off has its reasons.
        _ = connection => {}
        () = taken.put_out() => {}
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_socket_that_is_served_is_not_taken_over_and_a_stale_one_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = Unix::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Unix::bind(&path).err().unwrap().message.contains("Another 'nacelle serve'"));
        drop(first);
        assert!(!path.exists());
        // What a killed one leaves: a socket without a listener.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        drop(Unix::bind(&path).unwrap());
        // Others' things are left alone.
        let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(Unix::bind(&path).err().unwrap().message.contains("Another program"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, "text").unwrap();
        assert!(Unix::bind(&path).err().unwrap().message.contains("is no socket"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    }
}
