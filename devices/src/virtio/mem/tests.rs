use std::{
    collections::BTreeSet,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use super::*;
use crate::virtio::driver::{Buffer, Counts, Driver, memory};

const MIB: u64 = 1 << 20;
const START: u64 = 4 << 30;
const CONFIG: MemConfig =
    MemConfig { start: START, total: 512 * MIB, block_size: 2 * MIB, slot_size: 128 * MIB };

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// A hypervisor that only remembers; it can be made to refuse.
#[derive(Default)]
struct Remembered {
    open: Mutex<BTreeSet<u32>>,
    refuses: AtomicBool,
    /// Refuses the slot of this number and later ones, when it refuses.
    from: Mutex<u32>,
}

impl Remembered {
    fn open(&self) -> Vec<u32> {
        self.open.lock().unwrap().iter().copied().collect()
    }

    fn refuse_from(&self, slot: Option<u32>) {
        self.refuses.store(slot.is_some(), Relaxed);
        *self.from.lock().unwrap() = slot.unwrap_or(0);
    }

    fn check(&self, slot: &Slot) -> io::Result<()> {
        assert_eq!(slot.guest_address, START + u64::from(slot.index) * CONFIG.slot_size);
        assert_eq!(slot.len, CONFIG.slot_size);
        let refused = self.refuses.load(Relaxed) && slot.index >= *self.from.lock().unwrap();
        if refused { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }
}

impl Slots for Remembered {
    fn plug(&self, slot: &Slot) -> io::Result<()> {
        self.check(slot)?;
        assert!(self.open.lock().unwrap().insert(slot.index), "plugged twice");
        Ok(())
    }
    fn unplug(&self, slot: &Slot) -> io::Result<()> {
        self.check(slot)?;
        assert!(self.open.lock().unwrap().remove(&slot.index), "unplugged twice");
        Ok(())
    }
}

struct Bed {
    mem: Mem,
    region: Arc<Region>,
    slots: Arc<Remembered>,
    driver: Driver,
}

fn make() -> (Mem, Arc<Region>, Arc<Remembered>) {
    let region = Arc::new(Region::reserve(CONFIG.total, CONFIG.slot_size, Pages::Small).unwrap());
    let slots = Arc::new(Remembered::default());
    (Mem::new(CONFIG, region.clone(), slots.clone()).unwrap(), region, slots)
}

impl Bed {
    /// A driver that keeps the promise, with `mib` requested.
    fn new(mib: u64) -> Bed {
        let mut bed = Bed::with(F_COMMON | F_UNPLUGGED_INACCESSIBLE);
        bed.want(mib);
        bed
    }

    fn with(features: u64) -> Bed {
        let (mut mem, region, slots) = make();
        let mut driver = Driver::for_device(&mem);
        driver.start(&mut mem, features).unwrap();
        Bed { mem, region, slots, driver }
    }

    fn want(&mut self, mib: u64) {
        self.mem.update(&Change::MemoryRequested(mib * MIB)).unwrap();
    }

    /// Sends a request about `blocks` blocks from `mib` on; the answer's type and state.
    fn ask(&mut self, kind: u16, mib: u64, blocks: u16) -> (u16, u16) {
        self.ask_at(kind, START + mib * MIB, blocks)
    }

    fn ask_at(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        let buffers = self.buffers(kind, address, blocks);
        assert_eq!(self.driver.request(0, &buffers), Some(10));
        self.read_answer(buffers[1])
    }

    fn buffers(&mut self, kind: u16, address: u64, blocks: u16) -> [Buffer; 2] {
        let mut request = [0u8; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&blocks.to_le_bytes());
        [self.driver.readable(&request), self.driver.writable(10)]
    }

    fn read_answer(&self, at: Buffer) -> (u16, u16) {
        let bytes = self.driver.peek(at.address, 10);
        (u16::from_le_bytes([bytes[0], bytes[1]]), u16::from_le_bytes([bytes[8], bytes[9]]))
    }

    /// A field of the configuration space, by its offset.
    fn field(&self, offset: u32) -> u64 {
        let mut bytes = [0; 8];
        self.mem.read_config(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn plugged(&self) -> u64 {
        let Report::Memory(report) = self.mem.report() else { panic!("no report") };
        assert_eq!(report.plugged, self.field(40));
        assert_eq!(report.requested, self.field(48));
        report.plugged / MIB
    }

    fn poke(&self, mib: u64, value: u64) {
        // SAFETY: inside the region, which is readable and writable throughout.
        unsafe { self.region.host_address().add((mib * MIB) as usize).cast::<u64>().write_volatile(value) };
    }

    fn peek(&self, mib: u64) -> u64 {
        // SAFETY: as above.
        unsafe { self.region.host_address().add((mib * MIB) as usize).cast::<u64>().read_volatile() }
    }

    fn count(&self, name: &str) -> u64 {
        self.mem.counters().iter().find(|(n, _)| *n == name).unwrap().1
    }
}

#[test]
fn configurations_that_cannot_be_are_refused_with_the_sizes_in_mib() {
    let refused = |change: fn(&mut MemConfig)| {
        let mut config = CONFIG;
        change(&mut config);
        config.check().unwrap_err().to_string()
    };
    assert!(refused(|c| c.block_size = MIB).contains("1 MiB"));
    assert!(refused(|c| c.block_size = 6 * MIB).contains("power of two"));
    assert!(refused(|c| c.block_size = 0).contains("0 MiB"));
    assert!(refused(|c| c.slot_size = 64 * MIB).contains("64 MiB"));
    assert!(refused(|c| c.slot_size = 129 * MIB).contains("multiple"));
    assert!(refused(|c| c.slot_size = 0).contains("128 MiB"));
    assert!(refused(|c| c.total = 0).contains("0 MiB"));
    assert!(refused(|c| c.total = 200 * MIB).contains("200 MiB"));
    assert!(refused(|c| c.total = 128 * MIB * 10_000).contains("10000 slots"));
    assert!(refused(|c| (c.slot_size, c.total) = (1 << 40, 1 << 44)).contains("8388608 blocks"));
    assert!(refused(|c| c.start += MIB).contains("0x100100000"));
    assert!(refused(|c| c.start = 0u64.wrapping_sub(256 * MIB)).contains("too far up"));
    let region = Arc::new(Region::reserve(256 * MIB, 128 * MIB, Pages::Small).unwrap());
    assert!(Mem::new(CONFIG, region, Arc::new(Remembered::default())).is_err());
}

#[test]
fn a_requested_size_is_told_at_once_and_a_wrong_one_never() {
    let mut bed = Bed::new(0);
    let told = bed.driver.signals.counts().config;
    bed.want(6);
    assert_eq!(bed.driver.signals.counts(), Counts { config: told + 1, ..bed.driver.signals.counts() });
    let told = [0, 8, 16, 24, 32, 40, 48].map(|offset| bed.field(offset));
    assert_eq!(told, [2 * MIB, 0, START, 512 * MIB, 128 * MIB, 0, 6 * MIB]);
    for bad in [3 * MIB, 514 * MIB, u64::MAX] {
        assert!(bed.mem.update(&Change::MemoryRequested(bad)).is_err());
    }
    assert!(bed.mem.update(&Change::BalloonTarget(1)).is_err());
    assert_eq!(bed.field(48), 6 * MIB);
}

#[test]
fn what_was_requested_while_the_device_was_stopped_is_told_at_the_next_start() {
    let mut bed = Bed::new(0);
    bed.driver.stop(&mut bed.mem).unwrap();
    let told = bed.driver.signals.counts().config;
    bed.want(4);
    bed.driver.start(&mut bed.mem, F_COMMON).unwrap();
    assert_eq!(bed.driver.signals.counts().config, told + 1);
}

#[test]
fn a_guest_grows_and_shrinks_slot_by_slot() {
    let mut bed = Bed::new(256);
    assert_eq!(bed.ask(STATE, 0, 128), (ACK, UNPLUGGED));
    assert_eq!(bed.ask(PLUG, 0, 64), (ACK, 0));
    assert_eq!(bed.slots.open(), [0]);
    assert_eq!(bed.ask(PLUG, 128, 1), (ACK, 0));
    assert_eq!((bed.slots.open(), bed.plugged()), (vec![0, 1], 130));
    assert_eq!(bed.ask(STATE, 0, 65), (ACK, PLUGGED));
    assert_eq!(bed.ask(STATE, 0, 128), (ACK, MIXED));
    assert_eq!(bed.mem.plugged().runs(), vec![START..START + 130 * MIB]);

    for (mib, value) in [(0, 1), (2, 2), (128, 3)] {
        bed.poke(mib, value);
    }
    bed.want(0);
    assert_eq!(bed.ask(UNPLUG, 0, 1), (ACK, 0));
    assert_eq!((bed.slots.open(), bed.plugged()), (vec![0, 1], 128));
    assert_eq!((bed.peek(0), bed.peek(2)), (0, 2), "a block keeps its bytes until it is unplugged");
    // The rest, over the border of two slots.
    assert_eq!(bed.ask(UNPLUG, 2, 64), (ACK, 0));
    assert_eq!((bed.slots.open(), bed.plugged()), (vec![], 0));
    assert_eq!((bed.peek(2), bed.peek(128)), (0, 0));
    assert_eq!((bed.count("plug_bytes"), bed.count("unplug_bytes")), (130 * MIB, 130 * MIB));
    assert_eq!((bed.count("plug_fails"), bed.count("unplug_fails")), (0, 0));
}

#[test]
fn hostile_requests_are_answered_and_change_nothing() {
    let mut bed = Bed::new(256);
    assert_eq!(bed.ask(PLUG, 4, 2), (ACK, 0));
    let before = (bed.mem.save(), bed.slots.open());
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, blocks) in [
            (START, 0),
            (START + 1, 1),
            (START + MIB, 1),
            (START - 2 * MIB, 2),
            (START + 256 * MIB, 1),
            (START + 254 * MIB, 2),
            (START, u16::MAX),
            (START + 510 * MIB, u16::MAX),
            (0, 1),
            (u64::MAX, 1),
            (u64::MAX - 2 * MIB + 1, u16::MAX),
        ] {
            assert_eq!(bed.ask_at(kind, address, blocks).0, ERROR, "{kind} {address:#x} {blocks}");
        }
    }
    assert_eq!(bed.ask(PLUG, 4, 1).0, ERROR, "it is plugged");
    assert_eq!(bed.ask(PLUG, 2, 2).0, ERROR, "half of it is plugged");
    assert_eq!(bed.ask(UNPLUG, 2, 1).0, ERROR, "it is not plugged");
    assert_eq!(bed.ask(UNPLUG, 6, 2).0, ERROR, "half of it is not plugged");
    assert_eq!(bed.ask(PLUG, 8, 124).0, ACK, "all that was requested but one block");
    assert_eq!(bed.ask(UNPLUG, 8, 124).0, ACK);
    assert_eq!(bed.ask(PLUG, 8, 127).0, ERROR, "beyond the usable part");
    for kind in [4, 5, 0x100, u16::MAX] {
        assert_eq!(bed.ask(kind, 0, 1).0, ERROR);
    }
    bed.want(4);
    assert_eq!(bed.ask(PLUG, 8, 1).0, NACK, "more than is requested now");
    bed.want(256);
    assert_eq!((bed.mem.save(), bed.slots.open()), before);
}

#[test]
fn requests_without_shape_do_nothing() {
    let mut bed = Bed::new(256);
    let [whole, room] = bed.buffers(PLUG, START, 1);
    let short = Buffer { len: 23, ..whole };
    assert_eq!(bed.driver.request(0, &[short, room]), Some(10));
    assert_eq!(bed.read_answer(room).0, ERROR);
    assert_eq!(bed.driver.request(0, &[whole, Buffer { len: 9, ..room }]), Some(0));
    assert_eq!(bed.driver.request(0, &[whole]), Some(0));
    assert_eq!(bed.driver.request(0, &[room]), Some(10));
    assert_eq!((bed.plugged(), bed.slots.open()), (0, vec![]));
    // A request in pieces is one all the same.
    let pieces = [
        Buffer { len: 3, ..whole },
        Buffer::readable(whole.address + 3, 21),
        Buffer { len: 1, ..room },
        Buffer::writable(room.address + 1, 9),
    ];
    assert_eq!(bed.driver.request(0, &pieces), Some(10));
    assert_eq!((bed.read_answer(room).0, bed.plugged()), (ACK, 2));
}

#[test]
fn unplugging_all_ends_with_the_usable_part_that_the_request_needs() {
    let mut bed = Bed::new(512);
    for mib in [0, 6, 130, 510] {
        assert_eq!(bed.ask(PLUG, mib, 1), (ACK, 0));
    }
    assert_eq!(bed.slots.open(), [0, 1, 3]);
    bed.want(2);
    assert_eq!(bed.field(32), 512 * MIB, "the usable part shrank under the driver");
    assert_eq!(bed.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!((bed.plugged(), bed.slots.open(), bed.field(32)), (0, vec![], 128 * MIB));
    assert_eq!(bed.ask(UNPLUG_ALL, 0, 0), (ACK, 0), "there was nothing to do");
    assert_eq!(bed.ask(PLUG, 0, 1), (ACK, 0));
    assert_eq!(bed.count("unplug_bytes"), 8 * MIB);
}

#[test]
fn a_host_that_refuses_makes_the_driver_try_again_and_nothing_changed() {
    let mut bed = Bed::new(512);
    assert_eq!(bed.ask(PLUG, 126, 1), (ACK, 0));
    bed.poke(126, 7);
    let before = bed.mem.save();
    bed.slots.refuse_from(Some(2));
    assert_eq!(bed.ask(PLUG, 128, 128), (BUSY, 0), "slot 1 would do, slot 2 does not");
    assert_eq!((bed.mem.save(), bed.slots.open()), (before, vec![0]));
    assert_eq!((bed.count("plug_fails"), bed.peek(126)), (1, 7));
    bed.slots.refuse_from(None);
    assert_eq!(bed.ask(PLUG, 128, 128), (ACK, 0));
    let before = bed.mem.save();
    bed.slots.refuse_from(Some(1));
    assert_eq!(bed.ask(UNPLUG, 128, 64), (BUSY, 0));
    assert_eq!((bed.mem.save(), bed.slots.open()), (before, vec![0, 1, 2]));
    // All of it goes as far as it goes.
    assert_eq!(bed.ask(UNPLUG_ALL, 0, 0), (BUSY, 0));
    assert_eq!((bed.slots.open(), bed.plugged()), (vec![1, 2], 256));
    bed.slots.refuse_from(None);
    assert_eq!(bed.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!((bed.slots.open(), bed.plugged()), (vec![], 0));
}

#[test]
fn a_driver_that_promises_nothing_is_given_nothing() {
    let mut bed = Bed::with(F_COMMON);
    bed.want(128);
    assert_eq!(bed.ask(PLUG, 0, 1).0, NACK);
    assert_eq!(bed.ask(STATE, 0, 1), (ACK, UNPLUGGED));
    assert_eq!(bed.slots.open(), [] as [u32; 0]);
}

#[test]
fn a_reset_changes_no_block() {
    let mut bed = Bed::new(128);
    assert_eq!(bed.ask(PLUG, 2, 3), (ACK, 0));
    bed.poke(2, 9);
    bed.driver.stop(&mut bed.mem).unwrap();
    bed.mem.reset();
    bed.driver.rings[0].clear();
    bed.driver.start(&mut bed.mem, F_COMMON | F_UNPLUGGED_INACCESSIBLE).unwrap();
    assert_eq!((bed.plugged(), bed.peek(2), bed.slots.open()), (6, 9, vec![0]));
    assert_eq!(bed.ask(STATE, 2, 3), (ACK, PLUGGED));
}

#[test]
fn a_saved_device_goes_on_elsewhere_with_the_same_blocks() {
    let mut bed = Bed::new(384);
    assert_eq!(bed.ask(PLUG, 0, 1), (ACK, 0));
    assert_eq!(bed.ask(PLUG, 300, 10), (ACK, 0));
    bed.driver.stop(&mut bed.mem).unwrap();
    let saved = bed.mem.save();
    let (mut other, region, slots) = make();
    other.restore(&saved).unwrap();
    assert_eq!((slots.open(), other.save()), (vec![0, 2], saved.clone()));
    assert_eq!(other.plugged().runs(), bed.mem.plugged().runs());
    // Restoring less closes what is not in it.
    let nothing = make().0.save();
    other.restore(&nothing).unwrap();
    assert_eq!(slots.open(), [] as [u32; 0]);
    other.restore(&saved).unwrap();
    let features = F_COMMON | F_UNPLUGGED_INACCESSIBLE;
    bed.driver.start(&mut other, features).unwrap();
    let mut bed = Bed { mem: other, region, slots, driver: bed.driver };
    assert_eq!(bed.ask(UNPLUG, 300, 10), (ACK, 0));
    assert_eq!(bed.slots.open(), [0]);
}

#[test]
fn a_request_made_before_a_save_is_announced_after_it() {
    let mut bed = Bed::new(128);
    bed.driver.stop(&mut bed.mem).unwrap();
    bed.mem.update(&Change::MemoryRequested(256 * MIB)).unwrap();
    let mut other = make().0;
    other.restore(&bed.mem.save()).unwrap();
    let told = bed.driver.signals.counts().config;
    bed.driver.start(&mut other, F_COMMON | F_UNPLUGGED_INACCESSIBLE).unwrap();
    assert_eq!(bed.driver.signals.counts().config, told + 1);
}

#[test]
fn a_state_of_another_region_is_refused() {
    let saved = Bed::new(128).mem.save();
    for config in [
        MemConfig { start: START + 2 * MIB, ..CONFIG },
        MemConfig { total: 384 * MIB, ..CONFIG },
        MemConfig { block_size: 4 * MIB, ..CONFIG },
        MemConfig { slot_size: 256 * MIB, ..CONFIG },
    ] {
        let region = Arc::new(Region::reserve(config.total, config.slot_size, Pages::Small).unwrap());
        let mut other = Mem::new(config, region, Arc::new(Remembered::default())).unwrap();
        assert!(other.restore(&saved).is_err(), "{config:x?}");
    }
}

#[test]
fn giving_back_more_than_a_turn_does_is_done_in_turns_and_survives_a_stop() {
    // Three gigabytes, never touched: addresses only.
    let config = MemConfig { total: 3 << 30, ..CONFIG };
    let region = Arc::new(Region::reserve(config.total, config.slot_size, Pages::Small).unwrap());
    let slots = Arc::new(Remembered::default());
    let mem = Mem::new(config, region.clone(), slots.clone()).unwrap();
    let driver = Driver::for_device(&mem);
    let mut bed = Bed { mem, region, slots, driver };
    let features = F_COMMON | F_UNPLUGGED_INACCESSIBLE;
    bed.driver.start(&mut bed.mem, features).unwrap();
    bed.want(3072);
    assert_eq!(bed.ask(PLUG, 0, 1536), (ACK, 0));
    bed.poke(3070, 5);
    for round in 0..20 {
        let buffers = bed.buffers(if round % 2 == 0 { UNPLUG } else { UNPLUG_ALL }, START, 1536);
        let head = bed.driver.send(0, &buffers);
        // Wherever this hits, the request is answered once and done as a whole.
        bed.driver.stop(&mut bed.mem).unwrap();
        bed.driver.start(&mut bed.mem, features).unwrap();
        assert_eq!(bed.driver.wait_used(0).unwrap().head, u32::from(head));
        assert_eq!(bed.read_answer(buffers[1]).0, ACK);
        assert_eq!((bed.plugged(), bed.slots.open(), bed.peek(3070)), (0, vec![], 0));
        assert_eq!(bed.ask(PLUG, 0, 1536), (ACK, 0));
        bed.poke(3070, 5);
    }
}

/// A device that only takes the queue, so that a test can serve it turn by turn.
struct Taker {
    about: About,
    active: Option<Active>,
    back: Vec<Queue>,
}

impl VirtioDevice for Taker {
    fn about(&self) -> &About {
        &self.about
    }
    fn read_config(&self, _offset: u32, _data: &mut [u8]) {}
    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        self.active = Some(active);
        Ok(())
    }
    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        Ok(std::mem::take(&mut self.back))
    }
    fn save(&self) -> Section {
        Section::new(KIND, VERSION, &())
    }
    fn restore(&mut self, _section: &Section) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[test]
fn a_request_cut_off_between_two_turns_is_put_back_and_done_later() {
    let config = MemConfig { total: 3 << 30, ..CONFIG };
    let region = Arc::new(Region::reserve(config.total, config.slot_size, Pages::Small).unwrap());
    let slots = Arc::new(Remembered::default());
    let mem = Mem::new(config, region.clone(), slots.clone()).unwrap();
    let mut taker = Taker { about: mem.about.clone(), active: None, back: Vec::new() };
    let driver = Driver::for_device(&mem);
    let mut bed = Bed { mem, region, slots, driver };
    bed.want(3072);
    // How much is still plugged after the first turn of each: of a range all, of everything
    // what is left of it.
    for (kind, left) in [(UNPLUG, 3072), (UNPLUG_ALL, 2048)] {
        assert!(bed.mem.pool.plug(0..1536).is_ack());
        let buffers = bed.buffers(kind, START, 1536);
        bed.driver.rings[0].add(&buffers);
        let mut serve = |bed: &mut Bed| {
            bed.driver.start(&mut taker, F_COMMON).unwrap();
            let active = taker.active.take().unwrap();
            let queue = active.queues.into_iter().next().unwrap();
            let mut server = Server::new(queue, active.interrupt, Arc::clone(&bed.mem.pool), true);
            let more = server.serve().unwrap();
            taker.back = crate::worker::Handler::drain(Box::new(server));
            let positions = bed.driver.stop(&mut taker).unwrap();
            (more, positions[0].1)
        };
        let before = bed.driver.rings[0].setup();
        let (more, position) = serve(&mut bed);
        assert!(more && position == before, "the request was put back: {position:?}");
        assert_eq!((bed.plugged(), bed.driver.rings[0].take_used()), (left, None));
        // A range begins anew each time it is cut off: it needs a device that is left alone.
        if kind == UNPLUG {
            bed.driver.start(&mut bed.mem, F_COMMON).unwrap();
            assert!(bed.driver.wait_used(0).is_some());
            bed.driver.stop(&mut bed.mem).unwrap();
        } else {
            assert!(serve(&mut bed).0);
            assert!(!serve(&mut bed).0, "three turns are three gigabytes");
        }
        assert_eq!((bed.read_answer(buffers[1]), bed.plugged()), ((ACK, 0), 0));
        assert_eq!(bed.slots.open(), [] as [u32; 0]);
    }
}

#[test]
fn devices_that_are_pointed_at_unplugged_memory_end_nothing() {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
    let region = Arc::new(Region::reserve(CONFIG.total, CONFIG.slot_size, Pages::Small).unwrap());
    let part = region.guest_memory(START, true).unwrap();
    let all = crate::Memory::from_regions(vec![part]).unwrap();
    let pattern = vec![0xaa; 1 << 20];
    for slot in 0..4 {
        all.write_slice(&pattern, GuestAddress(START + slot * 128 * MIB)).unwrap();
    }
    assert!(region.sink_bytes() <= 2 * MIB, "each slot has memory of its own: {}", region.sink_bytes());
    assert_eq!(all.read_obj::<u8>(GuestAddress(START + 200 * MIB)).unwrap(), 0);
    // Rings in there are as good as any.
    let outside = memory(&[(0, 1 << 20)]);
    assert!(outside.find_region(GuestAddress(START)).is_none());
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_new_start_serves_again() {
    let mut bed = Bed::new(128);
    bed.driver.rings[0].offer(0xffff);
    bed.driver.kick(0);
    assert!(bed.driver.signals.wait(|counts| counts.needs_reset == 1));
    bed.driver.stop(&mut bed.mem).unwrap();
    bed.mem.reset();
    bed.driver.rings[0].clear();
    bed.driver.start(&mut bed.mem, F_COMMON | F_UNPLUGGED_INACCESSIBLE).unwrap();
    assert_eq!(bed.ask(PLUG, 0, 1), (ACK, 0));
}
