//! Saved state of devices, each taken by the device it is for, which then goes on.
//!
//! ```text
//!   input: kind, transport, sections' bytes, guest memory
//!     device ─ save ─► sections, bytes replaced ─► restore ─ refused: done
//!                                                     └► saved and restored again: must hold
//!                                                     └► memory written, resumed, notified, paused
//! ```
//!
//! What is left of a machine's parts, besides virtio, is restored alone: serial port, keyboard
//! controller, power registers, PCI slots, processors, metadata, addresses of files.

use std::{cell::RefCell, sync::Arc};

use api::Spec;
use devices::{
    Memory,
    legacy::{i8042::I8042, power::Power, processors::Processors, serial::Serial, wire::Wire},
    mmds::Mmds,
    pci::{hotplug::Hotplug, root::Root},
    state::Section,
    virtio::{driver, queue::QueueSetup},
    worker::Worker,
};
use nacelle::vm::annex::Annex;
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    pieces::{Pieces, piece},
    plugged::{KINDS, Plugged, RAM},
};

const PCI: u8 = 0x80;
/// Parts that are no virtio devices.
const PARTS: u8 = 7;
/// Rings of a seed: each has its own pages.
const RING: u64 = 0x4000;

thread_local! {
    static MEMORY: RefCell<Option<Memory>> = const { RefCell::new(None) };
}

/// Memory of a bench, zero. Mapping it anew each time would be most of the work.
fn memory() -> Memory {
    MEMORY.with_borrow_mut(|memory| {
        let memory = memory.get_or_insert_with(|| driver::memory(&[(0, RAM)]));
        memory.write_slice(&[0; RAM], GuestAddress(0)).expect("RAM");
        memory.clone()
    })
}

/// Takes the input apart, and restores what it is for.
pub fn run(data: &[u8]) {
    let mut pieces = Pieces::of(data);
    let kind = pieces.byte();
    match kind & !PCI {
        virtio if virtio < KINDS => restored(virtio, kind & PCI != 0, pieces),
        part if part < KINDS + PARTS => part_restored(part - KINDS, pieces.rest()),
        _ => {}
    }
}

fn restored(kind: u8, pci: bool, mut pieces: Pieces<'_>) {
    let memory = memory();
    let one = Plugged::new(kind, pci, &memory);
    let mut sections = one.transport.save().expect("a device that does not run is saved");
    for section in &mut sections {
        section.version = u16::from(pieces.byte());
        section.bytes = pieces.piece().to_vec();
    }
    let rest = pieces.rest();
    let _ = memory.write_slice(rest.get(..RAM.min(rest.len())).unwrap_or_default(), GuestAddress(0));
    if one.transport.restore(&sections).is_err() {
        return;
    }
    let again = one.transport.save().expect("a device that was restored can be saved");
    go_on(&one);
    drop(one);
    let other = Plugged::new(kind, pci, &memory);
    other.transport.restore(&again).expect("what was saved after a restore can be restored");
    assert_eq!(other.transport.save().expect("it was not resumed"), again);
}

/// Lets the device run on what is in its rings, and looks at it the ways a driver does.
fn go_on(one: &Plugged) {
    if one.transport.resume().is_ok() {
        for queue in 0..6 {
            one.face.notify(queue);
        }
        let mut config = [0; 64];
        one.face.read_config(0, &mut config);
        one.face.write_config(0, &config[..4]);
        let _ = (one.face.status(), one.face.generation(), one.face.queue_max(1));
    }
    let _ = (one.transport.counters(), one.transport.report(), one.transport.driven());
    if one.transport.pause().is_ok() {
        one.transport.save().expect("a device that stopped can be saved");
    }
    one.face.set_status(0);
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an event descriptor")
}

fn serial() -> Serial {
    Serial::with_wire(
        Wire::from_descriptors(None, None).expect("a wire of nothing"),
        event(),
        Worker::new("fuzz"),
    )
}

fn keyboard() -> I8042 {
    I8042::new(Arc::new(|_| {}), event())
}

fn power() -> Power {
    Power::new(Arc::new(|_| {}), event())
}

fn slots() -> Hotplug {
    Hotplug::new(Arc::new(Root::new()), Arc::new(|_| {}))
}

fn metadata() -> Mmds {
    Mmds::new(51_200).expect("a service")
}

/// A machine with a file and memory that can be plugged in.
fn machine() -> Spec {
    let path = crate::directory::work().join("annex");
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(&path).expect("a file");
    file.set_len(2 << 20).expect("a length");
    let pmem = json!([{ "id": "pmem", "path_on_host": path }]);
    serde_json::from_value(json!({ "pmem": pmem, "boot-source": { "kernel_image_path": "k" } }))
        .expect("a machine")
}

fn part_restored(part: u8, bytes: &[u8]) {
    let named = |kind: &str| Section { kind: kind.to_owned(), version: 1, bytes: bytes.to_vec() };
    match part {
        0 => {
            let serial = serial();
            if serial.restore(&named(&serial.save().kind)).is_ok() {
                serial.restore(&serial.save()).expect("what was restored can be saved");
            }
        }
        1 => {
            let keyboard = keyboard();
            if keyboard.restore(&named(&keyboard.save().kind)).is_ok() {
                keyboard.restore(&keyboard.save()).expect("what was restored can be saved");
                let _ = keyboard.send_ctrl_alt_del();
            }
        }
        2 => {
            let power = power();
            if power.restore(&named(&power.save().kind)).is_ok() {
                power.restore(&power.save()).expect("what was restored can be saved");
            }
        }
        3 => {
            let slots = slots();
            let _ = slots.restore(&named(&slots.save().kind));
        }
        4 => {
            let processors = Processors::new(2);
            if processors.restore(&named(&processors.save().kind)).is_ok() {
                processors.restore(&processors.save()).expect("what was restored can be saved");
            }
        }
        5 => {
            let metadata = metadata();
            if metadata.restore(&named(&metadata.save().kind), &["eth0"]).is_ok() {
                metadata.restore(&metadata.save(), &["eth0"]).expect("what was restored can be saved");
            }
        }
        _ => drop(Annex::open(&machine(), Some(&named("annex")))),
    }
}

/// Each device as its driver set it up, on both transports; each part as it is at first.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for kind in (0..KINDS).flat_map(|kind| [kind, kind | PCI]) {
        let memory = memory();
        let one = Plugged::new(kind & !PCI, kind & PCI != 0, &memory);
        let ring = |index: u16| QueueSetup {
            size: one.face.queue_max(index).min(16),
            desc: RING * u64::from(index),
            avail: RING * u64::from(index) + 0x1000,
            used: RING * u64::from(index) + 0x2000,
            ..QueueSetup::default()
        };
        let rings: Vec<QueueSetup> = (0..one.transport.about().queues.len() as u16).map(ring).collect();
        one.face.set_up(u64::MAX, &rings);
        one.transport.pause().expect("a device that was just set up stops");
        let mut seed = vec![kind];
        for section in one.transport.save().expect("a device that stands still") {
            seed.push(section.version as u8);
            seed.extend(piece(&section.bytes));
        }
        // A chain of two in the first ring: a readable buffer, then a writable one.
        let descriptors = [(0x8000u64, 16u32, 1u16, 1u16), (0x9000, 512, 2, 0)];
        let mut rings = descriptors
            .iter()
            .flat_map(|(address, length, flags, next)| {
                [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                    .concat()
            })
            .collect::<Vec<u8>>();
        rings.resize(0x1000, 0);
        rings.extend([0, 0, 1, 0, 0, 0]);
        seed.extend(rings);
        seeds.push(seed);
    }
    let annex = Annex::open(&machine(), None).map(|annex| annex.save()).expect("addresses of a file");
    let parts = [
        serial().save(),
        keyboard().save(),
        power().save(),
        slots().save(),
        Processors::new(2).save(),
        metadata().save(),
        annex,
    ];
    seeds.extend((KINDS..).zip(parts).map(|(kind, section)| [vec![kind], section.bytes].concat()));
    seeds
}
