//! The metadata service on this interface.
//!
//! ```text
//!   tx.rs ── frame for it ──► Detour::take      (charged to no limit)
//!   rx.rs ◄─ inject ───────── Detour::next_reply (as any frame towards the guest)
//!   worker.rs ◄── timer ───── what was not acknowledged is repeated
//! ```
//!
//! It answers while the tap is gone, and its connections outlive a pause.

use std::{io, sync::Arc};

use super::Net;
use crate::{
    mmds::{Detour, Mmds},
    virtio::DeviceError,
};

impl Net {
    /// Leads frames for the metadata service to `mmds`, at the address it is configured for
    /// now, instead of to the host's side. To be called before the device is started. Fails
    /// when the host has no random bytes or no descriptor to spare.
    pub fn connect_mmds(&mut self, mmds: Arc<Mmds>) -> Result<(), DeviceError> {
        let failed = |source: io::Error| DeviceError::Host {
            what: "A network device cannot be connected to the metadata service".to_owned(),
            source,
        };
        self.mmds = Some(Detour::new(mmds).map_err(failed)?);
        Ok(())
    }
}
