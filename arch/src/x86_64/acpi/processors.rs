//! Processors that can come while the guest runs, in AML.
//!
//! ```text
//!   \_SB.CPUS         (ACPI0010, a container of processors)
//!     PRES, INSR      a bit a processor: present; come since it was last asked
//!     C000 .. C0nn    (ACPI0007) _UID, _MAT, _STA = its bit of PRES
//!     SCAN            reads INSR, notifies those whose bits are set: "look again"
//! ```
//!
//! All processors that the machine has room for are described; those that are not present
//! answer `_STA` with 0. In the MADT they stand as "not enabled, online capable" (ACPI 6.5
//! section 5.2.12.2), so that the guest makes room for them at its start. `_MAT` (section
//! 6.2.11) says of every processor what the MADT says of one that is present, because a guest
//! asks it only of those.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, BufferData, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Method, Name, Notify, OpRegion, OpRegionSpace, Path, Return, Store, ZERO,
};

use super::{
    Processors,
    dsdt::{Done, numbered},
};

/// What [`super::event::PROCESSORS`] calls.
pub(super) const SCAN: &str = "\\_SB_.CPUS.SCAN";

/// Bits of a byte of the registers.
const BYTE: usize = 8;
/// "Device check": the device has come, or look whether it is still there.
const DEVICE_CHECK: u8 = 1;
/// `_STA` of a processor: present, enabled, shown, working.
const WORKING: u8 = 0xf;

/// Appends the container.
pub(super) fn container(out: &mut Vec<u8>, processors: Processors) {
    let count = usize::from(processors.max);
    let mut parts = Vec::new();
    let hid = Name::new("_HID".into(), &"ACPI0010");
    let uid = Name::new("_UID".into(), &ZERO);
    // One bit each of the first register, whole bytes of the second: reading takes its bits.
    let present = (0..count).map(|index| FieldEntry::Named(name(b'Q', index), 1)).collect();
    registers(&mut parts, "PRES", processors.present, present);
    let inserted = (0..count.div_ceil(BYTE)).map(|byte| FieldEntry::Named(name(b'I', byte), BYTE)).collect();
    registers(&mut parts, "INSR", processors.inserted, inserted);
    (0..count).for_each(|index| processor(&mut parts, index));
    scan(&mut parts, count);
    let parts = Done(&parts);
    Device::new("CPUS".into(), vec![&hid, &uid, &parts]).to_aml_bytes(out);
}

fn registers(out: &mut Vec<u8>, region: &str, port: u16, fields: Vec<FieldEntry>) {
    OpRegion::new(region.into(), OpRegionSpace::SystemIO, &port, &8u8).to_aml_bytes(out);
    let (access, update) = (FieldAccessType::Byte, FieldUpdateRule::WriteAsZeroes);
    Field::new(region.into(), access, FieldLockRule::NoLock, update, fields).to_aml_bytes(out);
}

fn processor(out: &mut Vec<u8>, index: usize) {
    let id = index as u8;
    let hid = Name::new("_HID".into(), &"ACPI0007");
    let uid = Name::new("_UID".into(), &id);
    let entry = BufferData::new(super::local_apic(id, super::ENABLED).to_vec());
    let mat = Name::new("_MAT".into(), &entry);
    let present = path(b'Q', index);
    let (working, absent) = (Return::new(&WORKING), Return::new(&ZERO));
    let answer = If::new(&present, vec![&working]);
    let sta = Method::new("_STA".into(), 0, false, vec![&answer, &absent]);
    Device::new(numbered('C', index), vec![&hid, &uid, &mat, &sta]).to_aml_bytes(out);
}

fn scan(out: &mut Vec<u8>, count: usize) {
    let mut body = Vec::new();
    let pending = Local(0);
    for index in 0..count {
        if index % BYTE == 0 {
            Store::new(&pending, &path(b'I', index / BYTE)).to_aml_bytes(&mut body);
        }
        let (bit, target) = (1u8 << (index % BYTE), numbered('C', index));
        let is_set = And::new(&ZERO, &pending, &bit);
        let notify = Notify::new(&target, &DEVICE_CHECK);
        If::new(&is_set, vec![&notify]).to_aml_bytes(&mut body);
    }
    let body = Done(&body);
    Method::new("SCAN".into(), 0, true, vec![&body]).to_aml_bytes(out);
}

fn name(letter: u8, index: usize) -> [u8; 4] {
    let digit = |shift: usize| b"0123456789ABCDEF"[index >> shift & 15];
    [letter, digit(8), digit(4), digit(0)]
}

fn path(letter: u8, index: usize) -> Path {
    numbered(char::from(letter), index)
}
