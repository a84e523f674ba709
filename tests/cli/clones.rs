//! Many forks of one container, each asked over the network who it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::Read,
    thread,
    time::{Duration, Instant},
};

use super::{
    host::{Host, LIMIT, Running},
    taps::Taps,
};

/// Serves its identity on port 7, and counts who asked. It sleeps when nobody does: a hundred of
/// them share one processor.
const SERVER: &str = r#"
    cat >/who <<'END'
#!/bin/sh
echo $(($(cat /count) + 1)) >/count
echo hostname=$(hostname)
echo etc-hostname=$(cat /etc/hostname)
echo machine-id=$(cat /etc/machine-id)
echo mac=$(ip link show eth0 | awk '/ether/ { print $2 }')
echo address=$(ip -4 addr show eth0 | awk '/inet/ { print $2 }')
echo urandom=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
echo uuid=$(cat /proc/sys/kernel/random/uuid)
echo count=$(cat /count)
END
    chmod +x /who; echo base >/etc/machine-id; echo 0 >/count
    exec nc -ll -p 7 -e /who
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
    who(&taps, 0);
    let before = who(&taps, 0);
    assert_eq!(before["count"], "2");
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
    for (number, answer) in (0..).zip(&answers).skip(1) {
        assert_eq!(answer["hostname"], format!("base-{number}"));
        assert_eq!(answer["address"], format!("{}/24", taps.guest(number)));
    }
    // Each went on where the original was, the original too, and goes on by itself.
    assert!(answers.iter().all(|answer| answer["count"] == "3"), "{answers:?}");
    assert_eq!(who(&taps, count)["count"], "4");
    assert_eq!(who(&taps, count - 1)["count"], "4");
    // The original is who it was.
    for fact in ["hostname", "machine-id", "mac", "address"] {
        assert_eq!(answers[0][fact], before[fact]);
    }
    let line: Vec<&str> = ["rm", "-f", "base"].into_iter().chain(names.lines()).collect();
    Running::start(host.command(&line), None).end(limit).expect(0);
    host.assert_nothing_left();
}
