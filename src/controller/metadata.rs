//! The metadata service as the API sees it: its data, and where it is reached.
//!
//! It is made when it is first needed, because most machines have none; its data may come
//! before the machine has a network interface, from `--metadata`, and changes at any time.

use std::sync::Arc;

use api::{Fault, FaultKind, Reply, spec};
use devices::{
    mmds::{DEFAULT_ADDRESS, DEFAULT_SIZE_LIMIT, Mmds, MmdsConfig, MmdsError, MmdsVersion},
    state::Section,
};
use serde_json::{Value, json};

use super::Controller;

impl Controller {
    /// The whole data; an empty object when there is none.
    pub(super) fn metadata(&self) -> Reply {
        let data = self.mmds.as_ref().and_then(|mmds| mmds.get());
        let data = data.filter(|data| !data.is_null()).map_or_else(|| json!({}), |data| Value::clone(&data));
        Reply::Json(data)
    }

    /// Replaces the data.
    pub fn put_metadata(&mut self, data: Value) -> Result<(), Fault> {
        self.service()?.put(data).map_err(|e| fault(&e))
    }

    /// Merges into the data (RFC 7396).
    pub(super) fn patch_metadata(&mut self, data: Value) -> Result<(), Fault> {
        self.service()?.patch(data).map_err(|e| fault(&e))
    }

    /// The service as the machine's interfaces are to reach it, if it is configured.
    pub(super) fn configured_service(&mut self) -> Result<Option<Arc<Mmds>>, Fault> {
        let Some(config) = self.spec.mmds_config.clone() else { return Ok(None) };
        let known: Vec<String> = self.spec.network_interfaces.iter().map(|n| n.iface_id.clone()).collect();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let service = self.service()?;
        let wanted = MmdsConfig {
            version: match config.version {
                spec::MmdsVersion::V1 => MmdsVersion::V1,
                spec::MmdsVersion::V2 => MmdsVersion::V2,
            },
            interfaces: config.network_interfaces,
            address: config.ipv4_address.unwrap_or(DEFAULT_ADDRESS),
            imds_compat: config.imds_compat,
        };
        service.configure(wanted, &known).map_err(|e| fault(&e))?;
        Ok(Some(service))
    }

    /// Takes over data and configuration of a machine that was saved.
    pub(super) fn restore_metadata(&mut self, section: &Section) -> Result<(), Fault> {
        let known: Vec<String> = self.spec.network_interfaces.iter().map(|n| n.iface_id.clone()).collect();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let restored = self.service()?.restore(section, &known);
        restored.map_err(|e| Fault::from_error(FaultKind::Invalid, &e))
    }

    fn service(&mut self) -> Result<Arc<Mmds>, Fault> {
        if let Some(service) = &self.mmds {
            return Ok(Arc::clone(service));
        }
        let limit = self.settings.mmds_size_limit.unwrap_or(DEFAULT_SIZE_LIMIT);
        let service = Mmds::new(limit).map_err(|e| Fault::from_error(FaultKind::Internal, &e))?;
        Ok(Arc::clone(self.mmds.insert(Arc::new(service))))
    }
}

/// How the service would be described that answers on no interface.
pub(super) fn described(mmds: &Mmds) -> spec::MmdsConfig {
    let config = mmds.config();
    spec::MmdsConfig {
        version: match config.version {
            MmdsVersion::V1 => spec::MmdsVersion::V1,
            MmdsVersion::V2 => spec::MmdsVersion::V2,
        },
        network_interfaces: Vec::new(),
        ipv4_address: Some(config.address).filter(|address| *address != DEFAULT_ADDRESS),
        imds_compat: config.imds_compat,
    }
}

fn fault(error: &MmdsError) -> Fault {
    let kind = match error {
        MmdsError::TooLarge { .. } => FaultKind::TooLarge,
        _ => FaultKind::Invalid,
    };
    Fault::from_error(kind, error)
}
