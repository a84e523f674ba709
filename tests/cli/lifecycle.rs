//! Machines that are left running: seen, asked, copied to and from, stopped and removed.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

use super::{
    host::{Ended, Host, LIMIT, Running, noise, wait_until},
    image::digest,
    terminal::Terminal,
};

#[test]
fn a_machine_is_seen_stopped_and_removed_by_name_id_and_start_of_id() {
    let host = Host::new();
    let script = "trap 'echo bye; exit 3' TERM; echo hello; echo problem >&2; while :; do sleep 0.1; done";
    let id = host.detached("web", script);
    wait_until("output", || host.nacelle(&["logs", "web"]).out == b"hello\n");

    let table = host.nacelle(&["ps"]).expect(0).text();
    assert!(table.contains("web") && table.contains(&id[..12]) && table.contains("Up "), "{table}");
    assert_eq!(host.nacelle(&["ls", "-q", "--no-trunc"]).expect(0).text(), format!("{id}\n"));
    let row = host.listed("web");
    assert_eq!(
        (&row["status"], &row["cpus"], &row["memory_mib"]),
        (&"running".into(), &1.into(), &256.into())
    );
    let seen = host.inspect(&id[..8]);
    assert_eq!((&seen["name"], &seen["id"]), (&"web".into(), &id[..].into()));
    assert_eq!(seen["state"]["status"], "running");
    assert_eq!(seen["resources"]["memory_mib"], 256);
    assert_eq!(seen["setup"]["entropy"], Value::Null, "seeds are nobody's business");

    // A name is one machine's.
    host.run(&["-d", "--name", "web"], "true").expect(125).says(&["web", "taken", &id[..12]]);
    host.nacelle(&["rm", "web"]).says(&["nacelle stop web"]);
    host.nacelle(&["inspect", "wbe"]).says(&["wbe", "did you mean web"]);

    // Its own handler has the last word, and what it says is kept.
    assert_eq!(host.nacelle(&["stop", &id[..5]]).expect(0).text(), format!("{}\n", &id[..5]));
    let row = host.listed("web");
    assert_eq!((&row["status"], &row["exit_code"]), (&"exited".into(), &3.into()));
    assert_eq!(host.nacelle(&["ls", "-q"]).expect(0).text(), "");
    let logs = host.nacelle(&["logs", "web"]).expect(0);
    assert_eq!((&logs.text()[..], &logs.err[..]), ("hello\nbye\n", "problem\n"));
    assert_eq!(host.nacelle(&["wait", "web"]).expect(0).text(), "3\n");
    host.nacelle(&["exec", "web", "true"]).expect(125).says(&["exited"]);
    assert_eq!(host.nacelle(&["rm", "web"]).expect(0).text(), "web\n");
    host.nacelle(&["inspect", "web"]).says(&["No machine is called \"web\""]);
    host.assert_nothing_left();
}

#[test]
fn a_prefix_of_two_ids_is_refused_and_all_are_named() {
    let host = Host::new();
    let mut ids = Vec::new();
    // They need not run for that.
    for number in 0..2 {
        let record = host.dir().join("state/machines").join(format!("{number:012x}"));
        fs::create_dir_all(&record).unwrap();
        let id = format!("ab{}", format!("{number}").repeat(62));
        let text = serde_json::json!({
            "id": id, "name": format!("m{number}"), "image": "x", "image_key": "", "command": ["x"], "env": [],
            "cpus": 1, "memory_mib": 64, "kernel": "/x", "terminal": false, "ephemeral": false, "stop_signal": 15,
            "created": number, "started": null, "monitor": null, "keeper": null, "end": null,
        });
        fs::write(record.join("machine.json"), text.to_string()).unwrap();
        ids.push(id);
    }
    let ended = host.nacelle(&["rm", "ab"]);
    assert_ne!(ended.code, 0);
    ended.says(&["several ids", "(m0)", "(m1)"]);
    assert_eq!(host.machines().len(), 2);
    // Each by what tells it from the others, all in one go.
    let words: Vec<&str> = ids.iter().map(|id| &id[..6]).collect();
    host.nacelle(&[&["rm"], &words[..]].concat()).expect(0);
    host.assert_nothing_left();
}

#[test]
fn logs_are_followed_until_the_end_and_byte_for_byte() {
    let host = Host::new();
    let script =
        "printf 'a\\0\\377'; echo err >&2; read go; for i in 1 2 3; do echo line $i; sleep 0.2; done; exit 6";
    // Without -i a detached command reads nothing, so `read` ends at once.
    host.detached("talk", script);
    let follower = Running::start(host.command(&["logs", "-f", "talk"]), None);
    let ended = follower.end(LIMIT).expect(0);
    assert_eq!(ended.out, b"a\0\xffline 1\nline 2\nline 3\n");
    assert_eq!(ended.err, "err\n");
    assert_eq!(host.nacelle(&["wait", "talk"]).expect(0).text(), "6\n");
    assert_eq!(host.nacelle(&["logs", "-n", "2", "talk"]).expect(0).text(), "line 2\nline 3\n");
    let timed = host.nacelle(&["logs", "-t", "-n", "1", "talk"]).expect(0).text();
    assert!(timed.starts_with("20") && timed.ends_with("Z line 3\n"), "{timed}");
    host.nacelle(&["logs", "--source", "kernel", "talk"]).expect(0);
    assert!(!host.nacelle(&["logs", "--source", "monitor", "talk"]).expect(0).out.is_empty());
    host.nacelle(&["rm", "talk"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn further_commands_have_streams_codes_and_terminals_of_their_own() {
    let host = Host::new();
    let flags = ["-d", "--name", "box", "-e", "COLOR=blue", "-w", "/tmp", "--init"];
    host.run(&flags, "exec sleep 1000").expect(0);
    let exec = |words: &[&str]| host.nacelle(&[&["exec"], words].concat());

    let ended = exec(&["box", "sh", "-c", "echo out; echo err >&2; exit 12"]).expect(12);
    assert_eq!((&ended.text()[..], &ended.err[..]), ("out\n", "err\n"));
    assert_eq!(exec(&["box", "sh", "-c", "echo $COLOR; pwd"]).expect(0).text(), "blue\n/tmp\n");
    let words =
        ["-e", "COLOR=red", "-w", "/etc", "-u", "nobody", "box", "sh", "-c", "echo $COLOR; pwd; id -un"];
    assert_eq!(exec(&words).expect(0).text(), "red\n/etc\nnobody\n");
    exec(&["box", "no-such-program"]).expect(127).says(&["no-such-program"]);
    exec(&["box", "/etc/passwd"]).expect(126);
    exec(&["box", "sh", "-c", "kill -9 $$"]).expect(137);
    // It is the same container: the main process is seen.
    assert!(exec(&["box", "ps"]).expect(0).text().contains("sleep 1000"));

    let bytes = noise(2 << 20);
    let command = host.command(&["exec", "-i", "box", "cat"]);
    let ended = Running::start(command, Some(bytes.clone())).end(LIMIT).expect(0);
    assert!(ended.out == bytes, "{} bytes came back, others than were sent", ended.out.len());

    let mut terminal = Terminal::start(host.command(&["exec", "-it", "box", "sh"]));
    terminal.see("# ");
    terminal.type_keys("stty size; echo $((6*7))\r");
    terminal.see("24 80");
    terminal.see("42");
    terminal.resize(40, 120);
    terminal.type_keys("while [ \"$(stty size)\" != '40 120' ]; do sleep 0.1; done; exit 8\r");
    assert_eq!(terminal.end(), 8);
    assert!(terminal.is_cooked());

    // A signal to the exec is one to its command.
    let mut running =
        Running::start(host.command(&["exec", "box", "sh", "-c", "echo ready; exec sleep 1000"]), None);
    running.wait_for("ready\n");
    running.signal(libc::SIGTERM);
    running.end(LIMIT).expect(143);
    assert_eq!(host.listed("box")["status"], "running");
    // Killed at once, as asked.
    host.nacelle(&["kill", "box"]).expect(0);
    assert_eq!(host.nacelle(&["wait", "box"]).expect(0).text(), "137\n");
    host.nacelle(&["rm", "box"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn files_are_copied_both_ways_and_as_tar() {
    let host = Host::new();
    host.detached("box", "exec sleep 1000");
    let dir = host.dir();
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let cp = |from: &str, to: &str| host.nacelle(&["cp", from, to]);

    // A tree in, and out again as it was.
    let bytes = noise(3 << 20);
    fs::create_dir_all(dir.join("tree/inner")).unwrap();
    fs::write(dir.join("tree/data"), &bytes).unwrap();
    fs::write(dir.join("tree/inner/script"), "#!/bin/sh\necho ran\n").unwrap();
    tool(Command::new("chmod").arg("750").arg(dir.join("tree/inner/script")));
    std::os::unix::fs::symlink("inner/script", dir.join("tree/link")).unwrap();
    cp(&at("tree"), "box:/srv").expect(0);
    let script = "sha256sum </srv/data; stat -c %a /srv/inner/script; readlink /srv/link; /srv/inner/script";
    let seen = host.nacelle(&["exec", "box", "sh", "-c", script]).expect(0).text();
    assert_eq!(seen, format!("{}  -\n750\ninner/script\nran\n", &digest(&bytes)[7..]));
    cp("box:/srv", &at("back")).expect(0);
    tool(Command::new("diff").arg("-r").arg(dir.join("tree")).arg(dir.join("back")));
    assert_eq!(fs::read_link(dir.join("back/link")).unwrap(), Path::new("inner/script"));

    // One file to a new name and into a directory.
    cp(&at("tree/data"), "box:/tmp/renamed").expect(0);
    cp("box:/tmp/renamed", dir.to_str().unwrap()).expect(0);
    assert_eq!(digest(&fs::read(dir.join("renamed")).unwrap()), digest(&bytes));

    // tar on standard output and input.
    let archive = host.nacelle(&["cp", "box:/srv/inner", "-"]).expect(0).out;
    let mut names = Vec::new();
    for entry in tar::Archive::new(&archive[..]).entries().unwrap() {
        names.push(entry.unwrap().path().unwrap().to_string_lossy().trim_end_matches('/').to_owned());
    }
    assert!(names.contains(&"inner/script".to_owned()), "{names:?}");
    let ended = Running::start(host.command(&["cp", "-", "box:/tmp"]), Some(archive)).end(LIMIT);
    ended.expect(0);
    assert_eq!(host.nacelle(&["exec", "box", "/tmp/inner/script"]).expect(0).text(), "ran\n");

    // What is not there is said, and by the right side.
    cp("box:/no/such/file", &at("x")).expect(125).says(&["/no/such/file"]);
    cp(&at("absent"), "box:/tmp").expect(125).says(&["absent"]);
    cp("nobody:/etc/passwd", &at("x")).expect(125).says(&["nobody"]);
    cp(&at("tree"), &at("x")).expect(125).says(&["MACHINE:"]);
    host.nacelle(&["rm", "-f", "box"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn figures_of_a_running_machine_make_sense() {
    let host = Host::new();
    host.detached("busy", "while :; do :; done");
    let row = |ended: Ended| -> Value { serde_json::from_slice(&ended.out).expect("one line of JSON") };
    let line = ["stats", "--no-stream", "--format", "json", "busy"];
    let seen = row(host.nacelle(&line).expect(0));
    assert_eq!(seen["name"], "busy");
    let number = |name: &str| seen[name].as_f64().unwrap_or_else(|| panic!("no {name} in {seen}"));
    assert!(number("cpu_percent") > 5.0, "{seen}");
    assert!(number("pids") >= 1.0 && number("memory_bytes") > 1000.0, "{seen}");
    assert!(number("memory_limit_bytes") <= 256.0 * 1048576.0, "{seen}");
    assert!((1e6..300e6).contains(&number("host_guest_bytes")), "{seen}");
    let table = host.nacelle(&["stats", "--no-stream"]).expect(0).text();
    assert!(table.contains("busy"), "{table}");
    // It does not listen to TERM, being process 1 without a handler: it is killed after its time.
    host.nacelle(&["stop", "-t", "1", "busy"]).expect(0);
    assert_eq!(host.nacelle(&["wait", "busy"]).expect(0).text(), "137\n");
    host.nacelle(&["stats", "--no-stream", "busy"]).says(&["busy"]);
    host.nacelle(&["rm", "busy"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn waiting_ends_with_the_machine_and_rm_takes_it_away_at_its_end() {
    let host = Host::new();
    let id = host.run(&["-d", "--rm", "--name", "brief", "--init"], "sleep 1000; exit 4").expect(0).text();
    let waiter = Running::start(host.command(&["wait", "brief"]), None);
    host.nacelle(&["kill", "-s", "TERM", "brief"]).expect(0);
    assert_eq!(waiter.end(LIMIT).expect(0).text(), "143\n");
    wait_until("it to be removed", || host.machines().is_empty());
    host.nacelle(&["inspect", id.trim()]).says(&["No machine is called"]);
    // Many are removed by force, whatever they do.
    host.detached("one", "exec sleep 1000");
    host.run(&["--name", "two"], "exit 2").expect(2);
    assert_eq!(host.listed("two")["exit_code"], 2);
    let ended = host.nacelle(&["rm", "-f", "one", "nobody", "two"]);
    assert_ne!(ended.code, 0);
    ended.says(&["nobody"]);
    host.assert_nothing_left();
}

fn tool(command: &mut Command) {
    let output = command.output().expect("the tool is installed");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&said));
}
