//! Many forks of one container, each asked over the network who it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::Read,
    thread,
    time::{Duration, Instant},
};

use super::{
    host::{Host, LIMIT, Running, wait_until},
    taps::Taps,
};

/// Serves its identity on port 7, and counts in its memory.
const SERVER: &str = r#"
    cat >/who <<'END'
#!/bin/sh
echo hostname=$(hostname)
echo etc-hostname=$(cat /etc/hostname)
echo machine-id=$(cat /etc/machine-id)
echo mac=$(ip link show eth0 | awk '/ether/ { print $2 }')
echo address=$(ip -4 addr show eth0 | awk '/inet/ { print $2 }')
echo urandom=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
echo uuid=$(cat /proc/sys/kernel/random/uuid)
echo count=$(cat /count)
END
    chmod +x /who; echo base >/etc/machine-id
    nc -ll -p 7 -e /who &
    i=0; while :; do i=$((i+1)); echo $i >/count.new; mv /count.new /count; sleep 0.5; done
"#;

/// What is nobody else's.
const OWN: [&str; 7] = ["hostname", "etc-hostname", "machine-id", "mac", "address", "urandom", "uuid"];

/// How many forks are made; the release check asks for 100.
fn clones() -> u8 {
    env::var("NACELLE_TEST_CLONES").map_or(4, |number| number.parse().unwrap())
}

/// Who the machine on a tap says that it is.
fn who(taps: &Taps, number: u8) -> BTreeMap<String, String> {
    let mut text = String::new();
    taps.connect(number, 7).read_to_string(&mut text).unwrap();
    let facts = text.lines().filter_map(|line| line.split_once('='));
    facts.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn available_kib() -> i64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn clones_answer_over_the_network_and_none_is_another() {
    let count = clones();
    let limit = LIMIT + 10 * Duration::from_secs(count.into());
    let (host, taps) = (Host::new(), Taps::new("nclclo", 24, count + 1));
    host.run(&["-d", "--name", "base", "--tap", &taps.flag()], SERVER).expect(0);
    wait_until("it to serve and to count", || who(&taps, 0).get("count").is_some_and(|n| !n.is_empty()));
    let before = who(&taps, 0);
    let (memory, begins) = (available_kib(), Instant::now());
    let settings = taps.settings();
    let number = count.to_string();
    let line = ["fork", "-q", "-n", &number, "--set", &settings[0], "--set", &settings[1], "base"];
    let names = Running::start(host.command(&line), None).end(limit).expect(0).text();
    let made = begins.elapsed();
    let expected: Vec<String> = (1..=count).map(|number| format!("base-{number}")).collect();
    assert_eq!(names.lines().collect::<Vec<_>>(), expected);

    // All at once: each is up, and has what it has drawn of random numbers first.
    let answers: Vec<BTreeMap<String, String>> = thread::scope(|scope| {
        let taps = &taps;
        let asked: Vec<_> = (0..=count).map(|number| scope.spawn(move || who(taps, number))).collect();
        asked.into_iter().map(|answer| answer.join().unwrap()).collect()
    });
    let (all, cost) = (begins.elapsed(), (memory - available_kib()) / i64::from(count));
    println!(
        "{count} clones: {made:?} until the last was made, {all:?} until all had answered, {cost} KiB each"
    );
    for fact in OWN {
        let values: BTreeSet<&str> = answers.iter().map(|answer| answer[fact].as_str()).collect();
        assert!(values.len() == answers.len() && !values.contains(""), "{fact}: {values:?}");
    }
    let counted = |answer: &BTreeMap<String, String>| answer["count"].parse::<u64>().unwrap();
    for (number, answer) in (0..).zip(&answers).skip(1) {
        assert_eq!(answer["hostname"], format!("base-{number}"));
        assert_eq!(answer["address"], format!("{}/24", taps.guest(number)));
        // It goes on where the original was.
        assert!(counted(answer) >= counted(&before), "{answer:?}, {before:?}");
    }
    // The original is who it was.
    for fact in ["hostname", "machine-id", "mac", "address"] {
        assert_eq!(answers[0][fact], before[fact]);
    }
    // Each goes on by itself.
    for (number, answer) in (0..).zip(&answers) {
        wait_until("a clone to go on", || counted(&who(&taps, number)) > counted(answer));
    }
    let line: Vec<&str> = ["rm", "-f", "base"].into_iter().chain(names.lines()).collect();
    Running::start(host.command(&line), None).end(limit).expect(0);
    host.assert_nothing_left();
}
