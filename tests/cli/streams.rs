//! Bytes in and out, exit codes and signals.

use std::time::{Duration, Instant};

use super::host::{Host, LIMIT, Running, SMALL, noise, stock_kernel, test_image};

#[test]
fn both_outputs_come_back_byte_for_byte_and_so_does_the_exit_code() {
    let host = Host::new();
    let bytes = noise(5 << 20);
    // Standard error and output are separate files inside, too: neither holds the other's.
    let script = "cat >/tmp/x; cat /tmp/x; cat /tmp/x >&2; exit 7";
    let ended = host.start(&["-i"], script, Some(bytes.clone())).end(LIMIT);
    assert!(ended.err.len() > 1000, "{}", ended.err);
    assert_eq!(ended.code, 7);
    assert!(ended.out == bytes, "standard output has {} bytes, others than were sent", ended.out.len());
    let err = String::from_utf8_lossy(&bytes);
    assert!(ended.err == err, "standard error has {} characters, others than were sent", ended.err.len());
    host.assert_nothing_left();
}

#[test]
fn five_mebibytes_go_in_and_out_at_the_same_time() {
    let host = Host::new();
    let bytes = noise(5 << 20);
    let ended = host.start(&["-i"], "exec cat", Some(bytes.clone())).end(LIMIT).expect(0);
    assert!(ended.out == bytes, "{} bytes came back, others than were sent", ended.out.len());
    assert_eq!(ended.err, "");
}

#[test]
fn without_i_the_command_reads_nothing() {
    let host = Host::new();
    let ended = host.start(&[], "cat; cat; echo end", Some(b"unseen".to_vec())).end(LIMIT).expect(0);
    assert_eq!(ended.text(), "end\n");
}

#[test]
fn a_command_that_is_not_there_is_127_and_one_that_is_no_program_126() {
    let host = Host::new();
    let image = test_image();
    let run = |command: &str| host.nacelle(&[&["run", "-q"], &SMALL[..], &[&image, command]].concat());
    run("no-such-program").expect(127).says(&["nacelle: ", "no-such-program"]);
    run("/etc/passwd").expect(126).says(&["nacelle: ", "/etc/passwd"]);
    run("/no/such/program").expect(127).says(&["/no/such/program"]);
    host.assert_nothing_left();
}

#[test]
fn a_command_that_a_signal_killed_is_128_and_its_number() {
    let host = Host::new();
    assert_eq!(host.run(&["--init"], "kill -9 $$; echo alive").expect(137).text(), "");
    host.run(&["--init"], "echo a; kill -SEGV $$").expect(139);
}

#[test]
fn signals_reach_the_command() {
    let host = Host::new();
    let script =
        "trap 'echo hup' HUP; trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut running = host.start(&[], script, None);
    running.wait_for("ready\n");
    running.signal(libc::SIGHUP);
    running.wait_for("hup\n");
    running.signal(libc::SIGTERM);
    assert_eq!(running.end(LIMIT).expect(3).text(), "ready\nhup\nterm\n");
    // One that does not care dies of it, under an init.
    let mut running = host.start(&["--init"], "echo ready; exec sleep 1000", None);
    running.wait_for("ready\n");
    running.signal(libc::SIGTERM);
    running.end(LIMIT).expect(143);
    host.assert_nothing_left();
}

#[test]
fn what_is_printed_last_is_not_lost_and_arrives_as_it_is_printed() {
    let host = Host::new();
    let mut running =
        host.start(&["-i"], "echo first; read line; seq 100000; echo last >&2", Some(b"go\n".to_vec()));
    running.wait_for("first\n");
    let ended = running.end(LIMIT).expect(0);
    assert_eq!(ended.err, "last\n");
    assert!(ended.text().ends_with("\n99999\n100000\n"), "the end is missing");
    assert_eq!(ended.text().lines().count(), 100_001);
}

#[test]
fn a_caller_that_does_not_read_on_ends_neither_the_log_nor_the_command() {
    let host = Host::new();
    // A shell that goes away after one line, as `| head -1` does.
    let mut command = std::process::Command::new("sh");
    let run = host.command::<&str>(&[]);
    command.args(["-c", "\"$@\" | head -n 1", "sh"]).arg(run.get_program());
    command.args(["run", "-q", "--name", "unread"]).args(SMALL).arg(test_image());
    command.args(["sh", "-c", "seq 50000; echo $? >&2"]);
    command.envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let ended = Running::start(command, None).end(LIMIT).expect(0);
    assert_eq!(ended.text(), "1\n");
    super::host::wait_until("the end", || host.listed("unread")["status"] == "exited");
    assert!(host.listed("unread")["exit_code"].is_u64());
}

#[test]
fn debians_own_kernel_runs_it_as_well() {
    let host = Host::new();
    let image = test_image();
    let kernel = stock_kernel();
    let script = "uname -r; cat; exit 5";
    for transport in [&[][..], &["--pci"]] {
        let flags = [&["run", "-q", "-i", "--kernel", &kernel], &SMALL[..], transport].concat();
        let line = [&flags[..], &[&image, "sh", "-c", script]].concat();
        let ended = Running::start(host.command(&line), Some(b"x\0y".to_vec())).end(LIMIT).expect(5);
        assert!(ended.text().contains("-amd64\nx\0y"), "{:?}", ended.text());
    }
}

#[test]
fn a_machine_that_cannot_start_in_time_ends_with_a_sentence() {
    let host = Host::new();
    let image = test_image();
    let line = [&["run", "-q"], &SMALL[..], &[image.as_str(), "true"]].concat();
    let mut command = host.command(&line);
    command.env("NACELLE_START_TIMEOUT", "0");
    let start = Instant::now();
    Running::start(command, None).end(LIMIT).expect(125).says(&["did not start within 0 s"]);
    assert!(start.elapsed() < Duration::from_secs(20));
    host.assert_nothing_left();
}
