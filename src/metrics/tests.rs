use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::Read,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::Path,
};

use serde_json::Value;

use super::{
    names::{KINDS, RENAMED, REQUESTS, SECTIONS},
    reading::Device,
    *,
};

/// What a strict reader of Firecracker's lines looks for.
const SCHEMA: &str = "
    api_server: process_startup_time_us process_startup_time_cpu_us
    balloon: activate_fails inflate_count stats_updates_count stats_update_fails deflate_count
        event_fails free_page_report_count free_page_report_freed free_page_report_fails
        free_page_hint_count free_page_hint_freed free_page_hint_fails
    block: activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count
        flush_count queue_event_count rate_limiter_event_count update_count update_fails read_bytes
        write_bytes read_count write_count rate_limiter_throttled_events io_engine_throttled_events
        remaining_reqs_count read_agg.sum_us write_agg.min_us
    deprecated_api: deprecated_http_api_calls
    entropy: activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails
        entropy_rate_limiter_throttled rate_limiter_event_count
    get_api_requests: instance_info_count machine_cfg_count mmds_count vmm_version_count
        hotplug_memory_count
    i8042: error_count missed_read_count missed_write_count read_count reset_count write_count
    interrupts: triggers config_updates
    latencies_us: full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm
        vmm_full_create_snapshot vmm_diff_create_snapshot vmm_load_snapshot vmm_pause_vm
        vmm_resume_vm
    logger: missed_metrics_count metrics_fails missed_log_count rate_limited_log_count
    memory_hotplug: activate_fails queue_event_fails queue_event_count plug_count plug_bytes
        plug_fails plug_agg.max_us unplug_count unplug_bytes unplug_fails unplug_discard_fails
        unplug_agg.sum_us unplug_all_count unplug_all_fails unplug_all_agg.sum_us state_count
        state_fails state_agg.sum_us
    mmds: rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_invalid_token rx_no_token
        rx_count tx_bytes tx_count tx_errors tx_frames connections_created connections_destroyed
    net: activate_fails cfg_fails mac_address_updates no_rx_avail_buffer no_tx_avail_buffer event_fails
        rx_queue_event_count rx_event_rate_limiter_count rx_rate_limiter_throttled
        rx_tap_event_count rx_bytes_count rx_packets_count rx_fails rx_count tap_read_fails
        tap_write_fails tap_write_agg.sum_us tx_bytes_count tx_malformed_frames tx_fails tx_count
        tx_packets_count tx_queue_event_count tx_rate_limiter_event_count tx_rate_limiter_throttled
        tx_spoofed_mac_count tx_remaining_reqs_count
    patch_api_requests: drive_count drive_fails network_count network_fails machine_cfg_count
        machine_cfg_fails mmds_count mmds_fails hotplug_memory_count hotplug_memory_fails pmem_count
        pmem_fails
    pmem: activate_fails cfg_fails event_fails queue_event_count rate_limiter_throttled_events
        rate_limiter_event_count
    put_api_requests: actions_count actions_fails boot_source_count boot_source_fails drive_count
        drive_fails logger_count logger_fails machine_cfg_count machine_cfg_fails cpu_cfg_count
        cpu_cfg_fails metrics_count metrics_fails network_count network_fails mmds_count mmds_fails
        vsock_count vsock_fails pmem_count pmem_fails serial_count serial_fails hotplug_memory_count
        hotplug_memory_fails
    seccomp: num_faults
    signals: sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill
    uart: error_count flush_count missed_read_count missed_write_count read_count write_count
        rate_limiter_dropped_bytes
    vcpu: exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures kvmclock_ctrl_fails
        exit_io_in_agg.min_us exit_io_out_agg.max_us exit_mmio_read_agg.sum_us
        exit_mmio_write_agg.sum_us
    vmm: panic_count
    vsock: activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails
        muxer_event_fails conn_event_fails rx_queue_event_count tx_queue_event_count rx_bytes_count
        tx_bytes_count rx_packets_count tx_packets_count conns_added conns_killed conns_removed
        killq_resync tx_flush_fails tx_write_fails rx_read_fails
";

struct Rig {
    dir: tempfile::TempDir,
    metrics: Metrics,
    reading: Reading,
}

impl Rig {
    fn new() -> Rig {
        Rig::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut spec::Metrics)) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::new(Startup::default());
        let mut wanted = spec::Metrics { metrics_path: dir.path().join("m"), ..spec::Metrics::default() };
        change(&mut wanted);
        metrics.configure(&wanted).unwrap();
        let reading = Reading { id: "vm-1".to_owned(), phase: "Running", ..Reading::default() };
        Rig { dir, metrics, reading }
    }

    fn count(&mut self, kind: &'static str, name: &str, counters: &[(&'static str, u64)]) {
        let name = name.to_owned();
        self.reading.devices.retain(|d| (d.kind, &d.name) != (kind, &name));
        self.reading.devices.push(Device { kind, name, counters: counters.to_vec() });
    }

    fn flush(&mut self) -> Value {
        self.metrics.flush(&self.reading).unwrap();
        let text = std::fs::read_to_string(self.dir.path().join("m")).unwrap();
        serde_json::from_str(text.lines().last().unwrap()).unwrap()
    }
}

fn only_numbers(value: &Value) -> bool {
    value.as_object().map_or(value.is_u64(), |object| object.values().all(only_numbers))
}

#[test]
fn every_name_of_firecracker_is_in_each_line_with_a_number() {
    let line = Rig::new().flush();
    let mut expected = BTreeMap::from([("utc_timestamp_ms", Vec::new())]);
    let mut section = "";
    for word in SCHEMA.split_whitespace() {
        match word.strip_suffix(':') {
            Some(name) => section = name,
            None => expected.entry(section).or_default().push(word),
        }
    }
    let found: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(found, expected.keys().copied().collect::<Vec<_>>());
    for (section, names) in expected.iter().filter(|(_, names)| !names.is_empty()) {
        assert_eq!(line[section].as_object().unwrap().len(), names.len(), "{section}");
        for name in names {
            let value = name.split('.').fold(&line[section], |value, part| &value[part]);
            assert!(value.is_u64(), "{section} {name}");
        }
    }
    assert!(only_numbers(&line));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    assert!(now - line["utc_timestamp_ms"].as_u64().unwrap() < 60_000);
}

#[test]
fn each_line_counts_from_the_one_before() {
    let mut rig = Rig::new();
    rig.count("virtio-block", "a", &[("reads", 5), ("read_bytes", 512)]);
    rig.count("virtio-block", "b", &[("reads", 2), ("rate_limiter_throttled_events", 1)]);
    let line = rig.flush();
    assert_eq!((&line["block_a"]["read_count"], &line["block_b"]["read_count"]), (&5.into(), &2.into()));
    assert_eq!((&line["block"]["read_count"], &line["block"]["read_bytes"]), (&7.into(), &512.into()));
    assert_eq!(line["block"]["rate_limiter_throttled_events"], 1);
    rig.count("virtio-block", "a", &[("reads", 15), ("read_bytes", 512)]);
    let line = rig.flush();
    assert_eq!((&line["block_a"]["read_count"], &line["block"]["read_count"]), (&10.into(), &10.into()));
    assert_eq!((&line["block_b"]["read_count"], &line["block"]["read_bytes"]), (&0.into(), &0.into()));
}

#[test]
fn a_device_that_replaces_another_begins_at_zero() {
    let mut rig = Rig::new();
    rig.count("virtio-net", "eth0", &[("rx_packets", 1000)]);
    rig.flush();
    rig.count("virtio-net", "eth0", &[("rx_packets", 3)]);
    let line = rig.flush();
    assert_eq!((&line["net_eth0"]["rx_count"], &line["net"]["rx_packets_count"]), (&3.into(), &3.into()));
}

#[test]
fn devices_without_a_section_of_their_own_are_summed_up() {
    let mut rig = Rig::new();
    rig.count("virtio-vsock", "vsock", &[("accepted", 2), ("dialed", 3), ("to_guest_bytes", 7)]);
    rig.count("serial", "serial", &[("output_bytes", 9), ("rate_limiter_dropped_bytes", 4)]);
    rig.count("unheard-of", "x", &[("reads", 9)]);
    let line = rig.flush();
    assert_eq!((&line["vsock"]["conns_added"], &line["vsock"]["rx_bytes_count"]), (&5.into(), &7.into()));
    assert_eq!(line["uart"]["write_count"], 9);
    assert_eq!(line["uart"]["rate_limiter_dropped_bytes"], 4);
    assert!(line.get("vsock_vsock").is_none());
}

#[test]
fn id_and_properties_come_when_they_are_wanted() {
    let mut rig = Rig::with(|wanted| {
        wanted.emit_id = true;
        wanted.properties = Some(BTreeMap::from([("a\"b".to_owned(), "c\n".to_owned())]));
    });
    let line = rig.flush();
    assert_eq!((&line["id"], &line["properties"]["a\"b"]), (&"vm-1".into(), &"c\n".into()));
    let plain = Rig::new().flush();
    assert!(plain.get("id").is_none() && plain.get("properties").is_none());
}

#[test]
fn requests_and_exits_are_in_the_line() {
    let mut rig = Rig::new();
    for (path, status) in [("/drives/a", 204), ("/drives/b", 400), ("/mmds", 204), ("/mmds/config", 204)] {
        let route = rig.metrics.api.asked("PUT", path);
        rig.metrics.api.answered(route, status, Duration::from_micros(1), status == 400);
    }
    rig.reading.exits.mmio_read.add(7_500);
    rig.reading.exits.mmio_read.add(2_000_900);
    rig.metrics.paused(Duration::from_micros(321));
    let line = rig.flush();
    let put = &line["put_api_requests"];
    assert_eq!(
        (&put["drive_count"], &put["drive_fails"], &put["mmds_count"]),
        (&2.into(), &1.into(), &2.into())
    );
    assert_eq!(line["deprecated_api"]["deprecated_http_api_calls"], 1);
    let vcpu = &line["vcpu"];
    assert_eq!((&vcpu["exit_mmio_read"], &vcpu["exit_mmio_write"]), (&2.into(), &0.into()));
    let times = &vcpu["exit_mmio_read_agg"];
    assert_eq!(
        (&times["min_us"], &times["max_us"], &times["sum_us"]),
        (&7.into(), &2000.into(), &2008.into())
    );
    assert_eq!(line["latencies_us"]["vmm_pause_vm"], 321);
    let line = rig.flush();
    let times = &line["vcpu"]["exit_mmio_read_agg"];
    assert_eq!((&times["min_us"], &times["max_us"], &times["sum_us"]), (&7.into(), &2000.into(), &0.into()));
    assert_eq!(line["latencies_us"]["pause_vm"], 321);
}

#[test]
fn where_lines_go_is_said_once_and_need_not_be_said() {
    let mut rig = Rig::new();
    let again = spec::Metrics { metrics_path: rig.dir.path().join("n"), ..spec::Metrics::default() };
    let error = rig.metrics.configure(&again).unwrap_err();
    assert!(matches!(error, MetricsError::Set(_)) && !again.metrics_path.exists());
    let mut none = Metrics::default();
    assert!(none.flush(&rig.reading).is_ok() && !none.is_configured());
    none.begin(&rig.reading);
    assert_eq!(none.due(), None);
    let wrong = spec::Metrics { metrics_path: "/nowhere/m".into(), ..spec::Metrics::default() };
    assert_eq!(none.configure(&wrong).unwrap_err().kind(), FaultKind::Invalid);
}

#[test]
fn lines_are_written_at_the_start_and_each_minute() {
    let mut rig = Rig::new();
    assert!(!rig.metrics.is_due(Instant::now() + PERIOD * 2));
    rig.metrics.begin(&rig.reading);
    assert!(std::fs::read_to_string(rig.dir.path().join("m")).unwrap().ends_with("}\n"));
    let due = rig.metrics.due().unwrap();
    assert!(!rig.metrics.is_due(due - Duration::from_millis(1)));
    assert!(rig.metrics.is_due(due) && !rig.metrics.is_due(due));
    assert_eq!(rig.metrics.due(), Some(due + PERIOD));
}

fn pipe(path: &Path) -> File {
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the name ends with a zero byte.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
}

fn drain(pipe: &mut File) -> String {
    let mut text = Vec::new();
    let mut part = [0; 4096];
    while let Ok(n) = pipe.read(&mut part) {
        text.extend_from_slice(&part[..n]);
    }
    String::from_utf8(text).unwrap()
}

#[test]
fn a_pipe_that_nobody_reads_costs_lines_but_no_counts() {
    let mut reader = None;
    let mut rig = Rig::with(|wanted| reader = Some(pipe(&wanted.metrics_path)));
    let mut reader = reader.unwrap();
    let start = Instant::now();
    let (mut kept, mut lost) = (0, 0);
    while lost < 3 {
        rig.count("virtio-rng", "rng", &[("bytes", kept + lost + 1)]);
        match rig.metrics.flush(&rig.reading) {
            Ok(()) => kept += 1,
            Err(error) => {
                assert_eq!(error.kind(), FaultKind::Internal);
                lost += 1;
            }
        }
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    let torn = rig.metrics.due();
    let mut text = drain(&mut reader);
    assert!(!rig.metrics.is_due(Instant::now() + AGAIN * 2));
    assert!(torn.is_none() || rig.metrics.due().is_none());
    rig.metrics.flush(&rig.reading).unwrap();
    text += &drain(&mut reader);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len() as u64, kept + 1);
    let bytes = lines.iter().map(|line| line["entropy"]["entropy_bytes"].as_u64().unwrap());
    assert_eq!(bytes.sum::<u64>(), kept + lost);
    assert_eq!(lines.last().unwrap()["logger"]["missed_metrics_count"], lost);
}

#[test]
fn the_tables_name_only_what_there_is() {
    let has =
        |section: &str, name: &str| SECTIONS.iter().any(|s| s.name == section && s.counts.contains(&name));
    for (section, ours, theirs) in RENAMED {
        assert!(has(section, theirs), "{section} {theirs}");
        assert!(!has(section, ours), "{section} {ours} has a place already");
    }
    for (_, section, _) in KINDS {
        assert!(SECTIONS.iter().any(|s| s.name == *section), "{section}");
    }
    for (section, name, method, path) in REQUESTS {
        assert!(has(section, &format!("{name}_count")), "{section} {name}");
        assert!(::api::routes::TABLE.contains(&(*method, *path)), "{method} {path}");
    }
}

/// Samples of a page by name and labels, and the types of its families. Panics where the page
/// breaks the rules of OpenMetrics.
fn parsed(page: &str) -> (BTreeMap<String, f64>, BTreeMap<String, String>) {
    let (mut samples, mut types) = (BTreeMap::new(), BTreeMap::new());
    let mut family = String::new();
    let body = page.strip_suffix("# EOF\n").expect("ends with EOF");
    for line in body.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", "TYPE", name, kind] => {
                assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
                family = name.to_owned();
            }
            ["#", "UNIT" | "HELP", name, text] => {
                assert!(name == family && !text.is_empty(), "{line}");
            }
            _ => {
                let (name, rest) = line.split_once('{').expect(line);
                let (labels, value) = rest.rsplit_once("} ").expect(line);
                let suffix = name.strip_prefix(&family).expect("a sample of the family above");
                let allowed: &[&str] = match types[&family].as_str() {
                    "counter" => &["_total"],
                    "histogram" => &["_bucket", "_count", "_sum"],
                    "info" => &["_info"],
                    "gauge" | "stateset" => &[""],
                    other => panic!("{other} is no type"),
                };
                assert!(allowed.contains(&suffix), "{line}");
                assert!(name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric()), "{name}");
                let value: f64 = value.parse().expect(line);
                assert!(samples.insert(format!("{name}{{{labels}}}"), value).is_none(), "{line} twice");
            }
        }
    }
    (samples, types)
}

#[test]
fn the_page_is_openmetrics() {
    let mut rig = Rig::new();
    rig.reading.id = "a\"b\\c\nd".to_owned();
    rig.reading.milestones = vec![("built", 1500)];
    rig.reading.exits.port_out.add(900);
    rig.reading.exits.port_out.add(3_000_000_000);
    rig.reading.exits.other = 4;
    rig.count("virtio-block", "root", &[("reads", 5), ("read_bytes", 512)]);
    rig.count("virtio-pmem", "p0", &[("queue_event_count", 3)]);
    rig.count("virtio-net", "eth0", &[("rx_bytes", 8)]);
    let route = rig.metrics.api.asked("PUT", "/drives/x");
    rig.metrics.api.answered(route, 400, Duration::from_micros(60), false);
    let page = rig.metrics.page(&rig.reading);
    let (samples, types) = parsed(&page);
    let machine = r#"machine="a\"b\\c\nd""#;
    let of = |name: &str, labels: &str| {
        let name = format!("{name}{{{machine}{labels}}}");
        *samples.get(&name).unwrap_or_else(|| panic!("no {name}"))
    };
    assert_eq!(of("nacelle_device_reads_total", r#",device="root",kind="virtio-block""#), 5.0);
    assert_eq!(of("nacelle_device_queue_event_total", r#",device="p0",kind="virtio-pmem""#), 3.0);
    assert_eq!(of("nacelle_device_rx_bytes_total", r#",device="eth0",kind="virtio-net""#), 8.0);
    assert_eq!(of("nacelle_milestone_seconds", r#",milestone="built""#), 0.0015);
    assert_eq!(of("nacelle_exits_total", r#",kind="port_out""#), 2.0);
    assert_eq!(of("nacelle_exits_total", r#",kind="other""#), 4.0);
    assert_eq!(of("nacelle_exit_seconds_bucket", r#",kind="port_out",le="1e-06""#), 1.0);
    assert_eq!(of("nacelle_exit_seconds_bucket", r#",kind="port_out",le="+Inf""#), 2.0);
    assert_eq!(of("nacelle_exit_seconds_sum", r#",kind="port_out""#), 3.0000009);
    let labels = r#",method="PUT",path="/drives/{id}""#;
    assert_eq!(of("nacelle_api_requests_total", &format!(r#"{labels},status="4xx""#)), 1.0);
    assert_eq!(of("nacelle_api_request_seconds_count", labels), 1.0);
    assert_eq!(of("nacelle_machine_state", r#",nacelle_machine_state="Running""#), 1.0);
    assert!(of("nacelle_resident_memory_bytes", "") > 4096.0);
    assert_eq!(types["nacelle_device_read_bytes"], "counter");
    assert!(page.contains("# UNIT nacelle_device_read_bytes bytes\n"));
}

#[test]
fn buckets_of_a_histogram_never_fall() {
    let mut rig = Rig::new();
    for nanoseconds in [1, 80_000, 80_000, 5_000_000, u64::MAX / 4] {
        rig.reading.exits.port_in.add(nanoseconds);
    }
    let page = rig.metrics.page(&rig.reading);
    let buckets =
        page.lines().filter(|l| l.starts_with("nacelle_exit_seconds_bucket") && l.contains("port_in"));
    let counts: Vec<u64> = buckets.map(|l| l.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(counts.len(), times::CLASSES);
    assert!(counts.is_sorted() && counts.last() == Some(&5));
}

#[test]
fn the_time_to_the_first_request_is_measured_when_the_caller_says_when_it_began() {
    let now = times::now() / 1000;
    let startup = Startup { start_us: Some(now - 5_000), start_cpu_us: Some(0), parent_cpu_us: Some(70) };
    let own = Metrics::new(startup).own;
    assert!((5_000..60_000_000).contains(&own.startup_us) && own.startup_cpu_us >= 70);
    assert_eq!(Metrics::new(Startup::default()).own.startup_us, 0);
}

#[test]
fn interrupts_are_summed_and_doorbells_have_firecrackers_names() {
    let mut rig = Rig::new();
    rig.count("virtio-net", "eth0", &[("interrupts", 3), ("tx_doorbells", 2), ("port_read_errors", 1)]);
    rig.count("virtio-block", "a", &[("interrupts", 4), ("activate_fails", 1)]);
    let line = rig.flush();
    assert_eq!(line["interrupts"]["triggers"], 7);
    assert_eq!(line["net_eth0"]["tx_queue_event_count"], 2);
    assert_eq!(line["net"]["tap_read_fails"], 1);
    assert_eq!(line["block_a"]["activate_fails"], 1);
}
