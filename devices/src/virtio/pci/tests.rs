//! An entropy device in a PCI slot, driven through ECAM and its BAR as a guest drives it.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    host::{Doorbell, Message},
    pci::root::Root,
    virtio::{
        F_COMMON,
        core::status,
        driver::{Bench, Buffer, Driver, Face, PATIENCE, PciFace, memory},
        queue::QueueSetup,
        rng::Rng,
    },
};

const ECAM: u64 = 0xe000_0000;
const SLOT: u8 = 3;
const BAR: u64 = 0xc100_0000;
const MESSAGE: Message = Message { address: 0xfee0_0000, data: 0x41 };

struct Rig {
    bench: Arc<Bench>,
    bus: Arc<Bus>,
    transport: Arc<PciTransport>,
    face: PciFace,
    driver: Driver,
}

fn rig() -> Rig {
    let bench = Bench::new();
    let bus = Arc::new(Bus::new());
    let root = Arc::new(Root::new());
    bus.insert(ECAM, 1 << 20, root.clone()).unwrap();
    let driver = Driver::new(memory(&[(0, 1 << 20)]), &[64]);
    let (memory, worker) = (driver.memory.clone(), Worker::new("pci-test"));
    let device = Box::new(Rng::new());
    let transport = PciTransport::new(device, memory, worker, bench.clone(), &bus, SLOT, Some(BAR)).unwrap();
    root.add(SLOT, transport.clone()).unwrap();
    let face = PciFace::new(bus.clone(), ECAM + (u64::from(SLOT) << 15), bench.clone());
    Rig { bench, bus, transport, face, driver }
}

impl Rig {
    /// Sets the device up with its queue's interrupt on vector 1.
    fn up(&mut self) {
        self.driver.rings[0].clear();
        self.driver.rings[0].accept(F_COMMON);
        self.face.set_status(0);
        self.face.set_status(3);
        self.face.accept(F_COMMON);
        self.face.set_status(0xb);
        self.face.set_queue(0, &self.driver.rings[0].setup());
        assert_eq!(self.face.set_vector(1, MESSAGE.address, MESSAGE.data, Some(0)), 1);
        self.face.set_status(0xf);
        assert_eq!(self.face.status(), 0xf);
    }

    /// One request from the doorbell to the interrupt.
    fn request(&mut self) {
        self.bench.messages();
        let buffer = Buffer::writable(0x8_0000, 100);
        self.driver.rings[0].add(&[buffer]);
        self.face.notify(0);
        assert!(self.bench.wait_message(), "no interrupt came");
        assert_eq!(self.bench.messages(), [MESSAGE]);
        assert_eq!(self.driver.rings[0].take_used().unwrap().len, 100);
    }
}

#[test]
fn the_function_says_what_it_is() {
    let rig = rig();
    assert_eq!(rig.face.get(0, 4), 0x1044_1af4);
    assert_eq!(rig.face.get(8, 4), 0xff00_0001);
    assert_eq!(rig.face.get(0x2c, 4), 0x1044_1af4);
    assert_eq!((rig.face.get(0x0e, 1), rig.face.get(0x3d, 1)), (0, 0), "type 0, no interrupt pin");
    assert_eq!(rig.face.get(0x100, 4), 0, "no extended capabilities");
    assert_eq!(rig.face.common(0x12, 2), 1);
    assert_eq!((rig.face.queue_max(0), rig.face.queue_max(1)), (64, 0));
}

#[test]
fn a_request_goes_from_the_doorbell_to_the_message() {
    let mut rig = rig();
    assert!(rig.bench.doorbells().is_empty());
    rig.up();
    assert_eq!(rig.bench.doorbells(), [(Doorbell::Mmio(BAR + 0x3000), None)]);
    rig.request();
    rig.request();
    // The same without a doorbell, by an ordinary write.
    let buffer = Buffer::writable(0x8_0000, 7);
    rig.driver.rings[0].add(&[buffer]);
    rig.bus.write(BAR + 0x3000, &[0, 0]);
    assert!(rig.bench.wait_message());
}

#[test]
fn without_messages_the_status_bit_tells_a_polling_driver() {
    let mut rig = rig();
    rig.driver.rings[0].accept(F_COMMON);
    rig.face.set_up(F_COMMON, &[rig.driver.rings[0].setup()]);
    rig.driver.rings[0].add(&[Buffer::writable(0x8_0000, 7)]);
    rig.face.notify(0);
    let end = Instant::now() + PATIENCE;
    while rig.face.isr() != 1 {
        assert!(Instant::now() < end, "the bit never came");
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(rig.face.isr(), 0, "reading takes it");
    assert!(rig.bench.messages().is_empty());
}

#[test]
fn a_moved_bar_takes_the_device_and_its_doorbells_along() {
    let mut rig = rig();
    rig.up();
    rig.request();
    // Sizing, as operating systems do it: decode off, all ones, read, put back.
    rig.face.set(4, 2, 0);
    rig.face.set(0x10, 4, 0xffff_ffff);
    assert_eq!(rig.face.get(0x10, 4), 0xffff_8004);
    assert!(rig.bench.doorbells().is_empty());
    let mut data = [0; 4];
    rig.bus.read(BAR, &mut data);
    assert_eq!(data, [0xff; 4], "not decoded");
    rig.face.set(0x10, 4, 0x4000_0000);
    rig.face.set(0x14, 4, 0x10);
    rig.face.set(4, 2, 6);
    rig.face.locate();
    assert_eq!(rig.face.status(), 0xf);
    assert_eq!(rig.bench.doorbells(), [(Doorbell::Mmio(0x10_4000_3000), None)]);
    rig.request();
}

#[test]
fn a_bar_on_top_of_another_device_is_not_decoded_there() {
    let mut rig = rig();
    rig.up();
    rig.face.set(0x10, 4, ECAM & 0xffff_ffff);
    assert_eq!(rig.face.get(0, 4), 0x1044_1af4, "the window over it still answers");
    rig.face.set(0x10, 4, BAR & 0xffff_ffff);
    rig.request();
    assert!(matches!(
        PciTransport::new(
            Box::new(Rng::new()),
            rig.driver.memory.clone(),
            Worker::new("second"),
            rig.bench.clone(),
            &rig.bus,
            4,
            Some(BAR)
        ),
        Err(DeviceError::Host { .. })
    ));
}

#[test]
fn vectors_that_do_not_exist_are_refused_and_those_in_use_stay() {
    let mut rig = rig();
    rig.face.set_common(0x16, 2, 0);
    for vector in [2, 255, 0x800, 0xfffe] {
        rig.face.set_common(0x1a, 2, vector);
        rig.face.set_common(0x10, 2, vector);
        assert_eq!((rig.face.common(0x1a, 2), rig.face.common(0x10, 2)), (0xffff, 0xffff));
    }
    rig.face.set_common(0x16, 2, 77);
    rig.face.set_common(0x1a, 2, 0);
    assert_eq!(rig.face.common(0x1a, 2), 0xffff, "a queue that does not exist has none");
    rig.up();
    rig.face.set_common(0x1a, 2, 0xffff);
    rig.face.set_common(0x18, 2, 2);
    rig.face.set_common(0x1c, 2, 0);
    assert_eq!((rig.face.common(0x1a, 2), rig.face.common(0x18, 2)), (1, 64));
    rig.request();
    rig.face.set_status(0);
    assert_eq!(rig.face.common(0x1a, 2), 0xffff);
}

#[test]
fn an_unassigned_vector_signals_nothing() {
    let mut rig = rig();
    rig.face.set_vector(0, MESSAGE.address, MESSAGE.data, None);
    rig.driver.rings[0].accept(F_COMMON);
    rig.face.set_up(F_COMMON, &[rig.driver.rings[0].setup()]);
    rig.driver.rings[0].add(&[Buffer::writable(0x8_0000, 7)]);
    rig.face.notify(0);
    let end = Instant::now() + PATIENCE;
    while rig.driver.rings[0].take_used().is_none() {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(1));
    }
    assert!(rig.bench.messages().is_empty());
}

#[test]
fn the_bar_is_reachable_through_configuration_space() {
    let rig = rig();
    let mut at = rig.face.get(0x34, 1);
    while rig.face.get(at + 3, 1) != 5 || rig.face.get(at, 1) != 9 {
        at = rig.face.get(at + 1, 1);
    }
    let status = 0x14;
    rig.face.set(at + 8, 4, status);
    rig.face.set(at + 12, 4, 1);
    rig.face.set(at + 16, 1, 3);
    assert_eq!((rig.face.status(), rig.face.get(at + 16, 1)), (3, 3));
    for (bar, offset, length) in [(1, status, 1), (0, 0x8000, 4), (0, 1, 4), (0, status, 3), (0, u64::MAX, 4)]
    {
        rig.face.set(at + 4, 1, bar);
        rig.face.set(at + 8, 4, offset & 0xffff_ffff);
        rig.face.set(at + 12, 4, length);
        rig.face.set(at + 16, length as usize, 0);
        assert_eq!(rig.face.status(), 3, "bar {bar} offset {offset:#x} length {length}");
    }
}

#[test]
fn a_saved_function_goes_on_in_another_machine_where_its_bar_was() {
    let mut rig = rig();
    rig.face.set(0x10, 4, 0xc200_0000);
    rig.face.locate();
    rig.up();
    rig.request();
    rig.transport.pause().unwrap();
    rig.driver.rings[0].add(&[Buffer::writable(0x8_0000, 7)]);
    let saved = rig.transport.save().unwrap();
    // The same guest memory, as a restored machine has it.
    let other = self::rig();
    let bus = Arc::new(Bus::new());
    let (memory, worker) = (rig.driver.memory.clone(), Worker::new("restored"));
    let transport =
        PciTransport::new(Box::new(Rng::new()), memory, worker, other.bench.clone(), &bus, SLOT, Some(BAR));
    let transport = transport.unwrap();
    transport.restore(&saved).unwrap();
    let mut data = [0];
    bus.read(0xc200_0014, &mut data);
    assert_eq!(data, [0xf], "the BAR is where the guest had moved it");
    transport.resume().unwrap();
    assert!(other.bench.wait_message(), "what came while it was away was not seen");
    assert_eq!(other.bench.messages(), [MESSAGE]);
    assert_eq!(other.bench.doorbells(), [(Doorbell::Mmio(0xc200_3000), None)]);
    assert!(transport.restore(&saved).is_err(), "it runs now");
}

#[test]
fn lies_in_a_saved_function_are_refused_or_harmless() {
    let mut rig = rig();
    rig.up();
    rig.transport.pause().unwrap();
    let saved = rig.transport.save().unwrap();
    assert!(self::rig().transport.restore(&saved[..2]).is_err());
    for i in 0..saved[2].bytes.len() {
        let other = self::rig();
        let mut lie = saved.clone();
        lie[2].bytes[i] ^= 0xff;
        if other.transport.restore(&lie).is_ok() {
            other.transport.resume().unwrap();
        }
        // By hand, because the lie may have been about where the BAR is.
        other.transport.write(0x14, &[0]);
        assert_eq!(other.transport.read_common(0x14, 1), Some(0));
    }
}

#[test]
fn an_unplugged_device_leaves_nothing_behind() {
    let mut rig = rig();
    assert!(!rig.transport.driven());
    rig.up();
    assert!(rig.transport.driven());
    for let_go in [0, status::ACKNOWLEDGE] {
        rig.face.set_status(let_go);
        assert!(!rig.transport.driven(), "{let_go}");
    }
    rig.up();
    rig.transport.unplug();
    assert!(rig.bench.doorbells().is_empty());
    rig.transport.save().expect("it runs on, on memory that may be somebody else's soon");
    let mut data = [0];
    rig.bus.read(BAR + 0x14, &mut data);
    assert_eq!(data, [0xff]);
    // What is meant for all devices of a machine may still reach it.
    rig.transport.resume().unwrap();
    assert!(rig.bench.doorbells().is_empty() && !rig.transport.driven());
}

#[test]
fn a_severed_device_answers_and_serves_nothing() {
    let mut rig = rig();
    rig.up();
    rig.request();
    rig.transport.sever();
    assert_eq!(rig.face.status(), 0xf | status::NEEDS_RESET);
    rig.face.set_status(0);
    assert_eq!(rig.face.status(), 0, "a driver that waits for this would wait for ever");
    rig.up();
    rig.driver.rings[0].add(&[Buffer::writable(0x8_0000, 64)]);
    rig.face.notify(0);
    rig.transport.pause().unwrap();
    rig.transport.resume().unwrap();
    assert!(rig.driver.rings[0].take_used().is_none());
    assert!(rig.transport.update(&Change::Backing(None)).unwrap_err().to_string().contains("taken away"));
    rig.transport.unplug();
}

#[test]
fn a_device_that_comes_later_is_placed_by_the_guest() {
    let rig = rig();
    let (memory, root) = (rig.driver.memory.clone(), Arc::new(Root::new()));
    let device = Box::new(Rng::new());
    let worker = Worker::new("late");
    let late = PciTransport::new(device, memory, worker, rig.bench.clone(), &rig.bus, 5, None).unwrap();
    root.add(5, late.clone()).unwrap();
    rig.bus.insert(0xf000_0000, 1 << 20, root).unwrap();
    let at = |offset| 0xf000_0000u64 + (5 << 15) + offset;
    let mut bar = [0; 8];
    rig.bus.read(at(0x10), &mut bar);
    assert_eq!(u64::from_le_bytes(bar), 4, "64 bits wide, at no address");
    rig.bus.write(at(4), &[2, 0]);
    rig.bus.write(at(0x10), &0xd000_0000_u64.to_le_bytes());
    let mut features = [0; 4];
    rig.bus.read(0xd000_0000 + 4, &mut features);
    assert_eq!(u32::from_le_bytes(features), F_COMMON as u32);
    late.unplug();
    rig.bus.read(0xd000_0000 + 4, &mut features);
    assert_eq!(features, [0xff; 4]);
}

#[test]
fn rings_outside_memory_need_a_reset_and_a_reset_heals() {
    let mut rig = rig();
    let good = rig.driver.rings[0].setup();
    for bad in [QueueSetup { desc: BAR, ..good }, QueueSetup { used: ECAM, ..good }] {
        assert_eq!(rig.face.set_up(F_COMMON, &[bad]), 0xf | status::NEEDS_RESET);
        assert_eq!(rig.face.isr(), 2);
    }
    rig.up();
    rig.request();
}
