//! Too many clients, too slow ones, and too few descriptors.

use std::process::Command;

use super::*;

/// Runs a test in a process of its own, because it measures or limits the whole process.
/// True in that process.
fn alone(name: &str) -> bool {
    const MARK: &str = "NACELLE_TEST_ALONE";
    if std::env::var_os(MARK).is_some_and(|v| v == name) {
        return true;
    }
    let name_here = format!("server::tests::crowd::{name}");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name_here, "--test-threads=1", "--nocapture"])
        .env(MARK, name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
    false
}

fn limit_descriptors(count: libc::rlim_t) {
    let limit = libc::rlimit { rlim_cur: count, rlim_max: count };
    // SAFETY: the limit is a whole one.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
}

/// Memory of this process that is really there, in bytes.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn a_thousand_slow_clients_cost_no_place_and_little_memory() {
    if !alone("a_thousand_slow_clients_cost_no_place_and_little_memory") {
        return;
    }
    limit_descriptors(4096);
    let server = run(Limits::default());
    let whole = [b"PUT /echo HTTP/1.1\r\nContent-Length: 51200\r\n\r\n".as_slice(), &[b'x'; 51_200]].concat();
    for _ in 0..3 {
        server.serves_a_fresh_client();
        assert!(server.exchange(&whole).contains("200 OK"));
    }
    let mut slow = Vec::with_capacity(1000);
    let before = resident();
    let mut most = before;
    for number in 0..1000 {
        let mut client = server.connect();
        client.set_nonblocking(true).unwrap();
        // Some send half a head, some nothing, some all but the end of the largest body.
        let part = match number % 4 {
            0 => &whole[..0],
            1 => &whole[..20],
            2 => &whole[..9000],
            _ => &whole[..whole.len() - 1],
        };
        // It may be cut already, or the rest does not fit.
        let _ = client.write(part);
        slow.push(client);
        if number % 20 == 0 {
            server.serves_a_fresh_client();
            most = most.max(resident());
        }
    }
    for client in &mut slow {
        let _ = client.write(b"x");
    }
    server.serves_a_fresh_client();
    most = most.max(resident());
    assert!(most - before < 1 << 20, "{} KiB more", (most - before) >> 10);
}

#[test]
fn without_descriptors_a_quiet_client_makes_room() {
    if !alone("without_descriptors_a_quiet_client_makes_room") {
        return;
    }
    let server = run(Limits::default());
    let mut quiet: Vec<UnixStream> = (0..10).map(|_| server.connect()).collect();
    server.serves_a_fresh_client();
    // The clients live in this process too: their descriptors come first, then the limit, so
    // that the next one that is needed is the server's.
    let fresh =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    let lowest = std::fs::File::open("/dev/null").unwrap();
    limit_descriptors(lowest.as_raw_fd().try_into().unwrap());
    rustix::net::connect(&fresh, &rustix::net::SocketAddrUnix::new(&server.path).unwrap()).unwrap();
    let mut fresh = UnixStream::from(fresh);
    fresh.set_read_timeout(Some(LONG)).unwrap();
    fresh.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(answer(&mut fresh).1, b"\"here\"");
    // The one that has been there longest is gone.
    assert_eq!(quiet[0].read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_full_server_closes_the_quietest_and_keeps_who_is_served() {
    let server = run(Limits { connections: 4, ..Limits::default() });
    let mut client = api::client::Client::unix(&server.path);
    let mut lines = client.lines("/events").unwrap();
    let mut known = server.connect();
    known.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    answer(&mut known);
    let mut crowd: Vec<UnixStream> = (0..50).map(|_| server.connect()).collect();
    server.serves_a_fresh_client();
    // Who never made a request goes first.
    known.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(answer(&mut known).1, b"\"here\"");
    assert_eq!(crowd[0].read(&mut [0]).unwrap(), 0);
    for _ in 0..20 {
        lines.next().unwrap().unwrap();
    }
}

#[test]
fn half_a_request_is_cut_when_its_time_is_over() {
    let server = run(Limits { patience: Duration::from_millis(200), ..Limits::default() });
    let mut idle = server.connect();
    let mut half = server.connect();
    half.write_all(b"GET / HT").unwrap();
    let (head, _) = answer(&mut half);
    assert!(head.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{head}");
    assert_eq!(half.read(&mut [0]).unwrap(), 0);
    // Who has begun nothing may stay.
    idle.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(answer(&mut idle).1, b"\"here\"");
}

#[test]
fn an_answer_that_is_not_read_is_cut_when_its_time_is_over() {
    let server = run(Limits { patience: Duration::from_millis(200), ..Limits::default() });
    let mut deaf = server.connect();
    deaf.write_all(b"GET /big HTTP/1.1\r\n\r\n").unwrap();
    std::thread::sleep(Duration::from_millis(1800));
    let mut text = Vec::new();
    let _ = deaf.read_to_end(&mut text);
    assert!(text.len() < BIG, "{} bytes", text.len());
    server.serves_a_fresh_client();
}

#[test]
fn clients_that_do_not_read_share_one_budget() {
    let server = run(Limits { memory: 4 << 20, ..Limits::default() });
    let mut deaf: Vec<UnixStream> = (0..3).map(|_| server.connect()).collect();
    for client in &mut deaf {
        client.write_all(b"GET /big HTTP/1.1\r\n\r\n").unwrap();
        server.serves_a_fresh_client();
    }
    let mut whole = 0;
    for client in &mut deaf {
        let mut head = Vec::new();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = client.read_to_end(&mut head);
        whole += usize::from(head.len() > BIG);
    }
    assert_eq!(whole, 1, "the budget has room for one answer of {BIG} bytes");
}

#[test]
fn a_refused_client_may_finish_sending_but_not_for_ever() {
    let server = run(Limits::default());
    let mut stream = server.connect();
    stream.write_all(b"PUT / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n").unwrap();
    let (head, _) = answer(&mut stream);
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    let mut sent = 0;
    while let Ok(count) = stream.write(&[0; 4096]) {
        sent += count;
        assert!(sent < 4 << 20, "it is never cut");
    }
    assert!(sent > 100_000, "cut after {sent} bytes");
}
