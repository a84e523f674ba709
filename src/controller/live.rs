//! Requests after the start: they change the machine.

use api::{
    Fault, FaultKind, Reply, Request, Spec,
    spec::{DrivePatch, MachineConfigPatch, NetworkInterfacePatch, RateLimiter},
};
use devices::virtio::{Change, Report, balloon::BalloonReport};
use serde_json::{Map, Value, json};

use super::sockets::Sockets;
use crate::{
    debug::Debugger,
    phase::Phase,
    vm::{Vm, VmError, build::limiter},
};

/// A machine that was started.
pub struct Live {
    /// The machine.
    pub vm: Vm,
    /// Its console sockets.
    pub sockets: Sockets,
    /// The door for gdb, if there is one.
    pub debugger: Option<Debugger>,
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
            Request::BalloonStatistics => return self.balloon_statistics(),
            Request::HintingStatus => {
                let report = self.balloon()?;
                let status = json!({ "host_cmd": report.host_cmd, "guest_cmd": report.guest_cmd });
                return Ok(Reply::Json(status));
            }
            Request::PatchBalloon(patch) => {
                let balloon = spec.balloon.as_mut().ok_or_else(|| missing("balloon"))?;
                self.update("virtio-balloon", "balloon", &Change::BalloonTarget(patch.amount_mib))?;
                balloon.amount_mib = patch.amount_mib;
            }
            Request::PatchBalloonStatistics(patch) => {
                let balloon = spec.balloon.as_mut().ok_or_else(|| missing("balloon"))?;
                let seconds = patch.stats_polling_interval_s;
                self.update("virtio-balloon", "balloon", &Change::BalloonStatistics(seconds))?;
                balloon.stats_polling_interval_s = seconds;
            }
            Request::StartHinting(start) => {
                let acknowledge_on_stop = start.acknowledge_on_stop;
                self.update("virtio-balloon", "balloon", &Change::HintingStart { acknowledge_on_stop })?;
            }
            Request::MemoryHotplug => {
                let config = spec.memory_hotplug.as_ref().ok_or_else(|| missing("pluggable memory"))?;
                let report = match self.vm.device("virtio-mem", "memory").map(|device| device.report()) {
                    Some(Report::Memory(report)) => report,
                    _ => return Err(missing("pluggable memory")),
                };
                return Ok(Reply::Json(json!({
                    "total_size_mib": config.total_size_mib,
                    "block_size_mib": config.block_size_mib,
                    "slot_size_mib": config.slot_size_mib,
                    "plugged_size_mib": report.plugged >> 20,
                    "requested_size_mib": report.requested >> 20,
                })));
            }
            Request::PatchMemoryHotplug(patch) => {
                let bytes = u64::from(patch.requested_size_mib) << 20;
                self.update("virtio-mem", "memory", &Change::MemoryRequested(bytes))?;
            }
            Request::PatchPmem(patch) => {
                let pmem = spec.pmem.iter_mut().find(|p| p.id == patch.id);
                let pmem = pmem.ok_or_else(|| unknown("pmem", &patch.id))?;
                if let Some(limits) = &patch.rate_limiter {
                    self.update("virtio-pmem", &patch.id, &Change::Limits(limiter(Some(limits))))?;
                    merge(&mut pmem.rate_limiter, limits);
                }
            }
            Request::StopHinting => self.update("virtio-balloon", "balloon", &Change::HintingStop)?,
            Request::PatchMachineConfig(patch) => self.add_vcpus(spec, &patch)?,
            Request::Nmi => self.vm.inject_nmi().map_err(|e| fault(&e))?,
            Request::CoreDump(path) => {
                let dump = || self.vm.core_dump(&path);
                let debugger = self.debugger.as_ref();
                let written = debugger.map_or_else(dump, |debugger| debugger.without_breakpoints(dump));
                let written = written.map_err(|e| fault(&e))?;
                log::info!("Wrote {} bytes of a core file to {}", written.data, path.display());
            }
            Request::Counters => return Ok(Reply::Json(self.counters())),
            Request::PatchDrive(patch) => self.patch_drive(spec, patch)?,
            Request::PatchNetworkInterface(patch) => self.patch_network_interface(spec, &patch)?,
            // Both can be repeated safely.
            Request::Pause if phase == Phase::Running => self.vm.pause().map_err(|e| fault(&e))?,
            Request::Resume if phase == Phase::Paused => self.vm.resume().map_err(|e| fault(&e))?,
            Request::Pause | Request::Resume => {}
            Request::PowerButton => self.vm.press_power_button().map_err(|e| fault(&e))?,
            Request::CtrlAltDel => self.vm.press_ctrl_alt_del().map_err(|e| fault(&e))?,
            _ => return Err(Fault::new(FaultKind::Conflict, crate::phase::TOO_LATE)),
        }
        Ok(Reply::Done)
    }

    /// A started machine can get more vCPUs; nothing else of its configuration changes.
    fn add_vcpus(&mut self, spec: &mut Spec, patch: &MachineConfigPatch) -> Result<(), Fault> {
        let only_vcpus = MachineConfigPatch { vcpu_count: patch.vcpu_count, ..Default::default() };
        let wanted = patch.vcpu_count.filter(|_| *patch == only_vcpus && self.vm.has_room_for_vcpus());
        let wanted = wanted.ok_or_else(|| Fault::new(FaultKind::Conflict, crate::phase::TOO_LATE))?;
        let mut changed = spec.clone();
        changed.machine_config.vcpu_count = wanted;
        if wanted <= spec.machine_config.vcpus_max() {
            changed.check_parts()?;
        }
        let debugger = &mut self.debugger;
        let added = self.vm.add_vcpus(wanted, |vm| {
            debugger.iter_mut().for_each(|debugger| debugger.vcpus_added(vm));
        });
        added.map_err(|e| {
            let kind = if e.is_invalid() { FaultKind::Invalid } else { FaultKind::Internal };
            Fault::from_error(kind, &e)
        })?;
        *spec = changed;
        Ok(())
    }

    /// Serves a debugger that has come or asks something.
    pub fn debug(&mut self) {
        if let Some(debugger) = &mut self.debugger {
            debugger.serve(&mut self.vm);
        }
    }

    /// A vCPU met what a debugger has set.
    pub fn debugged(&mut self) {
        if let Some(debugger) = &mut self.debugger {
            debugger.met(&mut self.vm);
        }
    }

    /// The guest is over.
    pub fn end(&mut self, code: i32) {
        if let Some(debugger) = &mut self.debugger {
            debugger.ended(&mut self.vm, code);
        }
    }

    fn balloon(&self) -> Result<BalloonReport, Fault> {
        match self.vm.device("virtio-balloon", "balloon").map(|device| device.report()) {
            Some(Report::Balloon(report)) => Ok(report),
            _ => Err(missing("balloon")),
        }
    }

    fn balloon_statistics(&self) -> Result<Reply, Fault> {
        let report = self.balloon()?;
        let stats = report.stats.as_ref().ok_or_else(|| {
            let text =
                "The balloon was made without statistics; set stats_polling_interval_s before the start";
            Fault::new(FaultKind::Conflict, text)
        })?;
        let mut answer = json!({
            "target_pages": report.target_pages,
            "actual_pages": report.actual_pages,
            "target_mib": report.target_mib,
            "actual_mib": report.actual_mib,
        });
        // What this guest does not tell is left out.
        if let (Some(fields), Ok(Value::Object(told))) = (answer.as_object_mut(), serde_json::to_value(stats))
        {
            fields.extend(told.into_iter().filter(|(_, value)| !value.is_null()));
        }
        Ok(Reply::Json(answer))
    }

    fn patch_drive(&self, spec: &mut Spec, patch: DrivePatch) -> Result<(), Fault> {
        let drive = spec.drives.iter_mut().find(|d| d.drive_id == patch.drive_id);
        let drive = drive.ok_or_else(|| unknown("drive", &patch.drive_id))?;
        if let Some(path) = patch.path_on_host {
            self.update("virtio-block", &patch.drive_id, &Change::Backing(Some(path.clone())))?;
            (drive.path_on_host, drive.by_descriptor) = (path, false);
        } else if patch.rate_limiter.is_none() {
            self.update("virtio-block", &patch.drive_id, &Change::Backing(None))?;
        }
        if let Some(limits) = &patch.rate_limiter {
            self.update("virtio-block", &patch.drive_id, &Change::Limits(limiter(Some(limits))))?;
            merge(&mut drive.rate_limiter, limits);
        }
        Ok(())
    }

    fn patch_network_interface(&self, spec: &mut Spec, patch: &NetworkInterfacePatch) -> Result<(), Fault> {
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

    fn counters(&self) -> Value {
        let mut devices = Map::new();
        for (device, counter, count) in self.vm.counters() {
            let entry = devices.entry(device).or_insert_with(|| Value::Object(Default::default()));
            if let Some(entry) = entry.as_object_mut() {
                entry.insert(counter.to_owned(), count.into());
            }
        }
        let exits: Map<_, _> =
            self.vm.exits().into_iter().map(|(kind, count)| (kind.to_owned(), count.into())).collect();
        json!({ "devices": devices, "exits": exits })
    }
}

/// What the limits are after a live change: a bucket that is absent stays.
fn merge(old: &mut Option<RateLimiter>, new: &RateLimiter) {
    let before = old.unwrap_or_default();
    *old = Some(RateLimiter { bandwidth: new.bandwidth.or(before.bandwidth), ops: new.ops.or(before.ops) });
}

fn fault(error: &VmError) -> Fault {
    Fault::from_error(error.kind(), error)
}

fn missing(what: &str) -> Fault {
    Fault::new(FaultKind::NotFound, format!("The machine has no {what}"))
}

fn unknown(kind: &str, id: &str) -> Fault {
    Fault::new(FaultKind::NotFound, format!("The machine has no {kind} {id:?}"))
}
