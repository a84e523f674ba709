//! A shell in a machine, at a terminal.

use super::{
    host::{Host, SMALL, test_image},
    terminal::Terminal,
};

fn shell(host: &Host, flags: &[&str]) -> Terminal {
    let image = test_image();
    Terminal::start(host.command(&[&["run", "-q"], &SMALL[..], flags, &[&image, "sh"]].concat()))
}

#[test]
fn a_shell_echoes_is_resized_and_interrupted_and_its_code_comes_back() {
    let host = Host::new();
    let mut terminal = shell(&host, &["-it"]);
    terminal.see("# ");
    assert!(!terminal.is_cooked(), "keys must reach the guest one by one");
    terminal.type_keys("echo sum-$((40+2)); tty; stty size\r");
    // What was typed is shown by the guest, then what it printed.
    terminal.see("echo sum-$((40+2))");
    terminal.see("sum-42");
    terminal.see("/dev/");
    terminal.see("24 80");
    terminal.resize(33, 101);
    // The news travels beside the keys.
    terminal.type_keys("while [ \"$(stty size)\" != '33 101' ]; do sleep 0.1; done; echo re''sized\r");
    terminal.see("resized");
    // The shell has left its line editor when it prints; the prompt says that it is back.
    terminal.type_keys("echo going-$((1+1)); sleep 1000\r");
    terminal.see("going-2");
    terminal.type_keys("\x03");
    terminal.see("# ");
    terminal.type_keys("echo code-$?\r");
    terminal.see("code-130");
    terminal.type_keys("exit 9\r");
    assert_eq!(terminal.end(), 9);
    assert!(terminal.is_cooked(), "the terminal was not put back");
    host.assert_nothing_left();
}

#[test]
fn a_caller_at_a_terminal_gets_one_unless_it_says_no() {
    let host = Host::new();
    let image = test_image();
    let line = |flag: &[&'static str]| {
        let script = "test -t 0 && test -t 1 && echo t''ty || echo n''one; stty -a 2>/dev/null | head -n 1";
        let words = [&["run", "-q"], &SMALL[..], flag, &[&image, "sh", "-c", script]].concat();
        Terminal::start(host.command(&words))
    };
    let mut terminal = line(&[]);
    terminal.see("tty");
    terminal.see("rows 24; columns 80");
    assert_eq!(terminal.end(), 0);
    let mut terminal = line(&["--no-tty"]);
    terminal.see("none");
    assert_eq!(terminal.end(), 0);
}

#[test]
fn control_d_ends_the_shell_and_a_terminal_that_is_not_there_is_said() {
    let host = Host::new();
    let mut terminal = shell(&host, &[]);
    terminal.see("# ");
    terminal.type_keys("false\r");
    terminal.see("# ");
    terminal.type_keys("\x04");
    assert_eq!(terminal.end(), 1);
    assert!(terminal.is_cooked());
    host.run(&["-it"], "true").expect(125).says(&["-t needs a terminal"]);
    host.assert_nothing_left();
}

#[test]
fn a_terminal_is_put_back_when_the_machine_is_killed() {
    let host = Host::new();
    let mut terminal = shell(&host, &["--name", "short-lived"]);
    terminal.see("# ");
    let monitor = host.inspect("short-lived")["state"]["monitor"]["pid"].as_i64().expect("a number");
    // SAFETY: plain numbers; the monitor was started for this host.
    unsafe { libc::kill(i32::try_from(monitor).expect("a process number"), libc::SIGKILL) };
    assert_eq!(terminal.end(), 125);
    assert!(terminal.is_cooked(), "the terminal was not put back");
    assert!(terminal.rest().contains("nacelle: "), "{}", terminal.rest());
}
