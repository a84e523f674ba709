//! Becoming the machine of a snapshot.
//!
//! ```text
//!   snapshot_path ─┬─ directory: chain, manifest ─┐
//!                  └─ file: pair + mem_backend ───┴► specification ◄─ overrides
//!                                                         │
//!                        state, memory ──► build (as every machine) ──► Paused ─► Running
//! ```
//!
//! A snapshot may be hostile: its specification is checked as one that a client sends, its state by
//! the parts that own it. And it may be dear: nothing of it is written to, and a drive that was
//! taken along is not used for writing, so that it can be loaded any number of times.
//!
//! A load that fails leaves the process as it was; it can be asked again.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use api::{
    Fault, FaultKind, Request, Spec,
    spec::{self, HugePages, LoadHugePages, LoadSnapshot, MemBackendType},
};
use arch::{irqchip::ClockPolicy, needs::Needs};
use devices::state::Section;
use serde_json::json;

use super::{Controller, snapshot::Lineage};
use crate::{
    pager::{
        Broken, Prefetch,
        working_set::{Place, WorkingSet},
    },
    snapshot::{
        Chain, Pair, Region, Search, SnapshotError,
        manifest::{self, Json},
        pair,
    },
    vm::{
        Ending,
        build::{Origin, Restored, Source},
        handed::{Gift, Handed},
        lazy::{self, Lazy, Server},
        saved::Saved,
        torn,
    },
};

/// Why a load comes too late. The words are Firecracker's.
const CONFIGURED: &str = "Loading a microVM snapshot not allowed after configuring boot-specific resources.";

/// A snapshot that was opened.
struct Opened {
    machine: Json,
    cpu: Json,
    regions: Vec<Region>,
    sections: Vec<Section>,
    pages: Pages,
    /// Drives that were taken along, with the files that hold them.
    drives: Vec<(String, PathBuf)>,
    lineage: Option<Lineage>,
    /// Where a record of what the guest needs first belongs.
    set: Option<Place>,
}

/// Where its memory is.
enum Pages {
    File(File),
    Chain(Arc<Chain>),
    /// With the process that listens there.
    Handler(PathBuf),
}

impl Controller {
    /// `PUT /snapshot/load`. The machine is paused afterwards.
    pub(super) fn load_snapshot(&mut self, load: &LoadSnapshot, arrived: Vec<OwnedFd>) -> Result<(), Fault> {
        load.check()?;
        if self.is_configured() {
            return Err(Fault::new(FaultKind::Conflict, CONFIGURED));
        }
        let opened = open(load)?;
        let mut spec: Spec = opened.machine.read().map_err(|e| Fault {
            kind: FaultKind::Invalid,
            message: "The snapshot's machine cannot be read".to_owned(),
            causes: vec![api::explain_json(&e)],
        })?;
        self.handed = given(&mut spec, load, arrived)?;
        apply(&mut spec, load)?;
        let drives = opened.drives;
        check_drives(&mut spec, load, &drives)?;
        // Those of this process, not of the one that wrote it.
        spec.logger = self.spec.logger.clone();
        spec.metrics = self.spec.metrics.clone();
        spec.machine_config.gdb_socket_path = None;
        spec.check_parts()?;
        check_memory(&spec, &opened.regions)?;

        let invalid = |e: &(dyn std::error::Error + 'static)| Fault::from_error(FaultKind::Invalid, e);
        let mut saved = Saved::decode(opened.sections).map_err(|e| invalid(&e))?;
        let platform = saved.platform().map_err(|e| invalid(&e))?;
        let metadata = saved.section_if_there("mmds").map_err(|e| invalid(&e))?;
        let needs: Option<Needs> = opened.cpu.read().map_err(|e| Fault {
            kind: FaultKind::Invalid,
            message: "What the snapshot's machine needs of the CPU cannot be read".to_owned(),
            causes: vec![e.to_string()],
        })?;
        let clock = if load.clock_realtime { ClockPolicy::Advance } else { ClockPolicy::Continue };
        let before = std::mem::replace(&mut self.spec, spec);
        let restored = metadata.map_or(Ok(()), |section| self.restore_metadata(&section));
        let known = opened.set.as_ref().filter(|_| load.prefetch == spec::Prefetch::WorkingSet);
        let known = known.filter(|_| !load.record_working_set).and_then(Place::read);
        // Whoever comes first leaves a record for those who follow.
        let wanted =
            load.record_working_set || load.prefetch == spec::Prefetch::WorkingSet && known.is_none();
        let place = opened.set.filter(|_| wanted);
        let source = || self.source(opened.pages, load.prefetch, (known.as_ref(), place.is_some()));
        let built = restored.and_then(|()| source());
        let built = built.and_then(|memory| {
            self.build(platform, Origin::Saved(Box::new(Restored { saved, needs, memory, clock })))
        });
        if let Err(fault) = built {
            self.spec = before;
            self.handed.clear();
            self.mmds = None;
            return Err(fault);
        }
        if let (Some(known), Some(live)) = (known, &mut self.live) {
            live.vm.prefetch(known);
        }
        self.unrecorded = place;
        self.lineage = opened.lineage;
        let path = load.snapshot_path.display().to_string();
        self.announce("SnapshotLoaded", json!({ "snapshot_path": path }));
        Ok(())
    }

    /// Where RAM comes from. With a working set, or with its record wanted, when our pager brings
    /// it.
    fn source(
        &self,
        pages: Pages,
        prefetch: spec::Prefetch,
        (known, record): (Option<&WorkingSet>, bool),
    ) -> Result<Source, Fault> {
        let huge = self.spec.machine_config.huge_pages == HugePages::Huge2M;
        let chain = match pages {
            Pages::File(file) => return Ok(Source::File(Arc::new(file))),
            Pages::Handler(path) => {
                return Ok(Source::Lazy(Lazy::new(Server::Handler(path), false, self.broken())));
            }
            Pages::Chain(chain) => chain,
        };
        let layers = lazy::layers(&chain).map_err(|e| Fault::from_error(FaultKind::Internal, &e))?;
        if let Some(layers) = layers.filter(|_| !huge) {
            return Ok(Source::Layers(layers));
        }
        let first = known.map(|known| known.touched.clone()).unwrap_or_default();
        let prefetch = Prefetch { first, all: prefetch == spec::Prefetch::All };
        Ok(Source::Lazy(Lazy::new(Server::Chain(chain, prefetch), record, self.broken())))
    }

    /// Ends the machine because pages of its memory cannot be had any more. This thread may itself
    /// wait for such a page, so it has a moment to end in order, and then the process ends.
    fn broken(&self) -> Broken {
        let handle = self.handle();
        Box::new(move |reason| {
            log::error!("Guest memory is lost: {reason}");
            handle.ended(Ending::Broken(reason.clone()));
            std::thread::sleep(torn::ORDERLY);
            eprintln!("nacelle: {}", Ending::Broken(reason).reason());
            // SAFETY: the process ends here and now, whatever its threads hold or wait for.
            unsafe { libc::_exit(1) };
        })
    }

    /// The guest runs for the first time since it was loaded.
    pub(super) fn record_working_set(&mut self) {
        let (Some(place), Some(live)) = (self.unrecorded.take(), &self.live) else { return };
        if let Err(error) = live.vm.record_working_set(place) {
            log::warn!("What the guest needs first is not recorded: {error}");
        }
    }

    /// Whether anything but what belongs to the process was configured.
    fn is_configured(&self) -> bool {
        let mut fresh = Spec { logger: self.spec.logger.clone(), ..Spec::default() };
        fresh.metrics = self.spec.metrics.clone();
        fresh.machine_config.transport = self.spec.machine_config.transport;
        self.spec != fresh || self.mmds.is_some()
    }
}

fn fault(error: &SnapshotError) -> Fault {
    Fault::from_error(FaultKind::Invalid, error)
}

fn open(load: &LoadSnapshot) -> Result<Opened, Fault> {
    let path = &load.snapshot_path;
    let is_file = pair::is_file(path).map_err(|e| Fault {
        kind: FaultKind::Invalid,
        message: format!("Snapshot {} cannot be opened", path.display()),
        causes: vec![e.to_string()],
    })?;
    let backend = load.backend();
    let handler = backend.as_ref().filter(|b| b.backend_type == MemBackendType::Uffd);
    let handler = handler.map(|b| Pages::Handler(b.backend_path.clone()));
    if is_file {
        let Some(backend) = backend else {
            let text = "missing field: either `mem_backend` or `mem_file_path` is required";
            return Err(Fault::new(FaultKind::Invalid, text));
        };
        let pair = Pair::open(path).map_err(|e| fault(&e))?;
        let pages = match handler {
            Some(handler) => handler,
            None => Pages::File(pair.memory(&backend.backend_path).map_err(|e| fault(&e))?),
        };
        let Pair { about, sections } = pair;
        let (machine, cpu, regions) = (about.machine, about.cpu, about.regions);
        let (drives, lineage, set) = (Vec::new(), None, None);
        return Ok(Opened { machine, cpu, regions, sections, pages, drives, lineage, set });
    }
    if backend.is_some() && handler.is_none() {
        let text =
            format!("{} is a directory, which holds its memory; leave out mem_backend", path.display());
        return Err(Fault::new(FaultKind::Invalid, text));
    }
    let opened = open_directory(path, load).map_err(|e| fault(&e))?;
    match handler {
        Some(pages) => Ok(Opened { pages, set: None, ..opened }),
        None => Ok(opened),
    }
}

fn open_directory(path: &Path, load: &LoadSnapshot) -> Result<Opened, SnapshotError> {
    let search = Search { parents: load.search.clone(), stores: load.search.clone() };
    let chain = Chain::open(path, &search)?;
    let top = chain.top();
    let manifest = top.manifest();
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let lineage = Lineage { path: path.clone(), id: manifest.id, index: manifest.memory.index.digest };
    let taken = |drive: &manifest::Drive| Some((drive.id.clone(), path.join(drive.file.as_ref()?)));
    let drives = manifest.drives.iter().filter_map(taken).collect();
    let (machine, regions) = (manifest.machine.clone(), manifest.memory.regions.clone());
    let (sections, cpu) = (top.sections()?, manifest.cpu.clone());
    let set = Place::of(top).ok();
    let file = top.memory_file().filter(|_| manifest.parent.is_none()).map(File::try_clone);
    let pages = match file.transpose() {
        Ok(Some(file)) => Pages::File(file),
        Ok(None) => Pages::Chain(Arc::new(chain)),
        Err(source) => {
            let what = format!("Memory of snapshot {} cannot be opened", path.display());
            return Err(SnapshotError::Io { what, source });
        }
    };
    Ok(Opened { machine, cpu, regions, sections, pages, drives, lineage: Some(lineage), set })
}

/// Marks what comes as a descriptor, and takes those that came: first of drives, then of
/// interfaces, in the order of the overrides.
fn given(spec: &mut Spec, load: &LoadSnapshot, arrived: Vec<OwnedFd>) -> Result<Handed, Fault> {
    let mut handed = Handed::default();
    let mut arrived = arrived.into_iter();
    for change in load.drive_overrides.iter().filter(|change| change.by_descriptor) {
        let drive = find(&mut spec.drives, |d| d.drive_id == change.drive_id, "drive", &change.drive_id)?;
        (drive.by_descriptor, drive.path_on_host) = (true, PathBuf::new());
        let own = arrived.by_ref().take(1).collect();
        handed.keep(Gift::of(&Request::PutDrive(drive.clone()), own)?)?;
    }
    for change in load.network_overrides.iter().filter(|change| change.by_descriptor) {
        let id = &change.iface_id;
        let card = find(&mut spec.network_interfaces, |n| n.iface_id == *id, "network interface", id)?;
        (card.by_descriptor, card.host_dev_name, card.host_dev_fd) = (true, None, None);
        let own = arrived.by_ref().take(card.num_queue_pairs.into()).collect();
        handed.keep(Gift::of(&Request::PutNetworkInterface(card.clone()), own)?)?;
    }
    match arrived.count() {
        0 => Ok(handed),
        left => Err(Fault::new(
            FaultKind::Invalid,
            format!("{left} descriptors came that no override with by_descriptor asks for"),
        )),
    }
}

/// Makes the overrides.
fn apply(spec: &mut Spec, load: &LoadSnapshot) -> Result<(), Fault> {
    for change in &load.drive_overrides {
        let id = &change.drive_id;
        let drive = find(&mut spec.drives, |d| d.drive_id == *id, "drive", id)?;
        if let Some(path) = &change.path_on_host {
            (drive.path_on_host, drive.by_descriptor) = (path.clone(), false);
        }
    }
    for change in &load.pmem_overrides {
        let pmem = find(&mut spec.pmem, |p| p.id == change.id, "pmem", &change.id)?;
        pmem.path_on_host = change.path_on_host.clone();
    }
    for change in &load.network_overrides {
        let id = &change.iface_id;
        let card = find(&mut spec.network_interfaces, |n| n.iface_id == *id, "network interface", id)?;
        if let Some(name) = &change.host_dev_name {
            (card.host_dev_name, card.host_dev_fd, card.by_descriptor) = (Some(name.clone()), None, false);
        }
        if let Some(mac) = &change.guest_mac {
            card.guest_mac = Some(mac.clone());
        }
    }
    if let Some(change) = &load.vsock_override {
        let vsock = spec.vsock.as_mut();
        let missing = || Fault::new(FaultKind::Invalid, "The snapshot's machine has no vsock device");
        let vsock = vsock.ok_or_else(missing)?;
        vsock.uds_path = change.uds_path.clone();
        vsock.guest_cid = change.guest_cid.unwrap_or(vsock.guest_cid);
    }
    if let Some(serial) = &load.serial_override {
        spec.serial = Some(serial.clone());
    }
    let config = &mut spec.machine_config;
    config.track_dirty_pages = load.track_dirty_pages || load.enable_diff_snapshots;
    config.prefault = load.prefetch == spec::Prefetch::All;
    config.huge_pages = match load.huge_pages {
        LoadHugePages::Snapshot => config.huge_pages,
        LoadHugePages::None => HugePages::None,
        LoadHugePages::Transparent => HugePages::Transparent,
        LoadHugePages::Huge2M => HugePages::Huge2M,
    };
    Ok(())
}

fn find<'a, T>(
    list: &'a mut [T],
    is_it: impl Fn(&T) -> bool,
    kind: &str,
    id: &str,
) -> Result<&'a mut T, Fault> {
    let missing = || Fault::new(FaultKind::Invalid, format!("The snapshot's machine has no {kind} {id:?}"));
    list.iter_mut().find(|entry| is_it(entry)).ok_or_else(missing)
}

/// Drives that were taken along are read where they are, and written nowhere.
fn check_drives(spec: &mut Spec, load: &LoadSnapshot, taken: &[(String, PathBuf)]) -> Result<(), Fault> {
    let overridden = |id: &str| load.drive_overrides.iter().any(|change| change.drive_id == id);
    for drive in spec.drives.iter_mut().filter(|drive| !overridden(&drive.drive_id)) {
        let id = &drive.drive_id;
        let copy = taken.iter().find(|(known, _)| known == id).map(|(_, path)| path);
        match copy {
            Some(path) if drive.is_read_only => drive.path_on_host = path.clone(),
            Some(path) => {
                let text = format!(
                    "Drive {id:?} was taken along in the snapshot and is writable; copy {} and name the copy \
                     in drive_overrides",
                    path.display()
                );
                return Err(Fault::new(FaultKind::Invalid, text));
            }
            None if drive.by_descriptor => {
                let text = format!("Drive {id:?} came as a descriptor; name a file in drive_overrides");
                return Err(Fault::new(FaultKind::Invalid, text));
            }
            None => {}
        }
    }
    let inherited = |n: &spec::NetworkInterface| n.host_dev_fd.is_some() || n.by_descriptor;
    let overridden = |n: &spec::NetworkInterface| {
        let same = |change: &spec::NetworkOverride| change.iface_id == n.iface_id;
        load.network_overrides.iter().any(|c| same(c) && (c.by_descriptor || c.host_dev_name.is_some()))
    };
    match spec.network_interfaces.iter().find(|n| inherited(n) && !overridden(n)) {
        None => Ok(()),
        Some(card) => {
            let text = format!(
                "Interface {:?} had its tap as a descriptor; name a tap in network_overrides",
                card.iface_id
            );
            Err(Fault::new(FaultKind::Invalid, text))
        }
    }
}

/// The memory file must be laid out as the machine's memory is.
fn check_memory(spec: &Spec, regions: &[Region]) -> Result<(), Fault> {
    let mib = spec.machine_config.mem_size_mib;
    let wrong = |text: String| Err(Fault::new(FaultKind::Invalid, text));
    let Some(bytes) = mib.checked_mul(1 << 20) else {
        return wrong(format!("A machine of {mib} MiB is not possible"));
    };
    let mut offset = 0;
    let mut wanted = Vec::new();
    for (base, len) in arch::layout::ram_regions(bytes) {
        wanted.push((base.0, len, offset));
        offset += len;
    }
    let found = |r: &Region| (r.guest_address, r.size, r.offset);
    let pluggable = usize::from(spec.memory_hotplug.is_some());
    let ram = regions.iter().take(wanted.len()).map(found);
    if regions.len() == wanted.len() + pluggable && ram.eq(wanted.iter().copied()) {
        return Ok(());
    }
    wrong(format!(
        "The snapshot's memory of {} regions is not that of a machine of {mib} MiB, which has {}",
        regions.len(),
        wanted.len() + pluggable
    ))
}
