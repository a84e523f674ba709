//! Linux under the real gdb: attached to while it boots or runs, stopped, looked at, stepped,
//! let go; and it goes on as if nothing had been.

use std::{
    io::Read,
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
};

use api::spec::Transport;

use crate::{
    kernel::Kernel,
    process::{Process, Stream, within},
    vm::{Setup, Vm},
};

/// The longest that a debugger may take.
const SESSION_SECONDS: u64 = 150;

/// A debugger with a script.
struct Gdb {
    process: Process,
    said: Stream,
}

impl Gdb {
    /// Connects and runs `script`.
    fn start(socket: &Path, script: &str) -> Gdb {
        let file = socket.with_extension("script");
        let target = format!("target remote {}", socket.display());
        let settings = "set pagination off\nset confirm off\nset remotetimeout 60\n";
        std::fs::write(&file, format!("{settings}{target}\n{script}\n")).unwrap();
        let mut command = Command::new("gdb");
        command.args(["-nx", "-batch", "-ex", "set architecture i386:x86-64", "-x"]).arg(&file);
        // Both streams in order, as a person sees them.
        let (reader, writer) = std::io::pipe().unwrap();
        command.stdin(Stdio::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
        let process = Process::new(command.spawn().expect("Debian's package gdb is needed"));
        drop(command);
        Gdb { process, said: Stream::of(reader) }
    }

    fn wait_for(&self, what: &str) {
        assert!(
            self.said.heard(what, within(SESSION_SECONDS)),
            "gdb did not say {what:?}: {}",
            self.said.text()
        );
    }

    /// Presses Ctrl+C.
    fn interrupt(&self) {
        self.process.signal(libc::SIGINT);
    }

    /// Waits for its end and returns what it said.
    fn end(mut self) -> String {
        let status = self.process.wait(within(SESSION_SECONDS));
        self.said.ended(within(SESSION_SECONDS));
        let said = self.said.text();
        assert!(status.is_some_and(|status| status.success()), "gdb failed: {said}");
        said
    }
}

/// The text after `@NAME=` on a line of what gdb said.
#[track_caller]
fn found<'s>(said: &'s str, name: &str) -> &'s str {
    let start = format!("@{name}=");
    let value = said.lines().find_map(|line| line.strip_prefix(&start));
    value.unwrap_or_else(|| panic!("gdb did not say {name}: {said}")).trim()
}

/// What the guest says on its console so far.
fn told(vm: &Vm, name: &str) -> String {
    vm.wait_for(&format!("@{name}="));
    let text = vm.console();
    let start = format!("@{name}=");
    let value = text.lines().find_map(|line| line.strip_prefix(&start));
    value.expect("the line is there").trim().to_owned()
}

/// The host's name is set again and again, so that a breakpoint in that system call is met.
const BUSY: &str = r#"
    fact place $(grep -w __x64_sys_sethostname /proc/kallsyms | cut -d' ' -f1)
    (i=0; while [ ! -e /tmp/stop ]; do hostname name$i; i=$((i+1)); done; echo $i > /tmp/count) &
    echo ready
    read -r word; echo "pong $word"
    read -r word
    touch /tmp/stop; wait
    fact count $(cat /tmp/count)
    fact cpus $(nproc)"#;

/// What is asked of a guest that was just stopped, and then of one that was let run.
const LOOK: &str = r#"
    info threads
    printf "@paging=%d\n", ($cr0 >> 31) & 1
    printf "@long=%d\n", ($efer >> 10) & 1
    set $before = *(unsigned int *)0xPLACE
    break *0xPLACE
    printf "@same=%d\n", $before == *(unsigned int *)0xPLACE
    delete
    MEETINGS
    set $steps = 0
    set $from = $rip
    stepi
    set $steps = $steps + ($rip != $from)
    set $from = $rip
    stepi
    set $steps = $steps + ($rip != $from)
    set $from = $rip
    stepi
    set $steps = $steps + ($rip != $from)
    printf "@stepped=%d\n", $steps
    set $rax_before = $rax
    set $rax = 0x1122334455667788
    printf "@rax=%lx\n", $rax
    set $rax = $rax_before
    echo @running\n
    continue
    printf "@interrupted=%d\n", $rip != 0
    info threads
    thread 2
    printf "@second=%lx\n", $rip
    monitor physical on
    printf "@physical=%x\n", *(unsigned char *)0xe0000
    monitor physical off
    detach"#;

/// Breakpoints of all kinds that are met.
const MEETINGS: &str = r#"
    hbreak *0xPLACE
    continue
    printf "@hit=%lx\n", $rip
    delete
    awatch -l *(unsigned long *)($rsp - 8)
    continue
    delete
    break *0xPLACE
    continue
    printf "@hit_again=%lx\n", $rip
    delete"#;

/// Whether this processor is QEMU's emulation, as in the lab.
fn is_emulated() -> bool {
    let signature = std::arch::x86_64::__cpuid(0x4000_0000);
    [signature.ebx, signature.ecx, signature.edx].map(u32::to_le_bytes).concat() == b"TCGTCGTCGTCG"
}

#[test]
fn gdb_stops_a_running_linux_looks_steps_and_lets_it_go() {
    let mut setup = Setup::new(Kernel::quick(), Transport::Mmio).size(2, 256).script(BUSY);
    let socket = setup.folder().join("gdb");
    setup.spec.machine_config.gdb_socket_path = Some(socket.clone());
    setup.spec.machine_config.gdb_wait = false;
    let mut vm = setup.start();
    vm.wait_for("ready\n");
    let place = told(&vm, "place");
    // On processors, the debugger's breakpoints are met. The emulated processor of the lab does not
    // give the guest's INT3 to KVM, nor look at its debug registers; there they are only set.
    let met = if is_emulated() {
        format!("hbreak *0x{place}\nbreak *0x{place}\ndelete\n")
    } else {
        MEETINGS.replace("PLACE", &place)
    };
    let script = LOOK.replace("PLACE", &place).replace("MEETINGS", &met);
    let gdb = Gdb::start(&socket, &script);
    gdb.wait_for("@running");
    // The guest runs, and a second debugger has no place.
    vm.say("one");
    vm.wait_for("pong one");
    let mut second = UnixStream::connect(&socket).unwrap();
    assert_eq!(second.read(&mut [0; 16]).unwrap(), 0);
    gdb.interrupt();
    let said = gdb.end();
    println!("{said}");
    for (name, value) in
        [("paging", "1"), ("long", "1"), ("same", "1"), ("stepped", "3"), ("interrupted", "1")]
    {
        assert_eq!(found(&said, name), value, "{name}: {said}");
    }
    assert_eq!(found(&said, "rax"), "1122334455667788");
    // The RSDP's first letter.
    assert_eq!(found(&said, "physical"), format!("{:x}", b'R'));
    assert!(said.contains("SIGINT") && said.contains("vCPU 1"), "{said}");
    assert_ne!(found(&said, "second"), "0");
    if !is_emulated() {
        for name in ["hit", "hit_again"] {
            assert_eq!(found(&said, name), place.trim_start_matches('0'), "{said}");
        }
        assert!(said.contains("Hardware access (read/write) watchpoint"), "{said}");
    }
    vm.say("two");
    let ended = vm.succeed();
    assert!(ended.number("count") > 2);
    ended.is("cpus", &2);
    ended.says("A second debugger was turned away");
    assert!(!socket.exists(), "the socket was left behind");
}
