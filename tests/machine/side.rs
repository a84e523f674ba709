//! The guest's half of tests that need more than busybox: this same program, `/bin/side`.
//!
//! A script starts it with the task in a variable:
//! `TASK="serve 5000 200" side --ignored --exact side::in_the_guest`.
//!
//! | task | does |
//! |---|---|
//! | `serve PORT COUNT` | takes COUNT vsock connections and sends back what each one sends |
//! | `rounds MIB FILE` | writes MIB MiB of memory in rounds until `/tmp/stop` is there, checks each page before it writes it, and adds a line to FILE for each round |
//! | `call PORT COUNT` | makes COUNT vsock connections to the host at once; on each sends what differs and expects it back |
//! | `echo PORT` | serves two vsock connections until they end, and tells of one that breaks |
//! | `lose PORT` | makes a vsock connection to the host, tells how it ends, and makes another one |
//! | `random` | after each line it reads prints 32 random bytes; `end` ends it |
//! | `clock` | after each line it reads prints the time; `end` ends it and tells how often time went back |

use std::{
    env,
    fs::File,
    io::{Read, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Instant, SystemTime, UNIX_EPOCH},
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
        "rounds" => rounds(number(1), words[2]),
        "call" => call(number(1), number(2)),
        "echo" => echo(number(1)),
        "lose" => lose(number(1)),
        "random" => random(),
        "clock" => clock(),
        other => panic!("unknown task {other:?}"),
    }
}

fn listen(port: u32) -> OwnedFd {
    let listener = socket();
    checked(with_address(libc::VMADDR_CID_ANY, port, |address, len| {
        // SAFETY: an open socket, and an address of the length given.
        unsafe { libc::bind(listener.as_raw_fd(), address, len) }
    }));
    // SAFETY: an open socket.
    checked(unsafe { libc::listen(listener.as_raw_fd(), 512) });
    println!("@serving={port}");
    listener
}

fn accept(listener: &OwnedFd) -> File {
    // SAFETY: an open socket; the caller's address is not asked for.
    let fd = unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
    checked(fd);
    // SAFETY: a new descriptor that nobody else has.
    File::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn connect(port: u32) -> File {
    let stream = socket();
    checked(with_address(libc::VMADDR_CID_HOST, port, |address, len| {
        // SAFETY: an open socket, and an address of the length given.
        unsafe { libc::connect(stream.as_raw_fd(), address, len) }
    }));
    File::from(stream)
}

fn echo(port: u32) {
    let listener = listen(port);
    let echoes = [(); 2].map(|()| {
        let mut stream = accept(&listener);
        thread::spawn(move || {
            let mut piece = [0; 4096];
            loop {
                match stream.read(&mut piece) {
                    Ok(0) => return,
                    Ok(got) => stream.write_all(&piece[..got]).unwrap(),
                    Err(e) => return println!("@dropped={}", e.raw_os_error().unwrap_or(0)),
                }
            }
        })
    });
    echoes.into_iter().for_each(|echo| echo.join().unwrap());
}

fn lose(port: u32) {
    let mut stream = connect(port);
    println!("@connected={port}");
    let end = stream.read(&mut [0; 1]);
    println!("@lost={}", end.map_or_else(|e| e.raw_os_error().unwrap_or(0), |_| 0));
    let mut text = String::new();
    connect(port).read_to_string(&mut text).unwrap();
    println!("@heard={text}");
}

/// Calls `f` with each line that is typed, up to `end`.
fn each_line(mut f: impl FnMut(&str)) {
    for line in std::io::stdin().lines() {
        match line.unwrap().trim() {
            "end" => return,
            line => f(line),
        }
    }
}

fn random() {
    println!("@asking=");
    each_line(|line| {
        let mut bytes = [0u8; 32];
        // SAFETY: the pointer and length are those of a live array.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        assert_eq!(got, 32);
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        println!("@{line}={digits}");
    });
}

fn clock() {
    static BACK: AtomicU32 = AtomicU32::new(0);
    // Watched all the while: the moment that counts is the one in which the machine goes on.
    thread::spawn(|| {
        let mut last = Instant::now();
        loop {
            // Not `elapsed`, which takes times that went back for equal ones.
            let now = Instant::now();
            if now < last {
                BACK.fetch_add(1, Ordering::Relaxed);
            }
            last = now;
        }
    });
    println!("@ticking=");
    each_line(|line| {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        println!("@{line}={}", time.as_nanos());
    });
    println!("@back={}", BACK.load(Ordering::Relaxed));
}

fn serve(port: u32, count: u32) {
    let listener = listen(port);
    let echoes: Vec<_> = (0..count)
        .map(|_| {
            let mut stream = accept(&listener);
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

/// Each page is what the round and its place say, and each is of the last round until its turn
/// comes: no page may be of another moment than this process's registers and stack.
fn rounds(mib: u32, file: &str) {
    let mut memory = vec![0u64; (mib as usize) << 17];
    let value = |round: u64, at: usize| (round << 32 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut told = File::create(file).unwrap();
    let mut round = 0;
    while !std::path::Path::new("/tmp/stop").exists() {
        for (page, words) in memory.chunks_mut(512).enumerate() {
            for (number, word) in words.iter().enumerate() {
                let at = page * 512 + number;
                let expected = if round == 0 { 0 } else { value(round, at) };
                assert_eq!(*word, expected, "word {number} of page {page} in round {round}");
            }
            for (number, word) in words.iter_mut().enumerate() {
                *word = value(round + 1, page * 512 + number);
            }
        }
        round += 1;
        writeln!(told, "{round}").unwrap();
    }
}

fn call(port: u32, count: u32) {
    // All are open before the first one speaks.
    let streams: Vec<File> = (0..count).map(|_| connect(port)).collect();
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
