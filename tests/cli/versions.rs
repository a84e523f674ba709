//! Machines that were suspended by one build and go on under another.
//!
//! A state that an older build wrote is made of one that this build wrote: each section that has
//! had another layout gets that layout and its number, byte for byte as it was then. The machine in
//! it is a container that was really running.
//!
//! | section | today | here |
//! |---|---|---|
//! | `virtio-block` | 3 | 1 for the first disk, 2 for the others |
//! | `virtio-net` | 2 | 1 |
//! | `virtio-rng` | 2 | 1 |
//! | `serial` | 2 | 1 |

use std::{
    fs,
    path::{Path, PathBuf},
};

use devices::state::Section;
use nacelle::snapshot::{Digest, Manifest, state};
use serde_json::Value;

use super::{
    host::{Host, wait_until},
    taps::{Taps, echo},
};

/// A bucket of tokens: limits, and what was left.
type Bucket = (u64, u64, u64, u64, u64, u64, u128);
/// Limits of bytes and of operations.
type Limits = (Option<Bucket>, Option<Bucket>);
/// `virtio-block`, version 3.
type Block = (u64, u16, bool, bool, Limits, bool);
/// `virtio-net`, version 2.
type Net = ([u8; 6], Option<u16>, u16, u16, Limits, Limits);
/// `serial`, version 2.
type Serial = ([u8; 2], u8, u8, u8, u8, u8, u8, Vec<u8>, Option<Bucket>);

/// The snapshot of a suspended machine.
struct Suspended(PathBuf);

impl Suspended {
    fn of(host: &Host, name: &str) -> Suspended {
        Suspended(host.inspect(name)["paths"]["suspended"].as_str().expect("it is suspended").into())
    }

    fn manifest(&self) -> Manifest {
        Manifest::decode(&fs::read(self.0.join("manifest.json")).unwrap(), &self.0).unwrap()
    }

    fn state(&self) -> PathBuf {
        self.0.join(self.manifest().state.file.name)
    }

    /// Puts other sections into it, with everything that covers them.
    fn put(&self, sections: &[Section]) {
        let file = state::encode(sections).unwrap();
        let mut manifest = self.manifest();
        manifest.state.sections = state::entries(sections);
        self.seal(manifest, &file);
    }

    fn seal(&self, mut manifest: Manifest, file: &[u8]) {
        fs::write(self.0.join(&manifest.state.file.name), file).unwrap();
        (manifest.state.file.size, manifest.state.file.digest) = (file.len() as u64, Digest::of(file));
        fs::write(self.0.join("manifest.json"), manifest.encode()).unwrap();
    }

    fn sections(&self) -> Vec<Section> {
        state::decode(&fs::read(self.state()).unwrap()).unwrap()
    }
}

/// Gives each section that has older layouts one of these, and returns what was changed to what.
fn aged(sections: &mut [Section]) -> Vec<(String, u16)> {
    let mut changed = Vec::new();
    let mut disks = 0;
    for section in sections {
        let older = match section.kind.as_str() {
            "virtio-block" => {
                let (sectors, queues, read_only, failed, limits, announce): Block =
                    section.open("virtio-block", 3).unwrap();
                assert!(!announce && limits == (None, None), "an older build could not have said this");
                disks += 1;
                if disks == 1 {
                    Section::new("virtio-block", 1, &(sectors, queues, read_only, failed))
                } else {
                    Section::new("virtio-block", 2, &(sectors, queues, read_only, failed, limits))
                }
            }
            "virtio-net" => {
                let (mac, mtu, pairs, in_use, ..): Net = section.open("virtio-net", 2).unwrap();
                Section::new("virtio-net", 1, &(mac, mtu, pairs, in_use))
            }
            "virtio-rng" => Section::new("virtio-rng", 1, &()),
            "serial" => {
                let (divisor, ier, iir, lcr, mcr, msr, scratch, input, limit): Serial =
                    section.open("serial", 2).unwrap();
                assert!(limit.is_none());
                Section::new("serial", 1, &(divisor, ier, iir, lcr, mcr, msr, scratch, input))
            }
            _ => continue,
        };
        changed.push((older.kind.clone(), older.version));
        *section = older;
    }
    changed
}

/// Counts in its memory, sends back what comes by TCP, and writes its own disk.
const SERVER: &str = "nc -ll -p 7 -e cat & i=0; while [ ! -e /stop ]; do i=$((i+1)); echo $i; echo $i >/count; \
                      sleep 0.1; done; sha256sum </dev/vdc; exit 7";

fn count(host: &Host) -> u32 {
    host.nacelle(&["exec", "web", "cat", "/count"]).expect(0).text().trim().parse().expect("a number")
}

/// A container that serves, counts and has a disk, suspended.
fn suspended_server(host: &Host, taps: &Taps) -> Suspended {
    let disk = host.dir().join("disk.img");
    fs::write(&disk, vec![5; 4 << 20]).unwrap();
    let flags = ["-d", "--name", "web", "--disk", disk.to_str().unwrap(), "--tap", &taps.flag()];
    host.run(&flags, SERVER).expect(0);
    echo(&mut taps.connect(0, 7), b"before");
    wait_until("it to count", || count(host) > 3);
    host.nacelle(&["suspend", "-q", "web"]).expect(0);
    Suspended::of(host, "web")
}

#[test]
fn a_container_goes_on_from_what_older_builds_wrote() {
    let (host, taps) = (Host::new(), Taps::new("nclver", 20, 1));
    let suspended = suspended_server(&host, &taps);
    let mut sections = suspended.sections();
    let mut changed = aged(&mut sections);
    changed.sort();
    let expected = [
        ("serial", 1),
        ("virtio-block", 1),
        ("virtio-block", 2),
        ("virtio-block", 2),
        ("virtio-net", 1),
        ("virtio-rng", 1),
    ];
    assert_eq!(changed, expected.map(|(kind, version)| (kind.to_owned(), version)));
    suspended.put(&sections);
    // Fields that older builds did not write into the machine's record and the manifest.
    let mut manifest = suspended.manifest();
    manifest.note = Value::Null;
    suspended.seal(manifest, &fs::read(suspended.state()).unwrap());
    let record = Path::new(host.inspect("web")["paths"]["directory"].as_str().unwrap()).join("machine.json");
    let mut text: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    assert!(text.as_object_mut().unwrap().remove("plain").is_some());
    fs::write(&record, text.to_string()).unwrap();

    host.nacelle(&["resume", "web"]).expect(0);
    let before = count(&host);
    wait_until("the count to go on", || count(&host) > before + 3);
    echo(&mut taps.connect(0, 7), b"after");
    let script = "dd if=/dev/zero of=/dev/vdc bs=64k count=1 conv=notrunc,fsync 2>/dev/null; head -c 64 \
                  /dev/urandom | wc -c; touch /stop";
    assert_eq!(host.nacelle(&["exec", "web", "sh", "-c", script]).expect(0).text().trim(), "64");
    assert_eq!(host.nacelle(&["wait", "web"]).expect(0).text(), "7\n");
    let logs = host.nacelle(&["logs", "web"]).expect(0).text();
    let (numbers, sum): (Vec<&str>, Vec<&str>) = logs.lines().partition(|line| line.len() < 20);
    assert!(numbers.iter().zip(1..).all(|(line, number)| **line == number.to_string()), "{logs}");
    // The host sees what the guest wrote, and the guest what the host has.
    let disk = fs::read(host.dir().join("disk.img")).unwrap();
    assert!(disk[..65536].iter().all(|byte| *byte == 0) && disk[65536..].iter().all(|byte| *byte == 5));
    assert!(sum[0].starts_with(&super::generations::sha256(&disk)), "{sum:?}");
    host.nacelle(&["rm", "web"]).expect(0);
    host.assert_nothing_left();
}

#[test]
fn what_newer_builds_wrote_is_refused_with_both_versions_and_stays_suspended() {
    let (host, taps) = (Host::new(), Taps::new("nclnew", 21, 1));
    let suspended = suspended_server(&host, &taps);
    let (sections, manifest) = (suspended.sections(), suspended.manifest());
    let file = fs::read(suspended.state()).unwrap();
    let refused = |words: &[&str]| {
        let ended = host.nacelle(&["resume", "web"]).says(words);
        assert_ne!(ended.code, 0);
        assert_eq!(host.listed("web")["status"], "suspended");
    };
    for kind in ["virtio-block", "serial", "clock", "vcpu"] {
        let mut newer = sections.clone();
        let section = newer.iter_mut().find(|section| section.kind == kind).expect(kind);
        section.version += 1;
        let words = [
            format!("of {kind} has version {}", section.version),
            format!("writes version {}", section.version - 1),
        ];
        suspended.put(&newer);
        refused(&words.each_ref().map(String::as_str));
    }
    // Of the state file, and of the whole.
    let mut newer = file.clone();
    newer[8] = 2;
    let end = newer.len() - 32;
    let digest = Digest::of(&newer[..end]).0;
    newer[end..].copy_from_slice(&digest);
    suspended.seal(manifest.clone(), &newer);
    refused(&["its version is 2; this build reads 1"]);
    suspended.seal(Manifest { format: 2, ..manifest.clone() }, &file);
    refused(&["has format 2; this build reads 1 to 1"]);
    let needs = vec!["time-travel".to_owned()];
    suspended.seal(Manifest { needs, ..manifest.clone() }, &file);
    refused(&["\"time-travel\"", "a newer nacelle may"]);

    // Under the build that wrote it, it goes on.
    suspended.seal(manifest, &file);
    host.nacelle(&["resume", "web"]).expect(0);
    let before = count(&host);
    wait_until("the count to go on", || count(&host) > before + 3);
    echo(&mut taps.connect(0, 7), b"after");
    host.nacelle(&["rm", "-f", "web"]).expect(0);
    host.assert_nothing_left();
}
