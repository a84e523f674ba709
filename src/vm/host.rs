//! What devices ask of the machine, by KVM: doorbells are ioeventfds, lines are irqfds,
//! messages are `KVM_SIGNAL_MSI` (KVM API sections 4.59, 4.75, 4.70).
//!
//! Messages go through the call instead of an irqfd with a route: the table of routes, which
//! KVM replaces as a whole at every change, then never changes after the machine is built,
//! and a vector costs nothing until it is used.

use std::io;

use devices::host::{Doorbell, Host, Message};
use kvm_bindings::kvm_msi;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The machine, as its devices see it.
pub struct KvmHost {
    vm: VmFd,
}

impl KvmHost {
    /// Wraps the machine.
    pub fn new(vm: VmFd) -> KvmHost {
        KvmHost { vm }
    }

    /// The machine's own descriptor.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }
}

fn place(at: Doorbell) -> IoEventAddress {
    match at {
        Doorbell::Mmio(address) => IoEventAddress::Mmio(address),
        Doorbell::Port(port) => IoEventAddress::Pio(port.into()),
    }
}

impl Host for KvmHost {
    fn doorbell(&self, at: Doorbell, value: Option<u32>) -> io::Result<EventFd> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        match value {
            Some(value) => self.vm.register_ioevent(&bell, &place(at), value)?,
            None => self.vm.register_ioevent(&bell, &place(at), NoDatamatch)?,
        }
        Ok(bell)
    }

    fn remove_doorbell(&self, at: Doorbell, value: Option<u32>, bell: &EventFd) -> io::Result<()> {
        match value {
            Some(value) => self.vm.unregister_ioevent(bell, &place(at), value)?,
            None => self.vm.unregister_ioevent(bell, &place(at), NoDatamatch)?,
        }
        Ok(())
    }

    fn line(&self, gsi: u32) -> io::Result<EventFd> {
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.vm.register_irqfd(&line, gsi)?;
        Ok(line)
    }

    fn message(&self, message: Message) -> io::Result<()> {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        self.vm.signal_msi(msi)?;
        Ok(())
    }
}
