//! The state of a machine: parts with names, each some sections.
//!
//! ```text
//!   save     vCPUs and devices stand still ─► vcpu.. clock irqchip platform power .. devices
//!   build    parts by kind, name and slot: each goes back to where it came from
//! ```
//!
//! A state file is a list of sections and knows nothing of their order or owners. Here each part
//! is a section that says whose it is and how many follow, and then those. What a part's sections
//! mean is its owner's affair.
//!
//! Order of saving: vCPUs and devices have stopped before ([`Vm::pause`]), and devices may have
//! raised interrupts while they did; so the interrupt controllers, with the vCPUs' own, are read
//! last.

use std::sync::Arc;

use arch::{
    irqchip::{ClockState, IrqchipError, IrqchipState},
    needs::Needs,
    state::VcpuState,
};
use devices::{
    mmds::Mmds,
    state::{Section, StateError},
    virtio::core::Location,
};
use serde::{Deserialize, Serialize};

use super::{Vm, VmError};

const HEADING: &str = "part";
const PLATFORM: &str = "platform";
/// What is left of a device that was taken by force, named by its slot.
const SEVERED: &str = "severed";
/// Of sections whose bytes are laid out by `arch`. A saved vCPU has a version of its own in them,
/// the interrupt controllers and the clock have only this one.
const PLAIN: u16 = 1;
/// Most parts that are read: vCPUs, devices and the rest.
const PARTS_MAX: usize = 256;

/// What the machine was built with beside its specification; see [`super::build::Plan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// A keyboard controller is shown.
    pub keyboard: bool,
    /// The boot timer's register is there.
    pub boot_timer: bool,
}

/// Whose sections they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Heading {
    kind: String,
    name: String,
    slot: Option<u8>,
    sections: u8,
}

/// A part of a saved machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// What it is: `vcpu`, `clock`, or the kind of a device.
    pub kind: String,
    /// Which one of its kind.
    pub name: String,
    /// Its PCI slot.
    pub slot: Option<u8>,
    /// Its state.
    pub sections: Vec<Section>,
}

impl Part {
    fn new(kind: &str, name: &str, sections: Vec<Section>) -> Part {
        Part { kind: kind.to_owned(), name: name.to_owned(), slot: None, sections }
    }

    /// A part of one section of bytes that say themselves what they are.
    fn plain(kind: &'static str, name: &str, bytes: Vec<u8>) -> Part {
        let section = Section { kind: kind.to_owned(), version: PLAIN, bytes };
        Part::new(kind, name, vec![section])
    }
}

/// Why saved parts cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// A section.
    #[error(transparent)]
    Section(#[from] StateError),
    /// A vCPU.
    #[error("Saved vCPU {index} cannot be used")]
    Vcpu {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: arch::state::StateError,
    },
    /// Interrupt controllers or clock.
    #[error("The saved interrupt controllers or clock cannot be used")]
    Irqchip(#[from] IrqchipError),
    /// Something is not there.
    #[error("The saved machine has no {kind} {name:?}")]
    Missing {
        /// What.
        kind: String,
        /// Which.
        name: String,
    },
    /// Something is there that the specification does not know.
    #[error("The saved machine has {kind} {name:?}, and its specification has not")]
    Unknown {
        /// What.
        kind: String,
        /// Which.
        name: String,
    },
    /// The list of parts is not one.
    #[error("The saved machine's parts are not in order: {0}")]
    Order(String),
}

/// The sections of all parts, for a state file.
pub fn encode(parts: Vec<Part>) -> Vec<Section> {
    let mut sections = Vec::new();
    for part in parts {
        let Part { kind, name, slot, sections: own } = part;
        // A part is what a handful of savers returned.
        let count = u8::try_from(own.len()).unwrap_or(u8::MAX);
        sections.push(Section::new(HEADING, 1, &Heading { kind, name, slot, sections: count }));
        sections.extend(own);
    }
    sections
}

/// The PCI slots of a saved machine's devices.
#[derive(Debug, Clone, Default)]
pub struct Slots(Vec<(String, String, u8)>);

impl Slots {
    /// The slot of a device by its kind and name; nothing where it was in none.
    pub fn of(&self, kind: &str, name: &str) -> Option<u8> {
        let mut slots = self.0.iter();
        slots.find(|(known, named, _)| known == kind && named == name).map(|(.., slot)| *slot)
    }
}

/// The parts of a state file, taken out one by one.
#[derive(Debug, Clone, Default)]
pub struct Saved {
    parts: Vec<Part>,
}

impl Saved {
    /// Takes the sections of a state file apart.
    pub fn decode(sections: Vec<Section>) -> Result<Saved, SavedError> {
        let mut parts: Vec<Part> = Vec::new();
        let mut sections = sections.into_iter();
        while let Some(first) = sections.next() {
            let Heading { kind, name, slot, sections: count } = first.open(HEADING, 1)?;
            let own: Vec<Section> = sections.by_ref().take(count.into()).collect();
            if own.len() != usize::from(count) {
                return Err(SavedError::Order(format!("{kind} {name:?} is cut short")));
            }
            if parts.iter().any(|other| (&other.kind, &other.name) == (&kind, &name)) {
                return Err(SavedError::Order(format!("{kind} {name:?} is there twice")));
            }
            if parts.len() == PARTS_MAX {
                return Err(SavedError::Order(format!("there are more than {PARTS_MAX}")));
            }
            parts.push(Part { kind, name, slot, sections: own });
        }
        Ok(Saved { parts })
    }

    /// Takes a part out.
    pub fn take(&mut self, kind: &str, name: &str) -> Result<Part, SavedError> {
        let at = self.parts.iter().position(|part| part.kind == kind && part.name == name);
        let missing = || SavedError::Missing { kind: kind.to_owned(), name: name.to_owned() };
        Ok(self.parts.swap_remove(at.ok_or_else(missing)?))
    }

    /// Takes a part of one section out.
    pub fn section(&mut self, kind: &str) -> Result<Section, SavedError> {
        let part = self.take(kind, "")?;
        let count = part.sections.len();
        match <[Section; 1]>::try_from(part.sections) {
            Ok([section]) => Ok(section),
            Err(_) => Err(SavedError::Order(format!("{kind} has {count} sections"))),
        }
    }

    /// Takes a part of one section out, if it is there.
    pub fn section_if_there(&mut self, kind: &str) -> Result<Option<Section>, SavedError> {
        if self.parts.iter().any(|part| part.kind == kind) { self.section(kind).map(Some) } else { Ok(None) }
    }

    /// Takes what the machine was built with.
    pub fn platform(&mut self) -> Result<Platform, SavedError> {
        Ok(self.section(PLATFORM)?.open(PLATFORM, 1)?)
    }

    /// Takes `count` vCPUs.
    pub fn vcpus(&mut self, count: u8) -> Result<Vec<VcpuState>, SavedError> {
        let one = |index: usize| {
            let part = self.take("vcpu", &index.to_string())?;
            let bytes = part.sections.first().map(|section| plain("vcpu", section)).transpose()?;
            let bytes = bytes.unwrap_or_default();
            VcpuState::from_bytes(bytes).map_err(|source| SavedError::Vcpu { index, source })
        };
        (0..usize::from(count)).map(one).collect()
    }

    /// Takes the interrupt controllers.
    pub fn irqchip(&mut self) -> Result<IrqchipState, SavedError> {
        Ok(IrqchipState::from_bytes(plain("irqchip", &self.section("irqchip")?)?)?)
    }

    /// Takes the clock.
    pub fn clock(&mut self) -> Result<ClockState, SavedError> {
        Ok(ClockState::from_bytes(plain("clock", &self.section("clock")?)?)?)
    }

    /// Takes all that is left of devices that were taken by force.
    pub fn severed(&mut self) -> Vec<Part> {
        self.parts.extract_if(.., |part| part.kind == SEVERED).collect()
    }

    /// The PCI slots in which devices were.
    pub fn slots(&self) -> Slots {
        let in_slot = |part: &Part| Some((part.kind.clone(), part.name.clone(), part.slot?));
        Slots(self.parts.iter().filter_map(in_slot).collect())
    }

    /// Nothing may be left that nobody took.
    pub fn finish(self) -> Result<(), SavedError> {
        match self.parts.into_iter().next() {
            None => Ok(()),
            Some(Part { kind, name, .. }) => Err(SavedError::Unknown { kind, name }),
        }
    }
}

/// The bytes of a section that `arch` laid out, if it is `kind`.
fn plain<'a>(kind: &'static str, section: &'a Section) -> Result<&'a [u8], StateError> {
    if section.kind != kind {
        return Err(StateError::Kind { expected: kind, found: section.kind.clone() });
    }
    if section.version != PLAIN {
        return Err(StateError::Version { kind, found: section.version, newest: PLAIN });
    }
    Ok(&section.bytes)
}

impl Vm {
    /// The state of the machine, and what it needs of the CPU; only while it is paused.
    pub fn save(&self, mmds: Option<&Arc<Mmds>>) -> Result<(Vec<Section>, Needs), VmError> {
        let mut parts = vec![
            Part::new(PLATFORM, "", vec![Section::new(PLATFORM, 1, &self.platform)]),
            Part::new("power", "", vec![self.power.save()]),
            Part::new("i8042", "", vec![self.i8042.save()]),
            Part::new("annex", "", vec![self.annex.save()]),
        ];
        parts.extend(self.consoles.save().map(|serial| Part::new("serial", "", vec![serial])));
        if let Ok(pci) = self.places.hotplug() {
            parts.push(Part::new("pci", "", vec![pci.save()]));
        }
        if let Some(room) = &self.room {
            parts.push(Part::new("processors", "", vec![room.save()]));
        }
        parts.extend(mmds.map(|mmds| Part::new("mmds", "", vec![mmds.save()])));
        for (name, device) in &self.devices {
            let sections = device.save();
            let sections = sections.map_err(|source| VmError::Device { name: name.clone(), source })?;
            let mut part = Part::new(device.about().kind, name, sections);
            if let Location::Pci { slot } = device.location() {
                part.slot = Some(slot);
            }
            parts.push(part);
        }
        for (slot, left) in &self.severed {
            let name = format!("slot {slot}");
            let sections = left.save().map_err(|source| VmError::Device { name: name.clone(), source })?;
            parts.push(Part { slot: Some(*slot), ..Part::new(SEVERED, &name, sections) });
        }
        let vm = self.host.vm();
        parts.push(Part::plain("clock", "", ClockState::save(vm)?.to_bytes()));
        let vcpus = self.vcpus.save(&self.shape)?;
        for (index, vcpu) in vcpus.iter().enumerate() {
            parts.push(Part::plain("vcpu", &index.to_string(), vcpu.to_bytes()));
        }
        parts.push(Part::plain("irqchip", "", IrqchipState::save(vm)?.to_bytes()));
        Ok((encode(parts), Needs::of(&vcpus, &self.template, None)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> Vec<Part> {
        let section = |kind| Section::new(kind, 1, &7u32);
        let mut disk = Part::new("virtio-block", "root", vec![section("a"), section("b")]);
        disk.slot = Some(3);
        vec![Part::new("power", "", vec![section("power")]), disk, Part::new("none", "x", Vec::new())]
    }

    #[test]
    fn parts_come_back_each_once() {
        let mut saved = Saved::decode(encode(parts())).unwrap();
        assert_eq!(saved.slots().of("virtio-block", "root"), Some(3));
        assert_eq!(saved.take("virtio-block", "root").unwrap(), parts()[1]);
        assert!(matches!(saved.take("virtio-block", "root"), Err(SavedError::Missing { .. })));
        assert_eq!(saved.section("power").unwrap(), parts()[0].sections[0]);
        assert_eq!(saved.section_if_there("serial").unwrap(), None);
        let left = saved.clone().finish().unwrap_err().to_string();
        assert!(left.contains(r#"none "x""#), "{left}");
        saved.take("none", "x").unwrap();
        saved.finish().unwrap();
    }

    #[test]
    fn what_a_newer_build_laid_out_is_refused_with_both_versions() {
        let newer = |(kind, name): (&'static str, &str)| {
            let mut part = Part::plain(kind, name, vec![0; 64]);
            part.sections[0].version += 1;
            part
        };
        let parts = [("clock", ""), ("irqchip", ""), ("vcpu", "0")].map(newer);
        let mut saved = Saved::decode(encode(parts.into())).unwrap();
        let errors = [saved.clock().err(), saved.irqchip().err(), saved.vcpus(1).err()];
        for (kind, error) in ["clock", "irqchip", "vcpu"].iter().zip(errors) {
            let error = error.unwrap().to_string();
            assert!(error.contains(&format!("{kind} has version 2; this build writes version 1")), "{error}");
        }
    }

    #[test]
    fn a_list_that_is_cut_or_says_something_twice_is_refused() {
        let sections = encode(parts());
        for length in 1..sections.len() {
            // Cut between two parts it is a shorter list, and whoever needs the rest says so.
            let _ = Saved::decode(sections[..length].to_vec());
        }
        assert!(matches!(Saved::decode(sections[..3].to_vec()), Err(SavedError::Order(_))));
        let twice = encode([parts(), parts()].concat());
        assert!(Saved::decode(twice).unwrap_err().to_string().contains("twice"));
        assert!(Saved::decode(sections[1..].to_vec()).is_err());
        let many = (0..300).map(|n| Part::new("p", &n.to_string(), Vec::new())).collect();
        assert!(Saved::decode(encode(many)).unwrap_err().to_string().contains("more than"));
        assert!(Saved::default().vcpus(1).is_err());
    }
}
