//! A container that works while it is suspended and resumed again and again.
//!
//! ```text
//!   /dev/vdc   blocks, written, read back, summed        every round is a line of its log
//!   port 7     sends back what it gets                   one connection is held all the while
//!   /ticks     a timer's count                           and the clocks, which never step back
//! ```
//!
//! What all that comes to without any disturbance is computed here from the number of rounds.

use std::{env, fs, thread, time::Duration};

use sha2::{Digest, Sha256};

use super::{
    host::{Host, LIMIT, Running, noise, wait_until},
    taps::{Taps, echo},
};

/// Bytes of a round's block, and blocks of the disk.
const BLOCK: usize = 64 << 10;
const BLOCKS: usize = 16;

const WORK: &str = r#"
    nc -ll -p 7 -e cat &
    (n=0; while :; do n=$((n + 1)); echo $n >/ticks.new; mv /ticks.new /ticks; sleep 0.02; done) &
    n=0; sum=start; up=0; clock=0
    while [ ! -e /stop ]; do
        n=$((n + 1))
        yes "round $n" | head -c 65536 >/block
        dd if=/block of=/dev/vdc bs=65536 seek=$((n % 16)) conv=notrunc,fsync 2>/dev/null
        echo 1 >/proc/sys/vm/drop_caches
        dd if=/dev/vdc of=/back bs=65536 skip=$((n % 16)) count=1 2>/dev/null
        sum=$( (echo "$sum"; cat /back) | sha256sum | cut -d' ' -f1)
        now=$(cut -d' ' -f1 /proc/uptime | tr -d .); [ $now -ge $up ] || echo "time ran back from $up to $now"
        up=$now
        now=$(date +%s); [ $now -ge $clock ] || echo "the clock ran back from $clock to $now"
        clock=$now
        echo "$n $sum"
    done
    echo "ends with $(sha256sum </dev/vdc | cut -d' ' -f1)"
    exit 7
"#;

/// The SHA-256 of `data`, in hexadecimal.
pub fn sha256(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The log of an undisturbed run of `rounds` rounds.
fn undisturbed(rounds: usize) -> String {
    let (mut disk, mut sum, mut log) = (vec![0; BLOCKS * BLOCK], "start".to_owned(), String::new());
    for round in 1..=rounds {
        let text = format!("round {round}\n");
        let block: Vec<u8> = text.bytes().cycle().take(BLOCK).collect();
        let at = round % BLOCKS * BLOCK;
        disk[at..at + BLOCK].copy_from_slice(&block);
        sum = sha256(&[sum.as_bytes(), b"\n", &block].concat());
        log += &format!("{round} {sum}\n");
    }
    log + &format!("ends with {}\n", sha256(&disk))
}

/// How often it is suspended; the release check asks for 100.
fn generations() -> u64 {
    env::var("NACELLE_TEST_GENERATIONS").map_or(3, |number| number.parse().unwrap())
}

fn number(host: &Host, path: &str) -> u64 {
    host.nacelle(&["exec", "web", "cat", path]).expect(0).text().trim().parse().expect("a number")
}

fn nothing_is_lost(transport: &[&str], taps: &Taps) {
    let host = Host::new();
    let disk = host.dir().join("disk.img");
    fs::write(&disk, vec![0; BLOCKS * BLOCK]).unwrap();
    let tap = taps.flag();
    let flags =
        [&["-d", "--name", "web", "--disk", disk.to_str().unwrap(), "--tap", &tap], transport].concat();
    host.run(&flags, WORK).expect(0);
    let mut held = taps.connect(0, 7);
    echo(&mut held, b"the first words");
    let follower = Running::start(host.command(&["logs", "-f", "web"]), None);
    let mut ticks = 0;
    for generation in 0..generations() {
        let before = number(&host, "/ticks");
        assert!(before > ticks, "the timer stands at {ticks}");
        host.nacelle(&["suspend", "-q", "web"]).expect(0);
        host.nacelle(&["resume", "web"]).expect(0);
        echo(&mut held, &noise(20_000 + generation as usize));
        echo(&mut taps.connect(0, 7), format!("generation {generation}").as_bytes());
        ticks = before;
        // At work when it is suspended again, not always at the same place.
        thread::sleep(Duration::from_millis(generation * 37 % 200));
    }
    wait_until("the timer to go on", || number(&host, "/ticks") > ticks);
    host.nacelle(&["exec", "web", "touch", "/stop"]).expect(0);
    assert_eq!(host.nacelle(&["wait", "web"]).expect(0).text(), "7\n");
    let log = host.nacelle(&["logs", "web"]).expect(0).text();
    assert_eq!(follower.end(LIMIT).expect(0).text(), log);
    let rounds = log.lines().count() - 1;
    assert!(rounds as u64 >= generations(), "{log}");
    assert_eq!(log, undisturbed(rounds));
    assert_eq!(log.lines().last().unwrap(), format!("ends with {}", sha256(&fs::read(&disk).unwrap())));
    println!("{rounds} rounds in {} generations", generations());
    host.nacelle(&["rm", "web"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn a_container_at_work_loses_nothing_over_generations_with_mmio_devices() {
    nothing_is_lost(&[], &Taps::new("nclgen", 22, 1));
}

#[test]
fn a_container_at_work_loses_nothing_over_generations_with_pci_devices() {
    nothing_is_lost(&["--pci"], &Taps::new("nclgep", 23, 1));
}
