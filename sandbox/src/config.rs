//! # What an image says about running it
//!
//! The image configuration (OCI image spec, "Image Configuration"; Docker writes the same) and
//! how it and the command line become one process, by Docker's rules: an entry point given on
//! the command line drops the image's command, a command given there replaces it, environment
//! variables are replaced by name. The user stays a string: names are looked up in the image's
//! own `/etc/passwd`, inside the guest, by the agent.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer, Serialize};

use crate::digest::Digest;

/// The search path of an image that names none (Docker's).
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why an image cannot be run as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or not of the right shape.
    #[error("The image configuration cannot be read: {0}")]
    Syntax(String),
    /// For another processor or system.
    #[error("The image is for {actual}, but this host runs {wanted} images")]
    Platform {
        /// What the image says.
        actual: String,
        /// What is needed.
        wanted: String,
    },
    /// Nothing to run.
    #[error("The image names no command, and none was given: add one after the image's name")]
    NoCommand,
    /// A working directory that is relative.
    #[error("The working directory '{0}' is not absolute: it must start with '/'")]
    WorkingDirectory(String),
    /// An environment entry without a name.
    #[error("The environment entry '{0}' is not of the form NAME=VALUE")]
    Environment(String),
    /// A zero byte in a string for the kernel.
    #[error("{0} contains a zero byte")]
    ZeroByte(&'static str),
}

/// What Docker writes as `null` and OCI leaves out.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

/// The image configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// The processor: `amd64`, `arm64`.
    #[serde(default, deserialize_with = "or_default")]
    pub architecture: String,
    /// The system: `linux`.
    #[serde(default, deserialize_with = "or_default")]
    pub os: String,
    /// How to run it.
    #[serde(default, deserialize_with = "or_default")]
    pub config: RunConfig,
    /// The layers, uncompressed.
    #[serde(default, deserialize_with = "or_default")]
    pub rootfs: RootFs,
}

/// How to run an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    /// `user`, `uid`, `user:group`, `uid:gid`; empty is root.
    #[serde(default, deserialize_with = "or_default")]
    pub user: String,
    /// `80/tcp`.
    #[serde(default, deserialize_with = "or_default")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
    /// `NAME=VALUE`.
    #[serde(default, deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// What always runs.
    #[serde(default, deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// Its arguments, or the program where there is no entry point.
    #[serde(default, deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// Directories that are kept apart from the image.
    #[serde(default, deserialize_with = "or_default")]
    pub volumes: BTreeMap<String, serde_json::Value>,
    /// Where it starts.
    #[serde(default, deserialize_with = "or_default")]
    pub working_dir: String,
    /// Free text by name.
    #[serde(default, deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// The signal that asks it to end: `SIGTERM`, `15`.
    #[serde(default, deserialize_with = "or_default")]
    pub stop_signal: String,
}

/// The layers of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// Digests of the uncompressed tars, lowest first.
    #[serde(default, deserialize_with = "or_default")]
    pub diff_ids: Vec<String>,
}

/// The name that registries use for this host's processor.
#[must_use]
pub fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl ImageConfig {
    /// Reads a configuration and checks that this host can run it. A configuration that does
    /// not say for whom it is passes.
    ///
    /// # Errors
    /// [`ConfigError::Syntax`] and [`ConfigError::Platform`].
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        // A JSON array would pass for a structure of defaults.
        if !json.trim_ascii_start().starts_with(b"{") {
            return Err(ConfigError::Syntax("it is no JSON object".into()));
        }
        let config: Self = serde_json::from_slice(json).map_err(|e| ConfigError::Syntax(e.to_string()))?;
        let right_os = matches!(&config.os[..], "" | "linux");
        let right_cpu = config.architecture.is_empty() || config.architecture == host_architecture();
        if right_os && right_cpu {
            return Ok(config);
        }
        Err(ConfigError::Platform {
            actual: format!("{}/{}", config.os, config.architecture),
            wanted: format!("linux/{}", host_architecture()),
        })
    }

    /// The digests of the uncompressed layers; `None` when one is malformed.
    pub(crate) fn diff_ids(&self) -> Option<Vec<Digest>> {
        self.rootfs.diff_ids.iter().map(|d| Digest::parse(d)).collect()
    }
}

/// What the command line says against the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--entrypoint`; an empty list drops the image's.
    pub entrypoint: Option<Vec<String>>,
    /// What stands after the image's name.
    pub command: Vec<String>,
    /// `-e NAME=VALUE`, in order; a bare `NAME` takes the variable away.
    pub env: Vec<String>,
    /// `-w`.
    pub working_dir: Option<String>,
    /// `-u`.
    pub user: Option<String>,
    /// `-t`.
    pub terminal: bool,
}

/// A process, ready for the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Program and arguments; never empty. The program is looked up in `PATH` of `env`.
    pub args: Vec<String>,
    /// `NAME=VALUE`, each name once.
    pub env: Vec<String>,
    /// Absolute; made by the agent where it does not exist.
    pub cwd: String,
    /// `user[:group]`, names or numbers, of the image; empty is root.
    pub user: String,
    /// Whether it runs on a terminal.
    pub terminal: bool,
}

/// The process that `config` and the command line make together.
///
/// # Errors
/// [`ConfigError`], for an empty command, a relative directory, a malformed environment.
pub fn process(config: &ImageConfig, overrides: &Overrides) -> Result<Process, ConfigError> {
    let run = &config.config;
    let entrypoint = overrides.entrypoint.as_ref().unwrap_or(&run.entrypoint);
    let keeps_cmd = overrides.command.is_empty() && overrides.entrypoint.is_none();
    let command = if keeps_cmd { &run.cmd } else { &overrides.command };
    let args: Vec<String> = entrypoint.iter().chain(command).cloned().collect();
    if args.first().is_none_or(String::is_empty) {
        return Err(ConfigError::NoCommand);
    }
    let cwd = match overrides.working_dir.as_deref() {
        Some(dir) => dir,
        None if run.working_dir.is_empty() => "/",
        None => &run.working_dir,
    };
    if !cwd.starts_with('/') {
        return Err(ConfigError::WorkingDirectory(cwd.to_owned()));
    }
    let env = environment(run, overrides)?;
    let user = overrides.user.as_ref().unwrap_or(&run.user);
    for (what, has) in [
        ("The command", args.iter().any(|a| a.contains('\0'))),
        ("The environment", env.iter().any(|e| e.contains('\0'))),
        ("The working directory", cwd.contains('\0')),
        ("The user", user.contains('\0')),
    ] {
        if has {
            return Err(ConfigError::ZeroByte(what));
        }
    }
    Ok(Process { args, env, cwd: cwd.to_owned(), user: user.clone(), terminal: overrides.terminal })
}

fn environment(run: &RunConfig, overrides: &Overrides) -> Result<Vec<String>, ConfigError> {
    let mut env: Vec<(String, Option<String>)> = Vec::new();
    let mut set = |name: &str, value: Option<&str>| {
        let value = value.map(str::to_owned);
        match env.iter_mut().find(|(n, _)| n == name) {
            Some(entry) => entry.1 = value,
            None => env.push((name.to_owned(), value)),
        }
    };
    set("PATH", Some(DEFAULT_PATH));
    if overrides.terminal {
        set("TERM", Some("xterm"));
    }
    // The image's entries come from a stranger: what is no entry is left out, as runc does.
    for entry in &run.env {
        if let Some((name, value)) = entry.split_once('=').filter(|(n, _)| !n.is_empty()) {
            set(name, Some(value));
        }
    }
    for entry in &overrides.env {
        let (name, value) = entry.split_once('=').map_or((&entry[..], None), |(n, v)| (n, Some(v)));
        if name.is_empty() {
            return Err(ConfigError::Environment(entry.clone()));
        }
        set(name, value);
    }
    Ok(env.into_iter().filter_map(|(n, v)| Some(format!("{n}={}", v?))).collect())
}

/// The ports an image exposes, as `(port, protocol)`; malformed entries are left out.
#[must_use]
pub fn exposed_ports(config: &ImageConfig) -> BTreeSet<(u16, String)> {
    let ports = config.config.exposed_ports.keys();
    ports
        .filter_map(|text| {
            let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
            Some((port.parse().ok()?, protocol.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(entrypoint: &[&str], cmd: &[&str], env: &[&str]) -> ImageConfig {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        ImageConfig {
            config: RunConfig {
                entrypoint: own(entrypoint),
                cmd: own(cmd),
                env: own(env),
                ..RunConfig::default()
            },
            ..ImageConfig::default()
        }
    }

    fn args(
        config: &ImageConfig,
        entrypoint: Option<&[&str]>,
        command: &[&str],
    ) -> Result<String, ConfigError> {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let overrides =
            Overrides { entrypoint: entrypoint.map(own), command: own(command), ..Overrides::default() };
        process(config, &overrides).map(|p| p.args.join(" "))
    }

    #[test]
    fn entry_point_and_command_combine_as_in_docker() {
        let both = image(&["entry"], &["cmd"], &[]);
        let only_cmd = image(&[], &["sh"], &[]);
        let none = image(&[], &[], &[]);
        assert_eq!(args(&both, None, &[]).unwrap(), "entry cmd");
        assert_eq!(args(&both, None, &["x"]).unwrap(), "entry x");
        assert_eq!(args(&both, Some(&["other"]), &[]).unwrap(), "other");
        assert_eq!(args(&both, Some(&["other"]), &["x"]).unwrap(), "other x");
        assert_eq!(args(&both, Some(&[]), &["x"]).unwrap(), "x");
        assert_eq!(args(&only_cmd, None, &[]).unwrap(), "sh");
        assert_eq!(args(&only_cmd, None, &["ls", "-l"]).unwrap(), "ls -l");
        for (config, entrypoint) in [(&none, None), (&both, Some(&[][..])), (&image(&[], &[""], &[]), None)] {
            assert_eq!(args(config, entrypoint, &[]), Err(ConfigError::NoCommand));
        }
    }

    #[test]
    fn variables_are_replaced_by_name_and_can_be_taken_away() {
        let config = image(&["x"], &[], &["A=1", "B=2", "PATH=/p", "broken", "=y", "A=3"]);
        let overrides = Overrides {
            env: vec!["B=".into(), "C=a=b".into(), "A".into()],
            terminal: true,
            ..Overrides::default()
        };
        let made = process(&config, &overrides).unwrap();
        assert_eq!(made.env, ["PATH=/p", "TERM=xterm", "B=", "C=a=b"]);
        let bad = Overrides { env: vec!["=x".into()], ..Overrides::default() };
        assert_eq!(process(&config, &bad), Err(ConfigError::Environment("=x".into())));
    }

    #[test]
    fn directories_are_absolute_and_zero_bytes_are_refused() {
        let with = |dir: &str| Overrides { working_dir: Some(dir.into()), ..Overrides::default() };
        let config = image(&["x"], &[], &[]);
        assert_eq!(process(&config, &Overrides::default()).unwrap().cwd, "/");
        assert_eq!(process(&config, &with("/a")).unwrap().cwd, "/a");
        assert!(matches!(process(&config, &with("a")), Err(ConfigError::WorkingDirectory(_))));
        assert!(matches!(process(&image(&["a\0b"], &[], &[]), &with("/")), Err(ConfigError::ZeroByte(_))));
    }

    #[test]
    fn dockers_nulls_are_read_and_foreign_images_are_refused_by_name() {
        let json = format!(
            r#"{{"architecture":"{}","os":"linux","config":{{"Cmd":["sh"],"Entrypoint":null,"Env":null,
            "Volumes":null,"ExposedPorts":{{"80/tcp":{{}},"53":{{}}}},"Labels":null,"OnBuild":null}},
            "rootfs":{{"type":"layers","diff_ids":null}},"history":[]}}"#,
            host_architecture()
        );
        let config = ImageConfig::parse(json.as_bytes()).unwrap();
        assert_eq!(config.config.cmd, ["sh"]);
        assert_eq!(exposed_ports(&config).into_iter().map(|p| p.0).collect::<Vec<_>>(), [53, 80]);
        let foreign = ImageConfig::parse(br#"{"architecture":"s390x","os":"linux"}"#).unwrap_err();
        assert!(foreign.to_string().contains("linux/s390x"), "{foreign}");
        assert!(matches!(ImageConfig::parse(b"[]"), Err(ConfigError::Syntax(_))));
    }
}
