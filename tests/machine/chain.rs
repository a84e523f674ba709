//! Diffs on diffs, each taken from a machine that went on from the one before.
//!
//! ```text
//!   full ◄─ diff 1 ◄─ diff 2 ◄─ .. ◄─ diff N ─► the guest, who checks all it ever wrote
//!     └── run ──┘└── run ──┘                └── merged ─► the guest again
//! ```
//!
//! In each run the guest writes a file in memory that is never touched again, so that its pages
//! are found in that one layer alone, and some pages of a board that all of them write on.

use std::{
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use api::spec::{SnapshotType, Transport};

use crate::{
    kernel::Kernel,
    snapshot::{directory, done, pause},
    vm::{Ended, Setup, Vm, sha256},
};

/// Bytes of a run's file, and of what it writes on the board.
const OWN: usize = 256 << 10;
const SHARE: usize = 20_000;
/// Pages of the board on which a share may begin, and all of them.
const STARTS: usize = 990;
const BOARD: usize = 1000 * 4096;

const SCRIPT: &str = r#"
    mkdir /tmp/own
    head -c 4096000 /dev/zero > /tmp/board
    : > /tmp/sums
    n=0
    dmesg -c > /dev/null
    echo begun
    while read -r word; do
        [ "$word" = end ] && break
        n=$((n + 1))
        yes "generation $n" | head -c 262144 > /tmp/own/$n
        sha256sum /tmp/own/$n >> /tmp/sums
        yes "board $n" | head -c 20000 | dd of=/tmp/board bs=4096 seek=$((n * 37 % 990)) conv=notrunc 2>/dev/null
        for seen in 1 $(((n + 1) / 2)) $n; do
            sed -n ${seen}p /tmp/sums | sha256sum -c -s || echo "what run $seen wrote is lost in run $n"
        done
        echo "$word $n"
    done
    fact runs $n
    fact board $(sha256sum < /tmp/board | cut -d' ' -f1)
    fact own $(for run in $(seq $n); do cat /tmp/own/$run; done | sha256sum | cut -d' ' -f1)
    part complaints sh -c 'dmesg | grep -A 12 -E "WARNING|BUG|lockup" || true'
"#;

/// How many diffs lie on the full snapshot; the release check asks for 50.
fn length() -> usize {
    env::var("NACELLE_TEST_CHAIN").map_or(8, |number| number.parse().unwrap())
}

fn cycled(text: &str, count: usize) -> impl Iterator<Item = u8> {
    text.bytes().cycle().take(count)
}

/// What the guest must have after `runs` runs, computed.
fn check(ended: &Ended, runs: usize) {
    let mut board = vec![0; BOARD];
    for run in 1..=runs {
        let at = run * 37 % STARTS * 4096;
        board.splice(at..at + SHARE, cycled(&format!("board {run}\n"), SHARE));
    }
    let own: Vec<u8> =
        (1..=runs).flat_map(|run| cycled(&format!("generation {run}\n"), OWN).collect::<Vec<_>>()).collect();
    ended.is("runs", &runs);
    ended.is("board", &sha256(&board));
    ended.is("own", &sha256(&own));
    assert!(!ended.console.contains("is lost"), "{}", ended.console);
    assert_eq!(ended.part("complaints"), "");
}

/// Bytes that a snapshot takes on the disk.
fn taken(snapshot: &Path) -> u64 {
    fs::read_dir(snapshot).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

fn nacelle(arguments: &[&str], paths: &[&Path]) {
    let output = Command::new(env!("CARGO_BIN_EXE_nacelle")).args(arguments).args(paths).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Has the guest write, saves it on what it went on from, and lets another monitor go on from that.
fn next(mut vm: Vm, run: usize) -> (Vm, PathBuf, Duration) {
    vm.say("go");
    vm.wait_for(&format!("go {run}\n"));
    let (mut create, mut load) = directory(&vm, &format!("run{run}"));
    create.snapshot_type = if run == 1 { SnapshotType::Full } else { SnapshotType::Diff };
    create.hash = run.is_multiple_of(4);
    // Which pages are its own is known with and without KVM's log.
    load.track_dirty_pages = run % 3 != 2;
    let mut client = vm.client();
    pause(&mut client);
    done(client.put("/snapshot/create", Some(&create)));
    let vm = vm.successor();
    let mut client = vm.client();
    let begins = Instant::now();
    done(client.put("/snapshot/load", Some(&load)));
    (vm, create.snapshot_path, begins.elapsed())
}

#[test]
fn every_run_of_a_long_chain_is_in_the_machine_that_comes_of_it() {
    let mut setup = Setup::new(Kernel::quick(), Transport::Pci).size(2, 192).script(SCRIPT);
    setup.spec.machine_config.track_dirty_pages = true;
    let mut vm = setup.start_with_api();
    vm.wait_for("begun\n");
    let (mut layers, mut loads) = (Vec::new(), Vec::new());
    for run in 1..=length() + 1 {
        let (next, snapshot, load) = next(vm, run);
        vm = next;
        layers.push(taken(&snapshot));
        loads.push(load);
    }
    let top = vm.folder().join(format!("run{}", length() + 1));
    nacelle(&["snapshot", "verify", "-q"], &[&top]);
    let folded = vm.folder().join("folded");
    nacelle(&["snapshot", "merge", "-q"], &[&top, &folded]);
    let (largest, total) = (layers[1..].iter().max().unwrap(), layers[1..].iter().sum::<u64>());
    println!(
        "a full snapshot of {} KiB and {} diffs of {} KiB in the mean, {} KiB at most; merged {} KiB; the first \
         load took {:?}, the last {:?}",
        layers[0] >> 10,
        length(),
        (total / length() as u64) >> 10,
        largest >> 10,
        taken(&folded) >> 10,
        loads[0],
        loads.last().unwrap(),
    );
    // A diff holds what its run wrote and not all that came before.
    assert!(*largest < layers[0], "{layers:?}");

    let (mut other, mut client) = vm.beside("folded");
    let (_, mut load) = directory(&vm, "folded");
    load.snapshot_path = folded;
    done(client.put("/snapshot/load", Some(&load)));
    for machine in [&mut vm, &mut other] {
        machine.say("end");
    }
    check(&other.succeed(), length() + 1);
    check(&vm.succeed(), length() + 1);
}
