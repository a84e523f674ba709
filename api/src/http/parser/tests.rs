use super::*;

const PUT: &[u8] = b"PUT /drives/root?a=b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello";

/// Everything that comes out of pieces: requests as text, and the error that ended them.
fn parsed(pieces: &[&[u8]]) -> (Vec<String>, Option<BadRequest>) {
    let mut parser = Parser::new(100);
    let mut requests = Vec::new();
    for piece in pieces {
        let mut rest = *piece;
        loop {
            match parser.advance(&mut rest) {
                Ok(Some(request)) => requests.push(format!("{request:?}")),
                Ok(None) => break,
                Err(bad) => return (requests, Some(bad)),
            }
        }
        assert!(rest.is_empty(), "bytes are left when more is needed");
    }
    (requests, None)
}

fn one(bytes: &[u8]) -> Request {
    let mut rest = bytes;
    let request = Parser::new(100).advance(&mut rest).unwrap().unwrap();
    assert!(rest.is_empty());
    request
}

fn error(bytes: &[u8]) -> BadRequest {
    let (requests, error) = parsed(&[bytes]);
    assert_eq!(requests.len(), 0, "{requests:?}");
    error.unwrap_or_else(|| panic!("no error from {:?}", String::from_utf8_lossy(bytes)))
}

#[test]
fn a_request_has_method_path_query_and_body() {
    let request = one(PUT);
    assert_eq!(request.method, Method::Put);
    assert_eq!((request.path.as_str(), request.query.as_str()), ("/drives/root", "a=b"));
    assert_eq!(request.body, b"hello");
    assert!(request.keep_alive);
}

#[test]
fn every_split_gives_the_same_requests() {
    let mut pipeline = PUT.to_vec();
    pipeline.extend_from_slice(b"\r\nGET / HTTP/1.0\r\n\r\n");
    pipeline.extend_from_slice(PUT);
    let whole = parsed(&[&pipeline]);
    assert_eq!(whole.0.len(), 3);
    for at in 0..=pipeline.len() {
        let (a, b) = pipeline.split_at(at);
        assert_eq!(parsed(&[a, b]), whole, "split at {at}");
    }
    let bytes: Vec<&[u8]> = pipeline.chunks(1).collect();
    assert_eq!(parsed(&bytes), whole);
}

#[test]
fn every_split_of_a_bad_request_gives_the_same_error() {
    let bad: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        b"GET / HTTP/3.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA : b\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: 101\r\n\r\n",
        b"G@T / HTTP/1.1\r\n\r\n",
    ];
    for bytes in bad {
        let whole = parsed(&[bytes]);
        assert!(whole.1.is_some());
        for at in 0..=bytes.len() {
            let (a, b) = bytes.split_at(at);
            assert_eq!(parsed(&[a, b]), whole, "split at {at}");
        }
    }
}

#[test]
fn an_absolute_target_loses_its_host() {
    assert_eq!(one(b"GET http://localhost/vm/config HTTP/1.1\r\n\r\n").path, "/vm/config");
    for target in ["http://localhost", "localhost:80", "*", "vm"] {
        let bytes = format!("GET {target} HTTP/1.1\r\n\r\n");
        assert_eq!(error(bytes.as_bytes()), BadRequest::Target(target.to_owned()));
    }
}

#[test]
fn connections_are_kept_as_the_version_and_the_fields_say() {
    let kept = |head: &str| one(format!("{head}\r\n\r\n").as_bytes()).keep_alive;
    assert!(kept("GET / HTTP/1.1"));
    assert!(!kept("GET / HTTP/1.0"));
    assert!(kept("GET / HTTP/1.0\r\nConnection: Keep-Alive"));
    assert!(!kept("GET / HTTP/1.1\r\nconnection: x, Close"));
}

#[test]
fn a_length_must_be_one_plain_number() {
    for length in ["-1", "+5", "5, 5", "0x5", "", "5 5", "18446744073709551616", "1e1", "\u{665}"] {
        let bytes = format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
        assert!(matches!(error(bytes.as_bytes()), BadRequest::Length(_)), "{length}");
    }
    let twice = b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-length: 2\r\n\r\n";
    assert_eq!(error(twice), BadRequest::LengthTwice);
}

#[test]
fn a_body_over_the_cap_is_refused_before_it_comes() {
    let put = |length: u64| format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
    assert_eq!(parsed(&[put(100).as_bytes()]), (vec![], None));
    assert_eq!(error(put(101).as_bytes()), BadRequest::BodyTooLarge { length: 101, limit: 100 });
    let all = BadRequest::BodyTooLarge { length: u64::MAX, limit: 100 };
    assert_eq!(error(put(u64::MAX).as_bytes()), all);
}

#[test]
fn a_body_in_chunks_is_refused_and_identity_is_not() {
    let put = |coding: &str| format!("PUT / HTTP/1.1\r\nTransfer-Encoding: {coding}\r\n\r\n");
    for coding in ["chunked", "gzip, chunked", "identity, chunked"] {
        assert_eq!(error(put(coding).as_bytes()), BadRequest::Coding(coding.to_owned()));
    }
    one(put("identity").as_bytes());
}

#[test]
fn a_head_over_the_cap_is_refused_however_it_comes() {
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_HEAD));
    assert_eq!(error(long.as_bytes()), BadRequest::HeadTooLong);
    let pieces: Vec<&[u8]> = long.as_bytes().chunks(100).collect();
    assert_eq!(parsed(&pieces), (vec![], Some(BadRequest::HeadTooLong)));
    let room = MAX_HEAD - "GET / HTTP/1.1\r\n\r\n".len();
    let fits = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(room));
    assert_eq!(fits.len(), MAX_HEAD);
    one(fits.as_bytes());
    let pieces: Vec<&[u8]> = fits.as_bytes().chunks(7).collect();
    assert_eq!(parsed(&pieces).0.len(), 1);
}

#[test]
fn sixty_four_fields_are_the_most() {
    let with = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(count));
    one(with(64).as_bytes());
    assert_eq!(error(with(65).as_bytes()), BadRequest::TooManyHeaders);
}

#[test]
fn a_handshake_of_another_protocol_is_refused_at_its_first_bytes() {
    assert!(matches!(error(b"\x16\x03\x01\x02\x00\x01"), BadRequest::Syntax(_)));
    assert_eq!(error(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), BadRequest::Version);
}

#[test]
fn fields_that_hide_something_are_refused() {
    for field in ["A b: c", "A : b", " folded: x", "A: b\r\n c", ": b", "A: \0", "A: b\rc"] {
        let bytes = format!("GET / HTTP/1.1\r\nHost: x\r\n{field}\r\n\r\n");
        assert!(matches!(error(bytes.as_bytes()), BadRequest::Syntax(_)), "{field:?}");
    }
}

#[test]
fn who_waits_to_be_asked_for_the_body_is_asked_once() {
    let head = b"PUT / HTTP/1.1\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n";
    let mut parser = Parser::new(100);
    assert!(parser.advance(&mut &head[..]).unwrap().is_none());
    assert!(parser.wants_continue());
    assert!(!parser.wants_continue());
    assert_eq!(parser.pending(), Some("body"));
    assert!(parser.advance(&mut &b"ab"[..]).unwrap().is_some());
    assert_eq!(parser.pending(), None);
    let mut parser = Parser::new(100);
    parser.advance(&mut [head, &b"a"[..]].concat().as_slice()).unwrap();
    assert!(!parser.wants_continue());
}

#[test]
fn a_parser_holds_little_more_than_what_came() {
    let mut parser = Parser::new(1 << 30);
    parser.advance(&mut &b"PUT / HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n"[..]).unwrap();
    assert!(parser.held() < 100, "{}", parser.held());
    for _ in 0..1000 {
        parser.advance(&mut &b"0123456789"[..]).unwrap();
    }
    assert!(parser.held() < 10_000 * 5 / 4 + 100, "{}", parser.held());
}

/// Numbers without pattern, the same in every run (xorshift64*).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33).unwrap()
    }
}

#[test]
fn noise_in_any_pieces_gives_the_same_and_never_panics() {
    let mut noise = Noise(0x5EED);
    let words: [&[u8]; 12] = [
        b"GET ",
        b"PUT / HTTP/1.1\r\n",
        b"HTTP/1.1",
        b"\r\n",
        b"\n",
        b"Content-Length: 3\r\n",
        b": ",
        b"/a?b ",
        b"\r\n\r\n",
        b"Transfer-Encoding: chunked",
        b"xyz",
        b"Expect: 100-continue\r\n",
    ];
    let mut whole_ones = 0;
    for _ in 0..20_000 {
        let mut bytes = Vec::new();
        for _ in 0..noise.next() % 12 {
            match noise.next() % 8 {
                0 => bytes.push(u8::try_from(noise.next() % 256).unwrap()),
                _ => bytes.extend_from_slice(words[noise.next() % words.len()]),
            }
        }
        // A bad line is found when it ends, and at once only in a first piece.
        bytes.extend_from_slice(b"\r\n\r\n");
        let whole = parsed(&[&bytes]);
        whole_ones += whole.0.len();
        let (mut pieces, mut rest) = (Vec::new(), bytes.as_slice());
        while !rest.is_empty() {
            let (piece, more) = rest.split_at((noise.next() % 9 + 1).min(rest.len()));
            pieces.push(piece);
            rest = more;
        }
        assert_eq!(parsed(&pieces), whole, "{:?}", String::from_utf8_lossy(&bytes));
    }
    assert!(whole_ones > 100, "noise makes {whole_ones} requests only");
}
