//! Requests after the start: they change the machine.

use api::{
    Fault, FaultKind, Reply, Request, Spec,
    spec::{DrivePatch, NetworkInterfacePatch, RateLimiter},
};
use devices::{limiter::LimiterConfig, virtio::Change};

use crate::{
    phase::Phase,
    vm::{Vm, VmError, build},
};

/// A machine that was started.
pub struct Live {
    /// The machine.
    pub vm: Vm,
}

impl Live {
    /// Carries out `request` on a machine in `phase`. `spec` is kept true: it says at any time
    /// what the machine is.
    pub fn change(&mut self, spec: &mut Spec, request: Request, phase: Phase) -> Result<Reply, Fault> {
        match request {
            Request::Balloon => match &spec.balloon {
                Some(balloon) => return Ok(Reply::Balloon(balloon.clone())),
                None => return Err(missing("balloon")),
            },
            Request::Counters => return Ok(Reply::Json(self.counters())),
            Request::PatchDrive(patch) => self.patch_drive(spec, patch)?,
            Request::PatchNetworkInterface(patch) => self.patch_network_interface(spec, patch)?,
            // Both can be repeated safely.
            Request::Pause if phase == Phase::Running => self.vm.pause().map_err(fault)?,
            Request::Resume if phase == Phase::Paused => self.vm.resume().map_err(fault)?,
            Request::Pause | Request::Resume => {}
            Request::PowerButton => self.vm.press_power_button().map_err(fault)?,
            Request::CtrlAltDel => self.vm.press_ctrl_alt_del().map_err(fault)?,
            Request::CreateSnapshot => {
                return Err(Fault::new(FaultKind::Unsupported, "This version cannot take snapshots yet"));
            }
            _ => return Err(Fault::new(FaultKind::Conflict, crate::phase::TOO_LATE)),
        }
        Ok(Reply::Done)
    }

    fn patch_drive(&self, spec: &mut Spec, patch: DrivePatch) -> Result<(), Fault> {
        let drive = spec.drives.iter_mut().find(|d| d.drive_id == patch.drive_id);
        let drive = drive.ok_or_else(|| unknown("drive", &patch.drive_id))?;
        if let Some(path) = patch.path_on_host {
            self.update("virtio-block", &patch.drive_id, &Change::Backing(Some(path.clone())))?;
            drive.path_on_host = path;
        } else if patch.rate_limiter.is_none() {
            self.update("virtio-block", &patch.drive_id, &Change::Backing(None))?;
        }
        if let Some(limits) = &patch.rate_limiter {
            self.update("virtio-block", &patch.drive_id, &Change::Limits(limiter(Some(limits))))?;
            merge(&mut drive.rate_limiter, limits);
        }
        Ok(())
    }

    fn patch_network_interface(&self, spec: &mut Spec, patch: NetworkInterfacePatch) -> Result<(), Fault> {
        let interface = spec.network_interfaces.iter_mut().find(|n| n.iface_id == patch.iface_id);
        let interface = interface.ok_or_else(|| unknown("network interface", &patch.iface_id))?;
        let (rx, tx) = (patch.rx_rate_limiter, patch.tx_rate_limiter);
        let change = Change::DirectionLimits { rx: limiter(rx.as_ref()), tx: limiter(tx.as_ref()) };
        self.update("virtio-net", &patch.iface_id, &change)?;
        rx.iter().for_each(|limits| merge(&mut interface.rx_rate_limiter, limits));
        tx.iter().for_each(|limits| merge(&mut interface.tx_rate_limiter, limits));
        Ok(())
    }

    fn update(&self, kind: &str, id: &str, change: &Change) -> Result<(), Fault> {
        let device = self.vm.device(kind, id).ok_or_else(|| unknown(kind, id))?;
        device.update(change).map_err(|e| Fault::from_error(FaultKind::Invalid, &e))
    }

    fn counters(&self) -> serde_json::Value {
        let mut devices = serde_json::Map::new();
        for (device, counter, count) in self.vm.counters() {
            let entry =
                devices.entry(device).or_insert_with(|| serde_json::Value::Object(Default::default()));
            if let Some(entry) = entry.as_object_mut() {
                entry.insert(counter.to_owned(), count.into());
            }
        }
        let exits: serde_json::Map<_, _> =
            self.vm.exits().into_iter().map(|(kind, count)| (kind.to_owned(), count.into())).collect();
        serde_json::json!({ "devices": devices, "exits": exits })
    }
}

/// Limits as devices take them.
fn limiter(limits: Option<&RateLimiter>) -> LimiterConfig {
    build::limiter(limits)
}

/// What the limits are after a live change: a bucket that is absent stays.
fn merge(old: &mut Option<RateLimiter>, new: &RateLimiter) {
    let before = old.unwrap_or_default();
    *old = Some(RateLimiter { bandwidth: new.bandwidth.or(before.bandwidth), ops: new.ops.or(before.ops) });
}

fn fault(error: VmError) -> Fault {
    Fault::from_error(error.kind(), &error)
}

fn missing(what: &str) -> Fault {
    Fault::new(FaultKind::NotFound, format!("The machine has no {what}"))
}

fn unknown(kind: &str, id: &str) -> Fault {
    Fault::new(FaultKind::NotFound, format!("The machine has no {kind} {id:?}"))
}
