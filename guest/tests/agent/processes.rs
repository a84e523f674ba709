//! Starting, signalling, waiting, and what a container's process sees.

use crate::fixture::{Fixture, LIMIT, code, command, shell};
use guest::{
    client::ClientError,
    protocol::{
        Dns, Event, ExitStatus, FailureKind, MAIN, ProcessSpec, ProcessState, Rlimit, Setup, Size, Stream,
        Tmpfs,
    },
};
use std::{
    io::{Read, Write},
    thread,
    time::{Duration, Instant},
};

#[test]
fn the_main_process_is_process_1_of_a_machine_with_its_own_name() {
    let mut f = Fixture::ready(|s| s.shm_size = 1 << 20);
    f.agent
        .start(shell(
            "echo $$ $(hostname) $(cat /etc/hostname) $HOSTNAME; grep -c box /etc/hosts; \
             ls /dev /dev/pts; df -k --output=size /dev/shm | tail -1 | tr -d ' '; ls /proc | grep -c '^[0-9]'; \
             touch /new && test ! -w /sys/kernel/profiling && cat /proc/self/oom_score_adj; \
             grep -c nacelle /proc/mounts; pwd; exit 42",
        ))
        .unwrap();
    let (code, out, err) = {
        let mut agent = f.machine.control().unwrap();
        f.finish(&mut agent, MAIN)
    };
    assert!(out.starts_with("1 box box box\n1\n"), "{out}{err}");
    for name in ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "fd", "stdin"] {
        assert!(out.lines().any(|l| l == name), "{name}: {out}");
    }
    assert!(out.contains("\n1024\n"), "{out}");
    assert_eq!((code, err.as_str()), (42, ""), "{out}");
    assert!(!std::path::Path::new("/new").exists());
}

#[test]
fn commands_that_cannot_run_are_told_apart() {
    let mut f = Fixture::running();
    let mut fails = |spec: ProcessSpec| match f.agent.exec(spec) {
        Err(ClientError::Agent(failure)) => failure,
        other => panic!("{other:?}"),
    };
    let missing = fails(command(&["no-such-program"]));
    assert_eq!((missing.kind, missing.exit_code()), (FailureKind::CommandNotFound, 127));
    assert!(missing.message.contains("PATH"), "{missing}");
    assert_eq!(fails(command(&["/no/such/program"])).exit_code(), 127);
    assert_eq!(fails(command(&["/etc/passwd"])).exit_code(), 126);
    assert_eq!(fails(command(&["/etc"])).exit_code(), 126);
    assert_eq!(fails(command(&["/etc/passwd/x"])).exit_code(), 127);
    let nowhere = fails(ProcessSpec { cwd: "/nowhere".into(), ..command(&["true"]) });
    assert!(nowhere.message.contains("/nowhere"), "{nowhere}");
    let nobody = fails(ProcessSpec { user: "no-such-user".into(), ..command(&["true"]) });
    assert_eq!(nobody.kind, FailureKind::NoSuchUser);
    // A failure to start leaves nothing behind.
    let list = f.agent.list().unwrap();
    assert_eq!(list.len(), 1);
}

#[test]
fn a_failed_start_can_be_tried_again_and_a_second_one_cannot() {
    let mut f = Fixture::ready(|_| ());
    assert!(
        matches!(f.agent.exec(command(&["true"])), Err(ClientError::Agent(e)) if e.kind == FailureKind::WrongState)
    );
    assert_eq!(f.agent.start(command(&["nothing"])).unwrap_err().exit_code(), 127);
    f.agent.start(command(&["sleep", "100"])).unwrap();
    let again = f.agent.start(command(&["true"])).unwrap_err();
    assert!(matches!(again, ClientError::Agent(e) if e.kind == FailureKind::WrongState));
    let again = f.agent.setup(Setup::default()).unwrap_err();
    assert!(matches!(again, ClientError::Agent(e) if e.kind == FailureKind::WrongState));
}

#[test]
fn exit_codes_and_signals_come_back() {
    let f = Fixture::running();
    for n in [0, 1, 42, 255] {
        assert_eq!(f.run(shell(&format!("exit {n}"))).0, n);
    }
    assert_eq!(f.run(shell("kill -SEGV $$")).0, 128 + 11);
    let mut agent = f.machine.control().unwrap();
    let (id, _) = agent.exec(command(&["sleep", "100"])).unwrap();
    assert_eq!(agent.wait(id, Some(Duration::from_millis(50))).unwrap(), None);
    agent.signal(id, libc::SIGKILL).unwrap();
    let exit = agent.wait(id, Some(LIMIT)).unwrap().unwrap();
    assert_eq!(exit.status, ExitStatus::Signal(9));
    assert!(!exit.out_of_memory && exit.lived_ms >= 50);
    let late = agent.signal(id, libc::SIGKILL).unwrap_err();
    assert!(matches!(late, ClientError::Agent(e) if e.kind == FailureKind::NoSuchProcess));
    assert!(agent.signal(MAIN, 0).is_err());
    assert!(agent.signal(MAIN, 65).is_err());
}

#[test]
fn stopping_the_main_process_ends_everything_beside_it() {
    let mut f = Fixture::running();
    let mut agent = f.machine.control().unwrap();
    let (beside, _) = agent.exec(command(&["sleep", "100"])).unwrap();
    f.agent.signal(MAIN, libc::SIGTERM).unwrap();
    assert_eq!(code(&f.agent.wait(MAIN, Some(LIMIT)).unwrap().unwrap()), 7);
    let exit = agent.wait(beside, Some(LIMIT)).unwrap().unwrap();
    assert_eq!(exit.status, ExitStatus::Signal(9));
    let list = agent.list().unwrap();
    assert!(list.iter().all(|p| matches!(p.state, ProcessState::Exited(_))));
    // The container has ended: nothing can be started in it, but it can still be asked about.
    assert!(agent.exec(command(&["true"])).is_err());
    assert!(agent.stat("/etc/passwd", true).unwrap().size > 0);
    f.agent.shutdown(false).unwrap();
}

#[test]
fn our_init_reaps_orphans_and_hands_signals_on() {
    let mut f = Fixture::ready(|_| ());
    let script = "for i in 1 2 3 4 5; do (sleep 0.1 &) ; done; trap 'exit 9' USR1; echo $$; \
                  while :; do sleep 1 & wait $!; done";
    f.agent.start(ProcessSpec { init: true, ..shell(script) }).unwrap();
    f.await_line(MAIN, "2\n");
    let begun = Instant::now();
    // The orphans end a moment after they became orphans.
    let zombies = "cat /proc/1/comm; grep -l '^State:.Z' /proc/[0-9]*/status | wc -l";
    while f.run(shell(zombies)).1 != "nacelle-init\n0\n" {
        assert!(begun.elapsed() < LIMIT);
    }
    f.agent.signal(MAIN, libc::SIGUSR1).unwrap();
    assert_eq!(code(&f.agent.wait(MAIN, Some(LIMIT)).unwrap().unwrap()), 9);
}

#[test]
fn users_groups_directory_and_environment_are_as_asked() {
    let f = Fixture::running();
    let spec = ProcessSpec {
        user: "www-data:games".into(),
        groups: vec!["77".into()],
        cwd: "/usr/bin".into(),
        env: vec!["A=b c".into()],
        ..shell("id -u; id -g; id -G; pwd; echo $A; echo $HOME; echo hi > /dev/stdout; ulimit -n")
    };
    let (code, out, err) = f.run(spec);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert_eq!(out, "33\n60\n60 77\n/usr/bin\nb c\n/var/www\nhi\n1024\n");
}

#[test]
fn limits_and_capabilities_are_as_asked() {
    let f = Fixture::running();
    let spec = ProcessSpec {
        capabilities: Some(vec!["CAP_CHOWN".into(), "CAP_KILL".into()]),
        no_new_privileges: true,
        rlimits: vec![Rlimit { name: "nofile".into(), soft: 100, hard: 200 }],
        ..shell("grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status; ulimit -n; ulimit -Hn")
    };
    let (_, out, _) = f.run(spec);
    assert!(out.contains("CapEff:\t0000000000000021\n"), "{out}");
    assert!(out.contains("CapBnd:\t0000000000000021\nNoNewPrivs:\t1\n100\n200\n"), "{out}");
    let (_, out, _) = f.run(shell(
        "grep CapEff /proc/self/status; grep SigIgn /proc/self/status; grep SigBlk /proc/self/status",
    ));
    assert!(!out.contains("CapEff:\t0000000000000000"), "{out}");
    assert!(out.contains("SigIgn:\t0000000000000000\nSigBlk:\t0000000000000000\n"), "{out}");
}

#[test]
fn a_terminal_is_a_terminal() {
    let f = Fixture::running();
    let mut agent = f.machine.control().unwrap();
    let spec = ProcessSpec {
        terminal: Some(Size { rows: 11, cols: 22 }),
        ..shell(
            "tty; stty size; echo $TERM; read line; stty size; echo got $line; read end || echo eof; kill -INT $$",
        )
    };
    let (id, _) = agent.exec(spec).unwrap();
    let mut io = f.machine.stream(id, Stream::Stdin).unwrap();
    let mut out = f.machine.stream(id, Stream::Stdout).unwrap();
    assert!(f.machine.stream(id, Stream::Stderr).is_err());
    agent.resize(id, Size { rows: 33, cols: 44 }).unwrap();
    io.write_all(b"hello\n").unwrap();
    thread::sleep(Duration::from_millis(300));
    agent.close_stdin(id).unwrap();
    io.shutdown(std::net::Shutdown::Write).unwrap();
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    let exit = agent.wait(id, Some(LIMIT)).unwrap().unwrap();
    assert_eq!(exit.status, ExitStatus::Signal(2), "{text}");
    assert!(text.contains("/dev/pts/0\r\n"), "{text}");
    assert!(text.contains("xterm\r\n") && text.contains("33 44\r\ngot hello\r\neof\r\n"), "{text}");
    assert!(agent.resize(MAIN, Size::default()).is_err());
}

#[test]
fn a_read_only_container_writes_only_where_it_may() {
    let mut f = Fixture::ready(|s| {
        s.read_only = true;
        s.tmpfs = vec![Tmpfs { path: "/scratch/deep".into(), size: 1 << 20, ..Tmpfs::default() }];
        s.sysctls = vec![("kernel.msgmax".into(), "9999".into())];
        s.dns = Some(Dns { servers: vec!["10.9.8.7".into()], ..Dns::default() });
    });
    let script = "touch /x 2>/dev/null && echo root; touch /scratch/deep/x && echo tmp; \
                  cat /proc/sys/kernel/msgmax /etc/resolv.conf; touch /dev/shm/x && echo shm";
    f.agent.start(ProcessSpec { cwd: "/made/for/it".into(), ..shell(script) }).unwrap();
    let mut agent = f.machine.control().unwrap();
    let (_, out, err) = f.finish(&mut agent, MAIN);
    assert_eq!(out, "tmp\n9999\nnameserver 10.9.8.7\nshm\n", "{err}");
}

#[test]
fn events_tell_of_ends() {
    let mut f = Fixture::running();
    let mut events = f.machine.events().unwrap();
    let (id, _) = f.agent.exec(command(&["false"])).unwrap();
    let event = events.next(Some(LIMIT)).unwrap();
    let Some(Event::Exited { process, exit }) = event else { panic!("{event:?}") };
    assert_eq!((process, code(&exit)), (id, 1));
    assert!(f.agent.exec(command(&["nothing"])).is_err());
    assert!(events.next(Some(Duration::from_millis(200))).is_err(), "no event for no process");
}

#[test]
fn figures_are_plausible() {
    let mut f = Fixture::running();
    let stats = f.agent.stats().unwrap();
    assert!(stats.guest.memory_total > 1 << 20 && stats.guest.memory_available > 0);
    assert!(stats.cpu.online >= 1);
    assert!(f.agent.hello().ready_us > 0 && !f.agent.hello().kernel.is_empty());
}

#[test]
fn ten_thousand_short_processes_leave_nothing_behind() {
    let f = Fixture::running();
    let count = if std::env::var_os("NACELLE_TEST_LONG").is_some() { 10_000 } else { 1_000 };
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let machine = f.machine.clone();
            thread::spawn(move || {
                let mut agent = machine.control().unwrap();
                for _ in 0..count / 4 {
                    let (id, _) = agent.exec(command(&["true"])).unwrap();
                    assert_eq!(code(&agent.wait(id, Some(LIMIT)).unwrap().unwrap()), 0);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    let (_, out, _) = f.run(shell("grep -l '^State:.Z' /proc/[0-9]*/status | wc -l"));
    assert_eq!(out, "0\n");
    let mut agent = f.machine.control().unwrap();
    assert!(agent.list().unwrap().len() <= 200);
    // The agent proper is the only child of the process we started.
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", f.pid())).unwrap();
    let agent_pid = children.trim();
    let open = std::fs::read_dir(format!("/proc/{agent_pid}/fd")).unwrap().count();
    // Two latches for each process that is remembered, and little else.
    assert!(open < 128 * 2 + 50, "{open} descriptors are open");
}

#[test]
fn orphans_of_a_double_fork_do_not_hold_the_end_back() {
    let f = Fixture::running();
    let begun = Instant::now();
    let (code, out, _) = f.run(shell("(setsid sleep 30 & ) ; echo started; exit 3"));
    assert_eq!((code, out.as_str()), (3, "started\n"));
    assert!(begun.elapsed() < Duration::from_secs(15));
}
