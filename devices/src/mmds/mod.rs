//! The metadata service of a machine (MMDS): what a guest reads at `http://169.254.169.254`.
//!
//! ```text
//!   host's API ── put, patch, get, configure ──► Mmds ◄── answer.rs ◄── http.rs
//!                                                (store.rs, token.rs)      ▲
//!                                                                          │ bytes
//!   guest ── frame ──► network device ── is it for us? ──► detour.rs ──► stack.rs (TCP)
//!     ▲                     │ no: tap                                      │
//!     └──── rx queue ◄──────┴───────────── replies ◄───────────────────── wire.rs
//! ```
//!
//! [`Mmds`] is the data and the rules, one a machine, shared by the API and by every network
//! interface that leads to it. A [`Detour`] is one interface's way there: Ethernet, ARP and a
//! small TCP stack that runs on the network device's own thread. Nothing of it ever reaches
//! the tap, and the host's kernel never sees the address.
//!
//! The guest is hostile, so everything is counted out: connections, the bytes of a request,
//! of answers not yet taken, of frames not yet given. All bounds are in [`limits`] or beside
//! what they bound.
//!
//! A saved machine has its data and how it is reached, so that a guest that goes on finds what
//! it knew. Tokens and connections end with the process: the key of the tokens is made anew, so
//! that what one machine's guest was given opens nothing in its clones. Whoever wants a clone to
//! read other data than its parent puts it before the clone runs.

mod answer;
mod counters;
mod detour;
mod http;
mod saved;
mod stack;
mod store;
#[cfg(test)]
mod tests;
mod token;
mod wire;

use std::{
    io,
    net::Ipv4Addr,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use serde_json::Value;

use self::{counters::Counters, store::Store, token::Mint};
pub use self::{
    detour::Detour,
    wire::{HEAD_LEN, MTU},
};

/// Where the service is unless configured otherwise.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Bytes the data may have unless set otherwise, written as JSON without white space.
pub const DEFAULT_SIZE_LIMIT: usize = 51_200;

/// How a guest reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MmdsVersion {
    /// By just asking.
    #[default]
    V1,
    /// With a token that it asked for before.
    V2,
}

/// How the service is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MmdsConfig {
    /// How a guest reads.
    pub version: MmdsVersion,
    /// Names of the network interfaces that lead to it, at least one.
    pub interfaces: Vec<String>,
    /// Its address, from 169.254.1.0 to 169.254.254.255 (RFC 3927 section 2.1).
    pub address: Ipv4Addr,
    /// Values come in the format of EC2's service whatever the guest asks for.
    pub imds_compat: bool,
}

impl MmdsConfig {
    /// The defaults, reached over one interface.
    pub fn for_interface(name: &str) -> MmdsConfig {
        let interfaces = vec![name.to_owned()];
        MmdsConfig { version: MmdsVersion::V1, interfaces, address: DEFAULT_ADDRESS, imds_compat: false }
    }

    /// Whether the address is one that may be and all interfaces are among those `known`.
    fn check(&self, known: &[&str]) -> Result<(), MmdsError> {
        if !matches!(self.address.octets(), [169, 254, 1..=254, _]) {
            return Err(MmdsError::Address(self.address));
        }
        match self.interfaces.iter().find(|name| !known.contains(&name.as_str())) {
            Some(name) => Err(MmdsError::UnknownInterface(name.clone())),
            None => Ok(()),
        }
    }
}

/// Why the service refused what its host asked.
#[derive(Debug, thiserror::Error)]
pub enum MmdsError {
    /// The data, or the result of a patch, is larger than allowed.
    #[error("The metadata would have {size} bytes; at most {limit} are allowed")]
    TooLarge {
        /// Bytes it would have.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// A patch came before there was anything to change.
    #[error("There is no metadata to patch; put some first")]
    Uninitialized,
    /// No interface leads to the service.
    #[error("The metadata service needs at least one network interface")]
    NoInterface,
    /// A name that no interface has.
    #[error("There is no network interface {0:?} for the metadata service")]
    UnknownInterface(String),
    /// The address is not usable.
    #[error("The metadata service cannot have address {0}; it must be from 169.254.1.0 to 169.254.254.255")]
    Address(Ipv4Addr),
}

/// The metadata service of one machine. All methods may be called from any thread.
pub struct Mmds {
    store: Store,
    config: RwLock<Arc<MmdsConfig>>,
    mint: Mint,
    counters: Counters,
    start: Instant,
}

impl std::fmt::Debug for Mmds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Neither the data nor the key belongs into a log.
        f.debug_struct("Mmds").field("config", &self.config()).finish_non_exhaustive()
    }
}

impl Mmds {
    /// A service without data that holds at most `size_limit` bytes, written as JSON without
    /// white space. Fails when the host has no random bytes.
    pub fn new(size_limit: usize) -> io::Result<Mmds> {
        let config = MmdsConfig { interfaces: Vec::new(), ..MmdsConfig::for_interface("") };
        Ok(Mmds {
            store: Store::new(size_limit),
            config: RwLock::new(Arc::new(config)),
            mint: Mint::new()?,
            counters: Counters::default(),
            start: Instant::now(),
        })
    }

    /// Replaces the data.
    pub fn put(&self, data: Value) -> Result<(), MmdsError> {
        self.store.put(data)
    }

    /// Merges `patch` into the data (RFC 7396): all of it, or nothing when the result would
    /// be too large.
    pub fn patch(&self, patch: Value) -> Result<(), MmdsError> {
        self.store.patch(patch)
    }

    /// The data; nothing before the first [`Mmds::put`].
    pub fn get(&self) -> Option<Arc<Value>> {
        self.store.get()
    }

    /// Bytes the data may have.
    pub fn size_limit(&self) -> usize {
        self.store.limit()
    }

    /// Sets how the service is reached. `known` are the names of the machine's network
    /// interfaces. Version and format count at once, the address and the interfaces for
    /// devices made afterwards.
    pub fn configure(&self, config: MmdsConfig, known: &[&str]) -> Result<(), MmdsError> {
        if config.interfaces.is_empty() {
            return Err(MmdsError::NoInterface);
        }
        config.check(known)?;
        self.set_config(config);
        Ok(())
    }

    fn set_config(&self, config: MmdsConfig) {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    /// How the service is reached. No interface leads to one that was never configured.
    pub fn config(&self) -> Arc<MmdsConfig> {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counters for metrics, over all interfaces, by Firecracker's names.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }

    /// The answer to one request as bytes, and whether the connection ends behind it.
    fn answer(&self, head: &[u8], now: Instant) -> (Vec<u8>, bool) {
        let response = answer::answer(self, head, self.since_start(now));
        (response.encode(), response.close)
    }

    fn since_start(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.start)
    }
}
