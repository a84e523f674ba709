//! Which HTTP request is which [`Request`], and how a [`Reply`] or [`Fault`] looks as HTTP.
//!
//! Paths, bodies and status codes are Firecracker's (its `firecracker.yaml`, version 1):
//! 204 without a body or 200 with one when it happened, 400 with `{"fault_message": ...}` when
//! not, whatever the reason, except 413 where a body is too large. What is *ours* answers in
//! the same way. [`TABLE`] is the whole list; `resources/openapi.yaml` is compared with it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Fault, FaultKind, Reply, Request, explain_json, nearest};

/// A method and a path template with what it does, for documents and hints.
pub type Route = (&'static str, &'static str);

/// Every path that a machine's API answers, with each of its methods. `{id}` stands for one
/// segment. Those of the last group are served beside the machine, not by a [`Request`].
pub const TABLE: &[Route] = &[
    ("GET", "/"),
    ("GET", "/version"),
    ("GET", "/vm/config"),
    ("PUT", "/actions"),
    ("PUT", "/boot-source"),
    ("GET", "/machine-config"),
    ("PUT", "/machine-config"),
    ("PATCH", "/machine-config"),
    ("PUT", "/cpu-config"),
    ("PUT", "/drives/{id}"),
    ("PATCH", "/drives/{id}"),
    ("DELETE", "/drives/{id}"),
    ("PUT", "/pmem/{id}"),
    ("PATCH", "/pmem/{id}"),
    ("DELETE", "/pmem/{id}"),
    ("PUT", "/network-interfaces/{id}"),
    ("PATCH", "/network-interfaces/{id}"),
    ("DELETE", "/network-interfaces/{id}"),
    ("PUT", "/vsock"),
    ("PUT", "/entropy"),
    ("DELETE", "/entropy"),
    ("PUT", "/serial"),
    ("GET", "/balloon"),
    ("PUT", "/balloon"),
    ("PATCH", "/balloon"),
    ("GET", "/balloon/statistics"),
    ("PATCH", "/balloon/statistics"),
    ("GET", "/balloon/hinting/status"),
    ("PATCH", "/balloon/hinting/start"),
    ("PATCH", "/balloon/hinting/stop"),
    ("GET", "/hotplug/memory"),
    ("PUT", "/hotplug/memory"),
    ("PATCH", "/hotplug/memory"),
    ("GET", "/mmds"),
    ("PUT", "/mmds"),
    ("PATCH", "/mmds"),
    ("PUT", "/mmds/config"),
    ("PUT", "/logger"),
    ("PUT", "/metrics"),
    ("PATCH", "/vm"),
    ("PUT", "/snapshot/create"),
    ("PUT", "/snapshot/load"),
    ("GET", "/snapshot/jobs"),
    ("GET", "/snapshot/jobs/{id}"),
    ("DELETE", "/snapshot/jobs/{id}"),
    ("GET", "/vm/counters"),
    ("GET", "/metrics/openmetrics"),
    ("PUT", "/vm/nmi"),
    ("PUT", "/vm/power-button"),
    ("PUT", "/vm/stop"),
    ("PUT", "/vm/coredump"),
    ("GET", "/healthz"),
    ("GET", "/events"),
    ("POST", "/vm/wait"),
    ("PUT", "/vm/shutdown"),
];

/// A request that was understood, and what its sender should be told besides.
#[derive(Debug, PartialEq)]
pub struct Parsed {
    /// What is asked.
    pub request: Request,
    /// A field or path that was used and is deprecated.
    pub deprecation: Option<&'static str>,
}

/// The request that `method`, `path` (without its query) and `body` stand for.
pub fn parse(method: &str, path: &str, body: &[u8]) -> Result<Parsed, Fault> {
    let segments: Vec<&str> = path.trim_start_matches('/').split_terminator('/').collect();
    refuse_body(method, &segments, body)?;
    let plain = |request| Ok(Parsed { request, deprecation: None });
    match (method, &segments[..]) {
        ("GET", rest) => read(rest).map_or_else(|| Err(unknown(method, path)), plain),
        ("DELETE", ["entropy"]) => plain(Request::DeleteEntropy),
        ("DELETE", ["snapshot", "jobs", id]) => match id.parse() {
            Ok(id) => plain(Request::CancelSnapshot(id)),
            Err(_) => Err(unknown(method, path)),
        },
        ("DELETE", [kind, id]) => {
            let id = checked(id)?.to_owned();
            match *kind {
                "drives" => plain(Request::DeleteDrive(id)),
                "pmem" => plain(Request::DeletePmem(id)),
                "network-interfaces" => plain(Request::DeleteNetworkInterface(id)),
                _ => Err(unknown(method, path)),
            }
        }
        ("PUT" | "PATCH" | "DELETE", ["drives" | "pmem" | "network-interfaces"]) => {
            Err(wrong("The ID cannot be empty"))
        }
        ("PUT", rest) => put(rest, body, path),
        ("PATCH", rest) => patch(rest, body, path),
        _ => Err(unknown(method, path)),
    }
}

fn refuse_body(method: &str, segments: &[&str], body: &[u8]) -> Result<(), Fault> {
    let bodyless = matches!(
        segments,
        ["balloon", "hinting", "start" | "stop"] | ["vm", "nmi" | "power-button" | "stop" | "shutdown"]
    );
    match method {
        "GET" | "DELETE" if !body.is_empty() => Err(wrong(format!("{method} request cannot have a body"))),
        "PUT" | "PATCH" if body.is_empty() && !bodyless => Err(wrong(format!("Empty {method} request"))),
        _ => Ok(()),
    }
}

fn read(segments: &[&str]) -> Option<Request> {
    Some(match segments {
        [] => Request::Info,
        ["version"] => Request::Version,
        ["vm", "config"] => Request::Config,
        ["vm", "counters"] => Request::Counters,
        ["machine-config"] => Request::MachineConfig,
        ["balloon"] => Request::Balloon,
        ["balloon", "statistics"] => Request::BalloonStatistics,
        ["balloon", "hinting", "status"] => Request::HintingStatus,
        ["hotplug", "memory"] => Request::MemoryHotplug,
        ["mmds"] => Request::Mmds,
        ["metrics", "openmetrics"] => Request::OpenMetrics,
        ["snapshot", "jobs"] => Request::SnapshotJobs,
        ["snapshot", "jobs", id] => Request::SnapshotJob(id.parse().ok()?),
        _ => return None,
    })
}

fn put(segments: &[&str], body: &[u8], path: &str) -> Result<Parsed, Fault> {
    let mut deprecation = None;
    let request = match segments {
        ["actions"] => action(body)?,
        ["boot-source"] => Request::PutBootSource(json(body)?),
        ["machine-config"] => {
            let config: crate::spec::MachineConfig = json(body)?;
            deprecation =
                config.cpu_template.map(|_| "PUT /machine-config: cpu_template field is deprecated.");
            Request::PutMachineConfig(config)
        }
        ["cpu-config"] => Request::PutCpuConfig(json(body)?),
        ["drives", id] => Request::PutDrive(named(id, body, |d: &crate::spec::Drive| &d.drive_id)?),
        ["pmem", id] => Request::PutPmem(named(id, body, |p: &crate::spec::Pmem| &p.id)?),
        ["network-interfaces", id] => {
            Request::PutNetworkInterface(named(id, body, |n: &crate::spec::NetworkInterface| &n.iface_id)?)
        }
        ["vsock"] => {
            let vsock: crate::spec::Vsock = json(body)?;
            deprecation = vsock.vsock_id.as_ref().map(|_| "PUT /vsock: vsock_id field is deprecated.");
            Request::PutVsock(vsock)
        }
        ["entropy"] => Request::PutEntropy(json(body)?),
        ["serial"] => Request::PutSerial(json(body)?),
        ["balloon"] => Request::PutBalloon(json(body)?),
        ["hotplug", "memory"] => Request::PutMemoryHotplug(json(body)?),
        ["mmds"] => Request::PutMmds(json(body)?),
        ["mmds", "config"] => {
            let config: crate::spec::MmdsConfig = json(body)?;
            let old = config.version == crate::spec::MmdsVersion::V1;
            deprecation = old.then_some("PUT /mmds/config: V1 is deprecated. Use V2 instead.");
            Request::PutMmdsConfig(config)
        }
        ["logger"] => Request::PutLogger(json(body)?),
        ["metrics"] => Request::PutMetrics(json(body)?),
        ["snapshot", "create"] => Request::CreateSnapshot(json(body)?),
        ["snapshot", "load"] => {
            let load: crate::spec::LoadSnapshot = json(body)?;
            let old = load.mem_file_path.is_some() || load.enable_diff_snapshots;
            let text = "PUT /snapshot/load: mem_file_path and enable_diff_snapshots fields are deprecated.";
            deprecation = old.then_some(text);
            Request::LoadSnapshot(Box::new(load))
        }
        ["vm", "nmi"] => nothing(body).map(|()| Request::Nmi)?,
        ["vm", "power-button"] => nothing(body).map(|()| Request::PowerButton)?,
        ["vm", "stop"] => nothing(body).map(|()| Request::Stop)?,
        ["vm", "coredump"] => Request::CoreDump(json::<CoreDump>(body)?.path),
        _ => return Err(unknown("PUT", path)),
    };
    Ok(Parsed { request, deprecation })
}

fn patch(segments: &[&str], body: &[u8], path: &str) -> Result<Parsed, Fault> {
    let mut deprecation = None;
    let request = match segments {
        ["machine-config"] => {
            let patch: crate::spec::MachineConfigPatch = json(body)?;
            if patch == crate::spec::MachineConfigPatch::default() {
                return Err(wrong("Empty PATCH request"));
            }
            deprecation =
                patch.cpu_template.map(|_| "PATCH /machine-config: cpu_template field is deprecated.");
            Request::PatchMachineConfig(patch)
        }
        ["drives", id] => Request::PatchDrive(named(id, body, |d: &crate::spec::DrivePatch| &d.drive_id)?),
        ["pmem", id] => Request::PatchPmem(named(id, body, |p: &crate::spec::PmemPatch| &p.id)?),
        ["network-interfaces", id] => {
            Request::PatchNetworkInterface(named(id, body, |n: &crate::spec::NetworkInterfacePatch| {
                &n.iface_id
            })?)
        }
        ["balloon"] => Request::PatchBalloon(json(body)?),
        ["balloon", "statistics"] => Request::PatchBalloonStatistics(json(body)?),
        ["balloon", "hinting", "start"] if body.is_empty() => Request::StartHinting(Default::default()),
        ["balloon", "hinting", "start"] => Request::StartHinting(json(body)?),
        ["balloon", "hinting", "stop"] => Request::StopHinting,
        ["hotplug", "memory"] => Request::PatchMemoryHotplug(json(body)?),
        ["mmds"] => Request::PatchMmds(json(body)?),
        ["vm"] => match json::<VmState>(body)?.state {
            WantedState::Paused => Request::Pause,
            WantedState::Resumed => Request::Resume,
        },
        _ => return Err(unknown("PATCH", path)),
    };
    Ok(Parsed { request, deprecation })
}

/// What a machine may be turned to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WantedState {
    /// Everything stands still.
    Paused,
    /// Everything goes on.
    Resumed,
}

/// The body of `PATCH /vm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// What the machine is turned to.
    pub state: WantedState,
}

/// The body of `PUT /vm/coredump`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoreDump {
    /// The file to write; it must not exist.
    pub path: PathBuf,
}

/// What `PUT /actions` can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Write metrics now.
    FlushMetrics,
    /// Start the machine.
    InstanceStart,
    /// Press Ctrl+Alt+Del.
    SendCtrlAltDel,
}

/// The body of `PUT /actions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// Which one.
    pub action_type: ActionType,
}

fn action(body: &[u8]) -> Result<Request, Fault> {
    Ok(match json::<Action>(body)?.action_type {
        ActionType::FlushMetrics => Request::FlushMetrics,
        ActionType::InstanceStart => Request::Start,
        ActionType::SendCtrlAltDel => Request::CtrlAltDel,
    })
}

fn named<T: DeserializeOwned>(id: &str, body: &[u8], of: fn(&T) -> &String) -> Result<T, Fault> {
    let id = checked(id)?;
    let value: T = json(body)?;
    if of(&value) != id {
        let inside = of(&value);
        return Err(wrong(format!(
            "The id from the path [{id}] does not match the id from the body [{inside}]!"
        )));
    }
    Ok(value)
}

fn checked(id: &str) -> Result<&str, Fault> {
    if id.chars().all(|c| c == '_' || c.is_ascii_alphanumeric()) {
        Ok(id)
    } else {
        Err(wrong("API Resource IDs can only contain alphanumeric characters and underscores"))
    }
}

/// Refuses the body of a call that takes none, but for an object without fields, which many
/// clients send where there is nothing to say.
pub fn nothing(body: &[u8]) -> Result<(), Fault> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Nothing {}
    if body.is_empty() { Ok(()) } else { json::<Nothing>(body).map(|_| ()) }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|e| bad_json(&e))
}

fn bad_json(error: &serde_json::Error) -> Fault {
    wrong(format!("An error occurred when deserializing the json body of a request: {}", explain_json(error)))
}

fn wrong(message: impl Into<String>) -> Fault {
    Fault::new(FaultKind::Invalid, message)
}

fn unknown(method: &str, path: &str) -> Fault {
    let known = TABLE.iter().filter(|(_, known)| !known.contains('{')).map(|(_, known)| *known);
    let mut message = format!("Invalid request method and/or path: {method} {}", shown(path));
    let methods: Vec<_> = TABLE.iter().filter(|(_, known)| matches(known, path)).map(|(m, _)| *m).collect();
    if !methods.is_empty() {
        message.push_str(&format!("; this path takes {}", methods.join(", ")));
    } else if let Some(near) = nearest(path, known) {
        message.push_str(&format!("; did you mean {near}?"));
    }
    Fault::new(FaultKind::NotFound, message)
}

/// The first 200 characters of a path that a client sent.
fn shown(path: &str) -> String {
    path.chars().take(200).collect()
}

fn matches(template: &str, path: &str) -> bool {
    let mut parts = path.trim_end_matches('/').split('/');
    let mut wanted = template.trim_end_matches('/').split('/');
    loop {
        match (wanted.next(), parts.next()) {
            (None, None) => return true,
            (Some("{id}"), Some(id)) if !id.is_empty() => {}
            (Some(a), Some(b)) if a == b => {}
            _ => return false,
        }
    }
}

/// Status, content type and body of an answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Rendered {
    /// HTTP status.
    pub status: u16,
    /// Content type; empty when there is no body.
    pub content_type: &'static str,
    /// The body.
    pub body: Vec<u8>,
}

const JSON: &str = "application/json";

/// The HTTP answer for an outcome.
pub fn render(outcome: &Result<Reply, Fault>) -> Rendered {
    let (status, value) = match outcome {
        Ok(Reply::Done) => return Rendered { status: 204, content_type: "", body: Vec::new() },
        Ok(Reply::Text(text)) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            return Rendered { status: 200, content_type, body: text.clone().into_bytes() };
        }
        Ok(Reply::Info(info)) => (200, serde_json::to_vec(info)),
        Ok(Reply::Version(version)) => {
            (200, serde_json::to_vec(&serde_json::json!({ "firecracker_version": version })))
        }
        Ok(Reply::Config(spec)) => (200, serde_json::to_vec(spec)),
        Ok(Reply::MachineConfig(config)) => (200, serde_json::to_vec(config)),
        Ok(Reply::Balloon(balloon)) => (200, serde_json::to_vec(balloon)),
        Ok(Reply::Begun(job)) => (202, serde_json::to_vec(job)),
        Ok(Reply::Json(value)) => (200, serde_json::to_vec(value)),
        Err(fault) => return refusal(if fault.kind == FaultKind::TooLarge { 413 } else { 400 }, fault),
    };
    match value {
        Ok(body) => Rendered { status, content_type: JSON, body },
        Err(error) => refusal(500, &Fault::new(FaultKind::Internal, error.to_string())),
    }
}

/// An answer that says why something did not happen.
pub fn refusal(status: u16, fault: &Fault) -> Rendered {
    let body = serde_json::json!({ "fault_message": fault.to_string() });
    Rendered { status, content_type: JSON, body: body.to_string().into_bytes() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(method: &str, path: &str, body: &str) -> Result<Parsed, Fault> {
        parse(method, path, body.as_bytes())
    }

    #[test]
    fn a_request_is_understood_as_firecracker_understands_it() {
        let start = parsed("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#).unwrap();
        assert_eq!(start.request, Request::Start);
        assert_eq!(parsed("GET", "/", "").unwrap().request, Request::Info);
        assert_eq!(parsed("GET", "", "").unwrap().request, Request::Info);
        let hinting = parsed("PATCH", "/balloon/hinting/start", "").unwrap();
        assert_eq!(
            hinting.request,
            Request::StartHinting(crate::spec::HintingStart { acknowledge_on_stop: true })
        );
        assert_eq!(parsed("PUT", "/vm/nmi", "{}").unwrap().request, Request::Nmi);
        let vsock = parsed("PUT", "/vsock", r#"{"guest_cid": 3, "uds_path": "v", "vsock_id": "1"}"#).unwrap();
        assert!(vsock.deprecation.unwrap().contains("vsock_id"));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let cases = [
            ("GET", "/", "{}", "cannot have a body"),
            ("PUT", "/boot-source", "", "Empty PUT request"),
            ("PATCH", "/machine-config", "{}", "Empty PATCH request"),
            ("PUT", "/drives", "{}", "ID cannot be empty"),
            ("PUT", "/vm/nmi", "garbage", "expected value"),
            ("PUT", "/vm/stop", r#"{"now": true}"#, "unknown field `now`"),
            ("PUT", "/drives/a-b", "{}", "alphanumeric"),
            (
                "PUT",
                "/drives/a",
                r#"{"drive_id": "b", "path_on_host": "x", "is_root_device": false}"#,
                "does not match",
            ),
            ("PUT", "/boot-source", r#"{"kernel_image_pat": "x"}"#, "did you mean `kernel_image_path`?"),
            ("GET", "/machine-confg", "", "did you mean /machine-config?"),
            ("POST", "/boot-source", "{}", "this path takes PUT"),
            ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":64,"cpu_template":"T9"}"#, "T9"),
        ];
        for (method, path, body, expected) in cases {
            let message = parsed(method, path, body).unwrap_err().message;
            assert!(message.contains(expected), "{method} {path} {body}: {message}");
        }
    }

    #[test]
    fn every_route_of_the_table_is_parsed() {
        let beside = ["/healthz", "/events", "/vm/wait", "/vm/shutdown"];
        for (method, template) in TABLE.iter().filter(|(_, path)| !beside.contains(path)) {
            let path = template.replace("jobs/{id}", "jobs/1").replace("{id}", "x");
            let body = if matches!(*method, "GET" | "DELETE") { "" } else { "\"nonsense\"" };
            let unknown = parsed(method, &path, body)
                .is_err_and(|fault| fault.message.starts_with("Invalid request method"));
            assert!(!unknown, "{method} {template} is not parsed");
        }
    }

    #[test]
    fn answers_have_firecrackers_shape() {
        assert_eq!(render(&Ok(Reply::Done)).status, 204);
        let refused = render(&Err(wrong("No")));
        assert_eq!((refused.status, &refused.body[..]), (400, &br#"{"fault_message":"No"}"#[..]));
        let version = render(&Ok(Reply::Version("1".to_owned())));
        assert_eq!(version.body, br#"{"firecracker_version":"1"}"#);
    }
}
