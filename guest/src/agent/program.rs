//! A process to start, with every name looked up and every string made.
//!
//! This is the half of starting a process that may allocate and fail in words; [`super::child`]
//! is the half that runs between fork and exec.

use super::{
    syscall::cstring,
    user::{self, Identity},
};
use guest::protocol::{Failure, FailureKind, ProcessSpec, Rlimit, Size};
use std::{ffi::CString, io, os::fd::AsFd};

/// Where programs are looked for when the image says nothing.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Most arguments and environment variables together.
const MAX_STRINGS: usize = 65_536;

/// Open files a process may have, soft and hard, as systemd gives services.
const NOFILE: (u64, u64) = (1024, 524_288);

/// A process to start.
#[derive(Debug)]
pub struct Program {
    /// Paths to try in order.
    pub candidates: Vec<CString>,
    pub args: Vec<CString>,
    pub env: Vec<CString>,
    pub cwd: CString,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    /// Capabilities to keep, by number; `None`: all.
    pub capabilities: Option<u64>,
    pub no_new_privileges: bool,
    pub rlimits: Vec<(u32, u64, u64)>,
    pub terminal: Option<Size>,
    pub init: bool,
}

impl Program {
    /// Looks everything up under the container's `root`.
    pub fn prepare(spec: &ProcessSpec, root: &impl AsFd, hostname: &str) -> Result<Self, Failure> {
        let bad = |text: String| Failure::new(FailureKind::BadRequest, text);
        let Some(name) = spec.args.first().filter(|a| !a.is_empty()) else {
            return Err(Failure::new(FailureKind::CommandNotFound, "No command was given"));
        };
        if spec.args.len() + spec.env.len() > MAX_STRINGS {
            return Err(bad(format!("More than {MAX_STRINGS} arguments and variables were given")));
        }
        if !spec.cwd.is_empty() && !spec.cwd.starts_with('/') {
            return Err(bad(format!("The working directory {:?} is not absolute", spec.cwd)));
        }
        let who = user::resolve(root, &spec.user, &spec.groups)?;
        let env = environment(spec, &who, hostname);
        let search = env.iter().find_map(|e| e.strip_prefix("PATH=")).unwrap_or_default();
        let strings = |list: &[String]| list.iter().map(cstring).collect::<io::Result<Vec<_>>>();
        let zero = |e: io::Error| bad(format!("An argument or variable cannot be passed on: {e}"));
        Ok(Self {
            candidates: strings(&candidates(name, search)).map_err(zero)?,
            args: strings(&spec.args).map_err(zero)?,
            env: strings(&env).map_err(zero)?,
            cwd: cstring(if spec.cwd.is_empty() { "/" } else { &spec.cwd }).map_err(zero)?,
            uid: who.uid,
            gid: who.gid,
            groups: who.groups,
            capabilities: spec.capabilities.as_deref().map(capabilities).transpose()?,
            no_new_privileges: spec.no_new_privileges,
            rlimits: rlimits(&spec.rlimits)?,
            terminal: spec.terminal,
            init: spec.init,
        })
    }
}

fn candidates(name: &str, search: &str) -> Vec<String> {
    if name.contains('/') {
        return vec![name.into()];
    }
    // An empty entry is the working directory, by POSIX.
    let directory = |d: &str| if d.is_empty() { "." } else { d }.trim_end_matches('/').to_owned();
    search.split(':').map(|d| format!("{}/{name}", directory(d))).collect()
}

/// The variables given (the last of a name wins) and those Docker adds.
fn environment(spec: &ProcessSpec, who: &Identity, hostname: &str) -> Vec<String> {
    let mut env: Vec<String> = Vec::new();
    let mut places = std::collections::BTreeMap::new();
    for variable in &spec.env {
        let name = variable.split('=').next().unwrap_or_default();
        match places.get(name) {
            Some(&place) => env[place] = variable.clone(),
            None => {
                places.insert(name, env.len());
                env.push(variable.clone());
            }
        }
    }
    let mut add = |name: &str, value: &str| {
        if !places.contains_key(name) {
            env.push(format!("{name}={value}"));
        }
    };
    add("PATH", DEFAULT_PATH);
    add("HOSTNAME", hostname);
    if spec.terminal.is_some() {
        add("TERM", "xterm");
    }
    add("HOME", &who.home);
    env
}

/// Names in the order of their numbers (Linux `capability.h`).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

fn capabilities(names: &[String]) -> Result<u64, Failure> {
    names.iter().try_fold(0, |mask, name| {
        let plain = name.strip_prefix("CAP_").unwrap_or(name);
        match CAPABILITIES.iter().position(|c| *c == plain) {
            Some(number) => Ok(mask | 1 << number),
            None => Err(Failure::new(
                FailureKind::BadRequest,
                format!("There is no capability {name:?}; they are named like CAP_NET_ADMIN"),
            )),
        }
    })
}

/// Names in the order of their numbers (Linux `resource.h`).
const RLIMITS: [&str; 16] = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];

fn rlimits(given: &[Rlimit]) -> Result<Vec<(u32, u64, u64)>, Failure> {
    let mut limits = vec![(libc::RLIMIT_NOFILE, NOFILE.0, NOFILE.1.min(own_file_limit()))];
    for limit in given {
        let number = RLIMITS.iter().position(|n| *n == limit.name);
        let Some(number) = number.filter(|_| limit.soft <= limit.hard) else {
            return Err(Failure::new(
                FailureKind::BadRequest,
                format!(
                    "The limit {}={}:{} cannot be set; names are like nofile, and the soft \
                     limit is at most the hard one",
                    limit.name, limit.soft, limit.hard
                ),
            ));
        };
        limits.push((number as u32, limit.soft, limit.hard));
    }
    Ok(limits)
}

/// The agent's own hard limit of open files: under a limited host (in tests) it is the most
/// that can be given.
fn own_file_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: one writable rlimit.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
        0 => limit.rlim_max.max(NOFILE.0),
        _ => NOFILE.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(args: &[&str]) -> ProcessSpec {
        ProcessSpec { args: args.iter().map(|&a| a.into()).collect(), ..ProcessSpec::default() }
    }

    fn prepare(spec: &ProcessSpec) -> Result<Program, Failure> {
        let dir = tempfile::tempdir().unwrap();
        Program::prepare(spec, &std::fs::File::open(dir.path()).unwrap(), "box")
    }

    fn text(list: &[CString]) -> Vec<&str> {
        list.iter().map(|c| c.to_str().unwrap()).collect()
    }

    #[test]
    fn a_plain_name_is_looked_for_along_the_path_given() {
        let mut s = spec(&["ls"]);
        s.env = vec!["PATH=/a:/b/:".into()];
        assert_eq!(text(&prepare(&s).unwrap().candidates), ["/a/ls", "/b/ls", "./ls"]);
        assert_eq!(text(&prepare(&spec(&["./x"])).unwrap().candidates), ["./x"]);
    }

    #[test]
    fn what_docker_adds_is_added_unless_given() {
        let mut s = spec(&["x"]);
        s.env = vec!["HOME=/h".into(), "A=1".into(), "A=2".into()];
        s.terminal = Some(Size::default());
        let program = prepare(&s).unwrap();
        let env = text(&program.env);
        assert_eq!(env[..2], ["HOME=/h", "A=2"]);
        assert!(env.contains(&"HOSTNAME=box") && env.contains(&"TERM=xterm"));
        assert_eq!(env.len(), 5);
    }

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        assert_eq!(capabilities(&["CAP_CHOWN".into(), "BPF".into()]).unwrap(), 1 | 1 << 39);
        assert_eq!(capabilities(&["NET_ADMIN".into()]).unwrap(), 1 << 12);
        assert_eq!(capabilities(&["MKNOD".into()]).unwrap(), 1 << 27);
        assert!(capabilities(&["ROOT".into()]).is_err());
    }

    #[test]
    fn limits_have_the_kernels_numbers() {
        let limit = |name: &str, soft, hard| Rlimit { name: name.into(), soft, hard };
        let set = rlimits(&[limit("core", 0, 0), limit("rttime", 1, 2)]).unwrap();
        assert_eq!(set[1..], [(libc::RLIMIT_CORE, 0, 0), (libc::RLIMIT_RTTIME, 1, 2)]);
        assert!(rlimits(&[limit("core", 2, 1)]).is_err());
        assert!(rlimits(&[limit("CORE", 1, 1)]).is_err());
    }

    #[test]
    fn what_cannot_be_started_is_said_before_anything_is_started() {
        assert_eq!(prepare(&spec(&[])).unwrap_err().exit_code(), 127);
        assert_eq!(prepare(&spec(&[""])).unwrap_err().exit_code(), 127);
        assert_eq!(prepare(&spec(&["a\0b"])).unwrap_err().exit_code(), 125);
        let relative = ProcessSpec { cwd: "a".into(), ..spec(&["x"]) };
        assert_eq!(prepare(&relative).unwrap_err().kind, FailureKind::BadRequest);
    }
}
