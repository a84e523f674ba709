//! The balloon device (VIRTIO 1.2 section 5.5): guest memory that the host gets back.
//!
//! ```text
//!   owner                Balloon (register half)                Server (queue half, on a worker)
//!   ─────                ───────────────────────                ────────────────────────────────
//!   BalloonTarget ─────► num_pages ──── config interrupt ──┐    inflate    pages ──► Ram ──► host
//!                        actual ◄── written by the driver  │    deflate
//!   BalloonStatistics ─► Clock ────────────────────────────┼──► statistics ──► Latest
//!   HintingStart/Stop ─► Hinting ─── config interrupt ─────┤    hinting    ranges ──► Ram ──► host
//!                                                          ▼    reporting  ranges ──► Ram ──► host
//!   report() ◄────────── Shared ◄───────────────────────driver
//! ```
//!
//! Three ways lead memory back to the host. *Inflating*: the owner sets a target, the driver
//! takes pages from the guest and names them. *Reporting*: the driver tells by itself which
//! pages are free. *Hinting*: the owner asks once which pages are free ([`hinting`]). In all of
//! them the page stays part of the guest: touched again, it is there again, empty.
//!
//! What the guest is believed: nothing. Pages that are no memory are counted and passed over,
//! `actual` and the statistics are shown as the guest wrote them and used for nothing.
//!
//! Queues: 0 inflates, 1 deflates. Those behind them exist by feature, and here the
//! specification and every driver differ: it gives each a fixed number, they leave no gaps.
//! Both are served: a driver that enabled as many queues as it accepted features gets them in
//! order, any other one by number. That is decided at each start from what the driver did.

mod hinting;
mod pages;
mod parts;
mod ram;
mod server;
mod shared;
mod stats;

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

pub use self::stats::BalloonStats;
use self::{
    hinting::Run,
    pages::PAGES_PER_MIB,
    ram::Ram,
    server::{Role, Server},
    shared::{Shared, add},
    stats::{Clock, Latest},
};
use crate::{
    state::{Section, StateError},
    virtio::{
        About, Active, Change, DeviceError, F_COMMON, Interrupt, Report, VirtioDevice, queue::Queue,
        read_config_bytes,
    },
    worker::{HandlerId, Worker},
};

const KIND: &str = "virtio-balloon";
const VERSION: u16 = 1;
const QUEUE_SIZE: u16 = 256;
/// `num_pages`, `actual`, `free_page_hint_cmd_id` (VIRTIO 1.2 section 5.5.4).
const CONFIG_LEN: u32 = 12;
/// Where in the configuration `actual` lies, the only field the driver may write.
const ACTUAL: std::ops::Range<usize> = 4..8;
/// Queues that are always there.
const FIXED_QUEUES: u16 = 2;

/// `VIRTIO_BALLOON_F_STATS_VQ`: there is a statistics queue.
pub const F_STATS_VQ: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the guest may take pages back rather than kill.
pub const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_FREE_PAGE_HINT`: the guest says on request which pages are free.
pub const F_FREE_PAGE_HINT: u64 = 1 << 3;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`: the guest says by itself which pages are free.
pub const F_PAGE_REPORTING: u64 = 1 << 5;

/// Optional queues in their order, with their feature and their number by the specification.
const OPTIONAL: [(u64, u16, Role); 3] = [
    (F_STATS_VQ, 2, Role::Statistics),
    (F_FREE_PAGE_HINT, 3, Role::Hinting),
    (F_PAGE_REPORTING, 4, Role::Reporting),
];

/// What a balloon is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonConfig {
    /// Size it is to have from the start, in MiB.
    pub amount_mib: u32,
    /// Whether the guest may take pages back when it would have to kill a process otherwise.
    pub deflate_on_oom: bool,
    /// Seconds between two questions for the guest's statistics; 0 for none, for good.
    pub stats_polling_interval_s: u16,
    /// Whether the owner may ask for free pages.
    pub free_page_hinting: bool,
    /// Whether the guest gives free pages back by itself.
    pub free_page_reporting: bool,
}

/// What a balloon says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BalloonReport {
    /// Size it is to have, in MiB.
    pub target_mib: u32,
    /// Size it has, in MiB, as the guest says.
    pub actual_mib: u32,
    /// Size it is to have, in pages of 4 KiB.
    pub target_pages: u32,
    /// Size it has, in pages of 4 KiB, as the guest says.
    pub actual_pages: u32,
    /// As configured.
    pub deflate_on_oom: bool,
    /// Seconds between two questions for statistics, 0 when there are none.
    pub stats_polling_interval_s: u16,
    /// As configured.
    pub free_page_hinting: bool,
    /// As configured.
    pub free_page_reporting: bool,
    /// Whether a driver has set the device up.
    pub active: bool,
    /// The guest's statistics; `None` when the device was made without them.
    pub stats: Option<Box<BalloonStats>>,
    /// Number of the hinting run that was asked for; 0 before the first, 1 after its end.
    pub host_cmd: u32,
    /// Last number the guest sent; 0 when it has no more pages.
    pub guest_cmd: Option<u32>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    target: u32,
    actual: u32,
    interval: u16,
    driver: Option<u64>,
    hinting: Run,
    latest: Latest,
    untold: bool,
}

struct Running {
    worker: Worker,
    handler: HandlerId,
    interrupt: Arc<dyn Interrupt>,
    clock: Option<Arc<Clock>>,
}

/// A memory balloon.
pub struct Balloon {
    about: About,
    memory_mib: u64,
    /// Target, in pages.
    target: u32,
    /// What the driver says it holds, in pages.
    actual: u32,
    /// Seconds.
    interval: u16,
    shared: Arc<Shared>,
    /// Features of the driver that set the device up.
    driver: Option<u64>,
    /// The configuration changed while nobody could be told.
    untold: bool,
    running: Option<Running>,
}

impl Balloon {
    /// A balloon for a machine with `memory_mib` MiB of memory, which no target may exceed.
    pub fn new(config: &BalloonConfig, memory_mib: u64) -> Result<Balloon, DeviceError> {
        let wanted = [
            (config.stats_polling_interval_s > 0, F_STATS_VQ),
            (config.deflate_on_oom, F_DEFLATE_ON_OOM),
            (config.free_page_hinting, F_FREE_PAGE_HINT),
            (config.free_page_reporting, F_PAGE_REPORTING),
        ];
        let own = wanted.iter().filter(|(on, _)| *on).fold(0, |all, (_, feature)| all | feature);
        let offered = OPTIONAL.iter().filter(|(feature, ..)| own & feature != 0);
        let queues = offered.map(|(_, number, _)| number + 1).max().unwrap_or(FIXED_QUEUES);
        let about = About {
            kind: KIND,
            device_id: 5,
            // PCI has no class for it.
            pci_class: 0x00ff_0000,
            features: F_COMMON | own,
            queues: vec![QUEUE_SIZE; usize::from(queues)],
            config_len: CONFIG_LEN,
        };
        let mut balloon = Balloon {
            about,
            memory_mib,
            target: 0,
            actual: 0,
            interval: config.stats_polling_interval_s,
            shared: Arc::default(),
            driver: None,
            untold: false,
            running: None,
        };
        balloon.target = balloon.pages(config.amount_mib)?;
        Ok(balloon)
    }

    fn offers(&self, feature: u64) -> bool {
        self.about.features & feature != 0
    }

    /// A target in pages.
    fn pages(&self, mib: u32) -> Result<u32, DeviceError> {
        let most = self.memory_mib.min(u64::from(u32::MAX / PAGES_PER_MIB));
        if u64::from(mib) > most {
            return Err(DeviceError::Change(format!(
                "A balloon of {mib} MiB is more than the machine's memory; ask for at most {most} MiB"
            )));
        }
        Ok(mib * PAGES_PER_MIB)
    }

    fn config(&self) -> [u8; CONFIG_LEN as usize] {
        let [a, b, c, d] = self.target.to_le_bytes();
        let [e, f, g, h] = self.actual.to_le_bytes();
        let [i, j, k, l] = self.shared.hinting.shown().to_le_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l]
    }

    /// Tells the driver that the configuration changed, at the next start if there is none now.
    fn tell(&mut self) {
        match &self.running {
            Some(running) => running.interrupt.config(),
            None => self.untold = true,
        }
    }

    fn set_interval(&mut self, seconds: u16) -> Result<(), DeviceError> {
        if seconds == self.interval {
            return Ok(());
        }
        if self.interval == 0 || seconds == 0 {
            let (now, want) = if seconds == 0 { ("with", "off") } else { ("without", "on") };
            return Err(DeviceError::Change(format!(
                "The balloon was made {now} statistics, and a guest cannot be told of a change; \
                 they cannot be switched {want}"
            )));
        }
        self.interval = seconds;
        if let Some(clock) = self.running.as_ref().and_then(|running| running.clock.as_ref()) {
            // The first question at once: who asks more often wants to know now.
            clock.set(Duration::from_nanos(1), every(seconds)).map_err(clock_error)?;
        }
        Ok(())
    }

    fn check_hinting(&self) -> Result<(), DeviceError> {
        let refuse = |why: &str| Err(DeviceError::Change(why.to_owned()));
        if !self.offers(F_FREE_PAGE_HINT) {
            return refuse(
                "The balloon was made without free page hinting; it can only be configured with it",
            );
        }
        match self.driver {
            None => refuse("The guest has no driver for its balloon yet; ask again when it has started"),
            Some(features) if features & F_FREE_PAGE_HINT == 0 => refuse(
                "The guest's balloon driver does not know free page hinting; it takes Linux 4.19 or newer",
            ),
            Some(_) => Ok(()),
        }
    }
}

impl VirtioDevice for Balloon {
    fn about(&self) -> &About {
        &self.about
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let mut config = self.config();
        let rest = config.get_mut(offset as usize..).unwrap_or_default();
        for (byte, written) in rest.iter_mut().zip(data) {
            *byte = *written;
        }
        if let Some(Ok(actual)) = config.get(ACTUAL).map(<[u8; 4]>::try_from) {
            self.actual = u32::from_le_bytes(actual);
        }
    }

    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        let Active { memory, features, queues, interrupt, worker } = active;
        let roles = roles(features, &queues.iter().map(|(queue, _)| queue.index()).collect::<Vec<_>>());
        let clock = if roles.contains(&Some(Role::Statistics)) && self.interval > 0 {
            let clock = Clock::new().map_err(clock_error)?;
            clock.set(every(self.interval), every(self.interval)).map_err(clock_error)?;
            Some(Arc::new(clock))
        } else {
            None
        };
        let queues = roles.into_iter().zip(queues).map(|(role, (queue, kick))| (role, queue, kick)).collect();
        let ram = Ram::new(memory, Arc::clone(&self.shared));
        let server =
            Server::new(queues, ram, Arc::clone(&self.shared), Arc::clone(&interrupt), clock.clone());
        let handler = worker.add(Box::new(server)).map_err(|source| {
            add(&self.shared.counters.activate_fails, 1);
            host("The balloon cannot be started", source)
        })?;
        self.driver = Some(features);
        self.running = Some(Running { worker, handler, interrupt, clock });
        if std::mem::take(&mut self.untold) {
            self.tell();
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        let Some(Running { worker, handler, .. }) = self.running.take() else { return Ok(Vec::new()) };
        worker.remove(handler).map_err(|source| host("The balloon cannot be stopped", source))
    }

    fn reset(&mut self) {
        self.actual = 0;
        self.driver = None;
        self.untold = false;
        self.shared.reset();
    }

    fn save(&self) -> Section {
        let saved = Saved {
            target: self.target,
            actual: self.actual,
            interval: self.interval,
            driver: self.driver,
            hinting: self.shared.hinting.run(),
            latest: *self.shared.latest(),
            untold: self.untold,
        };
        Section::new(KIND, VERSION, &saved)
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved: Saved = section.open(KIND, VERSION)?;
        let impossible = |reason| StateError::Impossible { kind: KIND, reason };
        if u64::from(saved.target) > self.memory_mib.saturating_mul(u64::from(PAGES_PER_MIB)) {
            let (pages, mib) = (saved.target, self.memory_mib);
            return Err(impossible(format!("{pages} pages are more than {mib} MiB of memory")).into());
        }
        if (saved.interval > 0) != self.offers(F_STATS_VQ) {
            let (found, here) = (saved.interval, self.interval);
            let reason = format!("its statistics interval is {found} s, here it is {here} s");
            return Err(impossible(reason).into());
        }
        self.target = saved.target;
        self.actual = saved.actual;
        self.interval = saved.interval;
        self.driver = saved.driver;
        *self.shared.latest() = saved.latest;
        self.untold = self.shared.hinting.restore(saved.hinting) | saved.untold;
        Ok(())
    }

    fn update(&mut self, change: &Change) -> Result<(), DeviceError> {
        match change {
            Change::BalloonTarget(mib) => {
                let target = self.pages(*mib)?;
                if std::mem::replace(&mut self.target, target) != target {
                    self.tell();
                }
            }
            Change::BalloonStatistics(seconds) => self.set_interval(*seconds)?,
            Change::HintingStart { acknowledge_on_stop } => {
                self.check_hinting()?;
                self.shared.hinting.begin(*acknowledge_on_stop);
                self.tell();
            }
            Change::HintingStop => {
                self.check_hinting()?;
                self.shared.hinting.end();
                self.tell();
            }
            _ => return Err(DeviceError::Change(format!("A {KIND} cannot be changed by {change:?}"))),
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters.list()
    }

    fn report(&self) -> Report {
        let run = self.shared.hinting.run();
        Report::Balloon(BalloonReport {
            target_mib: self.target / PAGES_PER_MIB,
            actual_mib: self.actual / PAGES_PER_MIB,
            target_pages: self.target,
            actual_pages: self.actual,
            deflate_on_oom: self.offers(F_DEFLATE_ON_OOM),
            stats_polling_interval_s: self.interval,
            free_page_hinting: self.offers(F_FREE_PAGE_HINT),
            free_page_reporting: self.offers(F_PAGE_REPORTING),
            active: self.driver.is_some(),
            stats: self.offers(F_STATS_VQ).then(|| Box::new(self.shared.latest().named())),
            host_cmd: run.host_cmd,
            guest_cmd: run.guest_cmd,
        })
    }
}

/// What each of the enabled queues, given in ascending order, is for.
fn roles(features: u64, enabled: &[u16]) -> Vec<Option<Role>> {
    let accepted = || OPTIONAL.iter().filter(|(feature, ..)| features & feature != 0);
    let optional = enabled.iter().filter(|index| **index >= FIXED_QUEUES).count();
    let without_gaps = optional == accepted().count();
    let mut next = accepted().map(|(.., role)| *role);
    let role = |index: &u16| match index {
        0 => Some(Role::Inflate),
        1 => Some(Role::Deflate),
        _ if without_gaps => next.next(),
        _ => accepted().find(|(_, number, _)| number == index).map(|(.., role)| *role),
    };
    enabled.iter().map(role).collect()
}

fn every(seconds: u16) -> Duration {
    Duration::from_secs(seconds.into())
}

fn host(what: &str, source: std::io::Error) -> DeviceError {
    DeviceError::Host { what: what.to_owned(), source }
}

fn clock_error(source: std::io::Error) -> DeviceError {
    host("The clock of the balloon's statistics cannot be set", source)
}

#[cfg(test)]
mod tests;
