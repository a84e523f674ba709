//! The emulated machine: QEMU's command line, its process, its end.
//!
//! Nothing of it lies on a disk: initrd and console are anonymous memory files that QEMU opens
//! through `/proc/self/fd`, the port is one end of a socket pair. So even when this program is
//! killed outright nothing is left behind; QEMU itself is tied to it by a parent-death signal
//! and leads a process group of its own, which a terminal's Ctrl-C does not reach.
//!
//! QEMU is **kept on one processor of the host**. Its emulation of SVM changes the word with a
//! processor's pending interrupts without an atomic instruction (`svm_helper.c`: each VMEXIT takes
//! the virtual interrupt out of `interrupt_request`), while the thread that serves devices and
//! timers sets bits in the same word. Run in parallel, one of the two changes is lost now and then:
//! the emulated local APIC then holds an interrupt that its processor never sees, and the machine
//! stands still until another one arrives. Seen with QEMU 7.2: timer vector in the IRR, interrupts
//! enabled, nothing taken for minutes, and a key pressed in QEMU's monitor made it go on. Where
//! threads cannot run at the same time, a change by one instruction is whole. What is lost even so
//! is made good by a [`Kind::Pulse`](super::frame::Kind) four times a second: an interrupt from
//! outside that ends in every processor being woken (see `init/pulse.rs`).

use std::ffi::{CStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use super::cache::Cache;
use super::order::{MODULES_TAG, Order, ROOT_TAG};
use super::{Lab, initrd};

/// What the kernel is told: nothing that makes an emulated start longer.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off tsc=reliable \
    nokaslr no_timer_check nowatchdog audit=0 apparmor=0 random.trust_cpu=on \
    rcupdate.rcu_expedited=1 cryptomgr.notests i8042.noaux 8250.nr_uarts=1 rdinit=/init";
/// How much of a dead machine's console is shown, in lines.
const CONSOLE_LINES: usize = 60;

/// A running emulated machine; dropping it ends it.
pub struct Machine {
    qemu: Child,
    console: File,
    complaints: File,
    /// This side of the port.
    pub port: UnixStream,
}

impl Machine {
    /// Starts the machine that `lab` describes with `order` for its init.
    pub fn start(lab: &Lab, cache: &Cache, order: &Order) -> Result<Self> {
        let order_text = serde_json::to_vec(order)?;
        let mut image = memory_file(c"lab-initrd")?;
        let network = if lab.network { cache.network.as_slice() } else { &[] };
        let rest = [cache.rest.as_slice(), network].concat();
        image.write_all(&initrd::build(&order_text, &cache.first, &rest)?)?;
        let console = memory_file(c"lab-console")?;
        let complaints = memory_file(c"lab-complaints")?;
        let (port, theirs) = UnixStream::pair()?;
        let inherited = [image.as_raw_fd(), console.as_raw_fd(), theirs.as_raw_fd()];
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(machine_arguments(lab))
            .arg("-kernel")
            .arg(&cache.kernel)
            .args(["-append", COMMAND_LINE, "-initrd"])
            .arg(format!("/proc/self/fd/{}", inherited[0]))
            .args(["-serial", &format!("file:/proc/self/fd/{}", inherited[1])])
            .args(["-chardev", &format!("socket,id=lab,fd={}", inherited[2])])
            .args(["-device", "virtio-serial-pci,max_ports=2"])
            .args(["-device", "virtserialport,chardev=lab,name=lab,nr=1"])
            .args(share_arguments(lab, cache, order)?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(complaints.try_clone()?)
            .process_group(0);
        let parent = std::process::id();
        let processor = one_processor(&allowed_processors()?, parent);
        // SAFETY: between fork and exec only async-signal-safe calls are made.
        unsafe {
            command.pre_exec(move || {
                tie_to_parent(parent, &inherited)?;
                keep_on(&processor)
            })
        };
        let qemu = command.spawn().context("Cannot run qemu-system-x86_64")?;
        Ok(Self { qemu, console, complaints, port })
    }

    /// Why the machine is no more: the end of its console and what QEMU had to say.
    pub fn last_words(&mut self) -> String {
        self.end();
        let mut words = text_of(&mut self.complaints);
        let warnings = words.lines().filter(|line| !line.contains("warning: TCG doesn't"));
        words = warnings.collect::<Vec<_>>().join("\n");
        let console = text_of(&mut self.console);
        let lines: Vec<&str> = console.lines().filter(|line| !line.trim().is_empty()).collect();
        for line in &lines[lines.len().saturating_sub(CONSOLE_LINES)..] {
            words.push('\n');
            words.push_str(line);
        }
        words.trim().to_owned()
    }

    fn end(&mut self) {
        // SAFETY: the process has not been waited for, so its id and group are still its own.
        unsafe { libc::kill(-self.qemu.id().cast_signed(), libc::SIGKILL) };
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if matches!(self.qemu.try_wait(), Ok(None)) {
            self.end();
        }
    }
}

fn machine_arguments(lab: &Lab) -> Vec<String> {
    let (accelerator, processors) = if lab.count_instructions {
        // One instruction is two nanoseconds of the machine's clock, and idle time is skipped.
        (["-accel", "tcg,thread=single", "-icount", "shift=1,sleep=off"].as_slice(), 1)
    } else {
        (["-accel", "tcg,thread=multi"].as_slice(), lab.processors)
    };
    let fixed = "-M q35,sata=off,smbus=off,vmport=off -cpu EPYC-Rome,+svm -nodefaults \
        -no-user-config -display none -no-reboot";
    let network = if lab.network { "-netdev user,id=out -device virtio-net-pci,netdev=out" } else { "" };
    fixed
        .split_whitespace()
        .chain(network.split_whitespace())
        .chain(accelerator.iter().copied())
        .map(str::to_owned)
        .chain(["-smp".to_owned(), processors.to_string()])
        .chain(["-m".to_owned(), lab.memory_mib.to_string()])
        .collect()
}

fn share_arguments(lab: &Lab, cache: &Cache, order: &Order) -> Result<Vec<OsString>> {
    let mut arguments =
        vec![share(&lab.root, ROOT_TAG, true)?.into(), share(&cache.modules, MODULES_TAG, true)?.into()];
    for (tag, path) in &order.shares {
        arguments.push(share(Path::new(path), tag, false)?.into());
    }
    Ok(arguments.into_iter().flat_map(|share: OsString| ["-virtfs".into(), share]).collect())
}

fn share(path: &Path, tag: &str, read_only: bool) -> Result<String> {
    let Some(name) = path.to_str() else {
        bail!("The lab can share only directories with UTF-8 names, not {}", path.display());
    };
    if !path.is_dir() {
        bail!("The lab cannot share {name}: it is no directory");
    }
    let read_only = if read_only { ",readonly=on" } else { "" };
    // QEMU's options end at a comma; two commas stand for one.
    let name = name.replace(',', ",,");
    Ok(format!("local,path={name},mount_tag={tag},security_model=none,multidevs=remap{read_only}"))
}

/// Runs in QEMU's process before QEMU does.
fn tie_to_parent(parent: u32, inherited: &[i32]) -> io::Result<()> {
    // SAFETY: system calls with constants, and a signal set on the stack that sigemptyset
    // initialises before it is read.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid().cast_unsigned() != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        for descriptor in inherited {
            libc::fcntl(*descriptor, libc::F_SETFD, 0);
        }
        let mut none = std::mem::MaybeUninit::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
    Ok(())
}

/// The processors of the host that this process may run on.
fn allowed_processors() -> Result<libc::cpu_set_t> {
    // SAFETY: a cpu_set_t is an array of integers, for which zeroes are a value.
    let mut allowed: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most the given size into the set, which outlives the call.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut allowed) } < 0 {
        return Err(io::Error::last_os_error()).context("Cannot ask which processors may be used");
    }
    Ok(allowed)
}

/// One of the `allowed`, another one for another `number`, so that labs that run at the same time
/// share the host.
fn one_processor(allowed: &libc::cpu_set_t, number: u32) -> libc::cpu_set_t {
    // SAFETY: the index is below the number of processors that a set describes.
    let is_allowed = |index: &usize| unsafe { libc::CPU_ISSET(*index, allowed) };
    let indices: Vec<usize> = (0..libc::CPU_SETSIZE.cast_unsigned() as usize).filter(is_allowed).collect();
    // SAFETY: as above, zeroes are an empty set.
    let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if let Some(index) = indices.get(number as usize % indices.len().max(1)) {
        // SAFETY: the index came out of a set of the same size.
        unsafe { libc::CPU_SET(*index, &mut one) };
    }
    one
}

/// Lets the calling process run only on the processors of `set`.
fn keep_on(set: &libc::cpu_set_t) -> io::Result<()> {
    // SAFETY: a system call that reads a set of the given size.
    match unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn memory_file(name: &CStr) -> Result<File> {
    // SAFETY: a NUL-terminated name; the result is checked before it is owned.
    let descriptor = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error()).context("Cannot make a file in memory");
    }
    // SAFETY: the descriptor was just opened for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }.into())
}

fn text_of(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).replace('\r', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_directory_keeps_its_commas() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a,b");
        std::fs::create_dir(&path).unwrap();
        let argument = share(&path, "w0", false).unwrap();
        assert!(argument.contains("a,,b,mount_tag=w0") && !argument.contains("readonly"));
    }

    #[test]
    fn a_file_cannot_be_shared() {
        let error = share(Path::new("/proc/self/exe"), "w0", false).unwrap_err();
        assert!(error.to_string().contains("/proc/self/exe"));
    }

    #[test]
    fn the_machine_gets_one_of_the_processors_it_may_use_and_the_next_machine_another() {
        let allowed = allowed_processors().unwrap();
        // SAFETY: both sets are whole values.
        let count = |set: &libc::cpu_set_t| unsafe { libc::CPU_COUNT(set) };
        let (first, second) = (one_processor(&allowed, 4), one_processor(&allowed, 5));
        assert_eq!((count(&first), count(&second)), (1, 1));
        // SAFETY: as above.
        let same = unsafe { libc::CPU_EQUAL(&first, &second) };
        assert_eq!(same, count(&allowed) == 1);
    }

    #[test]
    fn counting_instructions_takes_one_processor() {
        let lab = Lab { count_instructions: true, processors: 8, ..Lab::default() };
        let arguments = machine_arguments(&lab).join(" ");
        assert!(arguments.contains("-icount") && arguments.contains("-smp 1"), "{arguments}");
    }
}
