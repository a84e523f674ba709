//! The service of a host: machines through it, past it, and without it.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Instant,
};

use serde_json::{Value, json};

use super::host::{Host, LIMIT, Running, kernel, test_image, wait_until};

/// A running service.
pub struct Service {
    child: Child,
    pub socket: PathBuf,
}

impl Service {
    pub fn start(host: &Host, flags: &[&str]) -> Service {
        let socket = host.dir().join("state/serve.sock");
        let mut command = host.command(&[&["serve"], flags].concat());
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("it can be started");
        let service = Service { child, socket };
        wait_until("the service", || UnixStream::connect(&service.socket).is_ok());
        service
    }

    /// One request by curl: status and body.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let mut command = Command::new("curl");
        command.args(["-sS", "-X", method, "-w", "\n%{http_code}", "--unix-socket"]).arg(&self.socket);
        command.arg(format!("http://localhost{path}"));
        let body = body.map(|body| body.to_string().into_bytes());
        if body.is_some() {
            command.args(["--data-binary", "@-"]);
        }
        let ended = Running::start(command, body).end(LIMIT).expect(0);
        let text = ended.text();
        let (body, status) = text.rsplit_once('\n').expect("a status");
        let value = serde_json::from_str(body).unwrap_or_else(|_| body.into());
        (status.parse().expect("a number"), value)
    }

    pub fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask("GET", path, None);
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// Launches a small machine of the test image.
    pub fn launch(&self, name: &str, script: &str) -> Value {
        let body = json!({
            "name": name, "image": test_image(), "command": ["sh", "-c", script], "cpus": 1, "memory_mib": 256,
        });
        let (status, machine) = self.ask("POST", "/machines", Some(&body));
        assert_eq!(status, 201, "{machine}");
        machine
    }

    /// Ends it as nothing else could.
    pub fn kill(mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it is ours");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The lines of a stream as they come.
struct Lines {
    child: Child,
    lines: Receiver<Value>,
    seen: Vec<Value>,
}

impl Lines {
    fn follow(service: &Service, path: &str) -> Lines {
        let mut command = Command::new("curl");
        command.args(["-sSN", "--unix-socket"]).arg(&service.socket).arg(format!("http://localhost{path}"));
        let mut child = command.stdout(Stdio::piped()).spawn().expect("curl is installed");
        let out = child.stdout.take().expect("a pipe");
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let _ = sender.send(serde_json::from_str(&line).expect("a line of JSON"));
            }
        });
        Lines { child, lines, seen: Vec::new() }
    }

    /// Waits for an event of a machine.
    fn wait_for(&mut self, event: &str, machine: &str) -> Value {
        let until = Instant::now() + LIMIT;
        let fits = |line: &Value| line["event"] == event && line["machine"] == machine;
        if let Some(line) = self.seen.iter().find(|line| fits(line)) {
            return line.clone();
        }
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("no {event} of {machine} among {:#?}", self.seen)
            };
            self.seen.push(line.clone());
            if fits(&line) {
                return line;
            }
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn machines_are_launched_asked_waited_for_and_removed_through_a_service_that_may_die() {
    let host = Host::new();
    let service = Service::start(&host, &[]);
    assert_eq!(service.get("/healthz"), json!({ "status": "ok", "machines": 0 }));
    let mut events = Lines::follow(&service, "/events");

    // What it prints and how it ends comes back.
    let machine = service.launch("brief", "echo hello; echo problem >&2; read line; exit 7");
    assert_eq!((&machine["name"], &machine["resources"]["memory_mib"]), (&"brief".into(), &256.into()));
    let (status, ended) = service.ask("POST", "/machines/brief/wait", None);
    assert_eq!((status, &ended["exit_code"]), (200, &7.into()), "{ended}");
    // Which of two streams is read first is nobody's promise.
    let logs = service.get("/machines/brief/logs?follow=1");
    let logs = logs.as_str().unwrap();
    assert!(["hello\nproblem\n", "problem\nhello\n"].contains(&logs), "{logs}");
    let last = logs.lines().last().map(|line| format!("{line}\n"));
    assert_eq!(service.get("/machines/brief/logs?tail=1").as_str(), last.as_deref());
    for event in ["MachineCreated", "MachineStarted", "Running", "Ended"] {
        events.wait_for(event, "brief");
    }
    assert_eq!(events.wait_for("MachineEnded", "brief")["exit_code"], 7);

    // One that goes on: its own API is behind its name.
    service.launch("long", "echo up; exec sleep 1000");
    host.detached("beside", "exec sleep 1000");
    let names: Vec<Value> =
        service.get("/machines").as_array().unwrap().iter().map(|m| m["name"].clone()).collect();
    assert_eq!(names, ["beside", "long"]);
    assert_eq!(service.get("/machines?all=true").as_array().unwrap().len(), 3);
    assert_eq!(service.get("/machines/long/")["state"], "Running");
    assert_eq!(service.get("/machines/long/machine-config")["mem_size_mib"], 256);
    assert!(service.get("/machines/beside/vm/counters").is_object());
    let (status, refused) =
        service.ask("PUT", "/machines/long/boot-source", Some(&json!({"kernel_image_path": "x"})));
    assert_eq!(status, 400);
    assert!(refused["fault_message"].as_str().unwrap().contains("not supported after"), "{refused}");
    assert_eq!(service.ask("PATCH", "/machines/long/vm", Some(&json!({"state": "Paused"}))).0, 204);
    let paused = events.wait_for("Paused", "long");
    assert_eq!(service.ask("PATCH", "/machines/long/vm", Some(&json!({"state": "Resumed"}))).0, 204);
    let cursor = paused["cursor"].as_str().unwrap();
    let mut later = Lines::follow(&service, &format!("/events?since={cursor}"));
    later.wait_for("Running", "long");
    assert_eq!(later.seen.len(), 1, "it goes on after the cursor: {:?}", later.seen);
    let page = service.get("/metrics/openmetrics");
    let page = page.as_str().unwrap();
    for name in ["long", "beside"] {
        assert!(page.contains(&format!("nacelle_vcpus{{name=\"{name}\",")), "{page}");
    }
    assert!(page.ends_with("# EOF\n") && page.matches("# TYPE nacelle_vcpus ").count() == 1);
    assert!(service.get("/machines/long/stats")["pids"].as_u64().unwrap() >= 1);

    // Nobody misses a service that is killed, and the next one finds everything.
    let monitor = service.get("/machines/long")["state"]["monitor"]["pid"].clone();
    service.kill();
    assert_eq!(host.listed("long")["status"], "running");
    let service = Service::start(&host, &[]);
    assert_eq!(service.get("/machines/long")["state"]["monitor"]["pid"], monitor);
    assert_eq!(service.get("/machines/long/logs"), "up\n");
    let mut events = Lines::follow(&service, "/events");
    events.wait_for("MachineFound", "long");
    let refused = service.ask("DELETE", "/machines/long", None);
    assert_eq!(refused.0, 409, "{}", refused.1);
    assert_eq!(service.ask("POST", "/machines/long/stop", Some(&json!({"timeout_s": 0}))).0, 204);
    assert_eq!(service.ask("DELETE", "/machines/long", None).0, 204);
    events.wait_for("MachineRemoved", "long");
    assert_eq!(service.ask("DELETE", "/machines/beside?force=true", None).0, 204);
    assert_eq!(service.ask("DELETE", "/machines/brief", None).0, 204);
    assert_eq!(service.ask("GET", "/machines/brief", None).0, 404);
    drop((service, events, later));
    host.assert_nothing_left();
}

#[test]
fn a_machine_of_a_specification_is_configured_started_and_ended_through_the_service() {
    let host = Host::new();
    let service = Service::start(&host, &[]);
    let (status, machine) = service.ask("POST", "/machines", Some(&json!({ "name": "bare", "spec": {} })));
    assert_eq!(status, 201, "{machine}");
    assert_eq!(service.get("/machines/bare/")["state"], "Not started");
    let console = host.dir().join("console");
    let put = |path: &str, body: Value| {
        let (status, answer) = service.ask("PUT", &format!("/machines/bare{path}"), Some(&body));
        assert_eq!(status, 204, "{path}: {answer}");
    };
    let kernel = PathBuf::from(kernel());
    let image = ["vmlinux", "bzImage", "vmlinuz"]
        .iter()
        .map(|n| kernel.join(n))
        .find(|p| p.is_file())
        .unwrap_or(kernel);
    let boot = json!({ "kernel_image_path": image, "boot_args": "console=ttyS0 panic=-1 reboot=k" });
    put("/boot-source", boot.clone());
    put("/serial", json!({ "serial_out_path": console, "mode": "file" }));
    put("/actions", json!({ "action_type": "InstanceStart" }));
    // Without a root file system the kernel gives up, and the machine ends.
    let (status, ended) = service.ask("POST", "/machines/bare/wait", None);
    assert_eq!((status, &ended["exit_code"]), (200, &0.into()), "{ended}");
    assert!(std::fs::read_to_string(&console).unwrap().contains("Linux version"));
    // The same in one request.
    let spec = json!({ "boot-source": boot, "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 } });
    let (status, machine) = service.ask("POST", "/machines", Some(&json!({ "name": "whole", "spec": spec })));
    assert_eq!(status, 201, "{machine}");
    assert_eq!(service.ask("POST", "/machines/whole/wait", None).1["exit_code"], 0);
    assert!(host.nacelle(&["logs", "whole"]).expect(0).text().contains("Linux version"));
    // One that cannot be built says why, and leaves nothing.
    let broken = json!({ "boot-source": { "kernel_image_path": "/nonexistent/vmlinux" } });
    let (status, refused) =
        service.ask("POST", "/machines", Some(&json!({ "name": "broken", "spec": broken })));
    assert_eq!(status, 400);
    assert!(refused["fault_message"].as_str().unwrap().contains("/nonexistent/vmlinux"), "{refused}");
    for name in ["bare", "whole"] {
        assert_eq!(service.ask("DELETE", &format!("/machines/{name}"), None).0, 204);
    }
    drop(service);
    host.assert_nothing_left();
}

#[test]
fn a_machine_of_a_specification_is_suspended_and_goes_on_and_is_copied() {
    let host = Host::new();
    let service = Service::start(&host, &[]);
    let kernel = PathBuf::from(kernel());
    let images = ["vmlinux", "bzImage", "vmlinuz"].map(|name| kernel.join(name));
    let image = images.into_iter().find(|path| path.is_file()).unwrap_or(kernel);
    // It panics for want of a root file system and stays as it is: a guest without an agent.
    let boot = json!({ "kernel_image_path": image, "boot_args": "console=ttyS0 panic=0" });
    let spec = json!({ "boot-source": boot, "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 } });
    let (status, machine) = service.ask("POST", "/machines", Some(&json!({ "name": "bare", "spec": spec })));
    assert_eq!(status, 201, "{machine}");
    let log = || host.nacelle(&["logs", "bare"]).expect(0).text();
    wait_until("the guest to be up", || log().contains("end Kernel panic"));
    let before = log();
    assert_eq!(service.ask("POST", "/machines/bare/suspend", None).0, 204);
    assert_eq!(service.get("/machines/bare")["state"]["status"], "suspended");
    let (status, refused) = service.ask("GET", "/machines/bare/vm/config", None);
    assert_eq!((status, refused["fault_message"].as_str().unwrap().contains("suspended")), (409, true));
    assert_eq!(service.ask("POST", "/machines/bare/resume", None).0, 204);
    assert_eq!(service.get("/machines/bare/")["state"], "Running");
    assert_eq!(log(), before, "the log is the same file, and it did not boot again");
    assert_eq!(service.ask("POST", "/machines/nobody/suspend", None).0, 404);
    host.nacelle(&["fork", "-q", "--name", "copy", "bare"]).expect(0);
    assert_eq!(service.get("/machines/copy-1/")["state"], "Running");
    for name in ["bare", "copy-1"] {
        assert_eq!(service.ask("DELETE", &format!("/machines/{name}?force=true"), None).0, 204);
    }
    drop(service);
    host.assert_nothing_left();
}

#[test]
fn what_is_asked_wrong_is_refused_in_words_and_changes_nothing() {
    let host = Host::new();
    let service = Service::start(&host, &[]);
    host.command(&["serve"]).status().map(|status| assert_eq!(status.code(), Some(125))).unwrap();
    let second = host.nacelle(&["serve"]).expect(125);
    second.says(&["Another 'nacelle serve' listens on"]);
    let big = json!({ "image": "x".repeat(2 << 20) });
    let cases = [
        ("GET", "/machine", None, 404, "did you mean /machines?"),
        ("PUT", "/machines", None, 405, "takes GET and POST"),
        ("GET", "/machines?al=1", None, 400, "did you mean all?"),
        ("GET", "/machines/nobody", None, 404, "No machine is called"),
        ("GET", "/machines/../../etc", None, 404, ""),
        ("GET", "/machines/nobody/vm/config", None, 404, "No machine is called"),
        ("DELETE", "/machines/nobody", None, 404, "No machine is called"),
        ("POST", "/machines", Some(json!({})), 400, "either an image or a spec"),
        ("POST", "/machines", Some(json!({ "imag": "x" })), 400, "did you mean `image`?"),
        ("POST", "/machines", Some(json!({ "image": "/nonexistent" })), 400, "/nonexistent"),
        ("POST", "/machines", Some(json!({ "image": test_image(), "name": "../x" })), 400, "cannot be used"),
        ("POST", "/machines", Some(big), 413, "1048576 bytes"),
        ("GET", "/events?since=x", None, 400, "cursor"),
        ("GET", "/machines/nobody/logs?source=x", None, 400, "kernel"),
    ];
    for (method, path, body, status, text) in cases {
        let (got, answer) = service.ask(method, path, body.as_ref());
        let said = answer["fault_message"].as_str().unwrap_or_default();
        assert!(got == status && said.contains(text), "{method} {path}: {got} {answer}");
    }
    // Flags that do not go together.
    host.nacelle(&["serve", "--listen", "127.0.0.1:0"])
        .expect(125)
        .says(&["--tls-cert and --tls-key and --tls-ca"]);
    host.nacelle(&["serve", "--tls-key", "x"]).expect(125).says(&["--listen"]);
    // Three hundred who say half a word keep nobody from being served.
    let slow: Vec<UnixStream> = (0..300)
        .map(|_| {
            let mut stream = UnixStream::connect(&service.socket).unwrap();
            stream.write_all(b"GET /machines HTTP/1.1\r\nHo").unwrap();
            stream
        })
        .collect();
    let asked = Instant::now();
    assert_eq!(service.get("/healthz")["status"], "ok");
    assert!(asked.elapsed() < LIMIT / 9, "a fresh client waited for slow ones");
    let mut long = UnixStream::connect(&service.socket).unwrap();
    long.write_all(format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(100_000)).as_bytes())
        .ok();
    let mut answer = String::new();
    let _ = long.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    drop((slow, service));
    host.assert_nothing_left();
}
