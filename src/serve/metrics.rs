//! `GET /metrics/openmetrics`: the figures of all running machines on one page.
//!
//! Each machine's page is fetched from its monitor, with limits for its size and the time it
//! takes. Samples of one family must stand together, so pages are taken apart by family and put
//! together again. The samples say already which machine they are of, by its id (`machine`); its
//! name is added.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, sync::Semaphore, task::JoinSet};

use super::{
    Service,
    answer::{Answered, whole},
    machines::off_thread,
};
use crate::cli::state::{Machine, Status};

/// Longest page of one machine, in bytes.
const PAGE_MAX: usize = 1 << 20;
/// Most bytes of all of them.
const ALL_MAX: usize = 64 << 20;
/// Longest wait for one of them.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Pages that are fetched at a time.
const AT_A_TIME: usize = 16;

const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Puts the page together.
pub async fn page(service: &Arc<Service>) -> Answered {
    let reader = Arc::clone(service);
    let machines = off_thread(move || reader.state.machines()).await?;
    let mut counts = BTreeMap::new();
    let turns = Arc::new(Semaphore::new(AT_A_TIME));
    let mut pages = JoinSet::new();
    for machine in machines {
        let status = machine.record.status();
        *counts.entry(format!("{status:?}").to_lowercase()).or_insert(0u64) += 1;
        if status == Status::Running {
            let turns = Arc::clone(&turns);
            pages.spawn(async move {
                let _turn = turns.acquire().await;
                let page = tokio::time::timeout(TIMEOUT, fetch(&machine)).await;
                (machine.record.name, page.ok().flatten())
            });
        }
    }
    let mut families = Families::default();
    let (mut bytes, mut silent) = (0usize, 0u64);
    while let Some(fetched) = pages.join_next().await {
        match fetched {
            Ok((name, Some(page))) if bytes.saturating_add(page.len()) <= ALL_MAX => {
                bytes += page.len();
                families.add(&name, &String::from_utf8_lossy(&page));
            }
            _ => silent += 1,
        }
    }
    Ok(whole(families.text(&counts, silent), TYPE))
}

async fn fetch(machine: &Machine) -> Option<Bytes> {
    let stream = UnixStream::connect(machine.api()).await.ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    tokio::spawn(connection);
    let request = hyper::Request::get("/metrics/openmetrics").header("Host", "localhost");
    let response = sender.send_request(request.body(Empty::<Bytes>::new()).ok()?).await.ok()?;
    if !response.status().is_success() {
        return None;
    }
    Limited::new(response.into_body(), PAGE_MAX).collect().await.ok().map(|body| body.to_bytes())
}

/// Lines about a family, and its samples.
#[derive(Default)]
struct Family {
    about: Vec<String>,
    samples: String,
}

/// Families by name, in order of their names.
#[derive(Default)]
struct Families(BTreeMap<String, Family>);

impl Families {
    /// Adds a machine's page.
    fn add(&mut self, machine: &str, page: &str) {
        let mut current = String::new();
        for line in page.lines() {
            let mut words = line.splitn(4, ' ');
            match (words.next(), words.next(), words.next()) {
                (Some("#"), Some("TYPE" | "HELP" | "UNIT"), Some(name)) => {
                    current = name.to_owned();
                    let family = self.0.entry(current.clone()).or_default();
                    // The first page's words stand for all.
                    if !family.about.iter().any(|known| known == line) {
                        family.about.push(line.to_owned());
                    }
                }
                (Some(sample), _, _) if !sample.is_empty() && sample != "#" && !current.is_empty() => {
                    let family = self.0.entry(current.clone()).or_default();
                    family.samples.push_str(&named(line, machine));
                    family.samples.push('\n');
                }
                _ => {}
            }
        }
    }

    fn text(&self, counts: &BTreeMap<String, u64>, silent: u64) -> String {
        let mut text = String::new();
        text.push_str(
            "# TYPE nacelle_host_machines gauge\n# HELP nacelle_host_machines Machines of this host.\n",
        );
        for (status, count) in counts {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "nacelle_host_machines{{status=\"{status}\"}} {count}");
        }
        let name = "nacelle_host_silent_machines";
        let help = "Running machines whose figures could not be had.";
        let _ = writeln!(text, "# TYPE {name} gauge\n# HELP {name} {help}\n{name} {silent}");
        for family in self.0.values().filter(|family| !family.samples.is_empty()) {
            for line in &family.about {
                text.push_str(line);
                text.push('\n');
            }
            text.push_str(&family.samples);
        }
        text.push_str("# EOF\n");
        text
    }
}

/// A sample with the machine's name among its labels. Names need no escapes.
fn named(sample: &str, machine: &str) -> String {
    match sample.split_once('{') {
        Some((name, rest)) if !name.contains(' ') => {
            let comma = if rest.starts_with('}') { "" } else { "," };
            format!("{name}{{name=\"{machine}\"{comma}{rest}")
        }
        _ => match sample.split_once(' ') {
            Some((name, value)) => format!("{name}{{name=\"{machine}\"}} {value}"),
            None => sample.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_family_stand_together_and_name_their_machine() {
        let page = |value: u64| {
            format!(
                "# TYPE a counter\n# HELP a What.\na_total{{machine=\"x\"}} {value}\n# TYPE b gauge\nb {value}\n# EOF\n"
            )
        };
        let mut families = Families::default();
        families.add("one", &page(1));
        families.add("two", &page(2));
        let counts = BTreeMap::from([("running".to_owned(), 2)]);
        let text = families.text(&counts, 0);
        let expected = "# TYPE a counter\n# HELP a What.\na_total{name=\"one\",machine=\"x\"} 1\n\
                        a_total{name=\"two\",machine=\"x\"} 2\n# TYPE b gauge\nb{name=\"one\"} 1\nb{name=\"two\"} 2\n# EOF\n";
        assert!(text.ends_with(expected), "{text}");
        assert!(text.contains("nacelle_host_machines{status=\"running\"} 2\n"), "{text}");
    }

    #[test]
    fn nonsense_of_a_monitor_makes_no_line() {
        let mut families = Families::default();
        families.add("one", "b 1\n\n# EOF\n# nonsense\n#\n");
        assert_eq!(families.text(&BTreeMap::new(), 1).lines().count(), 6);
    }
}
