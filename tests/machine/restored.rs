//! What a restored guest notices: that it is another machine, and what time it is.
//!
//! Each test saves a machine whose guest is in the middle of something, and has one or two other
//! monitors take it up.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use api::{
    client::Client,
    spec::{CreateSnapshot, LoadSnapshot, Transport, Vsock, VsockOverride},
};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    vm::{Setup, Vm},
    vsock::connect,
};

/// Runs a task of [`crate::side`] in the guest.
const RUN: &str = r#"run() { TASK="$*" side --ignored --exact side::in_the_guest --nocapture; }
"#;
/// How far the guest's clock may be off.
const CLOCK_ERROR: Duration = Duration::from_millis(500);

#[track_caller]
fn done(outcome: Result<Value, api::client::ClientError>) {
    assert_eq!(outcome.unwrap_or_else(|e| panic!("{e}")), Value::Null);
}

/// Saves a machine; it is paused afterwards.
fn save(vm: &Vm) -> PathBuf {
    let snapshot_path = vm.folder().join("saved");
    let mut client = vm.client();
    done(client.patch("/vm", Some(&json!({ "state": "Paused" }))));
    let create = CreateSnapshot { snapshot_path: snapshot_path.clone(), ..CreateSnapshot::default() };
    done(client.put("/snapshot/create", Some(&create)));
    snapshot_path
}

fn load(client: &mut Client, snapshot_path: PathBuf, change: impl FnOnce(&mut LoadSnapshot)) {
    let mut load = LoadSnapshot { snapshot_path, resume_vm: true, ..LoadSnapshot::default() };
    change(&mut load);
    done(client.put("/snapshot/load", Some(&load)));
}

/// What the guest printed after `@name=`, once that is a whole line.
fn told(vm: &Vm, name: &str) -> String {
    let start = format!("@{name}=");
    vm.wait_for(&start);
    loop {
        let console = vm.console();
        if let Some((value, _)) = console.split_once(&start).and_then(|(_, rest)| rest.split_once('\n')) {
            return value.trim().to_owned();
        }
        vm.wait_for("\n");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn clones_of_one_snapshot_draw_different_random_numbers_and_were_told() {
    let script = format!(
        "{RUN}
        dmesg -c > /dev/null
        run random
        fact reseeded $(dmesg | grep -c 'crng reseeded due to virtual machine fork')
        "
    );
    let vm = Setup::new(Kernel::quick(), Transport::Mmio).with_side().script(script).start_with_api();
    vm.wait_for("@asking=");
    // Going on after a pause is no restore.
    let mut client = vm.client();
    for state in ["Paused", "Resumed"] {
        done(client.patch("/vm", Some(&json!({ "state": state }))));
    }
    let saved = save(&vm);
    let mut drawn = Vec::new();
    // Debian's cloud kernel has no driver, and nobody tells its clones but an agent.
    let driven = std::env::var_os("NACELLE_TEST_BUILT_KERNEL").is_some();
    for name in ["one", "two"] {
        let (mut clone, mut client) = vm.beside(name);
        load(&mut client, saved.clone(), |_| ());
        // The driver works when its interrupt comes: the first word is only to know that it did.
        clone.say("first");
        clone.wait_for("@first=");
        clone.say("second");
        drawn.push(told(&clone, "second"));
        clone.say("end");
        let ended = clone.succeed();
        ended.is("reseeded", &u8::from(driven));
    }
    assert!(drawn[0].len() == 64 && (drawn[0] != drawn[1] || !driven), "{drawn:?}");
}

#[test]
fn each_clone_has_an_id_of_its_own() {
    let script = format!(
        "{}
        echo begun
        while read -r word; do
            [ $word = end ] && break
            echo \"@$word=$(peek 0x9f000 16) $(peek 0x9e000 112)\"
        done
        ",
        crate::generation::PEEK
    );
    let mut vm = Setup::new(Kernel::debian(), Transport::Pci).script(script).start_with_api();
    vm.wait_for("begun\n");
    vm.say("before");
    let mut seen = vec![told(&vm, "before")];
    let saved = save(&vm);
    for name in ["one", "two"] {
        let (mut clone, mut client) = vm.beside(name);
        load(&mut client, saved.clone(), |_| ());
        clone.say(name);
        seen.push(told(&clone, name));
        clone.say("end");
        clone.succeed();
    }
    let halves: Vec<(&str, &str)> = seen.iter().map(|line| line.split_once(' ').unwrap()).collect();
    let [(first, page), (one, page_one), (two, page_two)] = halves[..] else { panic!("{halves:?}") };
    assert!(first != one && first != two && one != two, "{halves:?}");
    // Sequence (at 12), disruptions (16), generation (104): from 0 to 2, 1 and 1 in each clone.
    let at = |page: &str, byte: usize| u8::from_str_radix(&page[2 * byte..2 * byte + 2], 16).unwrap();
    let counts = |page| (at(page, 12), at(page, 16), at(page, 104));
    assert_eq!((counts(page), counts(page_one), counts(page_two)), ((0, 0, 0), (2, 1, 1), (2, 1, 1)));
}

/// Sends `text` and expects it back.
fn echoed(stream: &mut UnixStream, text: &[u8]) {
    stream.write_all(text).unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(back, text);
}

fn accepted(listener: &UnixListener) -> UnixStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    stream
}

fn connections_end_once_and_new_ones_come(kernel: Kernel, transport: Transport, cid: Option<u32>) {
    // The second one has to find the listener as it was, and to be told of the first one's end.
    let script = format!("{RUN} run echo 5000 & run lose 6000; wait");
    let mut setup = Setup::new(kernel, transport).size(2, 384).with_side().script(script);
    let uds = setup.folder().join("v.sock");
    setup.spec.vsock = Some(Vsock { guest_cid: 52, uds_path: uds.clone(), vsock_id: None });
    let listener = UnixListener::bind(setup.folder().join("v.sock_6000")).unwrap();
    let vm = setup.start_with_api();
    let mut called = accepted(&listener);
    vm.wait_for("@serving=5000\n");
    let mut calling = connect(&uds, 5000);
    echoed(&mut calling, b"before");
    vm.wait_for("@connected=6000\n");
    let saved = save(&vm);
    let (clone, mut client) = vm.beside("clone");
    let place = |name: &str| clone.folder().join(name);
    let listener = UnixListener::bind(place("v.sock_6000")).unwrap();
    load(&mut client, saved, |load| {
        load.vsock_override = Some(VsockOverride { uds_path: place("v.sock"), guest_cid: cid });
    });
    // At once: the clone's guest may not have understood yet.
    let mut again = connect(Path::new(&place("v.sock")), 5000);
    echoed(&mut again, b"after");
    drop(again);
    // The guest's own connection ended with an error, and it has made another one.
    let mut second = accepted(&listener);
    second.write_all(b"hello").unwrap();
    drop(second);
    let ended = clone.succeed();
    ended.is("lost", &libc::ECONNRESET);
    ended.is("dropped", &libc::ECONNRESET);
    ended.is("heard", "hello");
    assert_eq!(ended.console.matches("@lost=").count(), 1, "{}", ended.console);
    // The first machine's connections are its own affair; it stands still.
    called.set_nonblocking(true).unwrap();
    assert!(called.read(&mut [0; 1]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock));
}

#[test]
fn vsock_connections_end_once_and_listeners_stay_over_mmio() {
    connections_end_once_and_new_ones_come(Kernel::debian(), Transport::Mmio, None);
}

#[test]
fn vsock_connections_end_once_and_listeners_stay_over_pci_with_another_context_id() {
    connections_end_once_and_new_ones_come(Kernel::quick(), Transport::Pci, Some(77));
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

#[test]
fn the_clock_goes_on_from_the_present_where_that_is_asked_for() {
    let script = format!("{RUN} run clock");
    let mut vm =
        Setup::new(Kernel::quick(), Transport::Mmio).size(2, 256).with_side().script(script).start_with_api();
    vm.wait_for("@ticking=");
    // The lab's guests may start with a clock that is a little off.
    vm.say("before");
    let nanoseconds = |vm: &Vm, name: &str| Duration::from_nanos(told(vm, name).parse().unwrap());
    let before = nanoseconds(&vm, "before");
    let off = now().saturating_sub(before);
    let saved = save(&vm);
    thread::sleep(Duration::from_secs(5));
    for (name, advance) in [("still", false), ("advanced", true)] {
        let (mut clone, mut client) = vm.beside(name);
        load(&mut client, saved.clone(), |load| load.clock_realtime = advance);
        let asked = now();
        clone.say(name);
        let told = nanoseconds(&clone, name);
        let answered = now();
        clone.say("end");
        let ended = clone.succeed();
        ended.is("back", "0");
        if advance {
            // What it says was true at some moment between question and answer.
            let (early, late) = (asked.saturating_sub(off + CLOCK_ERROR), answered + CLOCK_ERROR);
            assert!(early <= told && told <= late, "{asked:?} <= {told:?} <= {answered:?}, off by {off:?}");
        } else {
            assert!(
                told + Duration::from_secs(4) < answered,
                "{told:?} {answered:?}: it did not stand still"
            );
        }
    }
}
