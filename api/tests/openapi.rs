//! `resources/openapi.yaml` and the code say the same, compared both ways.
//!
//! ```text
//!   openapi.yaml ──► paths ──────────► routes::TABLE, routes::parse
//!                └─► schemas ────────► serde: what it reads, refuses, fills in, writes
//!   api/src/spec*, routes, control ──► every type that is read has a schema
//! ```
//!
//! Serde keeps no list of a type's fields that a program could look at, but its refusals do:
//! an unknown field is answered with all known ones, an absent one is named, a wrong type
//! is named. So each statement of the document is put to the decoder, one field at a time,
//! starting from the schema's own example.

use std::{collections::BTreeSet, fmt::Debug, path::Path};

use api::{
    Fault, FaultKind, MachineInfo, MachineState, Reply,
    routes::{self, Action, ActionType, CoreDump, VmState, WantedState},
    spec::*,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

/// Paths that are served beside the machine, by the program and not by [`routes::parse`].
const BESIDE: [&str; 4] = ["/healthz", "/events", "/vm/wait", "/vm/shutdown"];

/// Schemas of what the program itself reads and writes, whose types this crate does not have, of
/// answers that have no type, and of free data.
const ELSEWHERE: [&str; 10] = [
    "BalloonStatistics",
    "Counters",
    "End",
    "Event",
    "Fault",
    "HintingStatus",
    "MemoryHotplugStatus",
    "Metadata",
    "Shutdown",
    "Version",
];

/// Schemas of strings with a form of their own.
const FORMS: [&str; 4] = ["Bitmap32", "Bitmap64", "KvmCapability", "Number32"];

/// Defaults that are filled in where the value is used: serde shows the field as absent.
const FILLED_IN_LATER: [(&str, &str, &str); 2] =
    [("BootSource", "boot_args", DEFAULT_BOOT_ARGS), ("MmdsConfig", "ipv4_address", "169.254.169.254")];

/// Bounds that hold only together with other values than those of the example.
const BOUND_TO_OTHERS: [(&str, &str); 2] =
    [("MemoryHotplug", "block_size_mib"), ("MemoryHotplug", "slot_size_mib")];

/// A type that serde reads, and the schema of the same name.
struct Known {
    name: &'static str,
    /// What serde writes after it has read this, or why it does not read it.
    decode: fn(&Value) -> Result<Value, String>,
    /// Whether two texts stand for the same value.
    same: fn(&Value, &Value) -> bool,
}

fn known<T: DeserializeOwned + Serialize + PartialEq + Debug>(name: &'static str) -> Known {
    fn read<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
        T::deserialize(value).map_err(|e| e.to_string())
    }
    Known {
        name,
        decode: |value| read::<T>(value).map(|read| serde_json::to_value(read).unwrap()),
        same: |a, b| read::<T>(a).unwrap() == read::<T>(b).unwrap(),
    }
}

macro_rules! known {
    ($($name:ident),* $(,)?) => { vec![$(known::<$name>(stringify!($name))),*] };
}

fn objects() -> Vec<Known> {
    known![
        Spec,
        BootSource,
        MachineConfig,
        MachineConfigPatch,
        CpuConfig,
        CpuidModifier,
        RegisterModifier,
        MsrModifier,
        TokenBucket,
        RateLimiter,
        Drive,
        DrivePatch,
        NetworkInterface,
        NetworkInterfacePatch,
        Vsock,
        Entropy,
        Serial,
        Console,
        Logger,
        LoggerPatch,
        Balloon,
        BalloonPatch,
        BalloonStatisticsPatch,
        HintingStart,
        Pmem,
        PmemPatch,
        MemoryHotplug,
        MemoryHotplugPatch,
        MmdsConfig,
        VmState,
        CreateSnapshot,
        MemBackend,
        NetworkOverride,
        VsockOverride,
        DriveOverride,
        PmemOverride,
        LoadSnapshot,
        SnapshotJob,
        Action,
        CoreDump,
        MachineInfo,
        Metrics,
    ]
}

fn enums() -> Vec<Known> {
    known![
        HugePages,
        Transport,
        NamedTemplate,
        CpuidRegister,
        CacheType,
        IoEngine,
        ConsoleMode,
        LogLevel,
        MmdsVersion,
        SnapshotType,
        DriveCapture,
        Compression,
        MemBackendType,
        LoadHugePages,
        Prefetch,
        JobState,
        WantedState,
        ActionType,
        MachineState,
    ]
}

fn document() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/openapi.yaml");
    yaml_serde::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn schema<'a>(document: &'a Value, name: &str) -> &'a Value {
    document["components"]["schemas"].get(name).unwrap_or_else(|| panic!("there is no schema {name}"))
}

/// What a reference, alone or with a description beside it, stands for.
fn resolved<'a>(document: &'a Value, part: &'a Value) -> &'a Value {
    let part = part["allOf"].get(0).unwrap_or(part);
    match part["$ref"].as_str() {
        Some(to) => document.pointer(&to[1..]).unwrap_or_else(|| panic!("{to} leads nowhere")),
        None => part,
    }
}

fn properties(schema: &Value) -> impl Iterator<Item = (&str, &Value)> {
    schema["properties"].as_object().into_iter().flatten().map(|(name, property)| (name.as_str(), property))
}

fn strings(list: &Value) -> BTreeSet<String> {
    list.as_array().into_iter().flatten().map(|s| s.as_str().unwrap().to_owned()).collect()
}

fn keys(object: &Value) -> BTreeSet<String> {
    object.as_object().unwrap().keys().cloned().collect()
}

/// The names that a refusal of an unknown one lists.
fn listed(refusal: &str) -> BTreeSet<String> {
    let (_, list) = refusal.split_once("expected").unwrap_or_else(|| panic!("no list in: {refusal}"));
    let list = list.split("; did you mean").next().unwrap_or(list);
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// `object` with one field set.
fn with(object: &Value, field: &str, value: Value) -> Value {
    let mut object = object.clone();
    object[field] = value;
    object
}

/// The example of a schema, and what of it is required.
fn examples(schema: &Value) -> (Value, Value) {
    let example = schema["example"].clone();
    let required = strings(&schema["required"]);
    let fields = example.as_object().unwrap_or_else(|| panic!("no example: {schema}")).clone();
    let minimal: Map<_, _> = fields.into_iter().filter(|(name, _)| required.contains(name)).collect();
    (example, Value::Object(minimal))
}

/// Each operation: method, path, what the document says.
fn operations(document: &Value) -> Vec<(String, &str, &Value)> {
    let paths = document["paths"].as_object().unwrap().iter();
    let of = |(path, item): (&'_ String, &'_ Value)| {
        let methods = item.as_object().unwrap().keys().filter(|key| *key != "parameters");
        methods.map(|method| (method.to_uppercase(), path.clone())).collect::<Vec<_>>()
    };
    let named: Vec<(String, String)> = paths.flat_map(of).collect();
    let mut all = Vec::new();
    for (method, path) in named {
        let (path, item) = document["paths"].as_object().unwrap().get_key_value(&path).unwrap();
        let operation = &item[method.to_lowercase()];
        all.push((method, path.as_str(), operation));
    }
    all
}

#[test]
fn the_paths_and_methods_are_those_of_the_table() {
    let document = document();
    let described: BTreeSet<(String, String)> =
        operations(&document).into_iter().map(|(method, path, _)| (method, path.to_owned())).collect();
    let served: BTreeSet<(String, String)> =
        routes::TABLE.iter().map(|(method, path)| ((*method).to_owned(), (*path).to_owned())).collect();
    let missing: Vec<_> = served.difference(&described).collect();
    let invented: Vec<_> = described.difference(&served).collect();
    assert!(missing.is_empty() && invented.is_empty(), "missing {missing:?}, invented {invented:?}");
}

#[test]
fn each_operation_says_when_it_is_allowed_and_what_it_answers() {
    let document = document();
    let states = strings(&schema(&document, "MachineState")["enum"]);
    let mut names = BTreeSet::new();
    for (method, path, operation) in operations(&document) {
        let name = operation["operationId"].as_str().unwrap_or_default();
        assert!(!name.is_empty() && names.insert(name.to_owned()), "{method} {path}: {name:?}");
        assert!(operation["summary"].is_string(), "{method} {path} has no summary");
        let when = strings(&operation["x-states"]);
        assert!(!when.is_empty() && when.is_subset(&states), "{method} {path}: {when:?}");
        let waits = ["/vm/wait", "/vm/shutdown"].contains(&path);
        let mut expected = vec![if method == "GET" || waits { "200" } else { "204" }, "400", "default"];
        if path == "/mmds" && method != "GET" {
            expected.push("413");
        }
        let job = path.starts_with("/snapshot/jobs");
        if waits || path == "/events" || (method == "DELETE" && !job) {
            expected.push("503");
        }
        if path == "/snapshot/create" {
            expected.push("202");
        }
        let expected: BTreeSet<String> = expected.into_iter().map(str::to_owned).collect();
        assert_eq!(keys(&operation["responses"]), expected, "{method} {path}");
    }
}

#[test]
fn each_body_has_the_fields_of_the_type_its_route_reads() {
    let document = document();
    let unknown = br#"{"no_such_field": 1}"#;
    for (method, path, operation) in operations(&document) {
        let body = &operation["requestBody"];
        if BESIDE.contains(&path) || !["PUT", "PATCH"].contains(&method.as_str()) {
            assert!(body.is_null() || path == "/vm/shutdown", "{method} {path} has a body");
            continue;
        }
        let at = path.replace("jobs/{id}", "jobs/1").replace("{id}", "x");
        let parse = |bytes: &[u8]| routes::parse(&method, &at, bytes);
        assert_eq!(parse(b"").is_err(), body["required"] == true, "{method} {path} without a body");
        if body.is_null() {
            continue;
        }
        let content = &body["content"]["application/json"];
        let schema = resolved(&document, &content["schema"]);
        match parse(unknown) {
            Err(fault) => {
                let described: BTreeSet<_> = properties(schema).map(|(name, _)| name.to_owned()).collect();
                assert_eq!(listed(&fault.message), described, "{method} {path}");
                assert!(content["examples"].is_object(), "{method} {path} has no example");
            }
            Ok(_) => assert!(schema["properties"].is_null(), "{method} {path} takes any body"),
        }
        for (name, example) in content["examples"].as_object().into_iter().flatten() {
            let parsed = parse(example["value"].to_string().as_bytes());
            assert!(parsed.is_ok(), "example {name} of {method} {path}: {parsed:?}");
        }
    }
}

#[test]
fn each_schema_has_the_fields_that_serde_knows_and_requires() {
    let document = document();
    for Known { name, decode, .. } in objects() {
        let schema = schema(&document, name);
        let (example, minimal) = examples(schema);
        let written = decode(&example).unwrap_or_else(|why| panic!("the example of {name}: {why}"));
        let described: BTreeSet<_> = properties(schema).map(|(field, _)| field.to_owned()).collect();
        match decode(&json!({ "no_such_field": 1 })) {
            Err(why) if why.starts_with("unknown field") => {
                assert_eq!(schema["additionalProperties"], false, "{name}");
                assert_eq!(listed(&why), described, "{name}");
            }
            _ => assert_eq!(keys(&written), described, "{name}"),
        }
        decode(&minimal).unwrap_or_else(|why| panic!("{name} with what is required only: {why}"));
        let required = strings(&schema["required"]);
        for field in &described {
            let mut without = example.clone();
            without.as_object_mut().unwrap().remove(field);
            let missing = decode(&without).is_err_and(|why| why == format!("missing field `{field}`"));
            assert_eq!(missing, required.contains(field), "{name}.{field} is required");
        }
    }
}

#[test]
fn each_field_has_the_type_that_serde_takes() {
    let document = document();
    let probes = [("boolean", json!(true)), ("integer", json!(7)), ("string", json!("text"))];
    for Known { name, decode, .. } in objects() {
        let schema = schema(&document, name);
        let (_, minimal) = examples(schema);
        for (field, property) in properties(schema) {
            assert!(property["description"].is_string(), "{name}.{field} is not described");
            let takes_null = decode(&with(&minimal, field, Value::Null)).is_ok();
            assert_eq!(takes_null, property["nullable"] == true, "{name}.{field} takes null");
            if !property["oneOf"].is_null() {
                continue;
            }
            let described = &resolved(&document, property)["type"];
            for (kind, probe) in &probes {
                let refusal = decode(&with(&minimal, field, probe.clone())).err();
                let wrong = refusal.as_ref().is_some_and(|why| why.contains("invalid type"));
                assert_eq!(wrong, described != kind, "{name}.{field} and {probe}: {refusal:?}");
            }
        }
    }
}

#[test]
fn each_default_is_what_serde_fills_in() {
    let document = document();
    for Known { name, decode, same } in objects() {
        let schema = schema(&document, name);
        let (_, minimal) = examples(schema);
        let filled = decode(&minimal).unwrap();
        for (field, property) in properties(schema).filter(|(field, _)| minimal.get(field).is_none()) {
            let serde = &filled[field];
            let later = FILLED_IN_LATER.iter().find(|(of, at, _)| (*of, *at) == (name, field));
            match (property.get("default"), later) {
                (default, Some((_, _, value))) => {
                    assert_eq!(default, Some(&json!(value)), "{name}.{field}");
                    assert!(serde.is_null(), "{name}.{field} is filled in by serde");
                }
                (Some(default), None) => {
                    let said = with(&minimal, field, default.clone());
                    assert!(same(&said, &minimal), "{name}.{field} is not {default} when absent");
                    assert!(serde.is_null() || serde == default, "{name}.{field}: {serde}, not {default}");
                }
                (None, None) => {
                    assert!(serde.is_null(), "{name}.{field} has a default, {serde}");
                    assert_eq!(property["nullable"], true, "{name}.{field} needs a default");
                }
            }
        }
    }
}

#[test]
fn each_enumeration_has_the_names_that_serde_knows() {
    let document = document();
    for Known { name, decode, .. } in enums() {
        let described = schema(&document, name)["enum"].as_array().unwrap();
        let why = decode(&json!("no_such_variant")).unwrap_err();
        assert_eq!(listed(&why), strings(&described.clone().into()), "{name}");
        // Of several spellings of one variant the first is the one that serde writes.
        for (at, spelling) in described.iter().enumerate() {
            let written = decode(spelling).unwrap();
            let first = described.iter().position(|other| *other == written);
            assert!(first.is_some_and(|first| first <= at), "{name}: {spelling} is written {written}");
        }
    }
}

/// A number of any size as JSON.
fn number(value: i128) -> Value {
    serde_json::from_str(&value.to_string()).unwrap()
}

/// Whether a machine may have `value` as its part `name`.
fn fits(name: &str, value: &Value) -> bool {
    let spec = match name {
        "MachineConfig" | "MachineConfigPatch" => {
            let mut config = json!({ "vcpu_count": 1, "mem_size_mib": 128 });
            let changes = value.as_object().unwrap().clone();
            config.as_object_mut().unwrap().extend(changes);
            json!({ "machine-config": config })
        }
        "Drive" => json!({ "drives": [value] }),
        "NetworkInterface" => json!({ "network-interfaces": [value] }),
        "Vsock" => json!({ "vsock": value }),
        "Balloon" => {
            json!({ "balloon": value, "machine-config": { "vcpu_count": 1, "mem_size_mib": 67_108_864 } })
        }
        "MemoryHotplug" => json!({ "memory-hotplug": value }),
        _ => return true,
    };
    Spec::deserialize(&spec).is_ok_and(|spec| spec.check_parts().is_ok())
}

#[test]
fn each_number_is_taken_up_to_its_bounds_and_no_further() {
    let document = document();
    for Known { name, decode, .. } in objects() {
        let schema = schema(&document, name);
        let (example, _) = examples(schema);
        for (field, property) in properties(schema).filter(|(_, property)| property["type"] == "integer") {
            let bound = |which: &str| -> i128 {
                let bound = &property[which];
                let signed = bound.as_i64().map(i128::from);
                let found = signed.or_else(|| bound.as_u64().map(i128::from));
                found.unwrap_or_else(|| panic!("{name}.{field} has no {which}"))
            };
            let taken = |value: i128| {
                let mut body = with(&example, field, number(value));
                match field {
                    "host_dev_fd" => body["host_dev_name"] = Value::Null,
                    "max_vcpu_count" => body["vcpu_count"] = json!(1),
                    _ => {}
                }
                decode(&body).is_ok() && fits(name, &body)
            };
            let (least, most) = (bound("minimum"), bound("maximum"));
            assert!(!taken(least - 1), "{name}.{field} takes {}", least - 1);
            assert!(!taken(most + 1), "{name}.{field} takes {}", most + 1);
            assert!(taken(least), "{name}.{field} refuses {least}");
            if !BOUND_TO_OTHERS.contains(&(name, field)) {
                assert!(taken(most), "{name}.{field} refuses {most}");
            }
        }
    }
}

/// A type in the source that serde reads: its name, and its fields with whether Firecracker
/// lacks them.
struct Declared {
    name: String,
    ours: bool,
    fields: Vec<(String, bool)>,
}

/// The types that a source file declares. Fields are only told apart well enough for this
/// crate's formatted source.
fn declared(source: &str) -> Vec<Declared> {
    let word = |text: &str| text.split(|c: char| c != '_' && !c.is_alphanumeric()).next().unwrap().to_owned();
    let (mut all, mut docs, mut read, mut inside) = (Vec::<Declared>::new(), String::new(), false, false);
    for line in source.lines() {
        let text = line.trim();
        if let Some(doc) = text.strip_prefix("///") {
            docs.push_str(doc);
            continue;
        }
        if let Some(derived) = text.strip_prefix("#[derive(") {
            read = derived.contains("Deserialize");
        }
        if text.starts_with("#[") {
            continue;
        }
        let ours = std::mem::take(&mut docs).contains("*Ours");
        let kind = text.strip_prefix("pub struct ").or_else(|| text.strip_prefix("pub enum "));
        if let Some(name) = kind {
            inside = std::mem::take(&mut read);
            if inside {
                all.push(Declared { name: word(name), ours, fields: Vec::new() });
            }
        } else if line == "}" {
            inside = false;
        } else if let (true, Some(field), Some(last)) = (inside, text.strip_prefix("pub "), all.last_mut()) {
            last.fields.push((word(field), ours));
        }
    }
    all
}

fn declared_everywhere() -> Vec<Declared> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let parts = std::fs::read_dir(source.join("spec")).unwrap().map(|entry| entry.unwrap().path());
    let files = ["spec.rs", "routes.rs", "control.rs"].map(|name| source.join(name)).into_iter().chain(parts);
    let texts = files.filter(|file| file.is_file()).map(|file| std::fs::read_to_string(file).unwrap());
    texts.flat_map(|text| declared(&text)).collect()
}

#[test]
fn each_type_has_a_schema_and_each_schema_a_type() {
    let document = document();
    let described = keys(&document["components"]["schemas"]);
    let mut compared: BTreeSet<String> =
        objects().iter().chain(&enums()).map(|known| known.name.to_owned()).collect();
    let declared: BTreeSet<String> = declared_everywhere().into_iter().map(|known| known.name).collect();
    assert_eq!(declared, compared, "types of the source, and types compared here");
    compared.extend(ELSEWHERE.into_iter().chain(FORMS).map(str::to_owned));
    assert_eq!(described, compared, "schemas, and types compared here");
}

#[test]
fn what_firecracker_lacks_is_marked_in_both() {
    let document = document();
    for Declared { name, ours, fields } in declared_everywhere() {
        let schema = schema(&document, &name);
        assert!(!ours || schema["x-nacelle"] == true, "{name}");
        for (field, ours) in fields {
            let dashed = field.replace('_', "-");
            let property = schema["properties"].get(&field).or_else(|| schema["properties"].get(&dashed));
            let property = property.unwrap_or_else(|| panic!("{name} has no {field}"));
            assert_eq!(property["x-nacelle"] == true, ours, "{name}.{field}");
        }
    }
}

#[test]
fn strings_with_a_form_are_read() {
    let document = document();
    let example = |name| &schema(&document, name)["example"];
    assert!(Bitmap::<32>::deserialize(example("Bitmap32")).is_ok());
    assert!(Bitmap::<64>::deserialize(example("Bitmap64")).is_ok());
    assert!(KvmCapability::deserialize(example("KvmCapability")).is_ok());
    let msr = json!({ "addr": example("Number32"), "bitmap": "0b1" });
    assert!(MsrModifier::deserialize(&msr).is_ok());
}

#[test]
fn answers_have_the_fields_of_their_schemas() {
    let document = document();
    let fields = |name| keys(&schema(&document, name)["properties"]);
    let body = |rendered: routes::Rendered| serde_json::from_slice::<Value>(&rendered.body).unwrap();
    let version = body(routes::render(&Ok(Reply::Version(api::FIRECRACKER_VERSION.to_owned()))));
    assert_eq!(version, schema(&document, "Version")["example"]);
    assert_eq!(keys(&version), fields("Version"));
    let fault = Fault::new(FaultKind::TooLarge, "No");
    let refused = routes::render(&Err(fault));
    assert_eq!(refused.status, 413);
    assert_eq!(keys(&body(refused)), fields("Fault"));
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
}
