//! State files, memory indexes and working sets, from bytes alone.

use arch::{
    irqchip::{ClockState, IrqchipState},
    state::VcpuState,
};
use devices::state::Section;
use kvm_bindings as kvm;
use nacelle::{
    pager::working_set::WorkingSet,
    snapshot::{
        Digest, Id,
        extents::{Extents, Run},
        index::Index,
        state as file,
    },
    vm::saved::{self, Part, Platform, Saved},
};

use crate::pieces::{Pieces, piece};

/// `pieces`: the kind, one byte of version, the bytes.
pub fn sections(pieces: &mut Pieces<'_>) -> Vec<Section> {
    let mut sections = Vec::new();
    while !pieces.is_empty() && sections.len() < 300 {
        let kind = String::from_utf8_lossy(pieces.piece()).into_owned();
        let version = u16::from(pieces.byte());
        sections.push(Section { kind, version, bytes: pieces.piece().to_vec() });
    }
    sections
}

/// The same the other way.
pub fn from_sections(sections: &[Section]) -> Vec<u8> {
    let one = |section: &Section| {
        [piece(section.kind.as_bytes()), vec![section.version as u8], piece(&section.bytes)].concat()
    };
    sections.iter().flat_map(one).collect()
}

/// A state file with right digests, and all that is taken out of it without KVM.
pub fn state(data: &[u8]) {
    let mut pieces = Pieces::of(data);
    let vcpus = pieces.byte();
    let Ok(bytes) = file::encode(&sections(&mut pieces)) else { return };
    let found = file::decode(&bytes).expect("what was encoded decodes");
    let Ok(mut saved) = Saved::decode(found) else { return };
    let _ = saved.platform();
    let _ = saved.slots().of("virtio-block", "root");
    for kind in ["annex", "pci", "processors", "serial", "i8042", "power", "mmds"] {
        let _ = saved.section_if_there(kind);
    }
    if let Ok(clock) = saved.clock() {
        assert!(ClockState::from_bytes(&clock.to_bytes()).is_ok());
    }
    if let Ok(chips) = saved.irqchip() {
        assert!(IrqchipState::from_bytes(&chips.to_bytes()).is_ok());
    }
    for vcpu in saved.vcpus(vcpus % 66).into_iter().flatten() {
        let _ = (vcpu.cpuid().len(), vcpu.msrs().len(), vcpu.registers(), vcpu.tsc_khz());
        assert!(VcpuState::from_bytes(&vcpu.to_bytes()).is_ok(), "a state that was read can be written");
    }
    let _ = saved.take("virtio-block", "root");
    let _ = saved.finish();
}

/// A machine of one vCPU whose every register is 0, by the layout that its module describes.
pub fn state_seeds() -> Vec<Vec<u8>> {
    let mut vcpu = [&b"NvCP"[..], &[1, 0, 0, 0]].concat();
    let lengths = [
        size_of::<kvm::kvm_mp_state>(),
        size_of::<kvm::kvm_regs>(),
        size_of::<kvm::kvm_sregs>(),
        size_of::<kvm::kvm_xcrs>(),
        size_of::<kvm::kvm_debugregs>(),
        size_of::<kvm::kvm_lapic_state>(),
        size_of::<kvm::kvm_vcpu_events>(),
        4,
        2 * size_of::<kvm::kvm_cpuid_entry2>(),
        2 * size_of::<kvm::kvm_msr_entry>(),
        4096,
    ];
    for (tag, length) in (1u32..).zip(lengths) {
        vcpu.extend(tag.to_le_bytes());
        vcpu.extend((length as u32).to_le_bytes());
        vcpu.resize(vcpu.len() + length, 0);
    }
    assert!(VcpuState::from_bytes(&vcpu).is_ok(), "the seed follows the layout");
    let part = |kind: &str, name: &str, sections| Part {
        kind: kind.to_owned(),
        name: name.to_owned(),
        slot: None,
        sections,
    };
    let plain = |kind: &'static str, bytes| vec![Section { kind: kind.to_owned(), version: 1, bytes }];
    let platform = Section::new("platform", 1, &Platform { keyboard: true, boot_timer: false });
    let mut disk = part(
        "virtio-block",
        "root",
        vec![Section::new("virtio-core", 1, &7u32), Section::new("virtio-block", 1, &7u32)],
    );
    disk.slot = Some(3);
    let parts = vec![
        part("platform", "", vec![platform]),
        disk,
        part("clock", "", plain("clock", vec![0; size_of::<kvm::kvm_clock_data>()])),
        part("vcpu", "0", plain("vcpu", vcpu)),
        part("irqchip", "", plain("irqchip", vec![0; 3 * size_of::<kvm::kvm_irqchip>()])),
    ];
    vec![[vec![1], from_sections(&saved::encode(parts))].concat()]
}

/// The index of a memory, and what is looked up in it.
pub fn index(data: &[u8]) {
    let mut pieces = Pieces::of(data);
    let (size, shift, hashed) = (pieces.number(), pieces.byte() % 11, pieces.byte() & 1 == 1);
    let (size, chunk) = (size.min(1 << 46) / 4096 * 4096, (64 << 10) << shift);
    let Ok(index) = Index::decode(pieces.rest(), size, chunk, hashed) else { return };
    assert_eq!(Index::decode(&index.encode(), size, chunk, hashed).as_ref(), Ok(&index));
    for run in index.extents.runs() {
        assert!(run.start < run.end && run.end <= size);
        let _ = index.extents.find(run.end);
    }
    for (chunk, _) in index.hashed_chunks() {
        let window = index.window(chunk);
        assert!(index.extents.inside(window).next().is_some(), "a chunk with a hash has pages");
    }
}

/// Indexes with and without hashes.
pub fn index_seeds() -> Vec<Vec<u8>> {
    let size: u64 = 1 << 20;
    let runs = vec![Run { start: 4096, end: 8192 }, Run { start: 61440, end: 69632 }];
    let extents = Extents::checked(runs, size).expect("runs in order");
    [0, 2]
        .map(|hashes| {
            let hashes = (0..hashes).map(|n| Digest([n; 32])).collect::<Vec<_>>();
            let hashed = u8::from(!hashes.is_empty());
            let index = Index { size, chunk_size: 64 << 10, extents: extents.clone(), hashes };
            [&size.to_le_bytes()[..], &[0, hashed], &index.encode()].concat()
        })
        .into()
}

const SNAPSHOT: (Id, u64) = (Id([7; 16]), 1 << 30);

/// A working set with a right digest.
pub fn working_set(data: &[u8]) {
    let (id, size) = SNAPSHOT;
    let sealed = [data, &Digest::of(data).0].concat();
    let Some(set) = WorkingSet::decode(&sealed, id, size) else { return };
    assert!(set.touched.runs().iter().chain(set.written.runs()).all(|run| run.end <= size));
    assert_eq!(WorkingSet::decode(&set.encode(id, size), id, size), Some(set));
}

/// A set of a few runs.
pub fn working_set_seeds() -> Vec<Vec<u8>> {
    let (id, size) = SNAPSHOT;
    let runs = |n: u64| (0..n).map(|at| Run { start: at * 16384, end: at * 16384 + 4096 }).collect();
    let extents = |n| Extents::checked(runs(n), size).expect("runs in order");
    let seed = |touched, written| {
        let mut file = WorkingSet { touched: extents(touched), written: extents(written) }.encode(id, size);
        file.truncate(file.len() - 32);
        file
    };
    vec![seed(0, 0), seed(3, 1), seed(40, 20)]
}
