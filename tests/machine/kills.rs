//! Monitors that are killed while they save or load (what was whole stays whole, what was not is
//! not there, and nothing is left behind), and states that lie.

use std::{
    env, fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use api::{
    client::Client,
    spec::{CreateSnapshot, Drive, Entropy, LoadSnapshot, MemBackend, MemBackendType, Transport, Vsock},
};
use nacelle::snapshot::{Chain, Pair, Search};
use serde_json::{Value, json};

use crate::{
    kernel::Kernel,
    vm::{Setup, Vm, random_file},
};

/// How many monitors are killed in each test; the release check asks for 400.
pub fn kills() -> u32 {
    env::var("NACELLE_TEST_KILLS").map_or(24, |number| number.parse().unwrap())
}

/// A machine that was saved to `base`, and the monitor beside which others are killed.
pub fn saved() -> (Vm, PathBuf) {
    let setup = Setup::new(Kernel::quick(), Transport::Mmio).size(1, 96).script("echo begun; read -r word");
    let vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let mut client = vm.client();
    let base = vm.folder().join("base");
    let done: Value = client.patch("/vm", Some(&json!({ "state": "Paused" }))).unwrap();
    assert_eq!(done, Value::Null);
    let create = CreateSnapshot { snapshot_path: base.clone(), hash: true, ..CreateSnapshot::default() };
    client.put::<Value>("/snapshot/create", Some(&create)).unwrap();
    (vm, base)
}

pub fn load(path: &Path) -> LoadSnapshot {
    LoadSnapshot { snapshot_path: path.to_owned(), ..LoadSnapshot::default() }
}

pub fn is_whole(path: &Path) {
    Chain::open(path, &Search::default()).unwrap().top().verify(true, &()).unwrap();
}

pub fn names(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| name.contains("nacelle-"));
    names
}

/// Has `work` done by a monitor that loaded `base`, `kills` times, and kills it at another moment
/// each time: spread over what it takes undisturbed. `after` looks at what is left.
fn killed_at_every_moment<T: serde::Serialize + Sync>(
    vm: &Vm,
    prepare: impl Fn(&mut Client),
    (path, body): (&str, &T),
    after: impl Fn(bool),
) {
    let (first, mut client) = vm.beside("first");
    prepare(&mut client);
    let begun = Instant::now();
    client.put::<Value>(path, Some(body)).unwrap();
    let length = begun.elapsed();
    drop(first);
    after(true);
    let mut done = 0;
    for kill in 0..kills() {
        let (killed, mut client) = vm.beside("killed");
        prepare(&mut client);
        let answered = thread::scope(|scope| {
            let asked = scope.spawn(|| client.put::<Value>(path, Some(body)).is_ok());
            thread::sleep(length * (kill % 100) / 90 + Duration::from_micros(u64::from(kill) * 7 % 100));
            drop(killed);
            asked.join().unwrap()
        });
        after(answered);
        done += u32::from(answered);
    }
    println!("{done} of {} were done before they were killed ({length:?})", kills());
    assert!(done < kills(), "nothing was killed in time");
}

#[test]
fn a_monitor_that_is_killed_while_it_saves_leaves_the_old_snapshot_or_the_new_one() {
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
    killed_at_every_moment(&vm, prepare, ("/snapshot/create", &create), |_| {
        is_whole(&target);
        is_whole(&base);
    });
    // The next writer sweeps what the killed ones left.
    let (last, mut client) = vm.beside("last");
    prepare(&mut client);
    client.put::<Value>("/snapshot/create", Some(&create)).unwrap();
    assert_eq!(names(vm.folder()), [""; 0]);
    drop(last);
    let (machine, mut client) = vm.beside("again");
    client.put::<Value>("/snapshot/load", Some(&load(&target))).unwrap();
    drop(machine);
}

#[test]
fn of_two_files_none_is_ever_loaded_with_another() {
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
    let mut whole = std::cell::Cell::new(0);
    killed_at_every_moment(&vm, prepare, ("/snapshot/create", &create), |_| {
        // There is no state, or one with its own memory: the mark says whose it is.
        if let Ok(pair) = Pair::open(&state) {
            pair.memory(&memory).unwrap();
            whole.set(whole.get() + 1);
        } else {
            assert!(!state.exists(), "half a state");
        }
    });
    assert!(*whole.get_mut() > 0);
    let (last, mut client) = vm.beside("last");
    prepare(&mut client);
    client.put::<Value>("/snapshot/create", Some(&create)).unwrap();
    assert_eq!(names(vm.folder()), [""; 0]);
    drop(last);
    let backend = MemBackend { backend_type: MemBackendType::File, backend_path: memory };
    let load = LoadSnapshot { mem_backend: Some(backend), ..load(&state) };
    let (machine, mut client) = vm.beside("again");
    client.put::<Value>("/snapshot/load", Some(&load)).unwrap();
    drop(machine);
}

#[test]
fn a_monitor_that_is_killed_while_it_loads_leaves_the_snapshot_as_it_was() {
    let (vm, base) = saved();
    let loading = LoadSnapshot { resume_vm: true, ..load(&base) };
    killed_at_every_moment(&vm, |_| {}, ("/snapshot/load", &loading), |_| is_whole(&base));
}

/// Deals the same numbers in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }
}

/// Makes `bytes` something else.
fn spoil(bytes: &mut Vec<u8>, dice: &mut Dice) {
    let at = dice.below(bytes.len());
    match dice.below(6) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, 0xff),
        2 => (0..8).for_each(|_| bytes.push(0x7f)),
        3 => bytes.iter_mut().skip(at).take(8).for_each(|byte| *byte = 0xff),
        4 => bytes.iter_mut().skip(at).take(4).for_each(|byte| *byte = 0),
        _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (at % 8)),
    }
}

#[test]
fn hostile_states_with_right_digests_never_end_a_monitor() {
    let script = "echo begun; read -r word";
    let mut setup = Setup::new(Kernel::quick(), Transport::Pci).size(2, 96).script(script);
    setup.spec.machine_config.max_vcpu_count = Some(4);
    setup.spec.entropy = Some(Entropy::default());
    let uds_path = setup.folder().join("vsock");
    setup.spec.vsock = Some(Vsock { guest_cid: 3, uds_path: uds_path.clone(), vsock_id: None });
    let path = setup.folder().join("disk");
    random_file(&path, 1, 1);
    let disk = Drive {
        drive_id: "disk".to_owned(),
        path_on_host: path,
        num_queues: 1,
        queue_size: 256,
        ..Drive::default()
    };
    setup.spec.drives.push(disk);
    let vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let mut client = vm.client();
    client.patch::<Value>("/vm", Some(&json!({ "state": "Paused" }))).unwrap();
    let (state, memory) = (vm.folder().join("state"), vm.folder().join("memory"));
    let create = CreateSnapshot {
        snapshot_path: state.clone(),
        mem_file_path: Some(memory.clone()),
        ..CreateSnapshot::default()
    };
    client.put::<Value>("/snapshot/create", Some(&create)).unwrap();
    let sections = nacelle::snapshot::state::decode(&fs::read(&state).unwrap()).unwrap();
    // Its disk and socket are free, its folder is not.
    let vm = vm.successor();

    let spoilt = vm.folder().join("spoilt");
    let backend = MemBackend { backend_type: MemBackendType::File, backend_path: memory };
    let loading = LoadSnapshot { mem_backend: Some(backend), ..load(&spoilt) };
    let mut dice = Dice(0x5eed);
    let (mut monitor, mut client) = vm.beside("hostile");
    let (mut refused, mut taken) = (0, 0);
    for round in 0..8 * kills() {
        let mut sections = sections.clone();
        for _ in 0..=dice.below(2) {
            let one = dice.below(sections.len());
            spoil(&mut sections[one].bytes, &mut dice);
        }
        fs::write(&spoilt, nacelle::snapshot::state::encode(&sections).unwrap()).unwrap();
        match client.put::<Value>("/snapshot/load", Some(&loading)) {
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
                // It is still there, and can be asked again.
                let state: Value = client.get("/").unwrap_or_else(|e| panic!("round {round}: {e}"));
                assert_eq!(state["state"], "Not started", "round {round}");
            }
            Ok(_) => {
                taken += 1;
                let state: Value = client.get("/").unwrap();
                assert_eq!(state["state"], "Paused", "round {round}");
                drop(monitor);
                let _ = fs::remove_file(&uds_path);
                (monitor, client) = vm.beside("hostile");
            }
        }
        let _ = fs::remove_file(&uds_path);
    }
    println!("{refused} were refused, {taken} were machines");
    assert!(refused > taken, "{refused} were refused, {taken} were machines");
}
