//! `--set KEY=VALUE`: what is different in a machine that is made of a snapshot.
//!
//! ```text
//!   drives.root.path_on_host=/b.img              drive_overrides[{drive_id: root, path_on_host}]
//!   network-interfaces.eth0.host_dev_name=tap7   network_overrides[{iface_id: eth0, ..}]
//!   network-interfaces.eth0.ip=10.0.0.7/24       the agent inside is told
//!   vsock.uds_path=/v.sock                       vsock_override{uds_path}
//!   clock_realtime=true                          clock_realtime
//! ```
//!
//! Keys are those of the machine's configuration, or fields of `PUT /snapshot/load`. Each has one
//! row in [`KEYS`]; what is in no row is refused with the nearest that is. Where several machines
//! are made, `{n}` in a value is the number of each, from 1.

use std::collections::BTreeSet;

use api::spec::{LoadSnapshot, Spec};
use serde_json::{Map, Value, json};

use super::failure::{Failure, Outcome};

/// A key and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    key: String,
    value: String,
}

/// What a value is in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Number,
    Flag,
    /// One of many: each adds one.
    Texts,
}

/// Where a value belongs in the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A field of its own.
    Field(&'static str),
    /// A field of an object.
    Inside(&'static str, &'static str),
    /// A field of the entry of a list that has the key's second part in a field.
    Entry(&'static str, &'static str, &'static str),
    /// Not in the request: the agent inside is told, see [`addresses`].
    Agent,
}

/// A way to write a key; `*` stands for an id.
struct Key {
    pattern: &'static str,
    place: Place,
    kind: Kind,
}

const fn key(pattern: &'static str, place: Place, kind: Kind) -> Key {
    Key { pattern, place, kind }
}

const fn drive(field: &'static str) -> Place {
    Place::Entry("drive_overrides", "drive_id", field)
}

const fn network(field: &'static str) -> Place {
    Place::Entry("network_overrides", "iface_id", field)
}

const fn pmem(field: &'static str) -> Place {
    Place::Entry("pmem_overrides", "id", field)
}

/// All keys there are.
const KEYS: [Key; 24] = [
    key("drives.*.path_on_host", drive("path_on_host"), Kind::Text),
    key("drives.*.path", drive("path_on_host"), Kind::Text),
    key("network-interfaces.*.host_dev_name", network("host_dev_name"), Kind::Text),
    key("network-interfaces.*.guest_mac", network("guest_mac"), Kind::Text),
    key("network-interfaces.*.ip", Place::Agent, Kind::Texts),
    key("network-interfaces.*.gw", Place::Agent, Kind::Texts),
    key("pmem.*.path_on_host", pmem("path_on_host"), Kind::Text),
    key("pmem.*.path", pmem("path_on_host"), Kind::Text),
    key("vsock.uds_path", Place::Inside("vsock_override", "uds_path"), Kind::Text),
    key("vsock.guest_cid", Place::Inside("vsock_override", "guest_cid"), Kind::Number),
    key("serial.mode", Place::Inside("serial_override", "mode"), Kind::Text),
    key("serial.serial_out_path", Place::Inside("serial_override", "serial_out_path"), Kind::Text),
    key("mem_backend.backend_type", Place::Inside("mem_backend", "backend_type"), Kind::Text),
    key("mem_backend.backend_path", Place::Inside("mem_backend", "backend_path"), Kind::Text),
    key("mem_file_path", Place::Field("mem_file_path"), Kind::Text),
    key("enable_diff_snapshots", Place::Field("enable_diff_snapshots"), Kind::Flag),
    key("track_dirty_pages", Place::Field("track_dirty_pages"), Kind::Flag),
    key("clock_realtime", Place::Field("clock_realtime"), Kind::Flag),
    key("record_working_set", Place::Field("record_working_set"), Kind::Flag),
    key("huge_pages", Place::Field("huge_pages"), Kind::Text),
    key("machine-config.huge_pages", Place::Field("huge_pages"), Kind::Text),
    key("machine-config.track_dirty_pages", Place::Field("track_dirty_pages"), Kind::Flag),
    key("prefetch", Place::Field("prefetch"), Kind::Text),
    key("search", Place::Field("search"), Kind::Texts),
];

/// Parses `--set`.
pub fn setting(word: &str) -> Result<Setting, String> {
    let (key, value) = word.split_once('=').ok_or_else(|| "it must be KEY=VALUE".to_owned())?;
    let setting = Setting { key: key.to_owned(), value: value.to_owned() };
    let (row, _) = setting.row()?;
    if value.is_empty() {
        return Err(format!("{key} has no value"));
    }
    let fits = match row.kind {
        Kind::Flag => matches!(value, "true" | "false"),
        // With the number of a machine in it, it is one later.
        Kind::Number => value.replace("{n}", "1").parse::<u64>().is_ok(),
        Kind::Text | Kind::Texts => true,
    };
    let what = if row.kind == Kind::Flag { "true or false" } else { "a number" };
    if fits { Ok(setting) } else { Err(format!("{key} is {value:?}; it must be {what}")) }
}

impl Setting {
    /// The row of the key, and the id in it.
    fn row(&self) -> Result<(&'static Key, Option<&str>), String> {
        let parts: Vec<&str> = self.key.split('.').collect();
        let fits = |row: &&Key| {
            let pattern: Vec<&str> = row.pattern.split('.').collect();
            pattern.len() == parts.len()
                && pattern.iter().zip(&parts).all(|(p, part)| p == part || (*p == "*" && !part.is_empty()))
        };
        if let Some(row) = KEYS.iter().find(fits) {
            return Ok((row, parts.get(1).copied().filter(|_| row.pattern.contains('*'))));
        }
        // The nearest is looked for with this key's id in the place of the star.
        let id = parts.get(1).copied().filter(|_| parts.len() > 2).unwrap_or("ID");
        let known: Vec<String> = KEYS.iter().map(|row| row.pattern.replace('*', id)).collect();
        let near = api::nearest(&self.key, known.iter().map(String::as_str));
        let hint = match near {
            Some(near) => format!("did you mean {near}?"),
            None => format!("there are {}", KEYS.map(|row| row.pattern.replace('*', "ID")).join(", ")),
        };
        Err(format!("{:?} cannot be set; {hint}", self.key))
    }

    fn json(&self, kind: Kind, number: u32) -> Value {
        let text = self.value.replace("{n}", &number.to_string());
        match kind {
            Kind::Flag => Value::Bool(text == "true"),
            Kind::Number => text.parse::<u64>().map_or(Value::Null, Value::from),
            Kind::Text | Kind::Texts => Value::String(text),
        }
    }
}

/// `base` with what is set, for machine `number` of those that are made.
pub fn apply(base: &LoadSnapshot, settings: &[Setting], number: u32) -> Outcome<LoadSnapshot> {
    let mut request = match serde_json::to_value(base) {
        Ok(Value::Object(request)) => request,
        _ => Map::new(),
    };
    for setting in settings {
        let (row, id) = setting.row().map_err(Failure::new)?;
        let value = setting.json(row.kind, number);
        match row.place {
            Place::Field(field) if row.kind == Kind::Texts => {
                change(&mut request, field, |entries| entries.push(value));
            }
            Place::Agent => {}
            Place::Field(field) => drop(request.insert(field.to_owned(), value)),
            Place::Inside(object, field) => {
                let place = request.entry(object).or_insert_with(|| Value::Object(Map::new()));
                place.as_object_mut().map(|object| object.insert(field.to_owned(), value));
            }
            Place::Entry(entries, name, field) => {
                let id = Value::from(id.unwrap_or_default());
                change(&mut request, entries, |entries| {
                    let same = |entry: &&mut Value| entry.get(name) == Some(&id);
                    match entries.iter_mut().find(same).and_then(Value::as_object_mut) {
                        Some(entry) => drop(entry.insert(field.to_owned(), value)),
                        None => entries.push(json!({ (name): id, (field): value })),
                    }
                });
            }
        }
    }
    let load: LoadSnapshot = serde_json::from_value(Value::Object(request))
        .map_err(|e| Failure::new(format!("What is set cannot be used: {}", api::explain_json(&e))))?;
    load.check().map_err(|fault| Failure { causes: fault.causes, ..Failure::new(fault.message) })?;
    Ok(load)
}

/// The IP addresses and gateways that are set for an interface of machine `number`, which its
/// agent is told: `network-interfaces.ID.ip=ADDRESS/PREFIX` and `.gw=ADDRESS`, as in `--tap`.
pub fn addresses(settings: &[Setting], id: &str, number: u32) -> (Vec<String>, Vec<String>) {
    let all = |field: &str| {
        let key = format!("network-interfaces.{id}.{field}");
        let values = settings.iter().filter(|setting| setting.key == key);
        values.map(|setting| setting.value.replace("{n}", &number.to_string())).collect()
    };
    (all("ip"), all("gw"))
}

/// The interfaces that are set something of.
pub fn interfaces(settings: &[Setting]) -> BTreeSet<&str> {
    let id = |setting: &Setting| setting.key.strip_prefix("network-interfaces.").is_some();
    settings.iter().filter(|s| id(s)).filter_map(|s| s.key.split('.').nth(1)).collect()
}

/// Changes a list of the request, which is made if there is none.
fn change(request: &mut Map<String, Value>, name: &str, act: impl FnOnce(&mut Vec<Value>)) {
    let mut entries = match request.remove(name) {
        Some(Value::Array(entries)) => entries,
        _ => Vec::new(),
    };
    act(&mut entries);
    request.insert(name.to_owned(), Value::Array(entries));
}

/// Checks that the machine has what is overridden.
pub fn check(load: &LoadSnapshot, settings: &[Setting], spec: &Spec) -> Outcome<()> {
    let drives = spec.drives.iter().map(|d| d.drive_id.as_str()).collect();
    for change in &load.drive_overrides {
        known("drive", &change.drive_id, &drives)?;
    }
    let cards = spec.network_interfaces.iter().map(|n| n.iface_id.as_str()).collect();
    for change in &load.network_overrides {
        known("network interface", &change.iface_id, &cards)?;
    }
    for id in interfaces(settings) {
        known("network interface", id, &cards)?;
    }
    let memories = spec.pmem.iter().map(|p| p.id.as_str()).collect();
    for change in &load.pmem_overrides {
        known("persistent memory", &change.id, &memories)?;
    }
    if load.vsock_override.is_some() && spec.vsock.is_none() {
        return Err(Failure::new("The machine in the snapshot has no vsock device"));
    }
    Ok(())
}

fn known(what: &str, id: &str, there: &Vec<&str>) -> Outcome<()> {
    if there.contains(&id) {
        return Ok(());
    }
    let hint = match api::nearest(id, there.iter().copied()) {
        Some(near) => format!("; did you mean {near}?"),
        None if there.is_empty() => " and no other".to_owned(),
        None => format!("; there is {}", there.join(", ")),
    };
    Err(Failure::new(format!("The machine in the snapshot has no {what} {id:?}{hint}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(words: &[&str], number: u32) -> Outcome<LoadSnapshot> {
        let settings: Vec<Setting> = words.iter().map(|word| setting(word).unwrap()).collect();
        apply(&LoadSnapshot { snapshot_path: "s".into(), ..LoadSnapshot::default() }, &settings, number)
    }

    #[test]
    fn each_key_reaches_its_field() {
        let load = set(
            &[
                "drives.root.path=/b.img",
                "drives.data.path_on_host=/c.img",
                "network-interfaces.eth0.host_dev_name=tap{n}",
                "network-interfaces.eth0.guest_mac=06:00:00:00:00:0{n}",
                "vsock.uds_path=/v{n}.sock",
                "vsock.guest_cid=4",
                "serial.mode=off",
                "clock_realtime=true",
                "huge_pages=None",
                "prefetch=all",
                "search=/a",
                "search=/b",
            ],
            7,
        )
        .unwrap();
        assert_eq!(load.drive_overrides.len(), 2);
        assert_eq!(load.drive_overrides[0].path_on_host, Some("/b.img".into()));
        assert_eq!(load.network_overrides.len(), 1);
        assert_eq!(load.network_overrides[0].host_dev_name.as_deref(), Some("tap7"));
        assert_eq!(load.network_overrides[0].guest_mac.as_deref(), Some("06:00:00:00:00:07"));
        let vsock = load.vsock_override.unwrap();
        assert_eq!((vsock.uds_path, vsock.guest_cid), ("/v7.sock".into(), Some(4)));
        assert!(load.clock_realtime && load.serial_override.is_some());
        assert_eq!(load.search, ["/a", "/b"].map(std::path::PathBuf::from));
    }

    #[test]
    fn every_row_names_a_field_that_the_request_has() {
        for row in KEYS.iter().filter(|row| row.place != Place::Agent) {
            let value = match row.kind {
                Kind::Flag => "true",
                Kind::Number => "5",
                _ => match row.pattern.rsplit('.').next().unwrap() {
                    "huge_pages" => "Transparent",
                    "prefetch" => "all",
                    "mode" => "off",
                    "backend_type" => "File",
                    _ => "/x",
                },
            };
            let own = format!("{}={value}", row.pattern.replace('*', "a"));
            let needed: &[&str] = match row.pattern {
                "vsock.guest_cid" => &["vsock.uds_path=/v"],
                "mem_backend.backend_type" => &["mem_backend.backend_path=/m"],
                "mem_backend.backend_path" => &["mem_backend.backend_type=File"],
                _ => &[],
            };
            let before = set(needed, 1).unwrap_or_default();
            assert_ne!(set(&[&[&own[..]], needed].concat(), 1).unwrap(), before, "{}", row.pattern);
        }
    }

    #[test]
    fn addresses_are_for_the_agent() {
        let words = [
            "network-interfaces.eth0.ip=10.0.0.{n}/24",
            "network-interfaces.eth0.ip=fd00::{n}/64",
            "network-interfaces.eth0.gw=10.0.0.1",
            "network-interfaces.eth1.ip=10.0.1.{n}/24",
        ];
        let settings: Vec<Setting> = words.iter().map(|word| setting(word).unwrap()).collect();
        assert_eq!(interfaces(&settings), BTreeSet::from(["eth0", "eth1"]));
        let (ip, gw) = addresses(&settings, "eth0", 5);
        assert_eq!((ip, gw), (vec!["10.0.0.5/24".into(), "fd00::5/64".into()], vec!["10.0.0.1".into()]));
        assert_eq!(set(&words, 5).unwrap().network_overrides, []);
    }

    #[test]
    fn what_cannot_be_set_is_refused_with_the_nearest() {
        let cases = [
            ("drives.root.pth=/x", "did you mean drives.root.path?"),
            ("drive.root.path=/x", "did you mean drives.root.path?"),
            ("network-interfaces.eth0.host_dev=tap0", "network-interfaces.eth0.host_dev_name?"),
            ("clok_realtime=true", "did you mean clock_realtime?"),
            ("something.else.entirely.other=1", "there are drives.ID.path_on_host"),
            ("drives..path=/x", "cannot be set"),
            ("clock_realtime=yes", "true or false"),
            ("vsock.guest_cid=three", "a number"),
            ("prefetch=", "no value"),
            ("prefetch", "KEY=VALUE"),
        ];
        for (word, expected) in cases {
            let said = setting(word).unwrap_err();
            assert!(said.contains(expected), "{word}: {said}");
        }
        assert!(set(&["prefetch=everything"], 1).unwrap_err().message.contains("everything"));
    }

    #[test]
    fn what_the_machine_does_not_have_cannot_be_overridden() {
        let spec: Spec = serde_json::from_str(
            r#"{"drives": [{"drive_id": "root", "path_on_host": "/r", "is_root_device": true}]}"#,
        )
        .unwrap();
        check(&set(&["drives.root.path=/x"], 1).unwrap(), &[], &spec).unwrap();
        let said =
            |word| check(&set(&[word], 1).unwrap(), &[setting(word).unwrap()], &spec).unwrap_err().message;
        assert!(said("drives.rot.path=/x").contains("did you mean root?"));
        assert!(said("network-interfaces.eth0.guest_mac=06:00:00:00:00:01").contains("no other"));
        assert!(said("vsock.uds_path=/v").contains("no vsock"));
    }
}
