//! The guest's half of tests that need more than busybox: this same program, `/bin/side`.
//!
//! A script starts it with the task in a variable:
//! `TASK="serve 5000 200" side --ignored --exact side::in_the_guest`.
//!
//! | task | does |
//! |---|---|
//! | `serve PORT COUNT` | takes COUNT vsock connections and sends back what each one sends |
//! | `call PORT COUNT` | makes COUNT vsock connections to the host at once; on each sends what differs and expects it back |

use std::{
    env,
    fs::File,
    io::{Read, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    thread,
};

use crate::vm::random_bytes;

/// Bytes that are sent on each connection.
pub const CALL_BYTES: usize = 48 << 10;

#[test]
#[ignore = "it is started by scripts in guests"]
fn in_the_guest() {
    let task = env::var("TASK").expect("this runs in guests only; their scripts set TASK");
    let words: Vec<&str> = task.split(' ').collect();
    let number = |index: usize| words[index].parse::<u32>().unwrap();
    match words[0] {
        "serve" => serve(number(1), number(2)),
        "call" => call(number(1), number(2)),
        other => panic!("unknown task {other:?}"),
    }
}

fn serve(port: u32, count: u32) {
    let listener = socket();
    checked(with_address(libc::VMADDR_CID_ANY, port, |address, len| {
        // SAFETY: an open socket, and an address of the length given.
        unsafe { libc::bind(listener.as_raw_fd(), address, len) }
    }));
    // SAFETY: an open socket.
    checked(unsafe { libc::listen(listener.as_raw_fd(), 512) });
    println!("@serving={port}");
    let echoes: Vec<_> = (0..count)
        .map(|_| {
            // SAFETY: an open socket; the caller's address is not asked for.
            let fd =
                unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
            checked(fd);
            // SAFETY: a new descriptor that nobody else has.
            let mut stream = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
            thread::spawn(move || {
                let mut piece = vec![0; 16 << 10];
                loop {
                    match stream.read(&mut piece).unwrap() {
                        0 => return,
                        got => stream.write_all(&piece[..got]).unwrap(),
                    }
                }
            })
        })
        .collect();
    for echo in echoes {
        echo.join().unwrap();
    }
}

fn call(port: u32, count: u32) {
    // All are open before the first one speaks.
    let streams: Vec<File> = (0..count)
        .map(|_| {
            let stream = socket();
            checked(with_address(libc::VMADDR_CID_HOST, port, |address, len| {
                // SAFETY: an open socket, and an address of the length given.
                unsafe { libc::connect(stream.as_raw_fd(), address, len) }
            }));
            File::from(stream)
        })
        .collect();
    for (seed, mut stream) in (0..).zip(streams) {
        let sent = random_bytes(CALL_BYTES, seed);
        let writer = stream.try_clone().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| (&writer).write_all(&sent).unwrap());
            let mut back = vec![0; sent.len()];
            stream.read_exact(&mut back).unwrap();
            assert!(back == sent, "connection {seed} brought back something else");
        });
    }
}

fn socket() -> OwnedFd {
    // SAFETY: plain numbers; the new descriptor is owned here.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        checked(fd);
        OwnedFd::from_raw_fd(fd)
    }
}

fn with_address(cid: u32, port: u32, f: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> i32) -> i32 {
    // SAFETY: plain numbers, for which all zeroes is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    f((&raw const address).cast(), size_of::<libc::sockaddr_vm>() as libc::socklen_t)
}

fn checked(result: i32) {
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
}
