//! `bench net`: 64 KiB frames into a tap device, by a polling guest and by a loop of writes
//! on a tap of its own, in turns.
//!
//! The frames are of an Ethernet type that nobody listens for, so in both cases the kernel
//! takes them in as far as every frame goes and drops them.

use std::ffi::c_short;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{
    Arguments,
    machine::{self, Bench, Tap},
    report::{self, Figure, Program, Report, Target},
};

/// Bytes of a frame: the largest a tap takes, nearly.
const FRAME: usize = 65_000;
/// Bytes of the header in front of it.
const HEADER: usize = 12;
const DURATION: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(30);
/// Frames in flight.
const DEPTH: u32 = 100;
/// IEEE 802 local experimental Ethernet type 1.
const TYPE: [u8; 2] = [0x88, 0xb5];

/// Measures and reports.
pub fn run(arguments: &Arguments) -> Result<Report> {
    let bench = Bench::new(arguments)?;
    let tap = Tap::new()?;
    let ticks = machine::ticks_per_second();
    let (mut ours, mut native) = (Vec::new(), Vec::new());
    for _ in 0..arguments.rounds {
        ours.push(guest_sends(&bench, &tap, ticks)?);
        native.push(native_sends(&tap)?);
    }
    let mut report = Report::new("Network: frames of 65000 bytes to the host through a tap", "directly");
    report.figures.push(
        Figure::new("guest to host", "k frames/s", report::median(&ours) / 1e3)
            .beside("write loop", report::median(&native) / 1e3)
            .target(Target::RatioAtLeast(0.8)),
    );
    report.notes.extend(machine::caveat());
    report.programs.push(Program {
        name: "nacelle".to_owned(),
        version: report::version(&bench.nacelle),
        command: vec!["vmm --no-api --show-counters --config-file, one network interface".to_owned()],
    });
    Ok(report)
}

/// Frames a second by the guest.
fn guest_sends(bench: &Bench, tap: &Tap, ticks: f64) -> Result<f64> {
    let cycles = (DURATION.as_secs_f64() * ticks) as u64;
    let work = format!("work=net {} depth={DEPTH} cycles={cycles} bytes={FRAME}", machine::base());
    let card = json!({ "network-interfaces": [{ "iface_id": "card", "host_dev_name": tap.0 }] });
    let counters = bench.counters(&work, &card, LIMIT)?;
    match (counters.get("tx_packets"), counters.get("tx_dropped")) {
        (Some(sent), Some(0.0)) if *sent > 0.0 => Ok(sent / DURATION.as_secs_f64()),
        _ => bail!("The guest's frames did not all arrive: {counters:?}"),
    }
}

/// Frames a second by this program.
fn native_sends(tap: &Tap) -> Result<f64> {
    let mut file = open(&tap.0)?;
    let mut frame = vec![0; HEADER + FRAME];
    frame[HEADER..HEADER + 6].fill(0xff);
    frame[HEADER + 6] = 2;
    frame[HEADER + 12..HEADER + 14].copy_from_slice(&TYPE);
    let (start, mut sent) = (Instant::now(), 0u64);
    while start.elapsed() < DURATION {
        file.write_all(&frame).context("A native write to the tap failed")?;
        sent += 1;
    }
    Ok(sent as f64 / DURATION.as_secs_f64())
}

/// Attaches to the tap called `name`, with the same header that the monitor uses.
fn open(name: &str) -> Result<File> {
    let file =
        File::options().read(true).write(true).open("/dev/net/tun").context("Cannot open /dev/net/tun")?;
    // SAFETY: a structure of numbers, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()).take(libc::IFNAMSIZ - 1) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as c_short;
    let size = HEADER as i32;
    // SAFETY: both calls read what they are given, which lives until they return.
    let refused = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) != 0
            || libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) != 0
    };
    if refused {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("Cannot attach to the tap {name}"));
    }
    Ok(file)
}
