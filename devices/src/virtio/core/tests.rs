//! The state machine through the registers of the MMIO transport, with devices that
//! misbehave on purpose.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use super::*;
use crate::{
    bus::Registers,
    host::Doorbell,
    virtio::{
        About, F_COMMON, F_EVENT_IDX, F_VERSION_1,
        driver::{Bench, Driver, Face, MmioFace, PATIENCE},
        mmio::MmioTransport,
        queue::{Queue, QueueSetup},
        rng::Rng,
    },
};

const BASE: u64 = 0xd000_0000;
const GSI: u32 = 5;

/// What a scripted device saw and how it is to behave.
#[derive(Default)]
struct Script {
    starts: AtomicU32,
    stops: AtomicU32,
    resets: AtomicU32,
    refuse_start: AtomicBool,
    refuse_stop: AtomicBool,
    lose_queue: AtomicBool,
    features: Mutex<u64>,
    sizes: Mutex<Vec<u16>>,
    kicked: Mutex<Vec<u64>>,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    /// Runs inside `stop`, on the thread that resets.
    at_stop: Mutex<Option<Box<dyn Fn() + Send>>>,
}

/// A device that does nothing but write down what is done to it.
struct Scripted {
    about: About,
    script: Arc<Script>,
    config: [u8; 6],
    queues: Vec<Queue>,
}

impl Scripted {
    fn new(script: &Arc<Script>) -> Scripted {
        let about = About {
            kind: "scripted",
            device_id: 42,
            pci_class: 0xff_0000,
            features: F_COMMON | 1,
            queues: vec![8, 256],
            config_len: 6,
        };
        Scripted { about, script: Arc::clone(script), config: [1, 2, 3, 4, 5, 6], queues: Vec::new() }
    }
}

impl VirtioDevice for Scripted {
    fn about(&self) -> &About {
        &self.about
    }
    fn read_config(&self, offset: u32, data: &mut [u8]) {
        data.copy_from_slice(&self.config[offset as usize..][..data.len()]);
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.config[offset as usize..][..data.len()].copy_from_slice(data);
    }
    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        self.script.starts.fetch_add(1, Ordering::SeqCst);
        if self.script.refuse_start.load(Ordering::SeqCst) {
            return Err(DeviceError::Driver("scripted".to_owned()));
        }
        *self.script.features.lock().unwrap() = active.features;
        *self.script.interrupt.lock().unwrap() = Some(active.interrupt);
        *self.script.kicked.lock().unwrap() =
            active.queues.iter().map(|(_, kick)| kick.read().unwrap_or(0)).collect();
        *self.script.sizes.lock().unwrap() = active.queues.iter().map(|(queue, _)| queue.size()).collect();
        self.queues = active.queues.into_iter().map(|(queue, _)| queue).collect();
        Ok(())
    }
    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        self.script.stops.fetch_add(1, Ordering::SeqCst);
        if let Some(f) = &*self.script.at_stop.lock().unwrap() {
            f();
        }
        if self.script.refuse_stop.load(Ordering::SeqCst) {
            return Err(DeviceError::Driver("scripted".to_owned()));
        }
        if self.script.lose_queue.load(Ordering::SeqCst) {
            self.queues.pop();
        }
        Ok(mem::take(&mut self.queues))
    }
    fn reset(&mut self) {
        self.script.resets.fetch_add(1, Ordering::SeqCst);
    }
    fn save(&self) -> Section {
        Section::new("scripted", 1, &self.config)
    }
    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        self.config = section.open("scripted", 1)?;
        Ok(())
    }
}

struct Rig {
    script: Arc<Script>,
    bench: Arc<Bench>,
    transport: Arc<MmioTransport>,
    face: MmioFace,
    driver: Driver,
}

impl Rig {
    fn setups(&self) -> Vec<QueueSetup> {
        self.driver.rings.iter().map(|ring| ring.setup()).collect()
    }

    fn up(&self) -> u8 {
        self.face.set_up(u64::MAX, &self.setups())
    }

    fn count(&self, counter: impl Fn(&Script) -> &AtomicU32) -> u32 {
        counter(&self.script).load(Ordering::SeqCst)
    }
}

fn plug(device: Box<dyn VirtioDevice>, driver: &Driver, bench: &Arc<Bench>) -> Arc<MmioTransport> {
    let (memory, worker) = (driver.memory.clone(), Worker::new("core-test"));
    MmioTransport::new(device, memory, worker, bench.clone(), BASE, GSI).unwrap()
}

fn rig() -> Rig {
    let script = Arc::new(Script::default());
    let device = Box::new(Scripted::new(&script));
    let driver = Driver::for_device(&*device);
    let bench = Bench::new();
    let transport = plug(device, &driver, &bench);
    let face = MmioFace::new(transport.clone(), BASE, bench.clone());
    Rig { script, bench, transport, face, driver }
}

#[test]
fn a_driver_that_follows_the_steps_gets_a_running_device() {
    let rig = rig();
    assert_eq!((rig.face.get(0), rig.face.get(4), rig.face.get(8)), (0x7472_6976, 2, 42));
    assert!(rig.bench.doorbells().is_empty(), "a doorbell was made before it was needed");
    assert_eq!(rig.up(), 0xf);
    assert_eq!(*rig.script.features.lock().unwrap(), F_COMMON | 1);
    assert_eq!(*rig.script.sizes.lock().unwrap(), [8, 256]);
    assert_eq!(*rig.script.kicked.lock().unwrap(), [1, 1], "each queue is looked at once");
    let bell = Doorbell::Mmio(BASE + 0x50);
    assert_eq!(rig.bench.doorbells(), [(bell, Some(0)), (bell, Some(1))]);
    rig.face.set_status(0);
    assert!(rig.bench.doorbells().is_empty());
    assert_eq!(rig.face.status(), 0);
    assert!(!rig.face.queue_ready(0));
    assert_eq!((rig.count(|s| &s.stops), rig.count(|s| &s.resets)), (1, 2));
}

#[test]
fn features_are_agreed_on_only_as_a_subset_with_version_1() {
    for (features, agreed) in [
        (F_VERSION_1, true),
        (F_COMMON | 1, true),
        (0, false),
        (F_EVENT_IDX | 1, false),
        (F_VERSION_1 | 2, false),
        (u64::MAX, false),
    ] {
        let rig = rig();
        rig.face.set_status(3);
        rig.face.accept(features);
        rig.face.set_status(0xb);
        assert_eq!(rig.face.status(), if agreed { 0xb } else { 3 }, "{features:#x}");
        if agreed {
            rig.face.accept(1 << 1);
            rig.face.set_status(0xf);
            assert_eq!(*rig.script.features.lock().unwrap(), features, "changed after FEATURES_OK");
        }
    }
}

#[test]
fn queues_can_be_set_up_only_between_features_ok_and_driver_ok() {
    let rig = rig();
    let setup = rig.setups()[0];
    for status in [0, 1, 3] {
        rig.face.set_status(status);
        rig.face.set_queue(0, &setup);
        assert!(!rig.face.queue_ready(0), "at status {status:#x}");
    }
    assert_eq!(rig.up(), 0xf);
    rig.face.set_queue(0, &QueueSetup { size: 4, desc: 0xdead_0000, ..setup });
    rig.face.set(0x44, 0);
    assert!(rig.face.queue_ready(0));
    rig.transport.pause().unwrap();
    rig.transport.resume().unwrap();
    assert_eq!(*rig.script.sizes.lock().unwrap(), [8, 256], "the old values stay in force");
    assert_eq!(rig.face.status(), 0xf);
}

#[test]
fn queues_that_do_not_exist_read_as_absent_and_swallow_writes() {
    let rig = rig();
    rig.face.set_status(3);
    rig.face.accept(F_VERSION_1);
    rig.face.set_status(0xb);
    for index in [2, 3, 0x7fff, 0xffff] {
        assert_eq!(rig.face.queue_max(index), 0);
        rig.face.set_queue(index, &rig.setups()[0]);
        assert!(!rig.face.queue_ready(index));
    }
    rig.face.set(0x30, u32::MAX);
    rig.face.set(0x44, 1);
    rig.face.set_status(0xf);
    for queue in [0, 1, 2, 0xffff, u32::MAX] {
        rig.face.set(0x50, queue);
    }
    assert_eq!(rig.face.status(), 0xf);
}

#[test]
fn rings_that_cannot_be_end_in_needs_reset_and_a_reset_heals() {
    let rig = rig();
    let good = rig.setups()[0];
    let bad = [
        QueueSetup { desc: good.desc + 8, ..good },
        QueueSetup { avail: good.avail + 1, ..good },
        QueueSetup { used: good.used + 2, ..good },
        QueueSetup { desc: (16 << 20) - 16, ..good },
        QueueSetup { used: BASE, ..good },
        QueueSetup { avail: u64::MAX - 1, ..good },
        QueueSetup { used: good.desc, ..good },
        QueueSetup { avail: good.desc + 32, ..good },
    ];
    for setup in bad {
        assert_eq!(rig.face.set_up(u64::MAX, &[setup]), 0x4f, "{setup:x?}");
        assert_eq!(rig.face.get(0x60), ISR_CONFIG);
        assert_eq!(rig.count(|s| &s.starts), 0);
    }
    assert_eq!(rig.up(), 0xf);
    // A size that cannot be is not even taken.
    for size in [0, 3, 16, 32768, 65535] {
        rig.face.set_up(u64::MAX, &[QueueSetup { size, ..good }]);
        assert_eq!(*rig.script.sizes.lock().unwrap(), [8], "size {size}");
    }
}

#[test]
fn a_device_that_refuses_to_start_needs_a_reset() {
    let rig = rig();
    let (sender, told) = mpsc::channel();
    rig.transport.watch(Box::new(move |trouble| sender.send(trouble).unwrap()));
    rig.script.refuse_start.store(true, Ordering::SeqCst);
    assert_eq!(rig.up(), 0x4f);
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [Trouble::NeedsReset], "its owner is told");
    rig.script.refuse_start.store(false, Ordering::SeqCst);
    assert_eq!(rig.up(), 0xf);
    assert_eq!(rig.count(|s| &s.stops), 0, "what never started is not stopped");
}

#[test]
fn a_device_that_does_not_stop_is_never_started_again() {
    let rig = rig();
    assert_eq!(rig.up(), 0xf);
    rig.script.refuse_stop.store(true, Ordering::SeqCst);
    rig.face.set_status(0);
    assert_eq!(rig.face.status(), 0, "a driver waits for this");
    rig.script.refuse_stop.store(false, Ordering::SeqCst);
    assert_eq!(rig.up(), 0x43, "features were agreed on with a dead device");
    assert_eq!(rig.count(|s| &s.starts), 1);
    assert!(rig.transport.save().is_err());
}

#[test]
fn a_device_that_loses_a_queue_is_given_up() {
    let rig = rig();
    assert_eq!(rig.up(), 0xf);
    rig.script.lose_queue.store(true, Ordering::SeqCst);
    assert!(rig.transport.pause().is_err());
    assert!(rig.transport.save().is_err(), "positions that nobody knows were saved");
    assert_eq!(rig.face.status(), 0x4f);
    assert_eq!(rig.up(), 0x43);
    assert_eq!(rig.count(|s| &s.starts), 1);
}

#[test]
fn a_doorbell_that_cannot_be_had_is_replaced_by_ordinary_writes() {
    let bench = Bench::new();
    bench.refuse_doorbells(true);
    let mut driver = Driver::new(crate::virtio::driver::memory(&[(0, 1 << 20)]), &[64]);
    let transport = plug(Box::new(Rng::new()), &driver, &bench);
    let face = MmioFace::new(transport, BASE, bench.clone());
    assert_eq!(face.set_up(u64::MAX, &[driver.rings[0].setup()]), 0xf);
    driver.rings[0].accept(F_COMMON);
    let buffer = driver.writable(32);
    driver.rings[0].add(&[buffer]);
    face.notify(0);
    let end = std::time::Instant::now() + PATIENCE;
    while driver.rings[0].take_used().is_none() {
        assert!(std::time::Instant::now() < end, "the request was never answered");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(bench.raised(GSI) > 0);
    assert_eq!(face.get(0x60), ISR_QUEUE);
    face.set(0x64, ISR_QUEUE);
    assert_eq!(face.get(0x60), 0);
}

#[test]
fn configuration_reads_end_where_it_ends_and_changes_count_up() {
    let rig = rig();
    let mut data = [0; 4];
    rig.face.read_config(0, &mut data);
    assert_eq!(data, [1, 2, 3, 4]);
    rig.face.read_config(4, &mut data);
    assert_eq!(data, [5, 6, 0xff, 0xff]);
    for offset in [6, 7, 0xefc] {
        rig.face.read_config(offset, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
    rig.face.write_config(4, &[9; 4]);
    rig.face.write_config(1, &[8]);
    rig.face.read_config(0, &mut data);
    assert_eq!(data, [1, 8, 3, 4], "a write that runs over the end was taken");
    rig.up();
    let before = rig.face.generation();
    rig.script.interrupt.lock().unwrap().as_ref().unwrap().config();
    assert_eq!(rig.face.generation(), before + 1);
    assert_eq!(rig.face.get(0x60), ISR_CONFIG);
}

#[test]
fn registers_take_aligned_words_only() {
    let rig = rig();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (0x6e, 4), (0xfe, 4)] {
        let mut data = vec![0; len];
        rig.transport.read(offset, &mut data);
        assert!(data.iter().all(|b| *b == 0xff), "{offset:#x}+{len}");
    }
    rig.transport.write(0x70, &[1]);
    rig.transport.write(0x70, &[1, 0, 0, 0, 0, 0, 0, 0]);
    rig.transport.write(0x70, &[1, 1, 0, 0]);
    assert_eq!(rig.face.status(), 0);
    for offset in (0xb0..0xc0).step_by(4) {
        assert_eq!(rig.face.get(offset), u32::MAX, "no shared memory region");
    }
}

#[test]
fn a_saved_device_goes_on_in_another_machine() {
    let rig = rig();
    rig.up();
    rig.face.write_config(0, &[77]);
    rig.script.interrupt.lock().unwrap().as_ref().unwrap().queue(1);
    assert!(rig.transport.save().is_err(), "a running device cannot be saved");
    rig.transport.pause().unwrap();
    rig.transport.pause().unwrap();
    let saved = rig.transport.save().unwrap();
    let other = self::rig();
    other.transport.restore(&saved).unwrap();
    assert_eq!(other.count(|s| &s.starts), 0, "restored is not yet running");
    other.transport.resume().unwrap();
    assert_eq!(other.count(|s| &s.starts), 1);
    assert_eq!(*other.script.kicked.lock().unwrap(), [1, 1]);
    assert_eq!((other.face.status(), other.face.get(0x60)), (0xf, ISR_QUEUE));
    assert_eq!(other.bench.raised(GSI), 1, "the edge may have been lost on its way");
    let mut data = [0];
    other.face.read_config(0, &mut data);
    assert_eq!(data, [77]);
    assert!(other.transport.restore(&saved).is_err(), "a running device cannot be overwritten");
}

#[test]
fn lies_in_a_saved_state_are_refused_by_name() {
    let rig = rig();
    rig.up();
    rig.transport.pause().unwrap();
    let saved = rig.transport.save().unwrap();
    let other = self::rig();
    let mut bytes = saved.clone();
    bytes[0].bytes.truncate(5);
    assert!(other.transport.restore(&bytes).is_err());
    assert!(other.transport.restore(&saved[..1]).is_err());
    assert!(other.transport.restore(&[]).is_err());
    // Any single byte changed: refused or taken, never a panic, and still a device.
    for i in 0..saved[0].bytes.len() {
        for flip in [1, 0x10, 0x80, 0xff] {
            let other = self::rig();
            let mut bytes = saved.clone();
            bytes[0].bytes[i] ^= flip;
            if other.transport.restore(&bytes).is_ok() {
                let _ = other.transport.resume();
            }
            assert!(status::reachable(other.face.status() & !status::NEEDS_RESET));
            assert_eq!(other.up(), 0xf, "byte {i} ^ {flip:#x}");
        }
    }
}

#[test]
fn a_worker_that_signals_while_a_driver_resets_cannot_deadlock() {
    let rig = rig();
    rig.up();
    let interrupt = rig.script.interrupt.lock().unwrap().clone().unwrap();
    let (ask, asked) = mpsc::channel::<mpsc::Sender<()>>();
    // The worker answers only after it has signalled in every way there is, and `stop`, which
    // runs under the transport's lock, waits for that answer.
    let worker = thread::spawn(move || {
        while let Ok(done) = asked.recv() {
            interrupt.queue(0);
            interrupt.config();
            interrupt.needs_reset();
            let _ = done.send(());
        }
    });
    *rig.script.at_stop.lock().unwrap() = Some(Box::new(move || {
        let (done, wait) = mpsc::channel();
        ask.send(done).unwrap();
        wait.recv_timeout(PATIENCE).expect("the worker is stuck behind the transport's lock");
    }));
    for _ in 0..200 {
        rig.face.set_status(0);
        assert_eq!(rig.up(), 0xf);
    }
    *rig.script.at_stop.lock().unwrap() = None;
    worker.join().unwrap();
}

#[test]
fn a_reset_with_requests_in_flight_ends_all_writing_to_memory() {
    let bench = Bench::new();
    let mut driver = Driver::new(crate::virtio::driver::memory(&[(0, 4 << 20)]), &[64]);
    let transport = plug(Box::new(Rng::new()), &driver, &bench);
    let face = MmioFace::new(transport, BASE, bench.clone());
    let buffer = driver.writable(60_000);
    for _ in 0..50 {
        driver.rings[0].clear();
        face.set_up(u64::MAX, &[driver.rings[0].setup()]);
        driver.rings[0].accept(F_COMMON);
        for _ in 0..64 {
            driver.rings[0].add(&[buffer]);
        }
        face.notify(0);
        face.set_status(0);
        assert_eq!(face.status(), 0);
        driver.poke(buffer.address, &vec![0x5a; 60_000]);
        let used = driver.rings[0].device_used_idx();
        thread::sleep(Duration::from_millis(2));
        assert_eq!(driver.peek(buffer.address, 60_000), vec![0x5a; 60_000], "written after the reset");
        assert_eq!(driver.rings[0].device_used_idx(), used);
    }
}

#[test]
fn from_every_rung_every_two_status_bytes_lead_to_a_rung() {
    let rig = rig();
    for rungs in 0..=4 {
        for first in 0..=255 {
            for second in 0..=255 {
                rig.face.set_status(0);
                for rung in [1, 3, 0xb, 0xf].into_iter().take(rungs) {
                    rig.face.accept(F_VERSION_1);
                    rig.face.set_status(rung);
                }
                let before = rig.face.status();
                rig.face.set_status(first);
                rig.face.set_status(second);
                let after = rig.face.status();
                assert!(status::reachable(after), "{before:#x}, {first:#x}, {second:#x}: {after:#x}");
                let running = rig.count(|s| &s.starts) - rig.count(|s| &s.stops);
                assert_eq!(running, u32::from(after & status::DRIVER_OK != 0));
            }
        }
    }
}
