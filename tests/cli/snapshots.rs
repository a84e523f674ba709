//! `nacelle snapshot create` with its flags, of a container that runs: each result is restored, and
//! goes on where the container was.

use std::path::Path;

use super::host::{Host, entries, wait_until};

/// Counts in the memory of the shell and in a file, and has 2 MiB that are like no others.
const COUNTER: &str = "head -c 2000000 /dev/urandom >/dev/shm/much; sha256sum </dev/shm/much >/sum; i=0; while :; do \
                       i=$((i+1)); echo $i >/count.new; mv /count.new /count; sleep 0.1; done";

fn exec(host: &Host, name: &str, script: &str) -> String {
    host.nacelle(&["exec", name, "sh", "-c", script]).expect(0).text().trim().to_owned()
}

fn count(host: &Host, name: &str) -> u32 {
    exec(host, name, "cat /count 2>/dev/null || echo 0").parse().expect("a number")
}

fn goes_on(host: &Host, name: &str, from: u32) {
    let now = count(host, name);
    assert!(now >= from, "{name} is at {now}, and was at {from}");
    wait_until("the count to go on", || count(host, name) > now);
    let checks = "sha256sum </dev/shm/much | cmp - /sum && echo same";
    assert_eq!(exec(host, name, checks), "same");
}

/// Bytes of a snapshot's present pages.
fn present(host: &Host, at: &str) -> u64 {
    let text = host.nacelle(&["snapshot", "inspect", at]).expect(0).text();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value[0]["present_bytes"].as_u64().unwrap_or_else(|| panic!("{value}"))
}

#[test]
fn snapshots_in_a_store_as_diffs_and_of_a_paused_machine_are_restored() {
    let host = Host::new();
    host.detached("web", COUNTER);
    wait_until("it to count", || count(&host, "web") > 2);
    let place = |name: &str| host.dir().join(name).to_str().unwrap().to_owned();
    let (store, full) = (place("store"), place("full"));
    let create = |flags: &[&str], at: &str| {
        let before = count(&host, "web");
        let line = [&["snapshot", "create", "-q"], flags, &["web", at]].concat();
        assert_eq!(host.nacelle(&line).expect(0).text(), format!("{at}\n"));
        host.nacelle(&["snapshot", "verify", "-q", at]).expect(0);
        before
    };
    let mut taken = vec![("paused", full.clone(), create(&["--pause", "--hash"], &full))];
    assert_eq!(host.listed("web")["status"], "running");
    // A diff of it, and one of that.
    for (name, flags) in [("diff", &["--diff"][..]), ("diff-of-diff", &["--diff", "--pause"])] {
        exec(&host, "web", "echo changed >>/dev/shm/changes");
        let at = place(name);
        taken.push((name, at.clone(), create(flags, &at)));
    }
    let (whole, diff) = (present(&host, &full), present(&host, &taken[2].1));
    println!("{whole} bytes in the full one, {diff} in the diff of a diff");
    // Nobody keeps a record of what a machine that booted writes: it is compared.
    assert!(diff < whole / 2, "{diff} of {whole} bytes");
    // In a store, twice: what is the same is there once.
    let flags = ["--store", &store, "--compress"];
    for name in ["stored", "stored-again"] {
        let at = place(name);
        taken.push((name, at.clone(), create(&flags, &at)));
        assert!(!entries(Path::new(&taken[taken.len() - 1].1)).iter().any(|path| path.ends_with("memory")));
    }
    let shown = host.nacelle(&["snapshot", "ls", "-q", host.dir().to_str().unwrap()]).expect(0).text();
    assert_eq!(shown.lines().count(), taken.len(), "{shown}");
    host.nacelle(&["rm", "-f", "web"]).expect(0);
    // A chain that was folded is the same machine.
    let folded = place("folded");
    host.nacelle(&["snapshot", "merge", "-q", &taken[2].1, &folded]).expect(0);
    taken.push(("folded", folded, taken[2].2));
    // The others lie below these.
    for (name, at, before) in taken.iter().filter(|(name, ..)| !["diff", "stored"].contains(name)) {
        host.nacelle(&["restore", "-q", "--name", name, at]).expect(0);
        goes_on(&host, name, *before);
        let changes = exec(&host, name, "cat /dev/shm/changes 2>/dev/null | wc -l");
        assert_eq!(changes, if *name == "paused" { "0" } else { "2" }, "{name}");
        host.nacelle(&["rm", "-f", name]).expect(0);
    }
    host.assert_nothing_left();
}
