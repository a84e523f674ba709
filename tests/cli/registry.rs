//! Images from a registry server, and from files and directories.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::{fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;

use super::{
    host::{Ended, Host, SMALL, wait_until},
    image::{Image, Layer, digest},
    terminal::Terminal,
};

/// Debian's docker-registry on this host, with its storage in a directory of its own.
struct Registry {
    server: Child,
    port: u16,
    dir: TempDir,
}

impl Registry {
    fn start() -> Registry {
        let dir = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let storage = dir.path().join("storage");
        let settings = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: \
             127.0.0.1:{port}\n",
            storage.display()
        );
        let file = dir.path().join("config.yml");
        fs::write(&file, settings).expect("a file");
        let log = fs::File::create(dir.path().join("log")).expect("a file");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a descriptor")).stderr(log);
        // SAFETY: one system call: the server is not to outlive a test that is killed.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            })
        };
        let server = command.spawn().expect("docker-registry can be started: is the package installed?");
        let registry = Registry { server, port, dir };
        wait_until("the registry", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        registry
    }

    /// The name under which `nacelle run` finds an image.
    fn name(&self, rest: &str) -> String {
        format!("localhost:{}/{rest}", self.port)
    }

    /// Uploads an image, as `docker push` does.
    fn push(&self, repository: &str, tag: &str, image: &Image) {
        let (blobs, manifest) = image.blobs();
        for blob in blobs {
            let begun = self.ask("POST", &format!("/v2/{repository}/blobs/uploads/"), "", &[]);
            assert_eq!(begun.code, 202, "{}", begun.text);
            let place = begun.header("location");
            let place = place.find("/v2/").map_or(&place[..], |at| &place[at..]);
            let mark = if place.contains('?') { '&' } else { '?' };
            let place = format!("{place}{mark}digest={}", digest(&blob));
            let done = self.ask("PUT", &place, "application/octet-stream", &blob);
            assert_eq!(done.code, 201, "{}", done.text);
        }
        let place = format!("/v2/{repository}/manifests/{tag}");
        let done = self.ask("PUT", &place, "application/vnd.oci.image.manifest.v1+json", &manifest);
        assert_eq!(done.code, 201, "{}", done.text);
    }

    fn ask(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("the registry listens");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a limit");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost:{}\r\nConnection: close\r\nContent-Type: {kind}\r\n\
             Content-Length: {}\r\n\r\n",
            self.port,
            body.len()
        );
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).expect("it reads");
        let mut text = Vec::new();
        stream.read_to_end(&mut text).expect("it answers");
        let text = String::from_utf8_lossy(&text).into_owned();
        let code = text.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("a status");
        Answer { code, text }
    }

    /// The file in which the server keeps a blob.
    fn blob(&self, digest: &str) -> PathBuf {
        let hex = &digest[7..];
        let folder = self.dir.path().join("storage/docker/registry/v2/blobs/sha256");
        folder.join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

struct Answer {
    code: u16,
    text: String,
}

impl Answer {
    fn header(&self, name: &str) -> String {
        let start = format!("{name}:");
        let line = self.text.lines().find(|line| line.to_ascii_lowercase().starts_with(&start));
        line.unwrap_or_else(|| panic!("no {name} in {}", self.text))[start.len()..].trim().to_owned()
    }
}

/// A port nobody listens on.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr()).expect("a port").port()
}

fn run(host: &Host, flags: &[&str], image: &str, command: &[&str]) -> Ended {
    host.nacelle(&[&["run"], &SMALL[..], flags, &[image], command].concat())
}

#[test]
fn an_image_from_a_registry_runs_interactively_and_is_kept() {
    let host = Host::with_own_cache();
    let registry = Registry::start();
    let layer = Layer::new().file("etc/motd", 0o644, b"pulled\n");
    registry.push("busybox", "latest", &Image::busybox().layer(layer));
    let name = registry.name("busybox:latest");

    let line = [&["run", "-it", "--insecure-registry"], &SMALL[..], &[&name, "sh"]].concat();
    let mut terminal = Terminal::start(host.command(&line));
    terminal.see("# ");
    terminal.type_keys("cat /etc/motd; echo in-$((1+1))\r");
    terminal.see("pulled");
    terminal.see("in-2");
    terminal.type_keys("exit 4\r");
    assert_eq!(terminal.end(), 4);

    // With the server gone the image is still there, and what is not there is said.
    drop(registry);
    let ended = run(&host, &["-q", "--insecure-registry"], &name, &["cat", "/etc/motd"]).expect(0);
    assert_eq!(ended.text(), "pulled\n");
    let ended = run(&host, &["--insecure-registry", "--pull", "always"], &name, &["true"]).expect(125);
    ended.says(&["cannot be pulled", "cannot be reached", "refused"]);
    host.assert_nothing_left();
}

#[test]
fn what_a_registry_does_not_have_or_sends_wrong_is_said_and_not_kept() {
    let host = Host::with_own_cache();
    let registry = Registry::start();
    let image = Image::busybox();
    registry.push("team/busybox", "v1", &image);
    let name = registry.name("team/busybox:v1");
    let fails = |flags: &[&str], name: &str| run(&host, flags, name, &["true"]).expect(125);

    fails(&["--insecure-registry"], &registry.name("team/busybox:none")).says(&["cannot be pulled", "none"]);
    fails(&["--insecure-registry"], &registry.name("nobody/nothing"))
        .says(&["cannot be pulled", "nobody/nothing"]);
    fails(&[], &name).says(&["does not speak TLS"]);
    fails(&["--insecure-registry"], &format!("localhost:{}/busybox", free_port()))
        .says(&["cannot be pulled", "cannot be reached"]);
    fails(&["--pull", "never"], &name).says(&["not in the cache"]);
    fails(&[], "UPPER/case").says(&["UPPER/case"]);
    assert_eq!(host.cached(), Vec::<PathBuf>::new());

    // By digest: the right one runs; a damaged blob is noticed.
    let (blobs, manifest) = image.blobs();
    let layer = registry.blob(&digest(&blobs[1]));
    let mut bytes = fs::read(&layer).expect("the server's file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&layer, &bytes).expect("damaged");
    let by_digest = registry.name(&format!("team/busybox@{}", digest(&manifest)));
    fails(&["--insecure-registry"], &by_digest).says(&["digest"]);
    assert_eq!(host.cached(), Vec::<PathBuf>::new());
    bytes[middle] ^= 1;
    fs::write(&layer, &bytes).expect("mended");
    // Shown as it goes, on standard error alone.
    let ended = run(&host, &["--insecure-registry"], &by_digest, &["echo", "ran"]).expect(0);
    assert_eq!(ended.text(), "ran\n");
    ended.says(&["Image ready"]);
    let absent = registry.name(&format!("team/busybox@sha256:{}", "0".repeat(64)));
    fails(&["--insecure-registry"], &absent).says(&["cannot be pulled"]);
    host.assert_nothing_left();
}

#[test]
fn a_saved_image_runs() {
    let host = Host::with_own_cache();
    let layer = Layer::new().file("etc/motd", 0o644, b"saved\n");
    let file = Image::busybox().layer(layer).saved(&host.dir().join("image.tar"));
    assert_eq!(run(&host, &["-q"], &file, &["cat", "/etc/motd"]).expect(0).text(), "saved\n");
    let cut = host.dir().join("cut.tar");
    let bytes = fs::read(&file).unwrap();
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let before = host.cached();
    run(&host, &[], cut.to_str().unwrap(), &["true"]).expect(125).says(&["cut.tar"]);
    fs::write(&cut, b"no archive at all").unwrap();
    run(&host, &[], cut.to_str().unwrap(), &["true"]).expect(125).says(&["cut.tar"]);
    assert_eq!(host.cached(), before);
    host.assert_nothing_left();
}

#[test]
fn a_root_directory_runs() {
    let host = Host::with_own_cache();
    let root = host.dir().join("root");
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(Path::new).find(|path| path.is_file());
    for name in ["bin", "etc", "proc", "dev", "sys", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(busybox.expect("busybox"), root.join("bin/busybox")).unwrap();
    for name in ["sh", "cat", "id"] {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::write(root.join("etc/motd"), "a directory\n").unwrap();
    let path = root.to_str().unwrap();
    let ended =
        run(&host, &["-q"], path, &["sh", "-c", "cat /etc/motd; echo more >>/etc/motd; id -u"]).expect(0);
    assert_eq!(ended.text(), "a directory\n0\n");
    assert_eq!(fs::read_to_string(root.join("etc/motd")).unwrap(), "a directory\n");
    // A change of the directory is seen by the next machine.
    fs::write(root.join("etc/motd"), "another text\n").unwrap();
    assert_eq!(run(&host, &["-q"], path, &["cat", "/etc/motd"]).expect(0).text(), "another text\n");
    run(&host, &[], path, &[]).expect(125).says(&["no command"]);
    run(&host, &[], "./no/such/directory", &["true"])
        .expect(125)
        .says(&["./no/such/directory", "does not exist"]);
    host.assert_nothing_left();
}
