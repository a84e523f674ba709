//! The same counts as text in OpenMetrics 1.0, for whoever comes to fetch them.
//!
//! Here counts are since the start, and every counter of every device is present under its own
//! name. All samples carry the machine's id, so that many machines can share a database.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{
    Own,
    reading::Reading,
    requests::ApiCounters,
    times::{BOUNDS, Times},
};

/// The text, up to and with its `# EOF`.
pub fn text(reading: &Reading, api: &ApiCounters, own: &Own) -> String {
    let mut text = Text { out: String::with_capacity(16 << 10), machine: reading.id.clone() };
    text.machine(reading, own);
    text.exits(reading);
    text.devices(reading);
    text.requests(api);
    text.out.push_str("# EOF\n");
    text.out
}

struct Text {
    out: String,
    machine: String,
}

impl Text {
    /// Begins a family of samples. `kind` is a type of OpenMetrics.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.out, "# TYPE {name} {kind}");
        if let Some(unit) = ["seconds", "bytes"].into_iter().find(|unit| name.ends_with(&format!("_{unit}")))
        {
            let _ = writeln!(self.out, "# UNIT {name} {unit}");
        }
        let _ = writeln!(self.out, "# HELP {name} {help}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let _ = write!(self.out, "{name}{{machine=\"{}\"", escaped(&self.machine));
        for (label, value) in labels {
            let _ = write!(self.out, ",{label}=\"{}\"", escaped(value));
        }
        let _ = writeln!(self.out, "}} {value}");
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.family(name, kind, help);
        let suffix = if kind == "counter" { "_total" } else { "" };
        self.sample(&format!("{name}{suffix}"), &[], value);
    }

    fn machine(&mut self, reading: &Reading, own: &Own) {
        self.family("nacelle_machine", "info", "The machine and its monitor.");
        self.sample("nacelle_machine_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        self.family("nacelle_machine_state", "stateset", "Where the machine is in its life.");
        for phase in ["NotStarted", "Running", "Paused", "Ended"] {
            let on = u8::from(phase == reading.phase);
            self.sample("nacelle_machine_state", &[("nacelle_machine_state", phase)], on);
        }
        self.family("nacelle_milestone_seconds", "gauge", "Time from the start of the process.");
        for (name, microseconds) in &reading.milestones {
            let time = seconds(microseconds.saturating_mul(1000));
            self.sample("nacelle_milestone_seconds", &[("milestone", name)], time);
        }
        self.single("nacelle_vcpus", "gauge", "Virtual processors.", reading.vcpus);
        let help = "Memory that the guest starts with.";
        self.single("nacelle_guest_memory_bytes", "gauge", help, reading.memory);
        if let Some(bytes) = own.resident {
            let help = "Memory of the host that the monitor and its guest have in use.";
            self.single("nacelle_resident_memory_bytes", "gauge", help, bytes);
        }
        let help = "Lines of the log that were not written.";
        self.single("nacelle_lost_log_lines", "counter", help, own.lost_log_lines);
        let help = "Lines of the metrics file that were not written.";
        self.single("nacelle_lost_metrics_lines", "counter", help, own.missed);
    }

    fn exits(&mut self, reading: &Reading) {
        let exits = &reading.exits;
        self.family("nacelle_exits", "counter", "Exits of vCPUs that were handed to the monitor.");
        for (kind, times) in exits.timed() {
            self.sample("nacelle_exits_total", &[("kind", kind)], times.count());
        }
        for (kind, count) in [("kicked", exits.kicked), ("other", exits.other)] {
            self.sample("nacelle_exits_total", &[("kind", kind)], count);
        }
        let help = "Time that the monitor took for such an exit.";
        self.family("nacelle_exit_seconds", "histogram", help);
        for (kind, times) in exits.timed() {
            self.histogram("nacelle_exit_seconds", &[("kind", kind)], times);
        }
    }

    fn devices(&mut self, reading: &Reading) {
        let mut families: BTreeMap<&str, Vec<(&str, &str, u64)>> = BTreeMap::new();
        for device in &reading.devices {
            for (counter, count) in &device.counters {
                // `_count` is how samples of histograms end.
                let name = counter.strip_suffix("_count").unwrap_or(counter);
                families.entry(name).or_default().push((&device.name, device.kind, *count));
            }
        }
        for (name, samples) in families {
            let family = format!("nacelle_device_{name}");
            self.family(&family, "counter", &format!("Counter {name} of devices."));
            for (device, kind, count) in samples {
                self.sample(&format!("{family}_total"), &[("device", device), ("kind", kind)], count);
            }
        }
    }

    fn requests(&mut self, api: &ApiCounters) {
        self.family("nacelle_api_requests", "counter", "Requests to the API.");
        for (method, path, calls) in api.calls() {
            for (status, count) in [("2xx", calls.done), ("4xx", calls.refused), ("5xx", calls.failed)] {
                let labels = [("method", method), ("path", path), ("status", status)];
                self.sample("nacelle_api_requests_total", &labels, count);
            }
        }
        let help = "Requests to the API that used something that will go away.";
        self.single("nacelle_api_deprecated_requests", "counter", help, api.deprecated());
        self.family("nacelle_api_request_seconds", "histogram", "Time that a request took.");
        for (method, path, calls) in api.calls() {
            let labels = [("method", method), ("path", path)];
            self.histogram("nacelle_api_request_seconds", &labels, &calls.times);
        }
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], times: &Times) {
        let mut below = 0;
        let bounds = BOUNDS.iter().map(|(_, text)| *text).chain(["+Inf"]);
        for (bound, count) in bounds.zip(times.classes) {
            below += count;
            let labels: Vec<_> = labels.iter().copied().chain([("le", bound)]).collect();
            self.sample(&format!("{name}_bucket"), &labels, below);
        }
        self.sample(&format!("{name}_count"), labels, below);
        self.sample(&format!("{name}_sum"), labels, seconds(times.sum));
    }
}

/// Nanoseconds as seconds, exactly.
fn seconds(nanoseconds: u64) -> String {
    format!("{}.{:09}", nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000)
}

/// The value of a label: backslash, quote and line feed cannot stand for themselves.
fn escaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            other => text.push(other),
        }
    }
    text
}
