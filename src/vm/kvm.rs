//! `/dev/kvm`: opened once, asked once what it can do.

use std::io;

use arch::template::Template;
use kvm_ioctls::{Cap, Kvm, VmFd};

/// Why this host cannot run a machine.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` is not there.
    #[error(
        "This host has no /dev/kvm: hardware virtualization is off or missing, or the kvm module is not loaded"
    )]
    Missing,
    /// It is there, but not for this user.
    #[error("No permission to open /dev/kvm; run as root or join the group that owns it (usually kvm)")]
    Permission,
    /// Opening failed for another reason.
    #[error("Cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// The kernel's interface has another version.
    #[error("KVM has API version {0}; version 12 is needed")]
    Version(i32),
    /// Something needed is missing from the host's KVM.
    #[error("This host's KVM lacks {0:?}, which needs Linux 5.10 or newer")]
    Lacks(Cap),
    /// Something that the machine's CPU template asks for is missing from the host's KVM.
    #[error("This host's KVM lacks capability {0}, which the CPU template asks for")]
    LacksAsked(u32),
    /// A call failed.
    #[error("KVM refused to {what}")]
    Call {
        /// What was asked.
        what: &'static str,
        /// What it said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Names a failed KVM call.
pub fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { what, source }
}

const NEEDED: [Cap; 5] = [Cap::Irqchip, Cap::Ioeventfd, Cap::Irqfd, Cap::UserMemory, Cap::SignalMsi];

/// Opens KVM and checks that it has what every machine needs.
pub fn open() -> Result<Kvm, KvmError> {
    open_for(&Template::default())
}

/// Opens KVM and checks that it has what a machine with this CPU template needs.
pub fn open_for(template: &Template) -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Permission,
        errno => KvmError::Open(io::Error::from_raw_os_error(errno)),
    })?;
    match kvm.get_api_version() {
        12 => {}
        other => return Err(KvmError::Version(other)),
    }
    let needed = template.needed_capabilities(&NEEDED.map(|cap| cap as u32));
    match needed.into_iter().find(|&number| kvm.check_extension_raw(number.into()) <= 0) {
        None => Ok(kvm),
        Some(number) => Err(match NEEDED.into_iter().find(|&cap| cap as u32 == number) {
            Some(cap) => KvmError::Lacks(cap),
            None => KvmError::LacksAsked(number),
        }),
    }
}

/// Whether the processor has hardware virtualization (CPUID: VMX in leaf 1, SVM in leaf
/// 0x80000001). A `/dev/kvm` without it emulates the guest's kernel one instruction at a time:
/// programs of a few thousand instructions run there, Linux does not boot.
pub fn has_hardware() -> bool {
    use std::arch::x86_64::__cpuid;
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let extended = __cpuid(0x8000_0000).eax;
    __cpuid(1).ecx & VMX != 0 || (extended >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & SVM != 0)
}

/// Creates an empty machine. KVM answers `EINTR` when a signal comes in meanwhile; that is
/// tried again, a few times.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let mut tries = 0;
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR && tries < 8 => tries += 1,
            other => return other.map_err(call("create a machine")),
        }
    }
}
