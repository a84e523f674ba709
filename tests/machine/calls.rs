//! Monitors that are killed at a system call: before each of those that saving and loading take.
//!
//! ```text
//!   tracer: every thread of the monitor stops at every call ─► counted ─► the n-th: SIGKILL
//!   test:   asks the monitor ─► an answer, or none ─► what is left is looked at
//! ```
//!
//! A moment in time hits where a process spends it, mostly the same two or three long writes. What
//! can be torn is between two calls, and there are a few hundred of them.

use std::{
    collections::HashMap,
    fs, io,
    sync::mpsc,
    thread::{self, JoinHandle},
    time::Duration,
};

use api::{
    client::Client,
    spec::{CreateSnapshot, LoadSnapshot, MemBackend, MemBackendType},
};
use nacelle::snapshot::Pair;
use serde_json::Value;

use crate::{
    kills::{is_whole, kills, load, names, saved},
    vm::Vm,
};

/// Follows a process and all its threads from call to call.
struct Tracer(JoinHandle<usize>);

impl Tracer {
    /// Follows `process`, and kills it before its call number `kill_at`. Returns when it is followed.
    fn follow(process: u32, kill_at: Option<usize>) -> Tracer {
        let process = libc::pid_t::try_from(process).unwrap();
        let (begun, begins) = mpsc::channel();
        let thread = thread::spawn(move || {
            seize(process);
            begun.send(()).unwrap();
            followed(process, kill_at)
        });
        begins.recv_timeout(Duration::from_secs(30)).expect("the monitor can be followed");
        Tracer(thread)
    }

    /// How many calls there were, once the process is gone.
    fn calls(self) -> usize {
        self.0.join().unwrap()
    }
}

fn ptrace(request: libc::c_uint, thread: libc::pid_t, data: libc::c_long) -> io::Result<()> {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: none of the requests made here takes an address.
    match unsafe { libc::ptrace(request, thread, none, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Takes every thread, and stops it.
fn seize(process: libc::pid_t) {
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE;
    let mut taken = Vec::new();
    loop {
        let threads = fs::read_dir(format!("/proc/{process}/task")).unwrap();
        let threads = threads.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap());
        let new: Vec<libc::pid_t> = threads.filter(|thread| !taken.contains(thread)).collect();
        if new.is_empty() {
            return;
        }
        for thread in new {
            // One that was made by a taken one is taken already; one may have ended meanwhile.
            if ptrace(libc::PTRACE_SEIZE, thread, options.into()).is_ok() {
                let _ = ptrace(libc::PTRACE_INTERRUPT, thread, 0);
            }
            taken.push(thread);
        }
    }
}

/// Goes from stop to stop until all threads are gone; the number of calls begun.
fn followed(process: libc::pid_t, kill_at: Option<usize>) -> usize {
    let mut inside: HashMap<libc::pid_t, bool> = HashMap::new();
    let mut calls = 0;
    loop {
        let mut status = 0;
        // SAFETY: the status is written to a variable of this function. Other threads' children are
        // not waited for.
        let thread = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
        if thread < 0 {
            return calls;
        }
        if !libc::WIFSTOPPED(status) {
            continue;
        }
        let signal = libc::WSTOPSIG(status);
        let mut deliver = 0;
        if signal == libc::SIGTRAP | 0x80 {
            let inside = inside.entry(thread).or_default();
            *inside = !*inside;
            if *inside {
                calls += 1;
                if kill_at == Some(calls) {
                    // SAFETY: a process that is followed is not reaped by anybody meanwhile.
                    unsafe { libc::kill(process, libc::SIGKILL) };
                }
            }
        } else if status >> 16 == 0 {
            deliver = signal.into();
        }
        // A thread that was killed meanwhile is gone.
        let _ = ptrace(libc::PTRACE_SYSCALL, thread, deliver);
    }
}

/// Has `body` done undisturbed by a monitor that `prepare` made ready, and then by others that are
/// killed at a call each, spread over all of them. `after` looks at what is left.
fn killed_at_calls<T: serde::Serialize + Sync>(
    vm: &Vm,
    prepare: impl Fn(&mut Client),
    (path, body): (&str, &T),
    after: impl Fn(),
) {
    let once = |kill_at| {
        let (monitor, mut client) = vm.beside("followed");
        prepare(&mut client);
        let tracer = Tracer::follow(monitor.process_id(), kill_at);
        let answered = client.put::<Value>(path, Some(body)).is_ok();
        drop(monitor);
        let calls = tracer.calls();
        after();
        (answered, calls)
    };
    let (answered, all) = once(None);
    assert!(answered, "it is not done undisturbed");
    let points = usize::try_from(kills()).unwrap().min(all);
    let mut done = 0;
    for point in 0..points {
        done += usize::from(once(Some(1 + point * all / points)).0);
    }
    println!("{path}: {points} of {all} calls, {done} after the answer");
    assert!(done < points, "nothing was killed in time");
}

#[test]
fn killed_at_any_call_a_saving_monitor_leaves_the_old_snapshot_or_the_new_one() {
    let (vm, base) = saved();
    let target = vm.folder().join("target");
    let create = CreateSnapshot {
        snapshot_path: target.clone(),
        hash: true,
        replace: true,
        ..CreateSnapshot::default()
    };
    let prepare = |client: &mut Client| {
        client.put::<Value>("/snapshot/load", Some(&load(&base))).unwrap();
    };
    let (first, mut client) = vm.beside("first");
    prepare(&mut client);
    client.put::<Value>("/snapshot/create", Some(&create)).unwrap();
    drop(first);
    killed_at_calls(&vm, prepare, ("/snapshot/create", &create), || {
        is_whole(&target);
        is_whole(&base);
    });
    let (last, mut client) = vm.beside("last");
    prepare(&mut client);
    client.put::<Value>("/snapshot/create", Some(&create)).unwrap();
    assert_eq!(names(vm.folder()), [""; 0]);
    drop(last);
    let (_machine, mut client) = vm.beside("again");
    client.put::<Value>("/snapshot/load", Some(&load(&target))).unwrap();
}

#[test]
fn killed_at_any_call_no_state_is_left_with_memory_of_another() {
    let (vm, base) = saved();
    let (state, memory) = (vm.folder().join("state"), vm.folder().join("memory"));
    let create = CreateSnapshot {
        snapshot_path: state.clone(),
        mem_file_path: Some(memory.clone()),
        ..CreateSnapshot::default()
    };
    let prepare = |client: &mut Client| {
        client.put::<Value>("/snapshot/load", Some(&load(&base))).unwrap();
    };
    killed_at_calls(&vm, prepare, ("/snapshot/create", &create), || match Pair::open(&state) {
        Ok(pair) => drop(pair.memory(&memory).unwrap()),
        Err(error) => assert!(!state.exists(), "half a state: {error}"),
    });
    let (last, mut client) = vm.beside("last");
    prepare(&mut client);
    client.put::<Value>("/snapshot/create", Some(&create)).unwrap();
    assert_eq!(names(vm.folder()), [""; 0]);
    drop(last);
    let backend = MemBackend { backend_type: MemBackendType::File, backend_path: memory };
    let (_machine, mut client) = vm.beside("again");
    let load = LoadSnapshot { mem_backend: Some(backend), ..load(&state) };
    client.put::<Value>("/snapshot/load", Some(&load)).unwrap();
}

#[test]
fn killed_at_any_call_a_loading_monitor_leaves_the_snapshot_as_it_was() {
    let (vm, base) = saved();
    let loading = LoadSnapshot { resume_vm: true, ..load(&base) };
    killed_at_calls(&vm, |_| {}, ("/snapshot/load", &loading), || is_whole(&base));
    assert_eq!(names(vm.folder()), [""; 0]);
}
