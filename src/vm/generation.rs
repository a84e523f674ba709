//! Clones are not twins: a new generation id for each machine that is booted or restored.
//!
//! [`arch::generation`] says what lies in guest memory and why; here are the random numbers and
//! the moment. A machine that boots gets its first id before its kernel is entered: one system
//! call. A restored machine gets another one, in this order:
//!
//! ```text
//!   memory, interrupt controllers, vCPUs loaded ─► devices and power block restored
//!     ─► renew: new id in memory, event pending, line raised ─► vCPUs run
//! ```
//!
//! The line comes behind the interrupt controllers, because loading those overwrites what is
//! pending in them. A pause changes nothing: who goes on after it is still the same machine.

use std::io;

use arch::generation::{self, Id};
use devices::{
    Memory,
    legacy::power::{self, Power},
};
use vm_memory::GuestMemoryError;

/// Why a machine has no new generation id.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The host has no random numbers.
    #[error("The host gives no random numbers for the machine's generation id")]
    Random(#[source] io::Error),
    /// Guest memory could not be written.
    #[error("Cannot write the machine's generation id into guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Gives a machine that boots its first id.
pub fn at_boot(memory: &Memory) -> Result<(), GenerationError> {
    Ok(generation::write(memory, &random()?)?)
}

/// Gives a restored machine, none of whose vCPUs runs, a new id and tells it. To be called once
/// for each machine that was restored, after its interrupt controllers and vCPUs were loaded and
/// `power` was restored.
pub fn renew(memory: &Memory, power: &Power) -> Result<(), GenerationError> {
    generation::renew(memory, &random()?)?;
    power.raise(power::EVENT_GENERATION);
    Ok(())
}

fn random() -> Result<Id, GenerationError> {
    let mut id = Id::default();
    // SAFETY: the pointer and length are those of a live array.
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    // So few bytes come whole or not at all.
    if usize::try_from(got) == Ok(id.len()) {
        Ok(id)
    } else {
        Err(GenerationError::Random(io::Error::last_os_error()))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::Arc};

    use devices::bus::Registers;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    #[test]
    fn each_machine_has_an_id_of_its_own_and_a_restored_one_is_told() {
        let config = api::spec::MachineConfig { mem_size_mib: 16, ..Default::default() };
        let memory = crate::vm::memory::map(&config, crate::vm::memory::Backing::Empty).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let power = Power::new(Arc::new(|_| ()), line.try_clone().unwrap());
        at_boot(&memory).unwrap();
        assert!(line.read().is_err(), "a machine that boots has nothing to be told");
        let mut ids = HashSet::from([[0; 16], generation::id(&memory).unwrap()]);
        for _ in 0..100 {
            renew(&memory, &power).unwrap();
            ids.insert(generation::id(&memory).unwrap());
        }
        assert_eq!(ids.len(), 102);
        let mut pending = [0];
        power.read(u64::from(power::EVENT_STATUS - power::BASE), &mut pending);
        assert_eq!((u32::from(pending[0]), line.read().unwrap()), (power::EVENT_GENERATION, 100));
    }
}
