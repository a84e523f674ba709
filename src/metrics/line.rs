//! One line of the metrics file, in Firecracker's schema.
//!
//! Most numbers are counts since the last line that was written. The counters themselves are
//! never set back: [`counts`] reads them all, [`since`] takes away what the last line had, and
//! only when a line was written does its reading become the last one. What a lost line would
//! have said is therefore in the next one.

use std::{collections::BTreeMap, fmt::Write as _};

use api::spec;

use super::{
    Own,
    names::{KINDS, RENAMED, REQUESTS, SECTIONS, Section},
    reading::Reading,
    requests::ApiCounters,
    times::Times,
};

/// Section, device (empty where the section is of no device), our name.
type Key = (&'static str, String, &'static str);

/// Counts by place and name.
pub type Counts = BTreeMap<Key, u64>;

/// Everything a line has differences of, since the process began.
pub fn counts(reading: &Reading, api: &ApiCounters, own: &Own) -> Counts {
    let mut counts = Counts::new();
    let mut add = |section, device: &str, name, count: u64| {
        *counts.entry((section, device.to_owned(), name)).or_default() += count;
    };
    for device in &reading.devices {
        let Some((_, section, _)) = KINDS.iter().find(|(kind, ..)| *kind == device.kind) else { continue };
        for (name, count) in &device.counters {
            match *name {
                "interrupts" => add("interrupts", "", "triggers", *count),
                name => add(section, &device.name, name, *count),
            }
        }
    }
    for (method, path, calls) in api.calls() {
        let places = REQUESTS.iter().filter(|(_, _, m, p)| (*m, *p) == (method, path));
        for (section, name, ..) in places {
            for (suffix, count) in [("_count", calls.asked), ("_fails", calls.fails())] {
                if let Some(name) = known(section, &format!("{name}{suffix}")) {
                    add(section, "", name, count);
                }
            }
        }
    }
    add("deprecated_api", "", "deprecated_http_api_calls", api.deprecated());
    add("logger", "", "missed_metrics_count", own.missed);
    add("logger", "", "missed_log_count", own.lost_log_lines);
    for (name, total, times) in vcpu(reading) {
        add("vcpu", "", name, times.count());
        add("vcpu", "", total, times.sum / 1000);
    }
    counts
}

/// What came since `before`. A count that is smaller than it was belongs to a device that has
/// taken the place of another one of the same name, and began at 0.
pub fn since(now: &Counts, before: &Counts) -> Counts {
    let difference = |(key, count): (&Key, &u64)| {
        let old = before.get(key).copied().unwrap_or(0);
        (key.clone(), count.checked_sub(old).unwrap_or(*count))
    };
    now.iter().map(difference).collect()
}

/// The line, without its line feed: `counts` are differences, the rest is as it stands.
pub fn line(time: u64, target: &spec::Metrics, reading: &Reading, own: &Own, counts: &Counts) -> String {
    let mut line = String::with_capacity(8 << 10);
    // Writing to a string cannot fail.
    let _ = write!(line, "{{\"utc_timestamp_ms\":{time}");
    if target.emit_id {
        let _ = write!(line, ",\"id\":{}", quoted(&reading.id));
    }
    if let Some(properties) = &target.properties {
        let pairs = properties.iter().map(|(key, value)| format!("{}:{}", quoted(key), quoted(value)));
        let _ = write!(line, ",\"properties\":{{{}}}", pairs.collect::<Vec<_>>().join(","));
    }
    for section in SECTIONS {
        for device in own_sections(section, reading) {
            let name = format!("{}_{device}", section.name);
            object(&mut line, &name, section, &values(section, Some(device), counts), reading, own);
        }
        object(&mut line, section.name, section, &values(section, None, counts), reading, own);
    }
    line.push('}');
    line
}

/// Names of the devices that have a section of their own.
fn own_sections<'a>(section: &Section, reading: &'a Reading) -> impl Iterator<Item = &'a str> {
    let kind = KINDS.iter().find(|(_, name, each)| *name == section.name && *each);
    let kind = kind.map_or("", |(kind, ..)| *kind);
    reading.devices.iter().filter(move |device| device.kind == kind).map(|device| device.name.as_str())
}

/// Numbers of a section by Firecracker's names: of one device, or of all together.
fn values(section: &Section, device: Option<&str>, counts: &Counts) -> BTreeMap<&'static str, u64> {
    let mut values = BTreeMap::new();
    let of_section = counts.iter().filter(|((name, ..), _)| *name == section.name);
    for ((.., ours), count) in of_section.filter(|((_, of, _), _)| device.is_none_or(|d| d == of)) {
        let mut places = RENAMED.iter().filter(|(s, o, _)| *s == section.name && o == ours).peekable();
        if places.peek().is_none() {
            *values.entry(*ours).or_default() += count;
        }
        places.for_each(|(.., theirs)| *values.entry(*theirs).or_default() += count);
    }
    values
}

fn object(
    line: &mut String,
    name: &str,
    section: &Section,
    values: &BTreeMap<&'static str, u64>,
    reading: &Reading,
    own: &Own,
) {
    let of = |name: &str| values.get(name).copied().or_else(|| standing(section.name, name, own));
    let numbers = section.counts.iter().map(|key| format!("\"{key}\":{}", of(key).unwrap_or(0)));
    let times = section.times.iter().map(|key| {
        let (least, most) = extremes(section.name, key, reading);
        let sum = of(key).unwrap_or(0);
        format!("\"{key}\":{{\"min_us\":{least},\"max_us\":{most},\"sum_us\":{sum}}}")
    });
    let fields: Vec<String> = numbers.chain(times).collect();
    let _ = write!(line, ",{}:{{{}}}", quoted(name), fields.join(","));
}

/// Values that are no counts.
fn standing(section: &str, name: &str, own: &Own) -> Option<u64> {
    Some(match (section, name) {
        ("api_server", "process_startup_time_us") => own.startup_us,
        ("api_server", "process_startup_time_cpu_us") => own.startup_cpu_us,
        // No other thread is asked to do it, so both views are one.
        ("latencies_us", "pause_vm" | "vmm_pause_vm") => own.pause_us,
        ("latencies_us", "resume_vm" | "vmm_resume_vm") => own.resume_us,
        _ => return None,
    })
}

/// Shortest and longest time in microseconds.
fn extremes(section: &str, name: &str, reading: &Reading) -> (u64, u64) {
    let times = vcpu(reading).into_iter().find(|(_, total, _)| section == "vcpu" && *total == name);
    times.map_or((0, 0), |(.., times)| (times.least / 1000, times.most / 1000))
}

/// Exits: name of their count, name of their times, both.
fn vcpu(reading: &Reading) -> [(&'static str, &'static str, &Times); 4] {
    let exits = &reading.exits;
    [
        ("exit_io_in", "exit_io_in_agg", &exits.port_in),
        ("exit_io_out", "exit_io_out_agg", &exits.port_out),
        ("exit_mmio_read", "exit_mmio_read_agg", &exits.mmio_read),
        ("exit_mmio_write", "exit_mmio_write_agg", &exits.mmio_write),
    ]
}

/// The name as the section has it.
fn known(section: &str, name: &str) -> Option<&'static str> {
    let section = SECTIONS.iter().find(|s| s.name == section)?;
    section.counts.iter().find(|known| **known == name).copied()
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
