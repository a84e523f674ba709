//! Machines that are suspended and go on, and machines that are made of others.

use std::{fs, path::Path, thread, time::Duration};

use serde_json::Value;

use super::{
    host::{Host, LIMIT, Running, SMALL, entries, test_image, wait_until},
    terminal::Terminal,
};

/// Counts in the memory of the shell, ten times a second; ends with code 7 when told.
const COUNTER: &str = "trap 'echo bye; exit 7' TERM; i=0; while :; do i=$((i+1)); echo $i; echo $i >/count; \
                       sleep 0.1; done";

/// The numbers that a counter has printed so far.
fn counted(host: &Host, name: &str) -> Vec<u32> {
    let text = host.nacelle(&["logs", name]).expect(0).text();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Waits until a counter has come further than it had.
fn counts(host: &Host, name: &str) -> u32 {
    let before = counted(host, name).last().copied().unwrap_or(0);
    wait_until("the count to go on", || counted(host, name).last().is_some_and(|last| *last > before + 3));
    before
}

fn exec(host: &Host, name: &str, script: &str) -> String {
    host.nacelle(&["exec", name, "sh", "-c", script]).expect(0).text().trim().to_owned()
}

fn process(host: &Host, name: &str, which: &str) -> i32 {
    let pid = host.inspect(name)["state"][which]["pid"].as_i64().expect("a process is recorded");
    i32::try_from(pid).expect("it is a process number")
}

fn alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn a_suspended_machine_is_files_and_goes_on_as_if_nothing_had_happened() {
    let host = Host::new();
    host.detached("web", COUNTER);
    counts(&host, "web");
    let follower = Running::start(host.command(&["logs", "-f", "web"]), None);
    let waiter = Running::start(host.command(&["wait", "web"]), None);
    for _ in 0..2 {
        let (monitor, keeper) = (process(&host, "web", "monitor"), process(&host, "web", "keeper"));
        assert_eq!(host.nacelle(&["suspend", "-q", "web"]).expect(0).text(), "web\n");
        assert!(!alive(monitor) && !alive(keeper), "nothing of it runs");
        let table = host.nacelle(&["ls"]).expect(0).text();
        assert!(table.contains("web") && table.contains("Suspended"), "{table}");
        assert_eq!(host.listed("web")["status"], "suspended");
        let seen = host.inspect("web");
        assert!(seen["paths"]["suspended"].is_string() && seen["state"]["monitor"].is_null(), "{seen}");
        host.nacelle(&["exec", "web", "true"]).expect(125).says(&["suspended"]);
        host.nacelle(&["stop", "web"]).says(&["nacelle resume web"]);
        // Twice is once.
        host.nacelle(&["suspend", "-q", "web"]).expect(0);

        assert_eq!(host.nacelle(&["resume", "web"]).expect(0).text(), "web\n");
        assert_eq!(host.listed("web")["status"], "running");
        counts(&host, "web");
        let count: u32 = exec(&host, "web", "cat /count").parse().expect("a number");
        assert!(count > 3);
    }
    host.nacelle(&["stats", "--no-stream", "web"]).expect(0);
    let file = host.dir().join("file");
    host.nacelle(&["cp", "web:/count", file.to_str().unwrap()]).expect(0);
    assert!(fs::read_to_string(&file).unwrap().trim().parse::<u32>().is_ok());
    // No clock of the guest's stands where it stood.
    let now: u64 = exec(&host, "web", "date +%s").parse().expect("seconds");
    let ours = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(now.abs_diff(ours) <= 2, "the guest's clock is {now}, ours {ours}");
    host.nacelle(&["stop", "web"]).expect(0);
    assert_eq!(waiter.end(LIMIT).expect(0).text(), "7\n");
    // Every number once, in order: nothing was lost or said twice at the seams.
    let printed = follower.end(LIMIT).expect(0).text();
    let numbers: Vec<u32> = printed.lines().filter_map(|line| line.parse().ok()).collect();
    let expected: Vec<u32> = (1..=numbers.last().copied().unwrap()).collect();
    assert_eq!(numbers, expected);
    assert!(printed.ends_with("bye\n"));
    assert_eq!(host.listed("web")["exit_code"], 7);
    host.nacelle(&["rm", "web"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn a_paused_machine_stands_still_and_goes_on() {
    let host = Host::new();
    host.detached("still", COUNTER);
    counts(&host, "still");
    host.nacelle(&["pause", "still"]).expect(0);
    let before = counted(&host, "still");
    thread::sleep(Duration::from_millis(600));
    assert_eq!(counted(&host, "still"), before);
    host.nacelle(&["resume", "still"]).expect(0);
    counts(&host, "still");
    host.nacelle(&["rm", "-f", "still"]).expect(0);
    host.nacelle(&["pause", "still"]).says(&["No machine is called"]);
    host.assert_nothing_left();
}

#[test]
fn a_foreground_run_ends_when_it_is_suspended_and_can_be_taken_up_with_its_input() {
    let host = Host::new();
    let script = "echo first; while read line; do echo got $line; done; echo end; exit 4";
    let mut running = {
        let image = test_image();
        let line =
            [&["run", "-q", "-i", "--name", "front"], &SMALL[..], &[&image, "sh", "-c", script]].concat();
        Running::start_with_open_input(host.command(&line))
    };
    running.wait_for("first\n");
    host.nacelle(&["suspend", "-q", "front"]).expect(0);
    running.end(LIMIT).expect(148).says(&["was suspended", "nacelle resume front"]);
    let again = Running::start(host.command(&["resume", "-a", "front"]), Some(b"one\ntwo\n".to_vec()));
    let ended = again.end(LIMIT).expect(4);
    assert_eq!(ended.text(), "got one\ngot two\nend\n");
    let logs = host.nacelle(&["logs", "front"]).expect(0).text();
    assert_eq!(logs, "first\ngot one\ngot two\nend\n");
    host.nacelle(&["rm", "front"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn a_machine_is_restored_beside_itself_as_often_as_one_likes() {
    let host = Host::new();
    host.detached("web", COUNTER);
    counts(&host, "web");
    let dir = host.dir().join("taken");
    let at = dir.to_str().unwrap();
    assert_eq!(host.nacelle(&["snapshot", "-q", "web", at]).expect(0).text(), format!("{at}\n"));
    // It went on meanwhile, and goes on.
    counts(&host, "web");
    host.nacelle(&["snapshot", "verify", "-q", at]).expect(0);
    let before: Vec<(String, u64)> = files(&dir);
    let ids: Vec<String> = ["one", "two"]
        .iter()
        .map(|name| host.nacelle(&["restore", "-q", "--name", name, at]).expect(0).text().trim().to_owned())
        .collect();
    for (name, id) in ["one", "two"].iter().zip(&ids) {
        assert_eq!(host.listed(name)["status"], "running");
        assert_eq!(host.listed(name)["id"], **id);
        counts(&host, name);
        assert_eq!(exec(&host, name, "hostname"), *name);
        exec(&host, name, &format!("echo {name} >/own"));
    }
    // Each has files of its own, and the original has none of theirs.
    assert_eq!(exec(&host, "one", "cat /own"), "one");
    assert_eq!(exec(&host, "two", "cat /own"), "two");
    assert_eq!(exec(&host, "web", "cat /own 2>/dev/null || echo none"), "none");
    counts(&host, "web");
    assert_eq!(files(&dir), before, "the snapshot is what it was");
    // A restored one is as good as any: it can be suspended, and waited for.
    host.nacelle(&["suspend", "-q", "one"]).expect(0);
    host.nacelle(&["resume", "one"]).expect(0);
    counts(&host, "one");
    host.nacelle(&["stop", "one"]).expect(0);
    assert_eq!(host.nacelle(&["wait", "one"]).expect(0).text(), "7\n");
    host.nacelle(&["rm", "-f", "web", "one", "two"]).expect(0);
    host.assert_nothing_left();
}

/// Names and sizes of a directory's files, but for what the first load leaves beside a snapshot for
/// those that follow.
fn files(dir: &Path) -> Vec<(String, u64)> {
    let mut files: Vec<_> = entries(dir)
        .into_iter()
        .filter(|path| !path.ends_with("memory.working-set"))
        .map(|path| (path.display().to_string(), path.metadata().map_or(0, |m| m.len())))
        .collect();
    files.sort();
    files
}

#[test]
fn forks_of_one_machine_are_no_twins() {
    let host = Host::new();
    host.detached("base", &format!("echo base >/etc/machine-id; {COUNTER}"));
    counts(&host, "base");
    let ended = host.nacelle(&["fork", "-q", "--count", "3", "base"]).expect(0);
    let names = ["base-1", "base-2", "base-3"];
    assert_eq!(ended.text(), names.map(|name| format!("{name}\n")).concat());
    let mut ids = vec![exec(&host, "base", "cat /etc/machine-id")];
    let mut doors = vec![host.inspect("base")["paths"]["vsock"].clone()];
    let mut random = Vec::new();
    for name in names {
        counts(&host, name);
        assert_eq!(exec(&host, name, "hostname"), name);
        ids.push(exec(&host, name, "cat /etc/machine-id"));
        doors.push(host.inspect(name)["paths"]["vsock"].clone());
        random.push(exec(&host, name, "head -c 16 /dev/urandom | od -An -tx1"));
    }
    for seen in [&mut ids, &mut random] {
        let count = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), count, "{seen:?}");
    }
    doors.sort_by_key(Value::to_string);
    doors.dedup();
    assert_eq!(doors.len(), 4);
    // The snapshot that they are made of is gone.
    assert_eq!(entries(&host.dir().join("state/making")), Vec::<std::path::PathBuf>::new());
    // A suspended one can be forked as well, and stays suspended.
    host.nacelle(&["suspend", "-q", "base-1"]).expect(0);
    let rows = host.nacelle(&["fork", "-q", "--name", "x", "--format", "json", "base-1"]).expect(0);
    let rows: Value = serde_json::from_slice(&rows.out).unwrap();
    assert_eq!((&rows[0]["name"], &rows[0]["error"]), (&"x-1".into(), &Value::Null));
    counts(&host, "x-1");
    assert_eq!(host.listed("base-1")["status"], "suspended");
    // A suspended machine goes with its snapshot.
    host.nacelle(&["rm", "base-1"]).expect(0);
    host.nacelle(&["rm", "-f", "base", "base-2", "base-3", "x-1"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn a_drive_that_somebody_writes_is_not_taken_by_another() {
    let host = Host::new();
    let disk = host.dir().join("data.img");
    fs::write(&disk, vec![0; 4 << 20]).unwrap();
    let disk = disk.to_str().unwrap();
    host.run(&["-d", "--name", "owner", "--disk", disk], "exec sleep 1000").expect(0);
    let at = host.dir().join("taken");
    let at = at.to_str().unwrap();
    host.nacelle(&["snapshot", "create", "-q", "--drives", "share", "owner", at]).expect(0);
    host.nacelle(&["restore", "-q", "--name", "thief", at]).expect(125).says(&["thief", "in use"]);
    assert_eq!(host.machines().len(), 1, "nothing is left of what did not come up");
    host.nacelle(&["restore", "-q", "--set", "drives.uper.path=/x", at]).says(&["did you mean upper?"]);
    host.nacelle(&["restore", "-q", "--set", "drive.upper.path=/x", at])
        .says(&["did you mean drives.upper.path?"]);
    assert_eq!(host.machines().len(), 1);
    host.nacelle(&["rm", "-f", "owner"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn whoever_is_killed_a_machine_runs_or_is_suspended_and_nothing_else_is_left() {
    let host = Host::new();
    let web = host.detached("web", COUNTER);
    counts(&host, "web");
    // Commands that are killed after a while, whatever they were doing then.
    for delay in [0, 20, 60, 150, 400] {
        let running = Running::start(host.command(&["suspend", "-q", "web"]), None);
        thread::sleep(Duration::from_millis(delay));
        running.signal(libc::SIGKILL);
        drop(running);
        settled(&host, "web");
        if host.listed("web")["status"] == "suspended" {
            let running = Running::start(host.command(&["resume", "web"]), None);
            thread::sleep(Duration::from_millis(delay / 2));
            running.signal(libc::SIGKILL);
            drop(running);
            settled(&host, "web");
        }
        host.nacelle(&["resume", "web"]).expect(0);
        counts(&host, "web");
        let running = Running::start(host.command(&["fork", "-q", "web"]), None);
        thread::sleep(Duration::from_millis(delay));
        running.signal(libc::SIGKILL);
        drop(running);
        // Keepers that were started come up by themselves; what was not goes with the next command.
        wait_until("what a killed fork left to be gone", || {
            host.nacelle(&["ls", "-q"]).expect(0);
            entries(&host.dir().join("state/making")).is_empty()
        });
        counts(&host, "web");
        // A fork that came up counts as well, and all of them share one processor.
        let made = host.nacelle(&["ls", "-q", "-a"]).expect(0).text();
        for fork in made.lines().filter(|id| !web.starts_with(*id)) {
            host.nacelle(&["rm", "-f", fork]).expect(0);
        }
    }
    // The keeper is killed: with it goes the machine, unless its snapshot is whole.
    host.nacelle(&["suspend", "-q", "web"]).expect(0);
    host.nacelle(&["resume", "web"]).expect(0);
    let text = host.nacelle(&["ls", "-q", "-a"]).expect(0).text();
    let ids: Vec<&str> = text.lines().collect();
    host.nacelle(&[&["rm", "-f"], &ids[..]].concat()).expect(0);
    host.assert_nothing_left();
}

/// Waits until a machine runs or is suspended, and its keeper is at nothing.
fn settled(host: &Host, name: &str) {
    let quiet = || {
        let status = host.listed(name)["status"].clone();
        thread::sleep(Duration::from_millis(300));
        status == host.listed(name)["status"] && (status == "running" || status == "suspended")
    };
    wait_until("it to run or to be suspended", quiet);
    let dir = host.inspect(name)["paths"]["directory"].as_str().unwrap().to_owned();
    wait_until("drafts to be gone", || {
        !entries(Path::new(&dir)).iter().any(|path| path.display().to_string().contains(".nacelle-snapshot-"))
    });
}

#[test]
fn interrupted_commands_leave_machines_that_run_and_nothing_else() {
    let host = Host::new();
    host.detached("web", COUNTER);
    let dir = host.dir().join("taken");
    let at = dir.to_str().unwrap().to_owned();
    for delay in [5, 30, 80, 200] {
        let interrupted = |words: &[&str]| {
            let running = Running::start(host.command(words), None);
            thread::sleep(Duration::from_millis(delay));
            running.signal(libc::SIGINT);
            running.end(LIMIT)
        };
        let ended = interrupted(&["snapshot", "-q", "web", &at]);
        assert_eq!(dir.exists(), ended.code == 0, "{}", ended.err);
        let _ = fs::remove_dir_all(&dir);
        let ended = interrupted(&["fork", "-q", "-n", "2", "web"]);
        let count = host.machines().len();
        assert_eq!(count, if ended.code == 0 { 3 } else { 1 }, "exit code {}: {}", ended.code, ended.err);
        for name in ["web-1", "web-2"].iter().filter(|_| ended.code == 0) {
            host.nacelle(&["rm", "-f", name]).expect(0);
        }
        interrupted(&["suspend", "-q", "web"]);
        settled(&host, "web");
        host.nacelle(&["resume", "web"]).expect(0);
        counts(&host, "web");
        let left =
            entries(host.dir()).into_iter().filter(|path| path.display().to_string().contains("nacelle-"));
        assert_eq!(left.collect::<Vec<_>>(), Vec::<std::path::PathBuf>::new());
        assert!(entries(&host.dir().join("state/making")).is_empty());
    }
    host.nacelle(&["rm", "-f", "web"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn a_keeper_that_is_killed_leaves_the_snapshot_or_a_machine_that_has_ended() {
    let host = Host::new();
    for delay in [0, 10, 40, 100, 250] {
        host.run(&["-d", "--rm", "--name", "web"], COUNTER).expect(0);
        counts(&host, "web");
        let keeper = process(&host, "web", "keeper");
        let running = Running::start(host.command(&["suspend", "-q", "web"]), None);
        thread::sleep(Duration::from_millis(delay));
        // SAFETY: plain numbers; the keeper of a machine of this test's, or nobody.
        unsafe { libc::kill(keeper, libc::SIGKILL) };
        let ended = running.end(LIMIT);
        wait_until("its processes to be gone", || host.processes().is_empty());
        match host.listed("web")["status"].as_str() {
            Some("suspended") => {
                // What removes it at its end does not remove it when it is suspended.
                assert_eq!(ended.code, 0, "{}", ended.err);
                host.nacelle(&["resume", "web"]).expect(0);
                counts(&host, "web");
                host.nacelle(&["stop", "web"]).expect(0);
                wait_until("it to be removed at its end", || host.machines().is_empty());
            }
            status => {
                assert_eq!(status, Some("dead"));
                assert_ne!(ended.code, 0);
                host.nacelle(&["rm", "web"]).expect(0);
            }
        }
        host.assert_nothing_left();
    }
}

#[test]
fn forks_on_taps_of_their_own_have_other_addresses() {
    let host = Host::new();
    let ip = |line: &str| {
        let output =
            std::process::Command::new("ip").args(line.split(' ')).output().expect("iproute2 is there");
        assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    };
    for name in ["nctap", "nctap1", "nctap2"] {
        // One that an earlier, killed run has left behind.
        let _ = std::process::Command::new("ip").args(["link", "del", name]).output();
        ip(&format!("tuntap add {name} mode tap vnet_hdr"));
    }
    host.run(&["-d", "--name", "net", "--tap", "nctap,ip=10.9.0.2/24,gw=10.9.0.1"], "exec sleep 1000")
        .expect(0);
    // The tap is taken.
    let ended = host.nacelle(&["fork", "-q", "net"]).expect(1).says(&["net-1", "nctap"]);
    assert!(ended.out.is_empty() && host.machines().len() == 1);
    let tap = "network-interfaces.eth0.host_dev_name=nctap{n}";
    let address = "network-interfaces.eth0.ip=10.9.0.1{n}/24";
    host.nacelle(&["fork", "-q", "-n", "2", "--set", tap, "--set", address, "net"]).expect(0);
    let mut macs = Vec::new();
    for (name, own) in [("net", "10.9.0.2"), ("net-1", "10.9.0.11"), ("net-2", "10.9.0.12")] {
        let seen = exec(&host, name, "ifconfig eth0 || ip addr show eth0");
        assert!(seen.contains(&format!("{own} ")) || seen.contains(&format!("{own}/24")), "{name}: {seen}");
        let mac = seen.split_whitespace().find(|word| word.to_lowercase().starts_with("06:"));
        macs.push(mac.expect("a hardware address").to_lowercase());
    }
    macs.sort();
    macs.dedup();
    assert_eq!(macs.len(), 3, "{macs:?}");
    host.nacelle(&["rm", "-f", "net", "net-1", "net-2"]).expect(0);
    for name in ["nctap", "nctap1", "nctap2"] {
        ip(&format!("link delete {name}"));
    }
    host.assert_nothing_left();
}

#[test]
fn output_that_streams_through_suspensions_is_whole() {
    let host = Host::new();
    // More than any buffer between the shell and the log holds, at the speed of the shell.
    let script = "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); echo $i; done; exit 5";
    host.detached("stream", script);
    let mut times = 0;
    while host.listed("stream")["status"] == "running" && times < 4 {
        // It may have ended between the look and the call.
        if host.nacelle(&["suspend", "-q", "stream"]).code == 0 {
            times += 1;
            host.nacelle(&["resume", "stream"]).expect(0);
        }
    }
    assert!(times > 0, "it was over before it could be suspended");
    assert_eq!(host.nacelle(&["wait", "stream"]).expect(0).text(), "5\n");
    let printed = host.nacelle(&["logs", "stream"]).expect(0).text();
    let expected: String = (1..=40000).map(|number| format!("{number}\n")).collect();
    let (seen, wanted) = (printed.lines().count(), expected.lines().count());
    assert!(printed == expected, "{seen} lines of {wanted}, suspended {times} times");
    host.nacelle(&["rm", "stream"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn a_terminal_is_given_back_and_taken_up_again() {
    let host = Host::new();
    let image = test_image();
    let line = [&["run", "-q", "-it", "--name", "tty"], &SMALL[..], &[&image, "sh"]].concat();
    let mut terminal = Terminal::start(host.command(&line));
    terminal.see("# ");
    terminal.type_keys("x=41; echo ready$((x+1))\r");
    terminal.see("ready42");
    host.nacelle(&["suspend", "-q", "tty"]).expect(0);
    assert_eq!(terminal.end(), 148);
    assert!(terminal.is_cooked());
    let mut terminal = Terminal::start(host.command(&["resume", "-a", "tty"]));
    // The same shell, with what it had in memory.
    terminal.type_keys("echo again$((x+2))\r");
    terminal.see("again43");
    terminal.resize(40, 120);
    terminal.type_keys("while [ \"$(stty size)\" != '40 120' ]; do sleep 0.1; done; exit 9\r");
    assert_eq!(terminal.end(), 9);
    assert!(terminal.is_cooked());
    host.nacelle(&["rm", "tty"]).expect(0);
    host.assert_nothing_left();
}
