//! Machines that are saved and loaded: started, driven through their API, watched from outside.
//!
//! The guest is the same for all monitors: the small kernel and an init that says `ready` and then
//! does one thing for ever, which its command line chooses:
//!
//! ```text
//!   tick    says "tick" every second          what a restored guest does first
//!   sleep   nothing                           what a clone costs that waits
//!   dirty   writes 16 MiB, says "tick", ...   what a diff is made of
//!   storm   writes 100 MB a second            what a live snapshot has to keep up with
//! ```

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use api::client::Client;
use flate2::{Compression, write::GzEncoder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Arguments,
    inside::{self, Copy, Monitor, PLACE, words},
    process, report,
};
use crate::{host, kernel, lab};

/// How long a monitor may take to serve.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a monitor that has a socket is left alone: it may not listen yet.
const REST: Duration = Duration::from_millis(50);
/// How long a guest may take to start.
const BOOT_LIMIT: Duration = Duration::from_secs(600);

/// So many vCPUs a guest starts at most.
const FEW: u32 = 8;

const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=0 reboot=k panic=-1 tsc=reliable rdinit=/init";
const INIT: &str = "#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t tmpfs tmpfs /tmp
for word in $($B cat /proc/cmdline); do
  case $word in work=*) work=${word#work=};; esac
done
# Not zeros: pages of zeros are holes.
$B yes | $B dd of=/tmp/block bs=1M count=1 iflag=fullblock 2>/dev/null
fill() {
  for part in $($B seq 0 $(($1 - 1))); do
    $B dd if=/tmp/block of=/tmp/blob bs=1M seek=$part conv=notrunc 2>/dev/null
  done
}
echo ready
case $work in
sleep) exec $B sleep 1000000;;
dirty) while :; do fill 16; echo tick; $B sleep 1; done;;
storm) while :; do fill 10; $B usleep 100000; done;;
*) while :; do $B sleep 1; echo tick; done;;
esac
";

/// What is to be measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Files for [`PLACE`].
    pub copies: Vec<Copy>,
    /// Ours first.
    pub monitors: Vec<Monitor>,
    /// How often.
    pub rounds: u32,
}

/// The files of these benchmarks: the first monitor is ours, its peers follow.
pub fn plan(arguments: &Arguments, work: &Path) -> Result<Plan> {
    let place = Path::new(PLACE);
    let nacelle = arguments.nacelle()?;
    let kernel = kernel::built().context("There is no kernel yet; make it with: cargo xtask kernel")?;
    let busybox = host::find_program("busybox").context("There is no busybox")?;
    let initrd = work.join("initrd.gz");
    fs::write(&initrd, initrd_of(&fs::read(&busybox)?)?)?;
    let (peers, programs) = inside::peers(arguments, "--api-sock")?;
    let own = Monitor {
        name: "nacelle".to_owned(),
        version: report::version(&nacelle),
        command: words(&format!("{PLACE}/nacelle vmm --api-sock")),
    };
    let mut copies = vec![
        (kernel.join("vmlinux"), place.join("vmlinux")),
        (initrd, place.join("initrd.gz")),
        (nacelle, place.join("nacelle")),
        (busybox, place.join("busybox")),
    ];
    copies.extend(programs);
    Ok(Plan { copies, monitors: [own].into_iter().chain(peers).collect(), rounds: arguments.rounds })
}

fn initrd_of(busybox: &[u8]) -> Result<Vec<u8>> {
    let mut archive = lab::Archive::new();
    for folder in ["bin", "dev", "proc", "tmp"] {
        archive.directory(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.device("dev/zero", 1, 5);
    archive.device("dev/null", 1, 3);
    archive.file("bin/busybox", busybox);
    archive.file("init", INIT.as_bytes());
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(&archive.finish())?;
    Ok(gzip.finish()?)
}

/// Whether this monitor is ours and has the fields that others have not.
pub fn is_ours(monitor: &Monitor) -> bool {
    monitor.name == "nacelle"
}

/// What a machine is to be.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// MiB of memory.
    pub memory_mib: u32,
    /// What its guest does.
    pub work: &'static str,
    /// Let KVM record what is written.
    pub tracked: bool,
}

/// A process of a monitor, ended with this.
pub struct Machine {
    child: Child,
    /// Its API.
    pub client: Client,
    socket: PathBuf,
    output: BufReader<ChildStdout>,
    ours: bool,
}

impl Machine {
    /// Starts a monitor that has no machine yet.
    pub fn idle(monitor: &Monitor, name: &str) -> Result<Machine> {
        let (program, arguments) = monitor.command.split_first().context("An empty command")?;
        let socket = Path::new(PLACE).join(format!("{name}.sock"));
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(program);
        command
            .args(arguments)
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().with_context(|| format!("Cannot run {program}"))?;
        let output = BufReader::new(child.stdout.take().context("No output")?);
        let client = Client::unix(&socket).patience(BOOT_LIMIT);
        let machine = Machine { child, client, socket, output, ours: is_ours(monitor) };
        let begun = Instant::now();
        while !machine.socket.exists() {
            if begun.elapsed() > LIMIT {
                bail!("It serves no API");
            }
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(REST);
        Ok(machine)
    }

    /// Starts a monitor and a guest in it, up to its `ready`.
    pub fn started(monitor: &Monitor, name: &str, shape: Shape) -> Result<Machine> {
        let mut machine = Machine::idle(monitor, name)?;
        // Sixty-four processors take an emulated host minutes to start; those that wait for their
        // start are threads as the others are.
        let few = if shape.vcpus > FEW { " maxcpus=1" } else { "" };
        let command_line = format!("{COMMAND_LINE} work={}{few}", shape.work);
        for (path, body) in [
            (
                "/machine-config",
                json!({ "vcpu_count": shape.vcpus, "mem_size_mib": shape.memory_mib,
                        "track_dirty_pages": shape.tracked }),
            ),
            (
                "/boot-source",
                json!({ "kernel_image_path": format!("{PLACE}/vmlinux"), "boot_args": command_line,
                        "initrd_path": format!("{PLACE}/initrd.gz") }),
            ),
            ("/actions", json!({ "action_type": "InstanceStart" })),
        ] {
            let _: Value = machine.client.put(path, Some(&body)).with_context(|| format!("PUT {path}"))?;
        }
        machine.line("ready")?;
        Ok(machine)
    }

    /// Waits for a line of the guest that ends with `word`.
    pub fn line(&mut self, word: &str) -> Result<()> {
        let mut line = Vec::new();
        loop {
            line.clear();
            if self.output.read_until(b'\n', &mut line)? == 0 {
                bail!("The guest ended before it said {word:?}");
            }
            if String::from_utf8_lossy(&line).trim_end().ends_with(word) {
                return Ok(());
            }
        }
    }

    /// Stops its vCPUs.
    pub fn pause(&mut self) -> Result<()> {
        self.state("Paused")
    }

    /// Lets them go on.
    pub fn resume(&mut self) -> Result<()> {
        self.state("Resumed")
    }

    fn state(&mut self, state: &str) -> Result<()> {
        let _: Value = self.client.patch("/vm", Some(&json!({ "state": state })))?;
        Ok(())
    }

    /// Writes a snapshot of the paused machine.
    pub fn save(&mut self, to: &Place, diff: bool) -> Result<()> {
        self.save_with(to, json!({ "snapshot_type": if diff { "Diff" } else { "Full" } }))
    }

    /// The same with other fields.
    pub fn save_with(&mut self, to: &Place, fields: Value) -> Result<()> {
        let body = merged(to.create(self.ours), fields);
        let _: Value = self.client.put("/snapshot/create", Some(&body)).context("PUT /snapshot/create")?;
        Ok(())
    }

    /// Loads a snapshot; the machine stands still unless `fields` say otherwise.
    pub fn load(&mut self, from: &Place, fields: Value) -> Result<()> {
        let body = merged(from.load(self.ours), fields);
        let _: Value = self.client.put("/snapshot/load", Some(&body)).context("PUT /snapshot/load")?;
        Ok(())
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Microseconds of processor time that something costs the monitor and its guest.
    pub fn cost(&mut self, what: impl FnOnce(&mut Machine) -> Result<()>) -> Result<f64> {
        let before = process::cpu(self.id())?;
        what(self)?;
        Ok(process::cpu(self.id())? - before)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// Where a snapshot is: ours in a directory, that of others in two files.
#[derive(Debug)]
pub struct Place {
    directory: PathBuf,
}

impl Place {
    /// A place with nothing in it.
    pub fn new(name: &str) -> Result<Place> {
        let directory = Path::new(PLACE).join(name);
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory)?;
        Ok(Place { directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn create(&self, ours: bool) -> Value {
        if ours {
            return json!({ "snapshot_path": self.path("saved") });
        }
        json!({ "snapshot_path": self.path("state"), "mem_file_path": self.path("memory") })
    }

    fn load(&self, ours: bool) -> Value {
        if ours {
            return json!({ "snapshot_path": self.path("saved") });
        }
        let memory = json!({ "backend_type": "File", "backend_path": self.path("memory") });
        json!({ "snapshot_path": self.path("state"), "mem_backend": memory })
    }

    /// Bytes that its files take, holes left out.
    pub fn bytes(&self) -> Result<f64> {
        use std::os::unix::fs::MetadataExt;
        let mut sum = 0;
        for folder in [self.directory.clone(), self.path("saved")] {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let about = entry?.metadata()?;
                sum += if about.is_file() { about.blocks() * 512 } else { 0 };
            }
        }
        Ok(sum as f64)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn merged(mut body: Value, fields: Value) -> Value {
    if let (Some(body), Value::Object(fields)) = (body.as_object_mut(), fields) {
        body.extend(fields);
    }
    body
}

/// Lets machines have more memory than there is: most of it stays untouched.
pub fn allow_overcommit() {
    if std::env::var_os("NACELLE_LAB").is_some() {
        // Where it cannot be allowed, the machine that needs it says so.
        let _ = fs::write("/proc/sys/vm/overcommit_memory", "1");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_a_directory_and_theirs_are_two_files() {
        let place = Place { directory: PathBuf::from("/nowhere/a") };
        assert_eq!(place.create(true), json!({ "snapshot_path": "/nowhere/a/saved" }));
        let theirs = merged(place.load(false), json!({ "resume_vm": true }));
        assert_eq!(theirs["mem_backend"]["backend_path"], "/nowhere/a/memory");
        assert_eq!(theirs["resume_vm"], true);
    }
}
