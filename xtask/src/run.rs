//! `cargo xtask run`: from a fresh checkout to a container in its own machine.
//!
//! ```text
//!   packages -> build -> kernel -> image -> nacelle run IMAGE COMMAND
//!                                            |-- directly, where the processor can
//!                                            `-- in the lab elsewhere, the cache shared
//! ```
//!
//! Each step does nothing when its result is there. Only the guest's bytes go to standard
//! output; everything said here goes to standard error.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{self, Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::lab::{Lab, Outcome, Streams};
use crate::{build, host, image, kernel, lab, progress};

/// The name that stands for the image made here.
const IMAGE: &str = "busybox";
/// What the tour runs: output on both streams, a look around, an exit code to be seen again.
const TOUR: &str = "echo \"Hello from a machine of my own: $(hostname), Linux $(uname -r)\"
echo \"I am $(id -un), I see $(nproc) processor(s) and $(($(awk '/MemTotal/{print $2}' /proc/meminfo) / 1024)) MiB\"
echo \"and $(ls /bin | wc -l) programs in /bin, all from the image\"
echo 'this line went to standard error' >&2
exit 7";
/// The exit code at the end of [`TOUR`].
const TOUR_CODE: u8 = 7;

/// Everything that a machine needs, ready.
struct Setup {
    nacelle: PathBuf,
    kernel: PathBuf,
    image: PathBuf,
    times: Vec<(&'static str, Duration)>,
    in_lab: bool,
}

/// Runs `nacelle run` with `arguments` (flags, image, command), in which the word "busybox" is
/// the image made here; without any, the tour. Its exit code.
pub fn run(arguments: &[OsString]) -> Result<u8> {
    let setup = Setup::make()?;
    if arguments.is_empty() {
        return tour(setup);
    }
    if setup.in_lab {
        eprintln!("This host has no hardware virtualization: running in the lab, an emulated machine.");
    }
    let mut arguments = arguments.to_vec();
    let ours = arguments.iter_mut().find(|argument| *argument == IMAGE);
    let network = ours.is_none();
    if let Some(name) = ours {
        *name = setup.image.clone().into_os_string();
    }
    setup.nacelle_run(&arguments, network).map(|outcome| outcome.code)
}

impl Setup {
    fn make() -> Result<Self> {
        let mut times = Vec::new();
        let in_lab = !host::has_hardware_virtualization();
        let mut timed = |name, since: Instant| times.push((name, since.elapsed()));
        let start = Instant::now();
        host::need("running a container", &host::RUN_PACKAGES)?;
        if in_lab {
            lab::prepare()?;
        }
        timed("packages and lab", start);
        let start = Instant::now();
        let nacelle = build::nacelle()?;
        timed("building nacelle", start);
        let start = Instant::now();
        let kernel = match (env::var_os("NACELLE_KERNEL"), kernel::built()) {
            (Some(asked), _) if !asked.is_empty() => path::absolute(asked)?,
            (_, Some(built)) => built,
            _ => kernel::debian_cloud()?,
        };
        timed("guest kernel", start);
        let start = Instant::now();
        let image = image::busybox()?;
        timed("image", start);
        Ok(Self { nacelle, kernel, image, times, in_lab })
    }

    /// `network`: the image may have to come from a registry.
    fn nacelle_run(&self, arguments: &[OsString], network: bool) -> Result<Outcome> {
        let cache = host::cache_directory("NACELLE_CACHE_DIR", "")?;
        let variables =
            [("NACELLE_CACHE_DIR", cache.as_os_str()), ("NACELLE_KERNEL", self.kernel.as_os_str())];
        let command: Vec<OsString> = [self.nacelle.clone().into_os_string(), "run".into()]
            .into_iter()
            .chain(arguments.iter().cloned())
            .collect();
        if self.in_lab {
            let lab = Lab {
                writable: vec![cache.clone()],
                network,
                environment: variables.map(|(name, value)| (name.into(), value.to_owned())).to_vec(),
                ..Lab::default()
            };
            return lab.run_with(&command, &mut Streams::Inherited);
        }
        let status = Command::new(&self.nacelle)
            .args(&command[1..])
            .envs(variables)
            .status()
            .with_context(|| format!("Cannot run {}", self.nacelle.display()))?;
        Ok(Outcome { code: host::exit_code(status), start: Duration::ZERO })
    }

    fn kernel_in_words(&self) -> String {
        match fs::read_to_string(self.kernel.join("release")) {
            Ok(release) => format!(
                "Debian's cloud kernel {} (`cargo xtask kernel` builds a smaller, faster one)",
                release.trim()
            ),
            Err(_) if self.kernel.join("config").exists() => {
                format!("nacelle's own, built here ({})", short_name(&self.kernel))
            }
            Err(_) => self.kernel.display().to_string(),
        }
    }
}

fn tour(mut setup: Setup) -> Result<u8> {
    let place = if setup.in_lab {
        "in the lab, an emulated machine, because this host has no hardware virtualization"
    } else {
        "directly on this host"
    };
    eprintln!(
        "\nA short tour of nacelle\n\
         \x20 kernel    {}\n\
         \x20 image     busybox, an OCI image in {}\n\
         \x20 where     {place}\n\
         \x20 command   nacelle run busybox sh -c '...; exit {TOUR_CODE}'\n\n\
         What came out of the machine:\n",
        setup.kernel_in_words(),
        setup.image.display(),
    );
    let arguments = [setup.image.clone().into_os_string(), "sh".into(), "-c".into(), TOUR.into()];
    let start = Instant::now();
    let outcome = setup.nacelle_run(&arguments, false)?;
    if setup.in_lab {
        setup.times.push(("lab start", outcome.start));
    }
    setup.times.push(("nacelle run", start.elapsed().saturating_sub(outcome.start)));
    if outcome.code != TOUR_CODE {
        eprintln!("\nThe command should have ended with exit code {TOUR_CODE}, not {}.", outcome.code);
        return Ok(outcome.code.max(1));
    }
    eprintln!(
        "\nIt ended with exit code {TOUR_CODE}, which came back from inside the machine.\n\nTime taken:"
    );
    for (name, time) in &setup.times {
        eprintln!("  {name:<18} {:>9}", progress::seconds(*time));
    }
    eprintln!("\nNext: cargo xtask run -- busybox sh    (a shell in a machine)");
    eprintln!("      cargo xtask run -- IMAGE COMMAND (any OCI layout, docker save file or registry image)");
    Ok(0)
}

fn short_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
