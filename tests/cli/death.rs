//! Processes that were killed: nothing goes on without them, and what they kept is found.

use std::fs;

use super::{
    host::{Host, LIMIT, wait_until},
    image::digest,
};

fn process(host: &Host, machine: &str, which: &str) -> i32 {
    let number = host.inspect(machine)["state"][which]["pid"].as_i64();
    i32::try_from(number.unwrap_or_else(|| panic!("no {which} of {machine}"))).expect("a process number")
}

fn kill(process: i32) {
    // SAFETY: plain numbers; the process was started for this test's host.
    assert_eq!(unsafe { libc::kill(process, libc::SIGKILL) }, 0);
}

#[test]
fn a_machine_whose_keeper_was_killed_is_dead_and_can_be_removed() {
    let host = Host::new();
    let id = host.detached("orphan", "echo before; exec sleep 1000");
    wait_until("output", || host.nacelle(&["logs", "orphan"]).out == b"before\n");
    kill(process(&host, "orphan", "keeper"));
    wait_until("the monitor to go as well", || host.processes().is_empty());
    let row = host.listed("orphan");
    assert_eq!((&row["status"], &row["exit_code"]), (&"dead".into(), &serde_json::Value::Null));
    assert!(host.nacelle(&["ls", "-a"]).expect(0).text().contains("Dead"));
    assert_eq!(host.nacelle(&["ls", "-q"]).expect(0).text(), "");
    // What it said is still there; what needs a running machine says so.
    assert_eq!(host.nacelle(&["logs", &id[..9]]).expect(0).text(), "before\n");
    host.nacelle(&["exec", "orphan", "true"]).expect(125).says(&["orphan", "dead"]);
    let waited = host.nacelle(&["wait", "orphan"]);
    assert!(waited.code != 0, "{}", waited.text());
    host.nacelle(&["stop", "orphan"]).expect(0);
    host.nacelle(&["rm", "orphan"]).expect(0);
    host.assert_nothing_left();
    // The name is free.
    host.run(&["--name", "orphan"], "true").expect(0);
}

#[test]
fn a_machine_whose_monitor_was_killed_has_ended_with_a_reason() {
    let host = Host::new();
    host.detached("cut", "exec sleep 1000");
    let follower = {
        let line = ["logs", "-f", "cut"];
        super::host::Running::start(host.command(&line), None)
    };
    kill(process(&host, "cut", "monitor"));
    // Whoever waits is told, and so is whoever reads.
    let waited = host.nacelle(&["wait", "cut"]).expect(0);
    assert_eq!(waited.text(), "125\n");
    follower.end(LIMIT).expect(0);
    let row = host.listed("cut");
    assert_ne!(row["status"], "running");
    assert!(row["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{row}");
    wait_until("the keeper to go as well", || host.processes().is_empty());
    host.nacelle(&["rm", "cut"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn a_foreground_run_whose_monitor_was_killed_says_so_and_leaves_nothing() {
    let host = Host::new();
    let mut running = host.start(&["--name", "front"], "echo ready; exec sleep 1000", None);
    running.wait_for("ready\n");
    kill(process(&host, "front", "monitor"));
    running.end(LIMIT).expect(125).says(&["nacelle: ", "the monitor ended"]);
    host.nacelle(&["rm", "front"]).expect(0);
    host.assert_nothing_left();
    // A run that is killed itself takes its machine with it.
    let mut running = host.start(&["--name", "front"], "echo ready; exec sleep 1000", None);
    running.wait_for("ready\n");
    running.signal(libc::SIGKILL);
    running.end(LIMIT).expect(1000 + libc::SIGKILL);
    wait_until("the monitor to go as well", || host.processes().is_empty());
    assert_eq!(host.listed("front")["status"], "dead");
    host.nacelle(&["rm", "-f", "front"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn the_image_stays_whole_while_machines_die() {
    let host = Host::new();
    host.run(&[], "true").expect(0);
    let images = || -> Vec<String> {
        let mut paths = super::host::entries(&host.cache().join("images"));
        paths.retain(|path| path.extension().is_some_and(|e| e == "erofs"));
        paths.sort();
        paths.iter().map(|path| digest(&fs::read(path).unwrap())).collect()
    };
    let before = images();
    let mut running =
        host.start(&["--name", "writer"], "echo ready; while :; do echo x >>/bin/sh2; done", None);
    running.wait_for("ready\n");
    kill(process(&host, "writer", "monitor"));
    running.end(LIMIT).expect(125);
    assert_eq!(images(), before);
    host.run(&[], "! test -e /bin/sh2").expect(0);
    host.nacelle(&["rm", "writer"]).expect(0);
    host.assert_nothing_left();
}
