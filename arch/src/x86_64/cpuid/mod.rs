//! CPUID: what KVM can do, turned into a processor that makes sense.
//!
//! ```text
//!   KVM_GET_SUPPORTED_CPUID --normalise--> Cpuid --(super::template)--> for_vcpu(i) -> CpuId
//!                             once a machine         if asked for          each vCPU
//! ```
//!
//! KVM's table describes the host thread that asked: its cache sharing, its APIC id, its number
//! of cores. [`Cpuid::normalise`] replaces all of that by the machine's own topology (one
//! package, cores, one or two threads a core), takes away what a guest must not see (PMU, nested
//! virtualization, MWAIT, SGX, unless asked) and adds what KVM leaves to the monitor to promise
//! (TSC deadline timer, hypervisor bit, TSC frequency). [`Cpuid::for_vcpu`] then only patches the
//! APIC ids. What stands between the two calls is the place for CPU templates.
//!
//! APIC ids are the vCPU indices: threads of a core are neighbours, and because everything is
//! counted in powers of two an id splits into thread, core and package bits as the manuals want.
//!
//! The brand string is the host's (performance counters, schedulers and people read it; hiding
//! it is a template's job); it is filled in only where a host has none.

#[cfg(test)]
mod tests;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The most vCPUs a machine can have.
pub const MAX_VCPUS: u8 = 64;

/// What the machine wants of its processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuConfig {
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Two threads a core; needs an even number of vCPUs (or one).
    pub smt: bool,
    /// TSC frequency as `KVM_GET_TSC_KHZ` gives it; tells the guest so that it need not measure.
    pub tsc_khz: Option<u32>,
    /// Show performance counters.
    pub pmu: bool,
    /// Show VMX or SVM.
    pub nested: bool,
}

/// Why there is no CPUID for these processors.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CpuidError {
    /// Number of vCPUs out of range.
    #[error("A machine has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u8),
    /// Threads in pairs need an even number.
    #[error("With SMT the number of vCPUs must be 1 or even, not {0}")]
    OddThreads(u8),
    /// A vCPU that the machine does not have.
    #[error("The machine has {vcpus} vCPUs; there is no vCPU {index}")]
    NoSuchVcpu {
        /// The index asked for.
        index: u8,
        /// How many there are.
        vcpus: u8,
    },
    /// KVM takes at most 256 entries.
    #[error("The CPUID table has {0} entries; KVM takes at most 256")]
    TooLong(usize),
    /// A table without leaf 0 or 1.
    #[error("KVM's CPUID table lacks leaf {0:#x}")]
    NoLeaf(u32),
}

/// Whose instruction set, and so whose topology leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel, and all that follow its leaves.
    Intel,
    /// AuthenticAMD and HygonGenuine.
    Amd,
}

/// A machine's CPUID table, the same for every vCPU but for the APIC ids.
#[derive(Clone, Debug)]
pub struct Cpuid {
    entries: Vec<kvm_cpuid_entry2>,
    vendor: Vendor,
    topology: Topology,
}

#[derive(Clone, Copy, Debug)]
struct Topology {
    vcpus: u8,
    threads: u8,
    /// Bits of an APIC id that number the thread in its core.
    thread_bits: u8,
    /// Bits of an APIC id that number the thread in its package.
    package_bits: u8,
}

impl Topology {
    fn new(config: &CpuConfig) -> Result<Self, CpuidError> {
        let vcpus = config.vcpus;
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(CpuidError::Vcpus(vcpus));
        }
        let threads = if config.smt && vcpus > 1 { 2 } else { 1 };
        if !vcpus.is_multiple_of(threads) {
            return Err(CpuidError::OddThreads(vcpus));
        }
        Ok(Self {
            vcpus,
            threads,
            thread_bits: threads - 1,
            package_bits: vcpus.next_power_of_two().trailing_zeros() as u8,
        })
    }

    fn cores(self) -> u8 {
        self.vcpus / self.threads
    }
}

const LEAF1_ECX_MONITOR: u32 = 1 << 3;
const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_PDCM: u32 = 1 << 15;
/// Debug store: its 64-bit area, and its filter by privilege.
const LEAF1_ECX_DEBUG_STORE: u32 = 1 << 2 | 1 << 4;
const LEAF1_EDX_DEBUG_STORE: u32 = 1 << 21;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF7_EBX_SGX: u32 = 1 << 2;
const LEAF7_ECX_SGX_LC: u32 = 1 << 30;
const LEAF7_EDX_ARCH_LBR: u32 = 1 << 19;
/// AMX-BF16, AMX-TILE, AMX-INT8.
const LEAF7_EDX_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
const XCR0_TILE: u32 = 1 << 17 | 1 << 18;
const AMD1_ECX_CMP_LEGACY: u32 = 1 << 1;
const AMD1_ECX_SVM: u32 = 1 << 2;
const AMD1_ECX_TOPOEXT: u32 = 1 << 22;
/// Core, northbridge and last-level-cache performance counters.
const AMD1_ECX_PERF: u32 = 1 << 23 | 1 << 24 | 1 << 28;

const KVM_SIGNATURE: u32 = 0x4000_0000;
/// TSC and APIC bus frequency in kHz, a leaf that VMware began and Linux and FreeBSD read.
const TIMING: u32 = 0x4000_0010;
/// KVM's local APIC counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

impl Cpuid {
    /// Makes the machine's table from KVM's (`KVM_GET_SUPPORTED_CPUID`).
    ///
    /// # Errors
    /// A topology that cannot be, or a table that is no CPUID: see [`CpuidError`].
    pub fn normalise(supported: &CpuId, config: &CpuConfig) -> Result<Self, CpuidError> {
        Self::normalise_with(supported.as_slice(), config, &host_leaf)
    }

    /// [`Cpuid::normalise`] with the host's own CPUID as a function, which is asked only for
    /// AMD's cache leaves, that KVM does not list.
    pub(super) fn normalise_with(
        supported: &[kvm_cpuid_entry2],
        config: &CpuConfig,
        host: &dyn Fn(u32, u32) -> [u32; 4],
    ) -> Result<Self, CpuidError> {
        let mut table =
            Self { entries: supported.to_vec(), vendor: Vendor::Intel, topology: Topology::new(config)? };
        if supported.len() > kvm_bindings::KVM_MAX_CPUID_ENTRIES {
            return Err(CpuidError::TooLong(supported.len()));
        }
        for leaf in [0, 1] {
            table.entry(leaf, 0).ok_or(CpuidError::NoLeaf(leaf))?;
        }
        table.vendor = Self::maker(supported);
        table.set_features(config);
        table.set_topology(host);
        table.set_hypervisor(config);
        table.set_brand();
        // What is not in the table reads as zero, and KVM looks through the table at every
        // CPUID. The leaves whose ids are patched later stay.
        let used = |e: &kvm_cpuid_entry2| (e.eax | e.ebx | e.ecx | e.edx) != 0;
        table.entries.retain(|e| used(e) || matches!(e.function, 0 | 1 | 0x8000_001e));
        if table.entries.len() > kvm_bindings::KVM_MAX_CPUID_ENTRIES {
            return Err(CpuidError::TooLong(table.entries.len()));
        }
        Ok(table)
    }

    /// The processor's maker.
    #[must_use]
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Bits of a guest physical address (leaf 0x80000008), 36 where a table does not say.
    #[must_use]
    pub fn physical_bits(&self) -> u8 {
        physical_bits(&self.entries)
    }

    /// One entry, or `None`.
    #[must_use]
    pub fn entry(&self, leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|e| e.function == leaf && e.index == subleaf)
    }

    /// One entry to change; [`super::template`] is where that is done.
    #[must_use]
    pub fn entry_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.entries.iter_mut().find(|e| e.function == leaf && e.index == subleaf)
    }

    /// Replaces the entry with this leaf and subleaf, or adds it.
    pub fn set_entry(&mut self, entry: kvm_cpuid_entry2) {
        match self.entry_mut(entry.function, entry.index) {
            Some(place) => *place = entry,
            None => self.entries.push(entry),
        }
    }

    /// Puts right again what follows from the machine's vCPUs and not from its processor.
    pub fn restore_topology(&mut self) {
        self.set_topology(&host_leaf);
    }

    /// All entries, in KVM's order.
    #[must_use]
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// The table for `KVM_SET_CPUID2` of vCPU `index`.
    ///
    /// # Errors
    /// [`CpuidError::NoSuchVcpu`], [`CpuidError::TooLong`].
    pub fn for_vcpu(&self, index: u8) -> Result<CpuId, CpuidError> {
        let topology = self.topology;
        if index >= topology.vcpus {
            return Err(CpuidError::NoSuchVcpu { index, vcpus: topology.vcpus });
        }
        let mut table =
            CpuId::from_entries(&self.entries).map_err(|_| CpuidError::TooLong(self.entries.len()))?;
        let id = u32::from(index);
        for e in table.as_mut_slice() {
            match e.function {
                1 => e.ebx = e.ebx & 0x00ff_ffff | id << 24,
                0xb | 0x1f => e.edx = id,
                0x8000_001e if self.vendor == Vendor::Amd => {
                    e.eax = id;
                    e.ebx = e.ebx & !0xff | id >> topology.thread_bits;
                }
                _ => {}
            }
        }
        Ok(table)
    }

    /// Whose leaves a table follows.
    pub(super) fn maker(table: &[kvm_cpuid_entry2]) -> Vendor {
        // "Auth" and "Hygo", the beginnings of the two names that follow AMD's manual.
        match table.iter().find(|e| e.function == 0).map(|e| e.ebx.to_le_bytes()) {
            Some([b'A', b'u', b't', b'h'] | [b'H', b'y', b'g', b'o']) => Vendor::Amd,
            _ => Vendor::Intel,
        }
    }

    /// Sets an entry, adding it if the table has none; `indexed` for leaves with subleaves.
    fn put(&mut self, leaf: u32, subleaf: u32, indexed: bool, [eax, ebx, ecx, edx]: [u32; 4]) {
        let fresh = kvm_cpuid_entry2 {
            function: leaf,
            index: subleaf,
            flags: if indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        self.set_entry(fresh);
    }

    fn remove(&mut self, leaves: &[u32]) {
        self.entries.retain(|e| !leaves.contains(&e.function));
    }

    fn set_features(&mut self, config: &CpuConfig) {
        let tiles = self.entry(0xd, 0).is_some_and(|e| e.eax & XCR0_TILE == XCR0_TILE);
        if let Some(e) = self.entry_mut(1, 0) {
            e.ecx &= !(LEAF1_ECX_MONITOR | LEAF1_ECX_OSXSAVE);
            e.ecx |= LEAF1_ECX_X2APIC | LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR;
            if !config.nested {
                e.ecx &= !LEAF1_ECX_VMX;
            }
            if !config.pmu {
                e.ecx &= !(LEAF1_ECX_PDCM | LEAF1_ECX_DEBUG_STORE);
                e.edx &= !LEAF1_EDX_DEBUG_STORE;
            }
        }
        if let Some(e) = self.entry_mut(7, 0) {
            // No enclave memory is given to the guest.
            e.ebx &= !LEAF7_EBX_SGX;
            e.ecx &= !LEAF7_ECX_SGX_LC;
            // Tiles without their XSAVE state (not granted to this process) would fault.
            if !tiles {
                e.edx &= !LEAF7_EDX_AMX;
            }
            if !config.pmu {
                e.edx &= !LEAF7_EDX_ARCH_LBR;
            }
        }
        if let Some(e) = self.entry_mut(0x8000_0001, 0) {
            if !config.nested {
                e.ecx &= !AMD1_ECX_SVM;
            }
            if !config.pmu {
                e.ecx &= !AMD1_ECX_PERF;
            }
        }
        // MWAIT, SGX; SEV; counters; SVM. A leaf that is missing reads as zero.
        self.remove(&[5, 0x12, 0x8000_001f]);
        if !tiles {
            self.remove(&[0x1d, 0x1e]);
        }
        if !config.pmu {
            self.remove(&[0xa, 0x1c, 0x23, 0x8000_0022]);
        }
        if !config.nested {
            self.remove(&[0x8000_000a]);
        }
    }

    fn set_topology(&mut self, host: &dyn Fn(u32, u32) -> [u32; 4]) {
        self.set_basic_topology();
        match self.vendor {
            Vendor::Intel => self.set_intel_caches(),
            Vendor::Amd => self.set_amd_topology(host),
        }
        self.set_extended_topology();
    }

    fn set_basic_topology(&mut self) {
        let vcpus = self.topology.vcpus;
        if let Some(e) = self.entry_mut(1, 0) {
            e.ebx = e.ebx & 0xff00_ffff | u32::from(vcpus) << 16;
            e.edx &= !LEAF1_EDX_HTT;
            if vcpus > 1 {
                e.edx |= LEAF1_EDX_HTT;
            }
        }
    }

    /// Leaf 4: which vCPUs share a cache, and how many cores the package has.
    fn set_intel_caches(&mut self) {
        let topology = self.topology;
        for e in self.entries.iter_mut().filter(|e| e.function == 4) {
            // Type 0 ends the list.
            if e.eax & 0x1f != 0 {
                e.eax =
                    e.eax & 0x3fff | sharing(topology, e.eax) << 14 | u32::from(topology.cores() - 1) << 26;
            }
        }
    }

    /// Leaves 0x80000008, 0x8000001d and 0x8000001e.
    fn set_amd_topology(&mut self, host: &dyn Fn(u32, u32) -> [u32; 4]) {
        let topology = self.topology;
        let vcpus = u32::from(topology.vcpus);
        if let Some(e) = self.entry_mut(0x8000_0001, 0) {
            e.ecx &= !AMD1_ECX_CMP_LEGACY;
            if vcpus > 1 {
                e.ecx |= AMD1_ECX_CMP_LEGACY;
            }
        }
        if let Some(e) = self.entry_mut(0x8000_0008, 0) {
            e.ecx = e.ecx & !0xf0ff | (vcpus - 1) | u32::from(topology.package_bits) << 12;
        }
        // A core has four caches; eight leave room for what comes.
        let caches: Vec<[u32; 4]> = (0..8)
            .map(|subleaf| match self.entry(0x8000_001d, subleaf) {
                Some(e) => [e.eax, e.ebx, e.ecx, e.edx],
                None => host(0x8000_001d, subleaf),
            })
            .take_while(|leaf| leaf[0] & 0x1f != 0)
            .collect();
        // Linux 6.9 and later prefer 0x80000026; without it they take 0xb, which is right.
        self.remove(&[0x8000_0026, 0x8000_001d, 0x8000_001e]);
        if caches.is_empty() {
            return;
        }
        for (subleaf, [eax, ebx, ecx, edx]) in (0..).zip(caches) {
            let eax = eax & 0x3fff | sharing(topology, eax) << 14;
            self.put(0x8000_001d, subleaf, true, [eax, ebx, ecx, edx]);
        }
        // Both leaves are ours, whether the host (an emulated one) says that it has them or not,
        // and threads of a core exist for Linux only with this flag.
        if let Some(e) = self.entry_mut(0x8000_0001, 0) {
            e.ecx |= AMD1_ECX_TOPOEXT;
        }
        let threads = u32::from(topology.threads - 1) << 8;
        self.put(0x8000_001e, 0, false, [0, threads, 0, 0]);
        self.raise_max(0x8000_0000, 0x8000_001e);
    }

    /// Leaf 0xb, and 0x1f where Intel has it: thread and core level of one package.
    fn set_extended_topology(&mut self) {
        let Topology { vcpus, threads, thread_bits, package_bits } = self.topology;
        let has_1f = self.vendor == Vendor::Intel && self.entry(0, 0).is_some_and(|e| e.eax >= 0x1f);
        self.remove(&[0xb, 0x1f]);
        for leaf in [0xb, 0x1f] {
            if leaf == 0x1f && !has_1f {
                continue;
            }
            let levels = [
                [u32::from(thread_bits), u32::from(threads), 1 << 8, 0],
                [u32::from(package_bits), u32::from(vcpus), 1 | 2 << 8, 0],
                [0, 0, 2, 0],
            ];
            for (level, values) in (0..).zip(levels) {
                self.put(leaf, level, true, values);
            }
        }
        self.raise_max(0, 0xb);
    }

    fn set_hypervisor(&mut self, config: &CpuConfig) {
        let Some(khz) = config.tsc_khz.filter(|&khz| khz > 0) else {
            return;
        };
        if self.entry(KVM_SIGNATURE, 0).is_some() {
            self.put(TIMING, 0, false, [khz, APIC_BUS_KHZ, 0, 0]);
            self.raise_max(KVM_SIGNATURE, TIMING);
        }
    }

    fn set_brand(&mut self) {
        let given = |e: &kvm_cpuid_entry2| e.eax != 0;
        if self.entry(0x8000_0002, 0).is_some_and(given) {
            return;
        }
        let text: &[u8] = match self.vendor {
            Vendor::Intel => b"Intel(R) Xeon(R) Processor",
            Vendor::Amd => b"AMD EPYC",
        };
        let mut brand = [0u8; 48];
        brand[..text.len()].copy_from_slice(text);
        for (leaf, part) in (0x8000_0002..).zip(brand.chunks_exact(16)) {
            let mut words = [0u32; 4];
            for (word, bytes) in words.iter_mut().zip(part.chunks_exact(4)) {
                *word = bytes.iter().rev().fold(0, |w, &b| w << 8 | u32::from(b));
            }
            self.put(leaf, 0, false, words);
        }
        self.raise_max(0x8000_0000, 0x8000_0004);
    }

    /// Makes the range that begins at `base` reach `leaf`.
    fn raise_max(&mut self, base: u32, leaf: u32) {
        if let Some(e) = self.entry_mut(base, 0) {
            e.eax = e.eax.max(leaf);
        } else {
            self.put(base, 0, false, [leaf, 0, 0, 0]);
        }
    }
}

/// Bits of a guest physical address that a table tells (leaf 0x80000008); 36 where it does not.
#[must_use]
pub fn physical_bits(entries: &[kvm_cpuid_entry2]) -> u8 {
    let leaf = entries.iter().find(|e| e.function == 0x8000_0008 && e.index == 0);
    leaf.map_or(36, |e| (e.eax & 0xff) as u8)
}

/// The "ids sharing this cache, less one" field for a cache whose EAX is `eax`: levels 1 and 2
/// belong to a core, all others to the package.
fn sharing(topology: Topology, eax: u32) -> u32 {
    match eax >> 5 & 7 {
        1 | 2 => u32::from(topology.threads) - 1,
        _ => (1 << topology.package_bits) - 1,
    }
}

fn host_leaf(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}
