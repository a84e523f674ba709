//! The command line through a service: over a unix socket, and over TCP from what could be another
//! host, which has nothing but certificates.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
};

use serde_json::Value;

use super::{
    host::{Ended, Host, LIMIT, Running, noise, test_image, wait_until},
    serve::Service,
    terminal::Terminal,
};

/// A host with a service on TCP, and a client elsewhere.
struct Pair {
    host: Host,
    service: Service,
    elsewhere: Host,
    port: u16,
}

impl Pair {
    fn new() -> Pair {
        let (host, elsewhere) = (Host::new(), Host::new());
        let certs = host.dir().join("certs");
        host.nacelle(&["certs", certs.to_str().unwrap()]).expect(0);
        // Free a moment ago; nobody else takes one in between.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let file = |name: &str| certs.join(name).to_str().unwrap().to_owned();
        let (address, cert, key, ca) =
            (format!("127.0.0.1:{port}"), file("server-cert.pem"), file("server-key.pem"), file("ca.pem"));
        let flags = ["--listen", &address, "--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &ca];
        let service = Service::start(&host, &flags);
        wait_until("the port", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let kept = elsewhere.dir().join("certs");
        fs::create_dir(&kept).unwrap();
        for name in ["ca.pem", "cert.pem", "key.pem"] {
            fs::copy(certs.join(name), kept.join(name)).unwrap();
        }
        Pair { host, service, elsewhere, port }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.elsewhere.command(words);
        command.env("NACELLE_HOST", format!("tcp://localhost:{}", self.port));
        command.env("NACELLE_CERTS", self.elsewhere.dir().join("certs"));
        command.env_remove("NACELLE_KERNEL");
        command
    }

    fn nacelle(&self, words: &[&str]) -> Ended {
        Running::start(self.command(words), None).end(LIMIT)
    }

    fn run(&self, flags: &[&str], script: &str) -> Ended {
        let image = test_image();
        self.nacelle(&[&["run", "-m", "256M", "--cpus", "1"], flags, &[&image, "sh", "-c", script]].concat())
    }

    fn end(self) {
        drop(self.service);
        self.host.assert_nothing_left();
        assert!(self.elsewhere.machines().is_empty(), "nothing was made where the client is");
    }
}

#[test]
fn another_hosts_machines_are_worked_with_as_if_they_were_here() {
    let pair = Pair::new();
    // In the foreground: output apart, byte for byte, and the exit code.
    let ended = pair.run(&["-e", "COLOR=blue"], "printf 'a\\0\\377'; echo $COLOR >&2; exit 9").expect(9);
    assert_eq!((&ended.out[..], &ended.err[..]), (&b"a\0\xff"[..], "blue\n"));
    assert_eq!(pair.nacelle(&["ls", "-aq"]).expect(0).text(), "", "it was removed at its end");
    pair.run(&["-i"], "cat").expect(125).says(&["no standard input", "exec -it"]);

    let id = pair.run(&["-d", "--name", "far", "--init"], "echo up; exec sleep 1000").expect(0).text();
    assert_eq!(id.len(), 65);
    assert_eq!(pair.host.listed("far")["status"], "running", "it is over there");
    let table = pair.nacelle(&["ls"]).expect(0).text();
    assert!(table.contains("far") && table.contains("Up "), "{table}");
    let seen: Value = serde_json::from_slice(&pair.nacelle(&["inspect", &id[..8]]).expect(0).out).unwrap();
    assert_eq!(seen[0]["name"], "far");
    pair.nacelle(&["inspect", "fra"]).says(&["did you mean far?"]);
    wait_until("output", || pair.nacelle(&["logs", "far"]).out == b"up\n");
    assert!(pair.nacelle(&["logs", "--source", "monitor", "far"]).expect(0).text().contains(' '));
    let stats = pair.nacelle(&["stats", "--no-stream", "--format", "json", "far"]).expect(0);
    let stats: Value = serde_json::from_slice(&stats.out).unwrap();
    assert!(stats["pids"].as_u64().unwrap() >= 1 && stats["cpu_percent"].is_number(), "{stats}");

    // Through the tunnel: streams, codes, a terminal, files.
    let ended = pair.nacelle(&["exec", "far", "sh", "-c", "echo out; echo err >&2; exit 12"]).expect(12);
    assert_eq!((&ended.text()[..], &ended.err[..]), ("out\n", "err\n"));
    let bytes = noise(1 << 20);
    let ended = Running::start(pair.command(&["exec", "-i", "far", "cat"]), Some(bytes.clone())).end(LIMIT);
    assert!(ended.expect(0).out == bytes, "other bytes came back than were sent");
    let mut terminal = Terminal::start(pair.command(&["exec", "-it", "far", "sh"]));
    terminal.see("# ");
    terminal.type_keys("echo $((6*7)); exit 8\r");
    terminal.see("42");
    assert_eq!(terminal.end(), 8);
    let file = pair.elsewhere.dir().join("file");
    fs::write(&file, &bytes).unwrap();
    pair.nacelle(&["cp", file.to_str().unwrap(), "far:/tmp/there"]).expect(0);
    let back = pair.elsewhere.dir().join("back");
    pair.nacelle(&["cp", "far:/tmp/there", back.to_str().unwrap()]).expect(0);
    assert!(fs::read(&back).unwrap() == bytes);

    // Its end, waited for from here.
    let waiter = Running::start(pair.command(&["wait", "far"]), None);
    pair.nacelle(&["rm", "far"]).says(&["force=true"]);
    pair.nacelle(&["kill", "-s", "TERM", "far"]).expect(0);
    assert_eq!(waiter.end(LIMIT).expect(0).text(), "143\n");
    pair.nacelle(&["exec", "far", "true"]).expect(125).says(&["exited"]);
    pair.nacelle(&["stop", "far"]).expect(0);
    pair.nacelle(&["rm", "far"]).expect(0);
    pair.nacelle(&["images"]).expect(125).says(&["their own host"]);
    // A signal to the run is one to the command.
    let image = test_image();
    let line = ["run", "-m", "256M", "--init", &image, "sh", "-c", "echo ready; exec sleep 1000"];
    let mut running = Running::start(pair.command(&line), None);
    running.wait_for("ready\n");
    running.signal(libc::SIGINT);
    running.end(LIMIT).expect(130);
    pair.end();
}

#[test]
fn only_clients_of_the_same_authority_are_let_in() {
    let pair = Pair::new();
    let certs = pair.elsewhere.dir().join("certs");
    let url = format!("https://localhost:{}/version", pair.port);
    let curl = |directory: &Path, client: bool| {
        let mut command = Command::new("curl");
        command.args(["-sS", "-m", "20", "--cacert"]).arg(certs.join("ca.pem")).arg(&url);
        if client {
            command.arg("--cert").arg(directory.join("cert.pem")).arg("--key").arg(directory.join("key.pem"));
        }
        Running::start(command, None).end(LIMIT)
    };
    assert!(curl(&certs, true).expect(0).text().contains("firecracker_version"));
    let without = curl(&certs, false);
    assert!(without.code != 0 && without.out.is_empty(), "{}", without.text());
    let other = pair.elsewhere.dir().join("other");
    let made = pair.elsewhere.nacelle(&["certs", other.to_str().unwrap()]).expect(0).text();
    assert!(made.contains("--tls-ca"), "{made}");
    let foreign = curl(&other, true);
    assert!(foreign.code != 0 && foreign.out.is_empty(), "{}", foreign.text());
    // Older versions of TLS, and none, are not spoken.
    let mut old = Command::new("curl");
    old.args(["-sS", "-m", "20", "--tls-max", "1.2", "--cacert"]).arg(certs.join("ca.pem")).arg(&url);
    old.arg("--cert").arg(certs.join("cert.pem")).arg("--key").arg(certs.join("key.pem"));
    assert_ne!(Running::start(old, None).end(LIMIT).code, 0);
    let mut plain = Command::new("curl");
    plain.args(["-sS", "-m", "20"]).arg(format!("http://localhost:{}/version", pair.port));
    let plain = Running::start(plain, None).end(LIMIT);
    assert!(!plain.text().contains("version"), "{}", plain.text());
    // The client trusts its own authority alone, too.
    let ended = pair.nacelle(&["--tlsdir", other.to_str().unwrap(), "ls"]).expect(125);
    ended.says(&["Nothing answers at localhost", "certificate"]);
    pair.nacelle(&["--host", "tcp://localhost:1", "ls"]).expect(125).says(&["localhost, port 1"]);
    pair.nacelle(&["--host", "ftp://x", "ls"]).expect(125).says(&["unix:///PATH or tcp://NAME:PORT"]);
    let mode = |name: &str| fs::metadata(other.join(name)).unwrap().permissions().mode() & 0o777;
    for name in ["ca-key.pem", "server-key.pem", "key.pem"] {
        assert_eq!(mode(name), 0o600, "{name}");
    }
    // What is there is not replaced.
    let before = fs::read(other.join("key.pem")).unwrap();
    pair.elsewhere.nacelle(&["certs", other.to_str().unwrap()]).expect(125).says(&["key.pem already"]);
    assert_eq!(fs::read(other.join("key.pem")).unwrap(), before);
    // openssl finds them right, each for its purpose.
    for (purpose, name) in [("sslserver", "server-cert.pem"), ("sslclient", "cert.pem")] {
        let mut verify = Command::new("openssl");
        verify
            .args(["verify", "-purpose", purpose, "-CAfile"])
            .arg(other.join("ca.pem"))
            .arg(other.join(name));
        Running::start(verify, None).end(LIMIT).expect(0);
    }
    // On the same host no certificate is needed, only the socket.
    let place = format!("unix://{}", pair.service.socket.display());
    assert_eq!(pair.elsewhere.nacelle(&["--host", &place, "ls", "-q"]).expect(0).text(), "");
    pair.end();
}

#[test]
fn the_units_are_understood_by_systemd() {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/systemd");
    let here = Host::new();
    for name in ["nacelle.service", "nacelle-hardened.service"] {
        let text = fs::read_to_string(units.join(name)).unwrap();
        for line in ["Type=notify", "KillMode=process", "ExecStart=/usr/bin/nacelle serve"] {
            assert!(text.contains(line), "{name} has no {line}");
        }
        // A program that is there, in the installed one's place.
        let unit = here.dir().join(name);
        fs::write(&unit, text.replace("/usr/bin/nacelle", env!("CARGO_BIN_EXE_nacelle"))).unwrap();
        let checked = Command::new("systemd-analyze").arg("verify").arg(&unit).output();
        let checked = checked.expect("systemd is installed");
        let said = String::from_utf8_lossy(&checked.stderr).into_owned();
        assert!(checked.status.success() && !said.contains(name), "{name}: {said}");
    }
}

#[test]
fn a_machine_elsewhere_is_paused_suspended_and_goes_on() {
    let pair = Pair::new();
    pair.run(&["-d", "--name", "far"], "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done").expect(0);
    let last =
        || pair.nacelle(&["logs", "-n", "1", "far"]).expect(0).text().trim().parse::<u32>().unwrap_or(0);
    let status = || pair.host.listed("far")["status"].clone();
    for words in [["pause", "far"], ["resume", "far"], ["suspend", "far"]] {
        assert_eq!(pair.nacelle(&words).expect(0).text(), "far\n");
    }
    assert_eq!(status(), "suspended");
    assert!(pair.nacelle(&["ls"]).expect(0).text().contains("Suspended"));
    let before = last();
    pair.nacelle(&["resume", "far"]).expect(0);
    assert_eq!(status(), "running");
    wait_until("the count to go on", || last() > before);
    pair.nacelle(&["resume", "-a", "far"]).expect(125).says(&["another host"]);
    pair.nacelle(&["fork", "far"]).expect(125).says(&["own host"]);
    pair.nacelle(&["rm", "-f", "far"]).expect(0);
    pair.end();
}
