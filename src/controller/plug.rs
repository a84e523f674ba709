//! Devices that are added to a machine which was started, or taken from it.
//!
//! ```text
//!   PUT    check ─► vm/plug.rs adds ─► 204                         event DeviceAdded
//!   DELETE check ─► guest is asked ─┬► it ejects ─────────► 204    event DeviceRemoved
//!                                   ├► no answer, no driver ─► the same
//!                                   └► no answer ─► 400            event DeviceRemovalUnanswered
//! ```
//!
//! A `DELETE` is answered when the device is gone, as Firecracker's is: who gets 204 may use the
//! file or tap for something else at once. Firecracker takes the device without asking; here the
//! guest is asked, and has [`PATIENCE`] to answer. One that still drives the device then keeps it,
//! and goes on being asked: if it ejects later, the device goes later. `DELETE ...?force=true` takes
//! what is behind the device at once, and leaves the guest with a device that answers to nothing.
//!
//! A guest that boots may miss the interrupt that says "look"; as long as it has not looked it is
//! told again, once a second and not for ever.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use api::{Fault, FaultKind, Reply, Request, Spec, http::Response};
use devices::mmds::Mmds;
use serde_json::{Value, json};

use super::{Controller, metadata};
use crate::{
    phase::{Phase, Verb},
    server::Ticket,
    vm::{
        handed::{Gift, Handed},
        plug::{Extra, Kind},
    },
};

/// How long a guest has to give a device back.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long until a guest that has not looked is told again.
const REMINDER: Duration = Duration::from_secs(1);
/// How often it is told again.
const REMINDERS: u32 = 60;

/// A device that the guest was asked for.
struct Removal {
    kind: Kind,
    id: String,
    slot: u8,
    deadline: Instant,
    /// Clients that wait for it.
    waiting: Vec<Ticket>,
}

/// What the guest owes.
#[derive(Default)]
pub(super) struct Removals {
    pending: Vec<Removal>,
    /// When the guest is told again, and how often still.
    reminder: Option<(Instant, u32)>,
    /// Answers for which the server has to come back first.
    pub(super) unanswered: Vec<(Ticket, Response)>,
}

impl Removals {
    /// When there is something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        let deadlines = self.pending.iter().map(|removal| removal.deadline);
        deadlines.chain(self.reminder.map(|(at, _)| at)).min()
    }

    fn remind_later(&mut self) {
        self.reminder = Instant::now().checked_add(REMINDER).map(|at| (at, REMINDERS));
    }
}

/// What a request is about, if it removes a device.
pub(super) fn removes(request: &Request) -> Option<(Kind, &str)> {
    Some(match request {
        Request::DeleteDrive(id) => (Kind::Drive, id),
        Request::DeletePmem(id) => (Kind::Pmem, id),
        Request::DeleteNetworkInterface(id) => (Kind::NetworkInterface, id),
        Request::DeleteEntropy => (Kind::Entropy, "entropy"),
        _ => return None,
    })
}

/// Whether a request adds or removes a device.
pub(super) fn concerns(request: &Request) -> bool {
    let adds = matches!(
        request,
        Request::PutDrive(_) | Request::PutPmem(_) | Request::PutNetworkInterface(_) | Request::PutEntropy(_)
    );
    adds || removes(request).is_some()
}

/// What a kind is called in messages.
fn noun(kind: Kind) -> &'static str {
    match kind {
        Kind::Drive => "drive",
        Kind::Pmem => "pmem",
        Kind::NetworkInterface => "network interface",
        Kind::Entropy => "entropy device",
    }
}

fn about(kind: Kind, id: &str) -> Value {
    json!({ "device": id, "kind": kind.device() })
}

impl Controller {
    /// Carries out a request that [`concerns`] the devices of a machine that was started.
    /// What came along with it is `gift`.
    pub(super) fn change_devices(&mut self, request: &Request, gift: Gift) -> Result<Reply, Fault> {
        match removes(request) {
            Some((kind, id)) => self.ask_for_device(kind, id),
            None => self.add_device(request, gift),
        }
    }

    /// Adds the device that `request` describes to the machine.
    fn add_device(&mut self, request: &Request, gift: Gift) -> Result<Reply, Fault> {
        self.phase.after(Verb::Change)?;
        let mut handed = Handed::default();
        handed.keep(gift)?;
        let mmds = self.mmds.clone();
        let Some(live) = &mut self.live else { return Ok(Reply::Done) };
        live.vm.has_slots().map_err(|e| Fault::from_error(e.kind(), &e))?;
        let mut spec = self.spec.clone();
        let (kind, id, extra) = match request {
            Request::PutDrive(drive) => {
                spec.put_drive(drive.clone());
                (Kind::Drive, drive.drive_id.as_str(), Extra::Drive(drive))
            }
            Request::PutPmem(pmem) => {
                spec.put_pmem(pmem.clone());
                (Kind::Pmem, pmem.id.as_str(), Extra::Pmem(pmem))
            }
            Request::PutNetworkInterface(card) => {
                spec.put_network_interface(card.clone());
                let named = |m: &&Arc<Mmds>| m.config().interfaces.contains(&card.iface_id);
                if let Some(mmds) = mmds.as_ref().filter(named) {
                    let config = spec.mmds_config.get_or_insert_with(|| metadata::described(mmds));
                    config.network_interfaces.push(card.iface_id.clone());
                }
                let extra = Extra::NetworkInterface(card, mmds.as_ref());
                (Kind::NetworkInterface, card.iface_id.as_str(), extra)
            }
            Request::PutEntropy(entropy) => {
                spec.entropy = Some(*entropy);
                (Kind::Entropy, "entropy", Extra::Entropy(entropy))
            }
            _ => return Err(Fault::new(FaultKind::Conflict, crate::phase::TOO_LATE)),
        };
        must_be_new(&self.spec, kind, id)?;
        can_come_late(&self.spec, extra)?;
        spec.check_parts()?;
        live.vm.add(extra, &handed).map_err(|e| Fault::from_error(e.kind(), &e))?;
        self.spec = spec;
        self.removals.remind_later();
        self.announce("DeviceAdded", about(kind, id));
        Ok(Reply::Done)
    }

    /// Asks the guest for a device, and takes it without asking where nobody is there to answer.
    fn ask_for_device(&mut self, kind: Kind, id: &str) -> Result<Reply, Fault> {
        let slot = self.removable(kind, id)?;
        let Some(live) = &mut self.live else { return Ok(Reply::Done) };
        if self.phase == Phase::Paused {
            if live.vm.is_driven(slot) {
                self.phase.after(Verb::Press)?;
            }
            if live.vm.take_out(slot) {
                let forgotten = live.vm.forget(slot);
                self.removed(slot, forgotten);
            }
            return Ok(Reply::Done);
        }
        live.vm.ask_back(slot);
        let deadline = Instant::now() + PATIENCE;
        match self.removals.pending.iter_mut().find(|removal| removal.slot == slot) {
            Some(removal) => removal.deadline = deadline,
            None => {
                let id = id.to_owned();
                self.removals.pending.push(Removal { kind, id, slot, deadline, waiting: Vec::new() });
            }
        }
        self.removals.remind_later();
        Ok(Reply::Done)
    }

    /// Takes a device away at once, whatever the guest does with it.
    pub(super) fn force_device(&mut self, kind: Kind, id: &str) -> Result<Reply, Fault> {
        self.phase.after(Verb::Change)?;
        let slot = self.removable(kind, id)?;
        let Some(live) = &mut self.live else { return Ok(Reply::Done) };
        let alone = !live.vm.is_driven(slot) && live.vm.take_out(slot);
        let forgotten = if alone { live.vm.forget(slot) } else { live.vm.sever(slot) };
        self.removed(slot, forgotten);
        self.removals.remind_later();
        Ok(Reply::Done)
    }

    /// The slot of a device that may be removed.
    fn removable(&self, kind: Kind, id: &str) -> Result<u8, Fault> {
        let slot = match &self.live {
            Some(live) => live.vm.slot_of(kind, id).map_err(|e| Fault::from_error(e.kind(), &e))?,
            None => None,
        };
        if is_root(&self.spec, kind, id) {
            let text = format!("Cannot unplug root device: the guest runs from {} {id:?}", noun(kind));
            return Err(Fault::new(FaultKind::Invalid, text));
        }
        slot.ok_or_else(|| {
            let text = format!("Device not found: the machine has no {} {id:?}", noun(kind));
            Fault::new(FaultKind::NotFound, text)
        })
    }

    /// Lets a client wait for a removal; false when there is nothing to wait for.
    pub(super) fn wait_for_removal(&mut self, kind: Kind, id: &str, ticket: Ticket) -> bool {
        let mut pending = self.removals.pending.iter_mut();
        let found = pending.find(|removal| removal.kind == kind && removal.id == id);
        found.map(|removal| removal.waiting.push(ticket)).is_some()
    }

    /// The guest has emptied a slot.
    pub(super) fn slot_emptied(&mut self, slot: u8) {
        let forgotten = self.live.as_mut().and_then(|live| live.vm.emptied(slot));
        self.removed(slot, forgotten);
    }

    /// What was in `slot` is closed and forgotten: tells everybody.
    fn removed(&mut self, slot: u8, forgotten: Option<(Kind, String)>) {
        let Some((kind, id)) = forgotten else { return };
        drop_from(&mut self.spec, kind, &id);
        let at = self.removals.pending.iter().position(|removal| removal.slot == slot);
        if let Some(removal) = at.map(|at| self.removals.pending.swap_remove(at)) {
            self.answer_all(removal.waiting, &Response::done());
        }
        self.announce("DeviceRemoved", about(kind, &id));
    }

    /// Does what time has come for: reminds the guest, gives removals up.
    pub(super) fn attend_removals(&mut self) {
        let now = Instant::now();
        if let Some((at, left)) = self.removals.reminder.filter(|(at, _)| *at <= now) {
            let running = self.phase == Phase::Running;
            let unread = self.live.as_ref().is_some_and(|live| live.vm.remind());
            let left = if running { left.saturating_sub(1) } else { left };
            self.removals.reminder = (unread && left > 0).then_some((at + REMINDER, left));
        }
        while let Some(at) = self.removals.pending.iter().position(|removal| removal.deadline <= now) {
            self.give_up(at);
        }
    }

    /// The guest had its time for the removal numbered `at`.
    fn give_up(&mut self, at: usize) {
        let (Some(live), Some(removal)) = (&mut self.live, self.removals.pending.get_mut(at)) else { return };
        let slot = removal.slot;
        if !live.vm.is_driven(slot) {
            // If it is empty already, its guest has just said so, and that comes next.
            removal.deadline += REMINDER;
            let forgotten = if live.vm.take_out(slot) { live.vm.forget(slot) } else { None };
            return self.removed(slot, forgotten);
        }
        let Removal { kind, id, waiting, .. } = self.removals.pending.swap_remove(at);
        let (seconds, noun) = (PATIENCE.as_secs(), noun(kind));
        let text = format!(
            "The guest has not given {noun} {id:?} back within {seconds} s; the device is removed when it \
             does. Asking again reminds it, and ?force=true does not wait for it"
        );
        log::warn!("{text}");
        let fault = Err(Fault::new(FaultKind::Conflict, text));
        self.answer_all(waiting, &super::http::rendered(&fault));
        self.announce("DeviceRemovalUnanswered", about(kind, &id));
    }

    /// Tells those who wait for a removal that there is no machine any more.
    pub(super) fn abandon_removals(&mut self) {
        let waiting: Vec<_> = self.removals.pending.drain(..).flat_map(|removal| removal.waiting).collect();
        let fault = Err(Fault::new(FaultKind::Conflict, "The machine has ended"));
        self.answer_all(waiting, &super::http::rendered(&fault));
    }

    fn answer_all(&mut self, waiting: Vec<Ticket>, response: &Response) {
        for ticket in waiting {
            match &mut self.server {
                Some(server) => drop(server.answer(ticket, response)),
                // It is calling, and gets this when it has done so.
                None => self.removals.unanswered.push((ticket, response.clone())),
            }
        }
    }
}

fn must_be_new(spec: &Spec, kind: Kind, id: &str) -> Result<(), Fault> {
    let taken = match kind {
        Kind::Drive => spec.drives.iter().any(|drive| drive.drive_id == id),
        Kind::Pmem => spec.pmem.iter().any(|pmem| pmem.id == id),
        Kind::NetworkInterface => spec.network_interfaces.iter().any(|card| card.iface_id == id),
        Kind::Entropy => spec.entropy.is_some(),
    };
    if taken {
        let text =
            format!("Device ID in use: the machine has {} {id:?} already; remove it first", noun(kind));
        return Err(Fault::new(FaultKind::Conflict, text));
    }
    Ok(())
}

/// Refuses what only a machine that starts can have.
fn can_come_late(spec: &Spec, extra: Extra<'_>) -> Result<(), Fault> {
    let wrong = |text: String| Err(Fault::new(FaultKind::Invalid, text));
    match extra {
        Extra::Drive(api::spec::Drive { is_root_device: true, drive_id: id, .. })
        | Extra::Pmem(api::spec::Pmem { root_device: true, id, .. }) => {
            wrong(format!("{id:?} cannot be the root device: the guest has started from another one"))
        }
        Extra::NetworkInterface(card, _) if card.host_dev_fd.is_some() => wrong(format!(
            "Interface {:?} has host_dev_fd, which names a descriptor inherited at the start; use \
             host_dev_name",
            card.iface_id
        )),
        Extra::NetworkInterface(card, _) => {
            let same =
                |mac: &String| card.guest_mac.as_ref().is_some_and(|own| own.eq_ignore_ascii_case(mac));
            let mut others = spec.network_interfaces.iter();
            match others.find(|other| other.guest_mac.as_ref().is_some_and(same)) {
                Some(other) => wrong(format!(
                    "The MAC address of interface {:?} is already in use by interface {:?}",
                    card.iface_id, other.iface_id
                )),
                None => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

fn is_root(spec: &Spec, kind: Kind, id: &str) -> bool {
    match kind {
        Kind::Drive => spec.drives.iter().any(|drive| drive.drive_id == id && drive.is_root_device),
        Kind::Pmem => spec.pmem.iter().any(|pmem| pmem.id == id && pmem.root_device),
        Kind::NetworkInterface | Kind::Entropy => false,
    }
}

fn drop_from(spec: &mut Spec, kind: Kind, id: &str) {
    match kind {
        Kind::Drive => spec.drives.retain(|drive| drive.drive_id != id),
        Kind::Pmem => spec.pmem.retain(|pmem| pmem.id != id),
        Kind::NetworkInterface => {
            spec.network_interfaces.retain(|card| card.iface_id != id);
            if let Some(mmds) = &mut spec.mmds_config {
                mmds.network_interfaces.retain(|name| name != id);
            }
            // The service goes on, and an interface of that name comes back to it.
            spec.mmds_config = spec.mmds_config.take().filter(|mmds| !mmds.network_interfaces.is_empty());
        }
        Kind::Entropy => spec.entropy = None,
    }
}

#[cfg(test)]
mod tests {
    use api::spec::{Drive, Entropy, MmdsConfig, NetworkInterface, Pmem};

    use super::*;

    fn card(id: &str, mac: Option<&str>) -> NetworkInterface {
        let text = json!({ "iface_id": id, "host_dev_name": "tap0", "guest_mac": mac });
        serde_json::from_value(text).unwrap()
    }

    fn spec() -> Spec {
        Spec {
            drives: vec![Drive { drive_id: "root".to_owned(), is_root_device: true, ..Drive::default() }],
            pmem: vec![Pmem { id: "p".to_owned(), ..Pmem::default() }],
            network_interfaces: vec![card("eth0", Some("06:00:00:00:00:0A")), card("eth1", None)],
            entropy: Some(Entropy::default()),
            mmds_config: Some(MmdsConfig {
                network_interfaces: vec!["eth0".to_owned(), "eth1".to_owned()],
                ..MmdsConfig::default()
            }),
            ..Spec::default()
        }
    }

    #[test]
    fn an_id_is_taken_among_its_own_kind() {
        let spec = spec();
        for (kind, id) in [(Kind::Drive, "root"), (Kind::Pmem, "p"), (Kind::NetworkInterface, "eth0")] {
            let fault = must_be_new(&spec, kind, id).unwrap_err();
            assert!(fault.message.starts_with("Device ID in use"), "{fault}");
            must_be_new(&spec, kind, "other").unwrap();
        }
        must_be_new(&spec, Kind::Pmem, "root").unwrap();
        assert!(must_be_new(&spec, Kind::Entropy, "entropy").is_err());
        assert!(is_root(&spec, Kind::Drive, "root") && !is_root(&spec, Kind::Pmem, "p"));
    }

    #[test]
    fn what_only_a_start_can_have_does_not_come_late() {
        let spec = spec();
        let refused = |extra: Extra<'_>| can_come_late(&spec, extra).unwrap_err().message;
        assert!(refused(Extra::Drive(&spec.drives[0])).contains("root device"));
        assert!(refused(Extra::Pmem(&Pmem { root_device: true, ..Pmem::default() })).contains("root device"));
        let same = card("eth2", Some("06:00:00:00:00:0a"));
        assert!(
            refused(Extra::NetworkInterface(&same, None)).contains("already in use by interface \"eth0\"")
        );
        let inherited = NetworkInterface { host_dev_fd: Some(7), ..card("eth2", None) };
        assert!(refused(Extra::NetworkInterface(&inherited, None)).contains("host_dev_name"));
        can_come_late(&spec, Extra::NetworkInterface(&card("eth2", None), None)).unwrap();
    }

    #[test]
    fn a_removed_device_leaves_nothing_in_the_specification() {
        let mut spec = spec();
        drop_from(&mut spec, Kind::NetworkInterface, "eth0");
        assert_eq!(spec.mmds_config.as_ref().unwrap().network_interfaces, ["eth1"]);
        for (kind, id) in [
            (Kind::NetworkInterface, "eth1"),
            (Kind::Drive, "root"),
            (Kind::Pmem, "p"),
            (Kind::Entropy, "entropy"),
        ] {
            drop_from(&mut spec, kind, id);
        }
        assert_eq!(spec, Spec::default());
        spec.check_parts().unwrap();
    }
}
