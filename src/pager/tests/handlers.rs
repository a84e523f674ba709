//! Firecracker's protocol with a handler in another process, which lives, dies, or dawdles.

use std::{
    io::IoSliceMut,
    mem::MaybeUninit,
    os::unix::net::UnixListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::{
    super::uffd::{Event, Userfault},
    *,
};

const SOCKET: &str = "NACELLE_TEST_PAGER_SOCKET";
const MANNER: &str = "NACELLE_TEST_PAGER_MANNER";
const PAGES: u64 = 256;
const PATIENCE: Duration = Duration::from_secs(2);

/// The handler's process: this test binary again, with this test alone.
#[test]
fn the_handler() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let manner = std::env::var(MANNER).unwrap();
    let listener = UnixListener::bind(PathBuf::from(socket)).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let mut text = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut text)];
    let got = recvmsg(&stream, &mut parts, &mut control, RecvFlags::empty()).unwrap().bytes;
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let uffd = Userfault::of(fds.next().unwrap().next().unwrap());
    let regions: Vec<serde_json::Value> = serde_json::from_slice(&text[..got]).unwrap();
    let field = |region: usize, name: &str| regions[region][name].as_u64().unwrap();
    for region in 0..regions.len() {
        assert_eq!((field(region, "page_size"), field(region, "page_size_kib")), (PAGE, PAGE));
    }
    let stream = (manner != "closes" && manner != "closes, then dies").then_some(stream);
    let mut served = 0;
    loop {
        let mut faults = Vec::new();
        uffd.drain(|event| faults.extend(matches!(event, Event::Fault(_)).then_some(event))).unwrap();
        for fault in faults {
            let Event::Fault(address) = fault else { continue };
            let within =
                |n: &usize| address.wrapping_sub(field(*n, "base_host_virt_addr")) < field(*n, "size");
            let region = (0..regions.len()).find(within).unwrap();
            let offset = address - field(region, "base_host_virt_addr") + field(region, "offset");
            match manner.as_str() {
                "dies" | "closes, then dies" if served == 3 => std::process::exit(0),
                "hangs" if served == 3 => std::thread::sleep(LONG),
                "drops one" if served == 3 => {}
                "dawdles" => {
                    std::thread::sleep(PATIENCE / 4);
                    uffd.copy(address, &page(offset / PAGE)).unwrap();
                }
                _ => drop(uffd.copy(address, &page(offset / PAGE)).unwrap()),
            }
            served += 1;
        }
        std::thread::sleep(Duration::from_micros(100));
        let _ = &stream;
    }
}

/// A handler's process, killed when dropped.
struct Process(Child);

impl Process {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Memory served by a process of that manner, and what is said of it.
struct Scene {
    _dir: tempfile::TempDir,
    process: Process,
    area: Area,
    handler: Handler,
    told: mpsc::Receiver<String>,
}

fn scene(manner: &str) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("handler");
    let module = module_path!().split_once("::").unwrap().1;
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("{module}::the_handler")]);
    child.env(SOCKET, &socket).env(MANNER, manner).stdout(Stdio::null()).stdin(Stdio::null());
    let process = Process(child.spawn().unwrap());
    let area = Area::anonymous(PAGES);
    // Two regions that lie the other way round in the snapshot.
    let ranges = [area.part(0, PAGES / 2, PAGES / 2 * PAGE), area.part(PAGES / 2, PAGES / 2, 0)];
    let until = Instant::now() + LONG;
    let (handler, told) = loop {
        let (broken, told) = complaints();
        match Handler::connect(&socket, &ranges, PATIENCE, broken) {
            Ok(handler) => break (handler, told),
            Err(e) => assert!(Instant::now() < until, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Scene { _dir: dir, process, area, handler, told }
}

fn expected(number: u64) -> Vec<u8> {
    page((number + PAGES / 2) % PAGES)
}

#[test]
fn pages_come_from_another_process() {
    for manner in ["serves", "closes"] {
        let scene = scene(manner);
        for number in 0..PAGES {
            assert_eq!(scene.area.page(number), expected(number));
        }
        assert!(scene.told.recv_timeout(2 * PATIENCE).is_err());
        scene.handler.give_up();
    }
}

#[test]
fn a_handler_that_dies_is_told_at_once_and_nobody_gets_a_wrong_page() {
    for manner in ["dies", "closes, then dies"] {
        let scene = scene(manner);
        for number in 0..3 {
            assert_eq!(scene.area.page(number), expected(number));
        }
        let waiting = hostile::touch(scene.area, 100);
        // Half of the patience: it is not for being stuck.
        let reason = scene.told.recv_timeout(PATIENCE / 2).unwrap();
        assert!(reason.contains("handler died"), "{reason}");
        assert!(waiting.recv_timeout(Duration::from_millis(100)).is_err());
        assert_eq!(scene.area.page(2), expected(2));
        scene.handler.give_up();
        waiting.recv_timeout(LONG).unwrap();
    }
}

#[test]
fn a_handler_that_is_killed_while_nobody_waits_is_told() {
    let mut scene = scene("serves");
    assert_eq!(scene.area.page(9), expected(9));
    scene.process.end();
    let reason = scene.told.recv_timeout(PATIENCE / 2).unwrap();
    assert!(reason.contains("handler died"), "{reason}");
    scene.handler.give_up();
}

#[test]
fn a_handler_that_brings_nothing_is_stuck_after_the_patience_and_not_before() {
    for manner in ["hangs", "drops one"] {
        let scene = scene(manner);
        for number in 0..3 {
            assert_eq!(scene.area.page(number), expected(number));
        }
        let before = Instant::now();
        let waiting = hostile::touch(scene.area, 200);
        let reason = scene.told.recv_timeout(LONG).unwrap();
        assert!(reason.contains("is stuck: for 2 s"), "{reason}");
        assert!(before.elapsed() >= PATIENCE, "{:?}", before.elapsed());
        assert!(waiting.try_recv().is_err());
        drop(scene.process);
        scene.handler.give_up();
        waiting.recv_timeout(LONG).unwrap();
    }
}

#[test]
fn a_slow_handler_is_not_stuck() {
    let scene = scene("dawdles");
    for number in 0..12 {
        assert_eq!(scene.area.page(number), expected(number));
    }
    assert!(scene.told.try_recv().is_err());
    scene.handler.give_up();
}

#[test]
fn a_socket_without_a_listener_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nobody");
    let connect = || {
        let ranges = [Area::anonymous(1).range(0)];
        Handler::connect(&path, &ranges, PATIENCE, never()).unwrap_err()
    };
    assert!(connect().to_string().contains("nobody cannot be connected to"));
    drop(UnixListener::bind(&path).unwrap());
    let refused = connect();
    assert!(told(&refused).contains("refused"), "{}", told(&refused));
}
