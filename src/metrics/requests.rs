//! How often the API was asked what, how it went and how long it took.

use std::{collections::BTreeMap, time::Duration};

use api::routes::{self, Route};

use super::times::Times;

/// What a request that the API does not know is counted as: what a client sends must not
/// become the name of a counter, or it could make any number of them.
const UNKNOWN: Route = ("other", "other");

/// Requests to one method of one path.
#[derive(Debug, Clone, Copy, Default)]
pub struct Calls {
    /// All that came, also those that still wait for their answer.
    pub asked: u64,
    /// Those that were done (status 2xx).
    pub done: u64,
    /// Those that were refused because of the client (status 4xx).
    pub refused: u64,
    /// Those that failed here (any other status).
    pub failed: u64,
    /// How long they took.
    pub times: Times,
}

impl Calls {
    /// Those that were not done.
    pub fn fails(&self) -> u64 {
        self.refused + self.failed
    }
}

/// Requests by method and path. The path is that of [`routes::TABLE`]: `/drives/{id}`.
#[derive(Debug, Default)]
pub struct ApiCounters {
    calls: BTreeMap<Route, Calls>,
    deprecated: u64,
}

impl ApiCounters {
    /// Counts a request that came, and says as what. It is counted before it is carried out,
    /// so that a request to write the counts is among them.
    pub fn asked(&mut self, method: &str, path: &str) -> Route {
        let route = route(method, path);
        self.calls.entry(route).or_default().asked += 1;
        route
    }

    /// Counts its answer, which had `status` and came after `took`; `deprecated` when the
    /// request used something that will go away.
    pub fn answered(&mut self, route: Route, status: u16, took: Duration, deprecated: bool) {
        let calls = self.calls.entry(route).or_default();
        match status {
            200..=299 => calls.done += 1,
            400..=499 => calls.refused += 1,
            _ => calls.failed += 1,
        }
        calls.times.add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        self.deprecated += u64::from(deprecated);
    }

    /// Requests by method and path, in the order of their names.
    pub fn calls(&self) -> impl Iterator<Item = (&'static str, &'static str, &Calls)> {
        self.calls.iter().map(|((method, path), calls)| (*method, *path, calls))
    }

    /// Requests that used something that will go away.
    pub fn deprecated(&self) -> u64 {
        self.deprecated
    }
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.trim_start_matches('/').split_terminator('/')
}

/// The route that a request took, or [`UNKNOWN`].
fn route(method: &str, path: &str) -> Route {
    // Without a name it was meant for the same route.
    let nameless = matches!(path.trim_matches('/'), "drives" | "pmem" | "network-interfaces");
    let wanted: Vec<&str> = segments(path).chain(nameless.then_some("")).collect();
    let takes = |template: &str| {
        segments(template).count() == wanted.len()
            && segments(template).zip(&wanted).all(|(a, b)| a == *b || a == "{id}")
    };
    let known = routes::TABLE.iter().find(|(known, template)| *known == method && takes(template));
    known.copied().unwrap_or(UNKNOWN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(counters: &mut ApiCounters, method: &str, path: &str, status: u16, deprecated: bool) {
        let route = counters.asked(method, path);
        counters.answered(route, status, Duration::from_micros(30), deprecated);
    }

    #[test]
    fn requests_are_counted_by_route_and_outcome() {
        let mut counters = ApiCounters::default();
        record(&mut counters, "PUT", "/drives/rootfs", 204, false);
        record(&mut counters, "PUT", "/drives/data", 400, true);
        record(&mut counters, "PUT", "/drives", 400, false);
        record(&mut counters, "GET", "/", 200, false);
        record(&mut counters, "GET", "", 500, false);
        counters.asked("GET", "/");
        let seen: Vec<_> =
            counters.calls().map(|(m, p, c)| (m, p, c.asked, c.done, c.refused, c.failed)).collect();
        assert_eq!(seen, [("GET", "/", 3, 1, 0, 1), ("PUT", "/drives/{id}", 3, 1, 2, 0)]);
        assert_eq!(counters.deprecated(), 1);
    }

    #[test]
    fn what_clients_invent_makes_one_counter_only() {
        let mut counters = ApiCounters::default();
        for i in 0..100 {
            record(&mut counters, "PUT", &format!("/x{i}"), 400, false);
            record(&mut counters, "BREW", "/", 400, false);
        }
        let all: Vec<_> = counters.calls().collect();
        assert_eq!((all.len(), all[0].0, all[0].2.refused), (1, "other", 200));
    }

    #[test]
    fn every_route_is_its_own() {
        for (method, template) in routes::TABLE {
            assert_eq!(route(method, &template.replace("{id}", "x")), (*method, *template));
        }
    }
}
