//! Clients one at a time: what they send, and what they get.

use std::process::Command;

use super::*;

fn curl(server: &Running, arguments: &[&str]) -> (String, String) {
    let path = server.path.to_str().unwrap();
    let output = Command::new("curl")
        .args(["-sS", "--max-time", "60", "--unix-socket", path, "-w", "|%{http_code}"])
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text.rsplit_once('|').unwrap();
    (body.to_owned(), status.to_owned())
}

#[test]
fn curl_gets_puts_and_is_refused() {
    let server = run(Limits::default());
    assert_eq!(curl(&server, &["http://localhost/"]), ("\"here\"".to_owned(), "200".to_owned()));
    let none = curl(&server, &["-X", "PUT", "-d", "{}", "http://localhost/none"]);
    assert_eq!(none, (String::new(), "204".to_owned()));
    let (body, status) = curl(&server, &["-X", "PATCH", "http://localhost/none"]);
    assert_eq!((body.as_str(), status.as_str()), (r#"{"fault_message":"Not here: PATCH /none"}"#, "400"));
}

#[test]
fn curl_asks_before_it_sends_a_large_body() {
    let server = run(Limits::default());
    let file = server.path.with_file_name("body");
    std::fs::write(&file, vec![b'7'; 51_200]).unwrap();
    let data = format!("@{}", file.display());
    let expects =
        ["-X", "PUT", "-H", "Expect: 100-continue", "--data-binary", &data, "http://localhost/echo"];
    let (body, status) = curl(&server, &expects);
    assert_eq!((body.len(), status.as_str()), (51_200, "200"));
}

#[test]
fn curl_learns_that_a_body_is_too_large_or_in_chunks() {
    let server = run(Limits::default());
    let file = server.path.with_file_name("body");
    std::fs::write(&file, vec![b'7'; 900_000]).unwrap();
    let data = format!("@{}", file.display());
    for expect in ["Expect: 100-continue", "Expect:"] {
        let put = ["-X", "PUT", "-H", expect, "--data-binary", &data, "http://localhost/echo"];
        let (body, status) = curl(&server, &put);
        assert_eq!(status, "400");
        assert!(body.contains("900000 bytes is larger than the limit of 51200 bytes"), "{body}");
    }
    let chunked = ["-X", "PUT", "-H", "Transfer-Encoding: chunked", "-d", "{}", "http://localhost/echo"];
    let (body, status) = curl(&server, &chunked);
    assert_eq!(status, "400");
    assert!(body.contains("send it with a Content-Length"), "{body}");
}

#[test]
fn curl_reads_an_answer_larger_than_the_socket_takes() {
    let server = run(Limits::default());
    let (body, status) = curl(&server, &["http://localhost/big"]);
    assert_eq!((body.len(), status.as_str()), (BIG, "200"));
}

#[test]
fn a_connection_is_used_again() {
    let server = run(Limits::default());
    let mut stream = server.connect();
    for number in 0..100 {
        let body = format!("[{number}]");
        write!(stream, "PUT /echo HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        assert_eq!(answer(&mut stream).1, body.as_bytes());
    }
}

#[test]
fn requests_in_one_write_are_answered_in_order() {
    let server = run(Limits::default());
    let mut stream = server.connect();
    let mut pipeline = String::new();
    for number in 0..200 {
        pipeline.push_str(&format!("PUT /echo HTTP/1.1\r\nContent-Length: 3\r\n\r\n{number:03}"));
        if number % 50 == 0 {
            pipeline.push_str("GET /later HTTP/1.1\r\n\r\n");
        }
    }
    stream.write_all(pipeline.as_bytes()).unwrap();
    for number in 0..200 {
        assert_eq!(answer(&mut stream).1, format!("{number:03}").as_bytes());
        if number % 50 == 0 {
            assert_eq!(answer(&mut stream).1, b"\"late\"");
        }
    }
}

#[test]
fn large_answers_to_a_pipeline_wait_for_a_slow_reader() {
    let server = run(Limits::default());
    let mut stream = server.connect();
    stream.write_all(&b"GET /big HTTP/1.1\r\n\r\n".repeat(3)).unwrap();
    server.serves_a_fresh_client();
    for _ in 0..3 {
        assert_eq!(answer(&mut stream).1.len(), BIG);
    }
}

#[test]
fn a_request_that_comes_byte_by_byte_is_served() {
    let server = run(Limits::default());
    let mut stream = server.connect();
    for byte in b"PUT /echo HTTP/1.1\r\nContent-Length: 2\r\n\r\nok" {
        stream.write_all(&[*byte]).unwrap();
        std::thread::yield_now();
    }
    assert_eq!(answer(&mut stream).1, b"ok");
}

#[test]
fn a_client_that_sends_no_more_gets_its_answers() {
    let server = run(Limits::default());
    let answer = server.exchange(b"GET / HTTP/1.1\r\n\r\nGET /later HTTP/1.1\r\n\r\n");
    assert!(answer.contains("\"here\"") && answer.ends_with("\"late\""), "{answer}");
}

#[test]
fn a_client_that_stops_in_the_middle_is_told() {
    let server = run(Limits::default());
    let answer = server.exchange(b"PUT /echo HTTP/1.1\r\nContent-Length: 5\r\n\r\nab");
    assert!(answer.contains("The request ended before its body was complete"), "{answer}");
    let answer = server.exchange(b"PUT /ec");
    assert!(answer.contains("The request ended before its head was complete"), "{answer}");
}

#[test]
fn a_connection_is_closed_when_the_client_says_so() {
    let server = run(Limits::default());
    for head in ["GET / HTTP/1.0", "GET / HTTP/1.1\r\nConnection: close", "HEAD / HTTP/1.1"] {
        let mut stream = server.connect();
        write!(stream, "{head}\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.contains("\r\nConnection: close\r\n"), "{text}");
    }
}

#[test]
fn descriptors_come_with_their_request_in_order() {
    let server = run(Limits::default());
    let mut files = Vec::new();
    for number in 0..16 {
        let mut file = tempfile::tempfile().unwrap();
        write!(file, "{number}").unwrap();
        io::Seek::rewind(&mut file).unwrap();
        files.push(file);
    }
    let descriptors: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let mut client = api::client::Client::unix(&server.path);
    let response = client.send(Method::Put, "/files", b"{}", &descriptors).unwrap();
    let texts: Vec<String> = serde_json::from_slice(&response.body).unwrap();
    assert_eq!(texts, (0..16).map(|n| n.to_string()).collect::<Vec<_>>());
    let none = client.send(Method::Put, "/files", b"{}", &[]).unwrap();
    assert_eq!(none.body, b"[]");
}

#[test]
fn more_descriptors_than_sixteen_are_refused_and_closed() {
    let server = run(Limits::default());
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    let mut stream = server.connect();
    for part in [&b"PUT /files HTTP/1.1\r\n"[..], b"Content-Length: 2\r\n\r\n"] {
        let descriptors = [theirs.as_fd(); 9];
        api::client::Stream::send(&mut stream, part, &descriptors).unwrap();
        // The two must not be received as one.
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(theirs);
    let (head, body) = answer(&mut stream);
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    assert!(String::from_utf8_lossy(&body).contains("More than 16 file descriptors"));
    // All copies are closed: the other end of the pair sees its end.
    ours.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
}

#[test]
fn noise_never_stops_the_server() {
    let server = run(Limits::default());
    let mut seed = 0x5EED_u64;
    for _ in 0..300 {
        let mut bytes = b"PUT /echo HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc".repeat(2);
        for _ in 0..4 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let random = usize::try_from(seed >> 33).unwrap();
            let at = random % bytes.len();
            bytes[at] = u8::try_from(random / 64 % 256).unwrap();
        }
        let mut stream = server.connect();
        // The server may refuse the beginning before all of it is written.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        assert!(text.is_empty() || text.starts_with(b"HTTP/1.1 "), "{}", String::from_utf8_lossy(&text));
    }
    server.serves_a_fresh_client();
}
