//! `nacelle stats`: what running machines use, once or again and again.
//!
//! Two views are put side by side. The agent says what the container uses, as `docker stats`
//! would count it: page cache that could be given back at once is not counted as used. The
//! host's kernel says what the monitor costs: guest memory that was touched, and, apart from
//! it, what the monitor itself takes, which is the overhead.

use std::{
    collections::BTreeMap,
    fs, thread,
    time::{Duration, Instant},
};

use clap::Args as ClapArgs;
use guest::{
    client::{Agent, Machine as Door},
    protocol::Stats,
};
use serde::{Deserialize, Serialize};

use super::{
    failure::{Failure, Outcome},
    output::{self, Format, Table},
    remote::{self, Host},
    state::{Machine, State, Status},
    terminal,
};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for one machine's figures.
const PATIENCE: Duration = Duration::from_secs(3);
/// Mappings at least this long whose memory is not accounted beforehand are guest memory.
const GUEST_MAPPING: u64 = 1 << 20;

/// Show what running machines use
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Show the figures once
    #[arg(long)]
    no_stream: bool,
    /// How to print them; JSON is one line a machine
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
    /// Names, ids or starts of ids; all that run without any
    #[arg(value_name = "MACHINE")]
    machines: Vec<String>,
}

/// The figures of one machine; keys stay what they are. What could not be had is null.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    id: String,
    name: String,
    /// Of one processor; 100 is one processor kept busy.
    cpu_percent: Option<f64>,
    memory_bytes: Option<u64>,
    memory_limit_bytes: Option<u64>,
    memory_percent: Option<f64>,
    pids: Option<u64>,
    net_rx_bytes: Option<u64>,
    net_tx_bytes: Option<u64>,
    block_read_bytes: Option<u64>,
    block_write_bytes: Option<u64>,
    /// Guest memory that the host holds.
    host_guest_bytes: Option<u64>,
    /// What the monitor takes besides.
    host_overhead_bytes: Option<u64>,
}

/// Shows them.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    if let Some(host) = host {
        return run_on(host, args);
    }
    let state = State::open()?;
    // A word that means nothing is said once, not every second.
    for word in &args.machines {
        let machine = state.find(word)?;
        if machine.record.status() != Status::Running {
            let name = &machine.record.name;
            return Err(Failure::new(format!("Machine {name} does not run; only running ones use anything")));
        }
    }
    let mut watched = BTreeMap::new();
    look(&state, &args.machines, &mut watched)?;
    loop {
        if !watched.is_empty() {
            thread::sleep(INTERVAL);
        }
        let figures = look(&state, &args.machines, &mut watched)?;
        show(args, &figures)?;
        if args.no_stream || (!args.machines.is_empty() && figures.is_empty()) {
            return Ok(0);
        }
        if watched.is_empty() {
            thread::sleep(INTERVAL);
        }
    }
}

/// Shows those of another host's machines, each of which is looked at for a second there.
fn run_on(host: &Host, args: &Args) -> Outcome<u8> {
    loop {
        let words = match &args.machines[..] {
            [] => {
                let rows: Vec<super::list::Row> = host.client().get("/machines")?;
                rows.iter().map(|row| row.id().to_owned()).collect()
            }
            named => named.to_vec(),
        };
        let ask = |word: &str| -> Outcome<Figures> { Ok(host.client().get(&remote::path(word, "/stats")?)?) };
        let answers: Vec<Outcome<Figures>> = thread::scope(|scope| {
            let threads: Vec<_> = words.iter().map(|word| scope.spawn(|| ask(word))).collect();
            let broken = |_| Err(Failure::new("A thread of this program failed"));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(broken)).collect()
        });
        let figures: Vec<Figures> = match args.machines[..] {
            // One that has just ended is no failure.
            [] => answers.into_iter().flatten().collect(),
            _ => answers.into_iter().collect::<Outcome<_>>()?,
        };
        show(args, &figures)?;
        if args.no_stream {
            return Ok(0);
        }
        if figures.is_empty() {
            thread::sleep(INTERVAL);
        }
    }
}

fn show(args: &Args, figures: &[Figures]) -> Outcome<()> {
    let redraw = args.format == Format::Table && !args.no_stream && terminal::is_terminal(1);
    let text = match args.format {
        Format::Table => table(figures).text(),
        Format::Json => lines(figures),
    };
    output::print(&if redraw { format!("\x1b[H\x1b[J{text}") } else { text })
}

/// The figures of one machine, after looking at it for a second; none when it does not run.
pub fn figures(state: &State, id: &str) -> Outcome<Option<Figures>> {
    let words = [id.to_owned()];
    let mut watched = BTreeMap::new();
    look(state, &words, &mut watched)?;
    thread::sleep(INTERVAL);
    Ok(look(state, &words, &mut watched)?.pop())
}

/// A machine that is looked at again and again.
struct Watched {
    agent: Option<Agent>,
    before: Option<(Instant, u64)>,
}

/// One look at each machine: those named that still run, or all that run.
fn look(state: &State, words: &[String], watched: &mut BTreeMap<String, Watched>) -> Outcome<Vec<Figures>> {
    let named = |m: &Machine| {
        words.is_empty() || words.iter().any(|w| m.record.name == *w || m.record.id.starts_with(w.as_str()))
    };
    let machines = state.machines()?;
    let running: Vec<&Machine> =
        machines.iter().filter(|m| named(m) && m.record.status() == Status::Running).collect();
    watched.retain(|id, _| running.iter().any(|m| m.record.id == *id));
    let mut figures = Vec::new();
    for machine in running {
        let fresh = || Watched { agent: None, before: None };
        let one = watched.entry(machine.record.id.clone()).or_insert_with(fresh);
        let stats = one.ask(machine);
        let now = Instant::now();
        let before = std::mem::replace(&mut one.before, stats.as_ref().map(|s| (now, s.cpu.usage_us)));
        figures.push(collect(machine, stats.as_ref(), before, now));
    }
    Ok(figures)
}

impl Watched {
    /// The agent's figures; nothing when it does not answer in time.
    fn ask(&mut self, machine: &Machine) -> Option<Stats> {
        let door = Door::new(machine.vsock()).with_timeout(PATIENCE);
        let mut agent = match self.agent.take() {
            Some(agent) => agent,
            None => door.control().ok()?,
        };
        let stats = agent.stats().ok()?;
        self.agent = Some(agent);
        Some(stats)
    }
}

fn collect(
    machine: &Machine,
    stats: Option<&Stats>,
    before: Option<(Instant, u64)>,
    now: Instant,
) -> Figures {
    let record = &machine.record;
    let cpu = stats.zip(before).and_then(|(stats, (at, usage))| {
        let wall = now.saturating_duration_since(at).as_micros() as f64;
        (wall > 0.0).then(|| stats.cpu.usage_us.saturating_sub(usage) as f64 / wall * 100.0)
    });
    let host = record.monitor.and_then(|m| fs::read_to_string(format!("/proc/{}/smaps", m.pid)).ok());
    let host = host.map(|text| footprint(&text));
    let used = stats.and_then(|s| s.memory.current.map(|c| c.saturating_sub(s.memory.inactive_file)));
    let limit = stats.map(|s| s.memory.limit.unwrap_or(s.guest.memory_total).min(s.guest.memory_total));
    let share = |(used, limit): (u64, u64)| (limit > 0).then(|| used as f64 / limit as f64 * 100.0);
    let sum = |list: Vec<u64>| list.into_iter().fold(0u64, u64::saturating_add);
    Figures {
        id: record.id.clone(),
        name: record.name.clone(),
        cpu_percent: cpu,
        memory_bytes: used,
        memory_limit_bytes: limit,
        memory_percent: used.zip(limit).and_then(share),
        pids: stats.and_then(|s| s.pids.current),
        net_rx_bytes: stats.map(|s| sum(s.network.iter().map(|n| n.rx_bytes).collect())),
        net_tx_bytes: stats.map(|s| sum(s.network.iter().map(|n| n.tx_bytes).collect())),
        block_read_bytes: stats.map(|s| sum(s.io.iter().map(|d| d.read_bytes).collect())),
        block_write_bytes: stats.map(|s| sum(s.io.iter().map(|d| d.write_bytes).collect())),
        host_guest_bytes: host.map(|(guest, _)| guest),
        host_overhead_bytes: host.map(|(_, own)| own),
    }
}

/// Guest memory that is held, and what the process holds besides, in bytes, from
/// `/proc/PID/smaps` (proc(5)). Guest memory is what is mapped without being reserved (`nr`),
/// or from huge pages (`ht`), and large; the rest is counted by its proportional share, since
/// the program's own pages are shared by all monitors.
fn footprint(smaps: &str) -> (u64, u64) {
    let (mut guest, mut own) = (0u64, 0u64);
    let (mut size, mut held) = (0, 0);
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let kib =
            || value.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0).saturating_mul(1024);
        match key {
            "Size" => (size, held) = (kib(), 0),
            "Pss" | "Private_Hugetlb" => held += kib(),
            // The last line of each mapping.
            "VmFlags" => {
                let unreserved = value.split_whitespace().any(|flag| flag == "nr" || flag == "ht");
                let side = if unreserved && size >= GUEST_MAPPING { &mut guest } else { &mut own };
                *side = side.saturating_add(held);
            }
            _ => {}
        }
    }
    (guest, own)
}

fn table(figures: &[Figures]) -> Table {
    let mut table = Table::new(&[
        "ID",
        "NAME",
        "CPU %",
        "MEM USAGE / LIMIT",
        "MEM %",
        "NET I/O",
        "BLOCK I/O",
        "PIDS",
        "HOST GUEST + OVERHEAD",
    ]);
    let percent = |value: Option<f64>| value.map_or("--".to_owned(), |v| format!("{v:.2}%"));
    let pair = |a: Option<u64>, b: Option<u64>, between: &str| {
        let one = |v: Option<u64>| v.map_or("--".to_owned(), output::bytes);
        format!("{} {between} {}", one(a), one(b))
    };
    for f in figures {
        table.add([
            f.id.get(..12).unwrap_or(&f.id).to_owned(),
            f.name.clone(),
            percent(f.cpu_percent),
            pair(f.memory_bytes, f.memory_limit_bytes, "/"),
            percent(f.memory_percent),
            pair(f.net_rx_bytes, f.net_tx_bytes, "/"),
            pair(f.block_read_bytes, f.block_write_bytes, "/"),
            f.pids.map_or("--".to_owned(), |p| p.to_string()),
            pair(f.host_guest_bytes, f.host_overhead_bytes, "+"),
        ]);
    }
    table
}

fn lines(figures: &[Figures]) -> String {
    figures.iter().filter_map(|f| serde_json::to_string(f).ok()).map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0080000000 rw-p 00000000 00:00 0
Size:            2097152 kB
Rss:              102400 kB
Pss:              102400 kB
VmFlags: rd wr mr mw me ac sd nr
7f00a0000000-7f00a0021000 rw-p 00000000 00:00 0
Size:                132 kB
Pss:                   8 kB
VmFlags: rd wr mr mw me nr sd
00400000-00500000 r-xp 00000000 08:01 123    /usr/bin/nacelle:odd name
Size:               1024 kB
Pss:                 300 kB
VmFlags: rd ex mr mw me sd
7f0100000000-7f0140000000 rw-p 00000000 00:0f 7  /anon_hugepage (deleted)
Size:            1048576 kB
Pss:                   0 kB
Private_Hugetlb:    2048 kB
VmFlags: rd wr mr mw me de ht sd
";

    #[test]
    fn guest_memory_is_told_from_the_monitors_own() {
        assert_eq!(footprint(SMAPS), ((102_400 + 2048) << 10, 308 << 10));
        assert_eq!(footprint("nonsense"), (0, 0));
    }

    #[test]
    fn what_could_not_be_had_is_shown_as_such() {
        let figures =
            [Figures { id: "0123456789abcdef".to_owned(), name: "a".to_owned(), ..Figures::default() }];
        let text = table(&figures).text();
        assert!(text.lines().nth(1).unwrap().starts_with("0123456789ab   a      --      -- / --"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&lines(&figures)).unwrap();
        assert_eq!(json["cpu_percent"], serde_json::Value::Null);
    }
}
