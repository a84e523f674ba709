//! What is saved of the metadata service: its data, and how it is reached.
//!
//! The data is kept as the JSON text that it is measured by. Size limit, tokens and their key
//! are this process's own.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Mmds, MmdsConfig, MmdsVersion};
use crate::state::{Section, StateError};

const KIND: &str = "mmds";
const VERSION: u16 = 1;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Saved {
    /// Guests need tokens.
    tokens: bool,
    interfaces: Vec<String>,
    address: [u8; 4],
    imds_compat: bool,
    /// JSON; nothing before the first put.
    data: Option<String>,
}

fn impossible(reason: String) -> StateError {
    StateError::Impossible { kind: KIND, reason }
}

impl Mmds {
    /// The data and how it is reached.
    pub fn save(&self) -> Section {
        let config = self.config();
        let saved = Saved {
            tokens: config.version == MmdsVersion::V2,
            interfaces: config.interfaces.clone(),
            address: config.address.octets(),
            imds_compat: config.imds_compat,
            data: self.get().map(|data| data.to_string()),
        };
        Section::new(KIND, VERSION, &saved)
    }

    /// Takes over saved data, and how it was reached. `known` are the names of the machine's
    /// network interfaces. To be called before interfaces are connected
    /// ([`super::Detour::new`]).
    ///
    /// # Errors
    /// When the section is another one's, when an interface or the address cannot be, and when
    /// the data is larger than this service's limit. Nothing is changed then.
    pub fn restore(&self, section: &Section, known: &[&str]) -> Result<(), StateError> {
        let saved: Saved = section.open(KIND, VERSION)?;
        let config = MmdsConfig {
            version: if saved.tokens { MmdsVersion::V2 } else { MmdsVersion::V1 },
            interfaces: saved.interfaces,
            address: saved.address.into(),
            imds_compat: saved.imds_compat,
        };
        config.check(known).map_err(|error| impossible(error.to_string()))?;
        if let Some(text) = saved.data {
            // The parser bounds the depth.
            let data: Value = serde_json::from_str(&text)
                .map_err(|error| impossible(format!("its data is not JSON: {error}")))?;
            self.put(data).map_err(|error| impossible(error.to_string()))?;
        }
        self.set_config(config);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn configured() -> Mmds {
        let mmds = Mmds::new(1000).unwrap();
        let config = MmdsConfig {
            version: MmdsVersion::V2,
            interfaces: vec!["eth1".to_owned()],
            address: [169, 254, 3, 4].into(),
            imds_compat: true,
        };
        mmds.configure(config, &["eth0", "eth1"]).unwrap();
        mmds.put(json!({"a": {"b": "ü"}})).unwrap();
        mmds
    }

    #[test]
    fn data_and_configuration_come_back_and_tokens_do_not() {
        let (old, new) = (configured(), Mmds::new(1000).unwrap());
        new.restore(&old.save(), &["eth1"]).unwrap();
        assert_eq!((new.get(), new.config()), (old.get(), old.config()));
        let token = old.mint.issue(60, Duration::ZERO);
        assert!(old.mint.is_valid(&token, Duration::ZERO) && !new.mint.is_valid(&token, Duration::ZERO));
    }

    #[test]
    fn a_service_that_nobody_configured_or_filled_is_saved_too() {
        let (old, new) = (Mmds::new(10).unwrap(), Mmds::new(10).unwrap());
        new.restore(&old.save(), &[]).unwrap();
        assert_eq!((new.get(), new.config()), (None, old.config()));
    }

    #[test]
    fn states_that_cannot_be_are_refused_and_change_nothing() {
        let saved: Saved = configured().save().open(KIND, VERSION).unwrap();
        let new = Mmds::new(20).unwrap();
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        for broken in [
            Saved { interfaces: vec!["eth7".to_owned()], ..saved.clone() },
            Saved { address: [10, 0, 0, 1], ..saved.clone() },
            Saved { data: Some("{".to_owned()), ..saved.clone() },
            Saved { data: Some(deep), ..saved.clone() },
            Saved { data: Some(json!({"a": "x".repeat(20)}).to_string()), ..saved.clone() },
        ] {
            let section = Section::new(KIND, VERSION, &broken);
            assert!(matches!(new.restore(&section, &["eth1"]), Err(StateError::Impossible { .. })));
        }
        assert!(new.restore(&Section::new("net", 1, &0u8), &[]).is_err());
        assert!(new.get().is_none() && new.config().interfaces.is_empty());
    }
}
