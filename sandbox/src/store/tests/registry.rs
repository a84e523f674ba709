//! Pulls from a registry that lives in the test: a TCP listener that knows the routes of the
//! distribution specification, a token server, and several ways to misbehave.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;

use super::*;
use crate::pull::Registry;
use crate::reference::Reference;

/// What the server does wrong, or differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mood {
    #[default]
    Honest,
    /// Asks for a token.
    Token,
    /// Asks for user and password.
    Basic,
    /// Another layer than asked for.
    WrongLayer,
    /// Closes in the middle of a layer.
    CutLayer,
    /// More bytes than declared.
    LongLayer,
    /// Another manifest than the header promises.
    WrongManifest,
    /// A manifest without end.
    HugeManifest,
    /// Blobs live at another origin.
    Redirect,
    /// Redirects to itself.
    Loop,
    /// Fails twice, then works.
    Shaky,
    /// Schema 1.
    Old,
}

struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
}

struct Content {
    blobs: HashMap<String, Vec<u8>>,
    manifest: Vec<u8>,
    mood: Mood,
    /// Where blobs are in the mood `Redirect`.
    other: String,
}

fn serve(content: Content) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (content, log) = (Arc::new(content), seen.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (content, log) = (content.clone(), log.clone());
            std::thread::spawn(move || answer(stream, &content, &log, address));
        }
    });
    Server { address, seen }
}

fn answer(mut stream: TcpStream, content: &Content, log: &Mutex<Vec<String>>, own: SocketAddr) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        // A TLS record of the kind "handshake": answered as servers without TLS do.
        if reader.fill_buf().ok()?.first() == Some(&0x16) {
            write!(stream, "HTTP/1.0 400 Bad Request\r\n\r\n").ok()?;
            return None;
        }
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        let path = line.split_whitespace().nth(1)?.to_owned();
        let mut authorization = String::new();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            if header.to_ascii_lowercase().starts_with("authorization: ") {
                authorization = header[15..].trim().to_owned();
            }
            if header.trim().is_empty() {
                break;
            }
        }
        let asked = {
            let mut log = log.lock().unwrap();
            log.push(format!("{path} {authorization}"));
            let same = format!("{path} ");
            log.iter().filter(|l| l.starts_with(&same)).count()
        };
        let (status, headers, body) = route(&path, &authorization, content, own, asked);
        let length = match content.mood {
            Mood::CutLayer if path.contains("/blobs/") && body.len() > 2000 => body.len() + 10,
            Mood::HugeManifest if path.contains("/manifests/") => 1 << 30,
            _ => body.len(),
        };
        write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n{headers}\r\n").ok()?;
        stream.write_all(&body).ok()?;
        if length == 1 << 30 {
            while stream.write_all(&[b' '; 4096]).is_ok() {}
        }
        if length != body.len() {
            return None;
        }
    }
}

fn route(
    path: &str,
    authorization: &str,
    content: &Content,
    own: SocketAddr,
    asked: usize,
) -> (u16, String, Vec<u8>) {
    let plain = |status, headers: &str, body: &[u8]| (status, headers.to_owned(), body.to_vec());
    if path.starts_with("/token") {
        let asked = path.contains("service=reg%20istry&scope=repository%3Aa%2Fb%3Apull");
        return plain(if asked { 200 } else { 400 }, "", br#"{"token":"secret-token"}"#);
    }
    let challenge = match content.mood {
        Mood::Token if authorization != "Bearer secret-token" => {
            format!("www-authenticate: Bearer realm=\"http://{own}/token\",service=\"reg istry\"\r\n")
        }
        Mood::Basic if authorization != "Basic dTpw" => "www-authenticate: Basic realm=\"x\"\r\n".to_owned(),
        _ => String::new(),
    };
    if !challenge.is_empty() {
        let body = br#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
        return plain(401, &challenge, body);
    }
    if content.mood == Mood::Shaky && asked <= 2 {
        return plain(503, "", b"busy");
    }
    if let Some(name) = path.strip_prefix("/v2/a/b/manifests/") {
        let digest = Digest::of(&content.manifest).to_string();
        if name != "latest" && name != digest {
            return plain(404, "", b"{}");
        }
        return match content.mood {
            Mood::WrongManifest => plain(200, &format!("docker-content-digest: {digest}\r\n"), b"{}"),
            Mood::HugeManifest => plain(200, "", b"{"),
            Mood::Old => plain(200, "", br#"{"schemaVersion":1,"name":"a/b"}"#),
            _ => plain(200, &format!("docker-content-digest: {digest}\r\n"), &content.manifest),
        };
    }
    let Some(blob) = path.strip_prefix("/v2/a/b/blobs/").and_then(|d| content.blobs.get(d)) else {
        return plain(404, "", b"{}");
    };
    let is_layer = blob.len() > 2000;
    match content.mood {
        Mood::Redirect => plain(307, &format!("location: {}{path}\r\n", content.other), b""),
        Mood::Loop if is_layer => plain(307, &format!("location: {path}\r\n"), b""),
        Mood::WrongLayer if is_layer => plain(200, "", &vec![b'x'; blob.len()]),
        Mood::LongLayer if is_layer => plain(200, "", &[&blob[..], b"more"].concat()),
        _ => plain(200, "", blob),
    }
}

fn content(mood: Mood) -> Content {
    let plain = layers();
    let config = config(&plain);
    let zipped: Vec<Vec<u8>> = plain.clone();
    let all = zipped.iter().chain([&config]);
    Content {
        blobs: all.map(|b| (Digest::of(b).to_string(), b.clone())).collect(),
        manifest: manifest(&config, &zipped),
        mood,
        other: String::new(),
    }
}

fn options() -> OpenOptions {
    OpenOptions { insecure: true, ..OpenOptions::default() }
}

fn pull(place: &Place, server: &Server) -> Result<Image, StoreError> {
    place.open_with(&format!("{}/a/b", server.address), &options())
}

#[test]
fn a_pulled_image_is_checked_kept_and_not_pulled_twice() {
    let place = Place::new();
    let content = content(Mood::Honest);
    let digest = Digest::of(&content.manifest);
    let server = serve(content);
    let image = pull(&place, &server).unwrap();
    assert_eq!(image.key, Digest::of(&config(&layers())).hex());
    assert_eq!(image.name, format!("{}/a/b:latest", server.address));
    let requests = server.seen.lock().unwrap().len();
    assert_eq!(requests, 4);
    pull(&place, &server).unwrap();
    assert_eq!(server.seen.lock().unwrap().len(), requests);
    // By digest: two small requests, no layer.
    let by_digest = format!("{}/a/b@{digest}", server.address);
    assert_eq!(place.open_with(&by_digest, &options()).unwrap().key, image.key);
    assert_eq!(server.seen.lock().unwrap().len(), requests + 2);
    let always = OpenOptions { pull: PullPolicy::Always, ..options() };
    place.open_with(&format!("{}/a/b", server.address), &always).unwrap();
    assert_eq!(server.seen.lock().unwrap().len(), requests + 4);
    assert!(place.store().remove_layers().unwrap() > 10_000);
}

#[test]
fn layers_tell_their_progress() {
    let place = Place::new();
    let server = serve(content(Mood::Honest));
    let mut seen = Vec::new();
    let mut watch = |event: Event<'_>| {
        if let Event::Download { index, done, total, count: 2, .. } = event {
            seen.push((index, done == total));
        }
    };
    let source = Source::parse(&format!("{}/a/b", server.address)).unwrap();
    place.store().open(&source, &options(), &mut watch).unwrap();
    assert!(seen.contains(&(0, true)) && seen.contains(&(1, true)) && seen.contains(&(0, false)));
}

#[test]
fn a_token_is_fetched_where_one_is_asked_for() {
    let place = Place::new();
    let server = serve(content(Mood::Token));
    pull(&place, &server).unwrap();
    let seen = server.seen.lock().unwrap();
    assert_eq!(seen.iter().filter(|s| s.starts_with("/token")).count(), 1, "{seen:?}");
}

#[test]
fn a_password_goes_to_the_registry_that_asks_for_it() {
    let server = serve(content(Mood::Basic));
    let reference = Reference::parse(&format!("{}/a/b", server.address)).unwrap();
    let limits = Limits::default();
    let mut registry = Registry::new(&reference, &limits, true).unwrap();
    registry.set_password("u", "p");
    assert_eq!(registry.resolve().unwrap().layers.len(), 2);
    registry.set_authorization("");
    registry.set_password("u", "wrong");
    let error = registry.resolve().unwrap_err().to_string();
    assert!(error.contains("not accepted"), "{error}");
}

#[test]
fn refused_access_says_what_may_help() {
    let place = Place::new();
    let server = serve(content(Mood::Basic));
    let error = chain(&pull(&place, &server).unwrap_err());
    assert!(error.contains("authentication required") && error.contains("docker login"), "{error}");
}

#[test]
fn wrong_content_is_refused_and_not_kept() {
    for (mood, expected) in [
        (Mood::WrongLayer, "wrong content for the layer"),
        (Mood::WrongManifest, "wrong content for the manifest"),
        (Mood::LongLayer, "were declared or allowed"),
        (Mood::HugeManifest, "were declared or allowed"),
        (Mood::CutLayer, "cannot be reached or does not answer properly"),
        (Mood::Loop, "redirects too often"),
        (Mood::Old, "schema 1"),
    ] {
        let place = Place::new();
        let server = serve(content(mood));
        let error = chain(&pull(&place, &server).unwrap_err());
        assert!(error.contains(expected), "{mood:?}: {error}");
        let kept = place.leftovers();
        let honest: Vec<String> = layers().iter().map(|l| Digest::of(l).hex().to_owned()).collect();
        for path in kept {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let bytes = fs::read(&path).unwrap();
            assert!(honest.contains(&name) && Digest::of(&bytes).hex() == name, "{mood:?} left {name}");
        }
    }
}

#[test]
fn a_redirect_does_not_take_the_token_along() {
    let place = Place::new();
    let storage = serve(content(Mood::Honest));
    let mut first = content(Mood::Redirect);
    first.other = format!("http://{}", storage.address);
    let server = serve(first);
    // The token is known before the first blob is asked for, as after a login.
    let reference = Reference::parse(&format!("{}/a/b", server.address)).unwrap();
    let limits = Limits::default();
    let registry = Registry::new(&reference, &limits, true).unwrap();
    registry.set_authorization("Bearer known");
    registry.resolve().unwrap();
    assert!(server.seen.lock().unwrap().iter().all(|s| s.ends_with("Bearer known")));
    let elsewhere = storage.seen.lock().unwrap().clone();
    assert!(!elsewhere.is_empty() && elsewhere.iter().all(|s| !s.contains("known")), "{elsewhere:?}");
    assert!(pull(&place, &server).is_ok());
}

#[test]
fn a_server_that_recovers_is_asked_again() {
    let place = Place::new();
    let server = serve(content(Mood::Shaky));
    pull(&place, &server).unwrap();
}

#[test]
fn what_is_not_there_is_said_so() {
    let place = Place::new();
    let server = serve(content(Mood::Honest));
    let error = chain(&place.open_with(&format!("{}/a/b:none", server.address), &options()).unwrap_err());
    assert!(error.contains("has no image"), "{error}");
    let never = OpenOptions { pull: PullPolicy::Never, ..options() };
    let error = place.open_with(&format!("{}/a/b", server.address), &never).unwrap_err();
    assert!(matches!(error, StoreError::NotCached { .. }));
    let error = chain(&place.open(&format!("{}/a/b", server.address)).unwrap_err());
    assert!(error.contains("does not speak TLS"), "{error}");
    let error = chain(&place.open_with("registry.invalid/a/b", &options()).unwrap_err());
    assert!(error.contains("only localhost"), "{error}");
}
