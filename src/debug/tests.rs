//! A debugger that speaks the protocol by hand, to a vCPU in real mode. Where there is no
//! `/dev/kvm`, only what needs none is looked at.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, mpsc},
    time::Duration,
};

use api::spec::MachineConfig;
use arch::state::StateShape;
use devices::{Memory, bus::Bus};
use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    metrics::Milestones,
    vcpu::{Buses, Report, Reporter, Vcpus},
    vm::memory,
};

const CODE: u64 = 0x1000;
/// inc ax; jmp back; for ever.
const LOOP: [u8; 3] = [0x40, 0xeb, 0xfd];

fn ram() -> Memory {
    memory::map(&MachineConfig { mem_size_mib: 16, ..MachineConfig::default() }, memory::Backing::Empty)
        .unwrap()
}

fn shape() -> Option<(VmFd, Arc<StateShape>)> {
    let kvm = Kvm::new().ok()?;
    let vm = kvm.create_vm().ok()?;
    let shape = StateShape::new(&kvm, &vm, false).ok()?;
    Some((vm, Arc::new(shape)))
}

/// A session with the other end of its socket.
fn session(guest: Guest) -> (Session, UnixStream) {
    let (own, client) = UnixStream::pair().unwrap();
    own.set_nonblocking(true).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut session = Session { socket: own.into(), stub: None, unsent: false, guest };
    session.begin().unwrap();
    (session, client)
}

/// A guest that runs [`LOOP`] on each of two vCPUs.
fn running() -> Option<(VmFd, Guest, Memory, mpsc::Receiver<Report>)> {
    let kvm = Kvm::new().ok()?;
    let vm = kvm.create_vm().unwrap();
    let ram = ram();
    memory::register(&vm, &ram, false).unwrap();
    ram.write_slice(&LOOP, GuestAddress(CODE)).unwrap();
    let fds: Vec<_> = (0..2).map(|index| vm.create_vcpu(index).unwrap()).collect();
    for fd in &fds {
        let mut sregs = fd.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        fd.set_sregs(&sregs).unwrap();
        fd.set_regs(&kvm_regs { rip: CODE, rsp: 0x8000, rflags: 2, ..Default::default() }).unwrap();
    }
    let buses = Buses {
        mmio: Arc::new(Bus::new()),
        ports: Arc::new(Bus::new()),
        milestones: Arc::new(Milestones::default()),
        loading: Arc::new(crate::vm::loading::Loading::done()),
    };
    let (sender, reports) = mpsc::channel();
    let reporter: Reporter = Arc::new(move |report| {
        let _ = sender.send(report);
    });
    let vcpus = Vcpus::spawn(fds, &buses, &reporter).unwrap();
    vcpus.run().unwrap();
    let shape = Arc::new(StateShape::new(&kvm, &vm, false).unwrap());
    let mut guest = Guest::new(ram.clone(), shape, guest::blocks_interrupts(&vm));
    guest.vcpus = vcpus;
    Some((vm, guest, ram, reports))
}

fn packet(content: &str) -> Vec<u8> {
    let sum = content.bytes().fold(0u8, u8::wrapping_add);
    format!("${content}#{sum:02x}").into_bytes()
}

/// Sends a packet and returns the answer's content.
fn ask(session: &mut Session, client: &mut UnixStream, content: &str) -> String {
    client.write_all(&packet(content)).unwrap();
    session.serve().unwrap();
    session.send().unwrap();
    answer(client)
}

/// The next packet's content, with runs written out (`0* ` is `0000`).
fn answer(client: &mut UnixStream) -> String {
    let (mut text, mut byte) = (Vec::new(), [0]);
    while client.read_exact(&mut byte).is_ok() && byte[0] != b'#' {
        match (byte[0], text.last().copied()) {
            (b'+' | b'$', _) if text.is_empty() => {}
            (b'*', Some(last)) => {
                client.read_exact(&mut byte).unwrap();
                text.extend(std::iter::repeat_n(last, usize::from(byte[0] - 29)));
            }
            _ => text.push(byte[0]),
        }
    }
    client.read_exact(&mut [0; 2]).unwrap();
    client.write_all(b"+").unwrap();
    String::from_utf8(text).unwrap()
}

#[test]
fn registers_and_memory_are_read_and_written_while_the_guest_stands_still() {
    let Some((_vm, guest, ram, _reports)) = running() else { return };
    let (mut session, mut client) = session(guest);
    let (s, c) = (&mut session, &mut client);
    assert!(ask(s, c, "qSupported:swbreak+;hwbreak+").contains("qXfer:features:read+"));
    assert!(ask(s, c, "qXfer:features:read:target.xml:0,800").contains("org.gnu.gdb.i386.core"));
    assert!(ask(s, c, "?").starts_with("T05thread:"));
    assert_eq!(ask(s, c, "qfThreadInfo"), "m01,02");
    assert_eq!(ask(s, c, "m1000,3"), "40ebfd");
    assert_eq!(ask(s, c, "M2000,2:abcd"), "OK");
    assert_eq!(ram.read_obj::<[u8; 2]>(GuestAddress(0x2000)).unwrap(), [0xab, 0xcd]);
    // Where there is no memory, and where there is none any more.
    assert!(ask(s, c, "m10000000,4").starts_with('E'));
    assert_eq!(ask(s, c, "mffffff,4").len(), 2);
    assert!(ask(s, c, "mffffffffffffffff,4").starts_with('E'));
    assert!(ask(s, c, "Mffffff,2:0102").starts_with('E'));
    let registers = ask(s, c, "g");
    assert_eq!(registers.len(), arch::debug::BLOCK * 2);
    let mut changed = registers.clone();
    changed.replace_range(16..32, "8877665544332211");
    assert_eq!(ask(s, c, &format!("G{changed}")), "OK");
    assert_eq!(ask(s, c, "g")[16..32], *"8877665544332211");
    // Registers of another processor are no registers.
    client.write_all(&packet("G00")).unwrap();
    assert!(matches!(session.serve(), Err(Over::Protocol(_))));
}

#[test]
fn a_breakpoint_is_hidden_and_gone_when_the_debugger_leaves() {
    let Some((_vm, guest, ram, _reports)) = running() else { return };
    let (mut session, mut client) = session(guest);
    let (s, c) = (&mut session, &mut client);
    assert_eq!(ask(s, c, "Z0,1001,1"), "OK");
    assert_eq!(ram.read_obj::<[u8; 3]>(GuestAddress(CODE)).unwrap(), [0x40, 0xcc, 0xfd]);
    assert_eq!(ask(s, c, "m1000,3"), "40ebfd");
    assert_eq!(ask(s, c, "M1001,2:90f4"), "OK");
    assert_eq!(ask(s, c, "m1000,3"), "4090f4");
    assert_eq!(ask(s, c, "M1001,2:ebfd"), "OK");
    for (slot, expected) in [("1,1000,1", "OK"), ("2,3000,8", "OK"), ("4,3001,4", "E16"), ("3,3008,4", "OK")]
    {
        assert_eq!(ask(s, c, &format!("Z{slot}")), expected, "{slot}");
    }
    client.write_all(&packet("D")).unwrap();
    assert!(matches!(session.serve(), Err(Over::Detached)));
    session.send().unwrap();
    assert_eq!(answer(&mut client), "OK");
    session.guest.let_go().unwrap();
    assert_eq!(ram.read_obj::<[u8; 3]>(GuestAddress(CODE)).unwrap(), LOOP);
    session.guest.vcpus.pause().unwrap();
}

#[test]
fn the_guest_runs_when_machine_and_debugger_both_let_it() {
    let Some((_vm, guest, _ram, _reports)) = running() else { return };
    let count = |guest: &Guest| guest.vcpus.on(0, |fd| fd.get_regs().unwrap().rax).unwrap();
    let (mut session, mut client) = session(guest);
    let before = count(&session.guest);
    // The machine is resumed, as after a pause, while the debugger holds it.
    session.guest.vcpus.pause().unwrap();
    session.guest.vcpus.run().unwrap();
    assert_eq!(count(&session.guest), before);
    // The debugger lets go while the machine is paused.
    session.guest.vcpus.pause().unwrap();
    client.write_all(&packet("vCont;c")).unwrap();
    session.serve().unwrap();
    assert_eq!(count(&session.guest), before);
    session.guest.vcpus.run().unwrap();
    assert!(session.guest.vcpus.on(0, |_| ()).is_err(), "it runs");
    // Nothing is read of a guest that runs.
    client.write_all(&packet("m1000,3")).unwrap();
    session.serve().unwrap();
    session.send().unwrap();
    assert!(answer(&mut client).starts_with('E'));
    client.write_all(b"\x03").unwrap();
    session.serve().unwrap();
    session.send().unwrap();
    assert_eq!(answer(&mut client), "T02thread:01;");
    let stopped = count(&session.guest);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(count(&session.guest), stopped);
    session.guest.let_go().unwrap();
    session.guest.vcpus.pause().unwrap();
}

#[test]
fn answers_that_nobody_reads_have_an_end() {
    let Some((_vm, guest, ..)) = running() else { return };
    let (mut session, mut client) = session(guest);
    // One packet that asks for too much.
    client.write_all(&packet("m0,ffffff")).unwrap();
    assert!(matches!(session.serve(), Err(Over::Protocol(_))));

    let Some((_vm, guest, ..)) = running() else { return };
    let (mut session, mut client) = self::session(guest);
    client.set_nonblocking(true).unwrap();
    let many = packet("g").repeat(1000);
    for _ in 0..1000 {
        let _ = client.write(&many);
        if session.serve().and_then(|()| session.send()).is_err() {
            return;
        }
        let held = session.stub.as_mut().map_or(0, |stub| wire(stub).waiting.capacity());
        assert!(held <= 2 * wire::WAITING, "{held} bytes wait");
        if session.unsent {
            break;
        }
    }
    assert!(session.unsent, "the socket takes all");
}

#[test]
fn nonsense_ends_the_session_at_most() {
    let names = [
        "g",
        "G",
        "m",
        "M",
        "X",
        "Z0",
        "Z1",
        "Z2",
        "z0",
        "z4",
        "vCont;",
        "vCont;s:",
        "vCont;c:",
        "H",
        "T",
        "q",
        "qXfer:features:read:",
        "qRcmd,",
        "qSupported:",
        "qThreadExtraInfo,",
        "c",
        "s",
        "k",
        "D",
        "?",
        "vFile:",
        "p",
        "P",
        "QStartNoAckMode",
        "vKill;",
        "qC",
        "\u{3}",
        "vMustReplyEmpty",
        "b",
        "R",
        "!",
    ];
    let arguments = [
        "",
        "0",
        "1",
        "ffffffffffffffff",
        "0,0",
        "1000,ffffffffffffffff",
        "p0.0",
        "p1.-1",
        "-1",
        "p1.ffffffffffffffff",
        "ffffffffffffffff,8",
        "1000,8:00",
        "target.xml:0,ffffffffffffffff",
        "target.xml:ffffffffffffffff,1",
        "706879736963616c206f6e",
        ";;;",
        ":",
        ",",
        "#",
        "}",
        "*~",
        "1000,1:}",
        "6",
        "0;1",
    ];
    let ram = ram();
    let mut state = 0x9e37_79b9_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    // Without vCPUs there is nothing to wait for.
    let Some((_vm, shape)) = shape() else { return };
    for _ in 0..3000 {
        let (mut session, mut client) = session(Guest::new(ram.clone(), Arc::clone(&shape), false));
        for _ in 0..8 {
            let text = format!("{}{}", names[random(names.len())], arguments[random(arguments.len())]);
            let mut bytes = packet(&text);
            if random(4) == 0 {
                let at = random(bytes.len());
                bytes[at] = random(256) as u8;
            }
            client.write_all(&bytes).unwrap();
            if session.serve().and_then(|()| session.send()).is_err() {
                break;
            }
        }
    }
}

/// Lets the guest run until it has met something, and returns what is told of it.
fn go(session: &mut Session, client: &mut UnixStream, reports: &mpsc::Receiver<Report>, how: &str) -> String {
    client.write_all(&packet(how)).unwrap();
    session.serve().unwrap();
    // A report may be of something that was told before.
    while matches!(session.stub, Some(Stub::Running(_))) {
        match reports.recv_timeout(Duration::from_secs(20)) {
            Ok(Report::Debugged) => session.met().unwrap(),
            other => panic!("The guest did not stop: {other:?}"),
        }
    }
    session.send().unwrap();
    answer(client)
}

/// Where the first vCPU is.
fn place(session: &mut Session, client: &mut UnixStream) -> String {
    assert_eq!(ask(session, client, "Hg1"), "OK");
    ask(session, client, "g")[2 * arch::debug::PC..][..4].to_owned()
}

#[test]
fn a_guest_steps_and_stops_at_debug_registers() {
    let Some((_vm, guest, _ram, reports)) = running() else { return };
    let (mut session, mut client) = session(guest);
    let (s, c) = (&mut session, &mut client);
    let first = place(s, c);
    for _ in 0..4 {
        let before = place(s, c);
        assert_eq!(go(s, c, &reports, "vCont;s:1"), "T05thread:01;");
        let expected = if before == "0010" { "0110" } else { "0010" };
        assert_eq!(place(s, c), expected, "after {before}");
    }
    assert_eq!(place(s, c), first);
    assert_eq!(ask(s, c, "Z1,1001,1"), "OK");
    for _ in 0..3 {
        assert!(go(s, c, &reports, "vCont;s:1;c").starts_with("T05thread:0"));
    }
    assert_eq!(ask(s, c, "Hg1"), "OK");
    let stop = go(s, c, &reports, "vCont;c");
    assert!(stop == "T05thread:01;hwbreak:;" || stop == "T05thread:02;hwbreak:;", "{stop}");
    assert_eq!(ask(s, c, "z1,1001,1"), "OK");
    // Nothing stops it any more but a press of Ctrl+C.
    client.write_all(&packet("vCont;c")).unwrap();
    session.serve().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    while reports.try_recv().is_ok() {
        session.met().unwrap();
    }
    assert!(matches!(session.stub, Some(Stub::Running(_))));
    session.guest.let_go().unwrap();
    session.guest.vcpus.pause().unwrap();
}

/// INT3 cannot be executed by every `/dev/kvm`, so its exit is made up here.
#[test]
fn an_int3_of_the_debuggers_stops_and_one_of_the_guests_is_the_guests() {
    let Some((_vm, guest, ..)) = running() else { return };
    let (mut session, mut client) = session(guest);
    assert_eq!(ask(&mut session, &mut client, "Z0,1001,1"), "OK");
    let guest = &mut session.guest;
    let met = |pc| kvm_bindings::kvm_debug_exit_arch { exception: 3, pc, ..Default::default() };
    guest.vcpus.pretend(1, met(0x1001));
    assert_eq!(guest.stop().unwrap(), Some(Reason::SwBreak(2.try_into().unwrap())));
    guest.vcpus.pretend(0, met(0x1000));
    assert_eq!(guest.stop().unwrap(), None);
    // It will be delivered when the vCPU goes on; KVM tells of it by its number alone.
    let waits = guest.vcpus.on(0, |fd| fd.get_vcpu_events().unwrap().exception).unwrap();
    assert_eq!(waits.nr, 3);
}

/// What gdb itself makes of it.
#[test]
fn gdb_stops_at_a_hardware_breakpoint_steps_and_leaves() {
    const SCRIPT: &str = "hbreak *0x1001\ncontinue\nprintf \"@hit=%x\\n\", $rip\ndelete\nstepi\n\
        printf \"@step=%x\\n\", $rip\nset $rbx = 0x55\nprintf \"@rbx=%x cr0=%x\\n\", $rbx, $cr0 & 1\n\
        set *(short *)0x2000 = 0x1234\nthread 2\nprintf \"@cs=%x\\n\", $cs\ndetach\n";
    let Some((_vm, guest, ram, reports)) = running() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (socket, script) = (directory.path().join("gdb"), directory.path().join("script"));
    let connect = format!("set remotetimeout 60\ntarget remote {}\n{SCRIPT}", socket.display());
    std::fs::write(&script, connect).unwrap();
    let listener = Listener::bind(SOCKET, &socket, Some(MODE)).unwrap();
    let mut gdb = std::process::Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex", "set architecture i386:x86-64", "-x"]).arg(&script);
    let gdb = gdb.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped()).spawn();
    let Ok(mut gdb) = gdb else { return };
    let socket = loop {
        match listener.accept() {
            Ok(socket) => break socket,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
        assert!(gdb.try_wait().unwrap().is_none(), "gdb did not connect");
    };
    let mut session = Session { socket, stub: None, unsent: false, guest };
    session.begin().unwrap();
    while session.serve().is_ok() {
        while reports.try_recv().is_ok() {
            session.met().unwrap();
        }
        session.send().unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    session.send().unwrap();
    session.guest.let_go().unwrap();
    let said = gdb.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&said.stdout);
    for part in ["@hit=1001\n", "@step=1000\n", "@rbx=55 cr0=0\n", "@cs=0\n", "detached"] {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    assert_eq!(ram.read_obj::<u16>(GuestAddress(0x2000)).unwrap(), 0x1234);
    session.guest.vcpus.pause().unwrap();
}
