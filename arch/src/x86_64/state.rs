//! One vCPU, saved.
//!
//! A saved vCPU is what KVM can tell about it, as plain bytes: a short header, then sections of
//! tag, length and content. There is nothing in it that belongs to this monitor, so it stays
//! readable when the monitor changes.
//!
//! ```text
//!   "NvCP" | version u16 | 0 u16 | { tag u32 | length u32 | content } ...        little endian
//! ```
//!
//! **Order of saving.** `mp_state` first: reading it makes KVM accept pending INIT and start-up
//! messages, which changes everything else. MSRs before the local APIC: a timer that fires in
//! between is then seen in the APIC's request register, where the other order loses it. Events
//! last, as the others may settle some.
//!
//! **Order of loading.** CPUID first: it decides which bits, registers and modes exist, then the
//! TSC's frequency. Special registers before the local APIC (they hold its mode) and the local
//! APIC before the MSRs (the deadline is ignored unless the timer is in deadline mode). Within
//! the MSRs the TSC comes before the deadline, see [`super::msr`]. Events last, because setting
//! the general registers forgets a pending exception.
//!
//! **Hostile bytes.** Counts and lengths are checked against what KVM could have produced; the
//! contents are KVM's to judge, which does so for any program. The one length KVM does not check
//! is that of the XSAVE area, which it reads from this process's memory: [`VcpuState::load`]
//! always hands it a buffer of the size this host asks for.

use std::sync::OnceLock;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{coredump::Registers, msr};

const MAGIC: [u8; 4] = *b"NvCP";
/// The version this monitor writes, and the only one it reads.
const VERSION: u16 = 1;
/// The part of an XSAVE area that every KVM knows.
const XSAVE_MIN: usize = 4096;
/// More than any processor's (AMX needs 11 KiB).
const XSAVE_MAX: usize = 64 << 10;
/// KVM lists about 150 MSRs.
const MAX_MSRS: usize = 1024;
/// By how many parts in a million the TSCs of two hosts may differ and count as equal: what
/// oscillators of one kind differ by anyway, and what clock discipline corrects.
pub(super) const TSC_TOLERANCE_PPM: u64 = 250;

/// Why a vCPU could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// KVM refused a part.
    #[error("Cannot {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// The bytes are no saved vCPU.
    #[error("The saved vCPU is damaged: {0}")]
    Damaged(String),
    /// Written by a version of the monitor that this one does not know.
    #[error("The saved vCPU has format version {0}; this program reads version {VERSION}")]
    Version(u16),
    /// The guest uses a register that this host does not have.
    #[error("The guest uses MSR {index:#x} (value {value:#x}), which this host cannot set")]
    Msr {
        /// The register.
        index: u32,
        /// Its saved value.
        value: u64,
    },
    /// The guest uses vector or tile registers that this host does not have.
    #[error("The guest's extended registers take {have} bytes; this host has room for {room}")]
    Xsave {
        /// Bytes in use.
        have: usize,
        /// Bytes this host's processors have.
        room: usize,
    },
    /// The TSCs run at different speeds and cannot be matched.
    #[error("The guest's TSC runs at {saved} kHz, this host's at {host} kHz and without scaling")]
    TscFrequency {
        /// Frequency the guest was told.
        saved: u32,
        /// Frequency of this host.
        host: u32,
    },
}

/// What this host's KVM needs to know to save and load vCPUs; made once a machine.
#[derive(Clone, Debug)]
pub struct StateShape {
    /// What KVM lists, and what else is to be saved.
    listed: Vec<u32>,
    /// MSRs to save, in the order of loading; made when a vCPU is saved.
    msrs: OnceLock<Vec<u32>>,
    /// Bytes of an XSAVE area.
    xsave: usize,
    nested: bool,
}

impl StateShape {
    /// Asks KVM. `nested` as in [`super::cpuid::CpuConfig`]. Two ioctls.
    ///
    /// # Errors
    /// [`StateError::Kvm`].
    pub fn new(kvm: &Kvm, vm: &VmFd, nested: bool) -> Result<Self, StateError> {
        let list = kvm.get_msr_index_list().map_err(|e| StateError::Kvm("list the MSRs", e))?;
        let xsave = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            listed: list.as_slice().to_vec(),
            msrs: OnceLock::new(),
            xsave: xsave.clamp(XSAVE_MIN, XSAVE_MAX),
            nested,
        })
    }

    /// The same, with further MSRs: those that a CPU template changed, which KVM need not list.
    #[must_use]
    pub fn with_msrs(mut self, indices: &[u32]) -> Self {
        self.listed.extend(indices);
        self.msrs = OnceLock::new();
        self
    }

    fn msrs(&self) -> &[u32] {
        self.msrs.get_or_init(|| msr::to_save(&self.listed, self.nested))
    }
}

/// A vCPU that does not run.
#[derive(Clone)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    tsc_khz: u32,
    cpuid: Vec<kvm_cpuid_entry2>,
    msrs: Vec<kvm_msr_entry>,
    xsave: Vec<u8>,
    nested: Option<Box<KvmNestedStateBuffer>>,
}

impl VcpuState {
    /// Reads the whole state of a vCPU that is outside `KVM_RUN` (and has completed its last
    /// exit: run it once with `immediate_exit` after an I/O exit).
    ///
    /// # Errors
    /// [`StateError::Kvm`].
    pub fn save(vcpu: &VcpuFd, shape: &StateShape) -> Result<Self, StateError> {
        fn get<T>(what: &'static str, r: Result<T, kvm_ioctls::Error>) -> Result<T, StateError> {
            r.map_err(|e| StateError::Kvm(what, e))
        }
        let mp_state = get("read the vCPU's run state", vcpu.get_mp_state())?;
        let regs = get("read the vCPU's registers", vcpu.get_regs())?;
        let sregs = get("read the vCPU's segment registers", vcpu.get_sregs())?;
        let xsave = get_xsave(vcpu, shape)?;
        let xcrs = get("read the vCPU's XCRs", vcpu.get_xcrs())?;
        let debug = get("read the vCPU's debug registers", vcpu.get_debug_regs())?;
        let cpuid = get("read the vCPU's CPUID", vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
        // A host without a fixed frequency has none to tell.
        let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        let mut msrs = get_msrs(vcpu, shape.msrs())?;
        let lapic = get("read the vCPU's local APIC", vcpu.get_lapic())?;
        keep_expired_timer(&mut msrs, &lapic);
        let nested = if shape.nested {
            let mut buffer = Box::new(KvmNestedStateBuffer::empty());
            get("read the nested state", vcpu.nested_state(&mut buffer))?.map(|_| buffer)
        } else {
            None
        };
        let events = get("read the vCPU's events", vcpu.get_vcpu_events())?;
        Ok(Self {
            mp_state,
            regs,
            sregs,
            xcrs,
            debug,
            lapic,
            events,
            tsc_khz,
            cpuid: cpuid.as_slice().to_vec(),
            msrs,
            xsave,
            nested,
        })
    }

    /// Writes the whole state into a vCPU that has not run.
    ///
    /// # Errors
    /// Every way in which this host differs from the other or the state is not one:
    /// see [`StateError`].
    pub fn load(&self, vcpu: &VcpuFd, shape: &StateShape) -> Result<(), StateError> {
        fn set(what: &'static str, r: Result<(), kvm_ioctls::Error>) -> Result<(), StateError> {
            r.map_err(|e| StateError::Kvm(what, e))
        }
        self.check_nested(shape)?;
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| StateError::Damaged("its CPUID is too long".into()))?;
        set("set the vCPU's CPUID", vcpu.set_cpuid2(&cpuid))?;
        self.load_tsc_khz(vcpu)?;
        set("set the vCPU's run state", vcpu.set_mp_state(self.mp_state))?;
        set("set the vCPU's registers", vcpu.set_regs(&self.regs))?;
        set("set the vCPU's segment registers", vcpu.set_sregs(&self.sregs))?;
        set_xsave(vcpu, shape, &self.xsave)?;
        set("set the vCPU's XCRs", vcpu.set_xcrs(&self.xcrs))?;
        set("set the vCPU's debug registers", vcpu.set_debug_regs(&self.debug))?;
        set("set the vCPU's local APIC", vcpu.set_lapic(&self.lapic))?;
        set_msrs(vcpu, &self.msrs)?;
        if let Some(nested) = &self.nested {
            set("set the nested state", vcpu.set_nested_state(nested))?;
        }
        set("set the vCPU's events", vcpu.set_vcpu_events(&self.events))
    }

    /// The CPUID the guest saw, for comparing with what this host can show.
    #[must_use]
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// The model-specific registers, in the order of loading.
    #[must_use]
    pub fn msrs(&self) -> &[kvm_msr_entry] {
        &self.msrs
    }

    /// What a debugger wants to see.
    #[must_use]
    pub fn registers(&self) -> Registers {
        let kernel_gs_base = self.msrs.iter().find(|m| m.index == msr::KERNEL_GS_BASE).map_or(0, |m| m.data);
        Registers { regs: self.regs, sregs: self.sregs, kernel_gs_base }
    }

    /// TSC frequency in kHz the guest was told, 0 where the host had none to tell.
    #[must_use]
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// A state must not bring nested virtualization to a machine that was made without.
    fn check_nested(&self, shape: &StateShape) -> Result<(), StateError> {
        if self.nested.is_some() && !shape.nested {
            return Err(StateError::Damaged("it has nested virtualization, this machine has not".into()));
        }
        Ok(())
    }

    fn load_tsc_khz(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let saved = self.tsc_khz;
        let Ok(host) = vcpu.get_tsc_khz() else {
            return Ok(());
        };
        let apart = u64::from(saved.abs_diff(host)) * 1_000_000;
        if saved == 0 || apart <= TSC_TOLERANCE_PPM * u64::from(saved) {
            return Ok(());
        }
        vcpu.set_tsc_khz(saved).map_err(|_| StateError::TscFrequency { saved, host })
    }
}

/// Tells a guest that uses kvmclock that it was paused, so that its watchdogs do not take the
/// pause for a hang. Call for each vCPU before it runs again; one ioctl.
///
/// # Errors
/// [`StateError::Kvm`]; a guest without kvmclock is no error.
pub fn announce_pause(vcpu: &VcpuFd) -> Result<(), StateError> {
    match vcpu.kvmclock_ctrl() {
        Err(e) if e.errno() != libc::EINVAL => Err(StateError::Kvm("tell the guest of the pause", e)),
        _ => Ok(()),
    }
}

pub(super) fn get_xsave(vcpu: &VcpuFd, shape: &StateShape) -> Result<Vec<u8>, StateError> {
    let fail = |e| StateError::Kvm("read the vCPU's extended registers", e);
    if shape.xsave <= XSAVE_MIN {
        let xsave = vcpu.get_xsave().map_err(fail)?;
        return Ok(xsave.region.as_bytes().to_vec());
    }
    let mut xsave = new_xsave(shape)?;
    // SAFETY: `shape.xsave` is what KVM_CAP_XSAVE2 answered for this machine, and nothing in
    // this program asks for further dynamic features (arch_prctl) after a machine exists.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(fail)?;
    let mut bytes = xsave.as_fam_struct_ref().xsave.region.as_bytes().to_vec();
    bytes.extend_from_slice(xsave.as_slice().as_bytes());
    Ok(bytes)
}

/// An XSAVE area of the size this host asks for, zero.
fn new_xsave(shape: &StateShape) -> Result<Xsave, StateError> {
    let extra = shape.xsave.saturating_sub(size_of::<kvm_xsave>());
    Xsave::new(extra.div_ceil(4))
        .map_err(|_| StateError::Damaged("no memory for the extended registers".into()))
}

pub(super) fn set_xsave(vcpu: &VcpuFd, shape: &StateShape, saved: &[u8]) -> Result<(), StateError> {
    let room = shape.xsave.max(XSAVE_MIN);
    let used = saved.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    if used > room {
        return Err(StateError::Xsave { have: used, room });
    }
    let mut xsave = new_xsave(shape)?;
    let (region, extra) = saved.split_at(saved.len().min(XSAVE_MIN));
    let copy = |to: &mut [u8], from: &[u8]| {
        let len = to.len().min(from.len());
        to[..len].copy_from_slice(&from[..len]);
    };
    copy(xsave.as_mut_slice().as_mut_bytes(), extra);
    // SAFETY: only the fixed part is written through this reference, not the length.
    let fixed = unsafe { xsave.as_mut_fam_struct() };
    copy(fixed.xsave.region.as_mut_bytes(), region);
    // SAFETY: the buffer has the size KVM_CAP_XSAVE2 answered (or the 4 KiB of older kernels),
    // which is how much KVM reads.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(|e| StateError::Kvm("set the vCPU's extended registers", e))
}

/// Reads what can be read: KVM lists a few registers that a vCPU without the feature lacks.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let wanted: Vec<kvm_msr_entry> = indices.iter().map(|&i| msr::entry(i, 0)).collect();
    let mut rest = wanted.as_slice();
    let mut found = Vec::with_capacity(rest.len());
    while let Some(mut list) = msr::lists(rest).into_iter().next() {
        let asked = list.as_slice().len();
        let got =
            vcpu.get_msrs(&mut list).map_err(|e| StateError::Kvm("read the vCPU's MSRs", e))?.min(asked);
        found.extend_from_slice(&list.as_slice()[..got]);
        // KVM stops at the first it cannot read; that one is left out.
        let done = if got < asked { got + 1 } else { got };
        rest = rest.get(done..).unwrap_or(&[]);
    }
    Ok(found)
}

fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let mut rest = entries;
    while let Some(list) = msr::lists(rest).into_iter().next() {
        let asked = list.as_slice().len();
        let set = vcpu.set_msrs(&list).map_err(|e| StateError::Kvm("set the vCPU's MSRs", e))?.min(asked);
        let mut done = set;
        if let Some(refused) = list.as_slice().get(set) {
            // A zero in a register that is not there is no loss.
            if refused.data != 0 {
                return Err(StateError::Msr { index: refused.index, value: refused.data });
            }
            done += 1;
        }
        rest = rest.get(done..).unwrap_or(&[]);
    }
    Ok(())
}

/// A deadline timer that has just fired reads as 0 before its interrupt is anywhere to be seen.
/// Setting the deadline to "now" makes it fire once more after loading: at worst one tick too
/// many, where the alternative is a guest that never wakes.
fn keep_expired_timer(msrs: &mut [kvm_msr_entry], lapic: &kvm_lapic_state) {
    const LVT_TIMER: usize = 0x320;
    const MASKED: u32 = 1 << 16;
    const MODE: u32 = 3 << 17;
    const DEADLINE_MODE: u32 = 2 << 17;
    let timer = lapic
        .regs
        .get(LVT_TIMER..LVT_TIMER + 4)
        .map_or(0, |r| r.iter().rev().fold(0, |v, &b| v << 8 | u32::from(b as u8)));
    let now = msrs.iter().find(|m| m.index == msr::IA32_TSC).map(|m| m.data);
    let deadline = msrs.iter_mut().find(|m| m.index == msr::IA32_TSC_DEADLINE);
    if let (Some(now), Some(deadline)) = (now, deadline)
        && timer & MODE == DEADLINE_MODE
        && timer & MASKED == 0
        && deadline.data == 0
    {
        deadline.data = now;
    }
}

/// Names of the sections in a saved vCPU. Numbers are never used again for something else.
mod tag {
    pub const MP_STATE: u32 = 1;
    pub const REGS: u32 = 2;
    pub const SREGS: u32 = 3;
    pub const XCRS: u32 = 4;
    pub const DEBUG: u32 = 5;
    pub const LAPIC: u32 = 6;
    pub const EVENTS: u32 = 7;
    pub const TSC_KHZ: u32 = 8;
    pub const CPUID: u32 = 9;
    pub const MSRS: u32 = 10;
    pub const XSAVE: u32 = 11;
    pub const NESTED: u32 = 12;
}

impl VcpuState {
    /// The state as bytes (about 10 KiB).
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 << 10);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0, 0]);
        let mut put = |tag: u32, content: &[u8]| {
            out.extend_from_slice(&tag.to_le_bytes());
            out.extend_from_slice(&(content.len() as u32).to_le_bytes());
            out.extend_from_slice(content);
        };
        put(tag::MP_STATE, self.mp_state.as_bytes());
        put(tag::REGS, self.regs.as_bytes());
        put(tag::SREGS, self.sregs.as_bytes());
        put(tag::XCRS, self.xcrs.as_bytes());
        put(tag::DEBUG, self.debug.as_bytes());
        put(tag::LAPIC, self.lapic.as_bytes());
        put(tag::EVENTS, self.events.as_bytes());
        put(tag::TSC_KHZ, &self.tsc_khz.to_le_bytes());
        put(tag::CPUID, self.cpuid.as_bytes());
        put(tag::MSRS, self.msrs.as_bytes());
        put(tag::XSAVE, &self.xsave);
        if let Some(nested) = &self.nested {
            put(tag::NESTED, nested.as_bytes());
        }
        out
    }

    /// The state from [`VcpuState::to_bytes`].
    ///
    /// # Errors
    /// [`StateError::Damaged`] with the section and what is wrong with it,
    /// [`StateError::Version`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let sections = sections(bytes)?;
        let find = |tag: u32| sections.iter().find(|s| s.0 == tag).map(|s| s.1);
        let need =
            |tag: u32| find(tag).ok_or_else(|| StateError::Damaged(format!("section {tag} is missing")));
        let nested = match find(tag::NESTED) {
            Some(content) => Some(Box::new(one(tag::NESTED, content)?)),
            None => None,
        };
        let state = Self {
            mp_state: one(tag::MP_STATE, need(tag::MP_STATE)?)?,
            regs: one(tag::REGS, need(tag::REGS)?)?,
            sregs: one(tag::SREGS, need(tag::SREGS)?)?,
            xcrs: one(tag::XCRS, need(tag::XCRS)?)?,
            debug: one(tag::DEBUG, need(tag::DEBUG)?)?,
            lapic: one(tag::LAPIC, need(tag::LAPIC)?)?,
            events: one(tag::EVENTS, need(tag::EVENTS)?)?,
            tsc_khz: one(tag::TSC_KHZ, need(tag::TSC_KHZ)?)?,
            cpuid: many(tag::CPUID, need(tag::CPUID)?, KVM_MAX_CPUID_ENTRIES)?,
            msrs: many(tag::MSRS, need(tag::MSRS)?, MAX_MSRS)?,
            xsave: many(tag::XSAVE, need(tag::XSAVE)?, XSAVE_MAX)?,
            nested,
        };
        if state.xcrs.nr_xcrs as usize > state.xcrs.xcrs.len() {
            let count = state.xcrs.nr_xcrs;
            return Err(StateError::Damaged(format!("it has {count} XCRs")));
        }
        if state.xsave.len() < XSAVE_MIN {
            let len = state.xsave.len();
            return Err(StateError::Damaged(format!(
                "its XSAVE area has {len} bytes, at least {XSAVE_MIN} are needed"
            )));
        }
        Ok(state)
    }
}

/// Splits the bytes into sections. Each tag at most once, so there are at most as many as tags.
fn sections(bytes: &[u8]) -> Result<Vec<(u32, &[u8])>, StateError> {
    let damaged = |why: &str| StateError::Damaged(why.to_owned());
    let (head, mut rest) = bytes.split_at_checked(8).ok_or_else(|| damaged("it is cut short"))?;
    if head[..4] != MAGIC {
        return Err(damaged("it does not begin as one"));
    }
    let version = u16::from_le_bytes([head[4], head[5]]);
    if version != VERSION {
        return Err(StateError::Version(version));
    }
    let mut found: Vec<(u32, &[u8])> = Vec::new();
    while !rest.is_empty() {
        let cut = || damaged("it is cut short");
        let (tag, after) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        let (len, after) = after.split_first_chunk::<4>().ok_or_else(cut)?;
        let len = u32::from_le_bytes(*len) as usize;
        let (content, after) = after.split_at_checked(len).ok_or_else(cut)?;
        let tag = u32::from_le_bytes(*tag);
        if !(tag::MP_STATE..=tag::NESTED).contains(&tag) || found.iter().any(|s| s.0 == tag) {
            return Err(StateError::Damaged(format!("section {tag} is unknown or there twice")));
        }
        found.push((tag, content));
        rest = after;
    }
    Ok(found)
}

fn one<T: FromBytes>(tag: u32, content: &[u8]) -> Result<T, StateError> {
    T::read_from_bytes(content).map_err(|_| wrong_length(tag, content))
}

fn many<T: FromBytes + IntoBytes + Immutable + Clone>(
    tag: u32,
    content: &[u8],
    most: usize,
) -> Result<Vec<T>, StateError> {
    let one = size_of::<T>().max(1);
    let count = content.len() / one;
    if !content.len().is_multiple_of(one) || count > most {
        return Err(wrong_length(tag, content));
    }
    let mut all = vec![T::new_zeroed(); count];
    all.as_mut_slice().as_mut_bytes().copy_from_slice(content);
    Ok(all)
}

fn wrong_length(tag: u32, content: &[u8]) -> StateError {
    StateError::Damaged(format!("section {tag} has {} bytes", content.len()))
}

#[cfg(test)]
mod tests;
