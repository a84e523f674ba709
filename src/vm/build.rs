//! From a specification to a machine: the only builder.
//!
//! Boot, restore, clone and migration all come through here and differ in what is loaded
//! afterwards. The order is the one the parent module argues for.

use std::{
    fs::File,
    io,
    os::{fd::BorrowedFd, unix::fs::FileExt},
    path::PathBuf,
    sync::Arc,
};

use api::{FaultKind, Spec, spec};
use arch::{
    acpi, boot, cpuid,
    irqchip::{self, ClockPolicy},
    kernel::{BootError, BootFile, CommandLine, What},
    layout,
    needs::{Needs, NeedsError},
    regs,
    state::StateShape,
    template::Template,
};
use devices::{
    Memory,
    bus::{Bus, BusError},
    host::Host,
    legacy::{
        i8042::{self, I8042},
        power::{self, Power, PowerEvent},
        processors,
        pvpanic::{self, PvPanic},
    },
    limiter::{BucketConfig, LimiterConfig},
    mmds::Mmds,
    pci::{
        hotplug::{self, Hotplug},
        root::{self, Root},
    },
    virtio::{DeviceError, VirtioDevice, balloon, block, net, rng, severed::Severed, vsock},
};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuFd};

use super::{
    Ending, Vm,
    annex::Annex,
    attach::{AttachError, Places},
    boot_timer::{self, BootTimer},
    capture::{self, Beneath},
    console::{ConsoleError, Consoles},
    cpu,
    faults::Faults,
    generation,
    handed::Handed,
    host::KvmHost,
    kvm::{self, KvmError},
    lazy::{Layers, Lazy, Served},
    loading::{self, Files, Loading},
    memory::{self, MemoryError},
    pages,
    plug::Left,
    processors::Room,
    saved::{Part, Platform, Saved, SavedError},
    torn,
};
use crate::{
    metrics::Milestones,
    pager::PagerError,
    snapshot::extents::{Gathering, Run},
    vcpu::{Buses, Report, Reporter, VcpuError, Vcpus},
};

/// What to build, and who is told.
pub struct Plan<'a> {
    /// The machine.
    pub spec: &'a Spec,
    /// Stamped on the way.
    pub milestones: Arc<Milestones>,
    /// Told of trouble of devices and crashes of the guest.
    pub faults: Arc<Faults>,
    /// Called, from any thread, when the guest has given back what was in a PCI slot.
    pub ejected: hotplug::Ejected,
    /// Told, from any thread, when the guest ends or meets what a debugger has set.
    pub reporter: Reporter,
    /// What is shown beside what the specification names. A guest spends some thirty exits on
    /// finding a keyboard controller, so it is there only where somebody can press its keys.
    pub platform: Platform,
    /// The metadata service, for the interfaces that its configuration names.
    pub mmds: Option<Arc<Mmds>>,
    /// Descriptors that came for devices.
    pub handed: &'a Handed,
    /// What the machine is at first.
    pub origin: Origin,
}

/// What a machine is at first.
pub enum Origin {
    /// A kernel, about to start.
    Boot,
    /// A machine that was saved, paused as it was then.
    Saved(Box<Restored>),
}

/// A saved machine on its way back.
pub struct Restored {
    /// Its state.
    pub saved: Saved,
    /// What it needs of the CPU, as far as that was recorded.
    pub needs: Option<Needs>,
    /// RAM.
    pub memory: Source,
    /// What its clock does with the time that has passed.
    pub clock: ClockPolicy,
}

/// Where the RAM of a saved machine is.
pub enum Source {
    /// In this memory file, which is mapped.
    File(Arc<File>),
    /// In parts of several, which are mapped over each other.
    Layers(Layers),
    /// Wherever it is brought from when it is touched.
    Lazy(Lazy),
}

impl Source {
    /// Fills a buffer from an offset in the memory file on.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Source::File(file) => file.read_exact_at(bytes, offset),
            Source::Lazy(lazy) => lazy.read(offset, bytes),
            Source::Layers(layers) => {
                let window = Run { start: offset, end: offset + bytes.len() as u64 };
                bytes.fill(0);
                for (run, file) in layers.iter() {
                    let run = run.within(window);
                    let from = (run.start.saturating_sub(offset)) as usize;
                    let piece = bytes.get_mut(from..).and_then(|b| b.get_mut(..run.len() as usize));
                    piece.filter(|_| !run.is_empty()).map_or(Ok(()), |p| file.read_exact_at(p, run.start))?;
                }
                Ok(())
            }
        }
    }
}

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Reading them.
    #[error(transparent)]
    Loading(#[from] loading::LoadingError),
    /// Processors.
    #[error("The machine's processors cannot be made")]
    Processors(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// vCPU threads.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Firmware tables.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// A device with what it stands for on the host.
    #[error("{what} cannot be set up")]
    Device {
        /// Which one.
        what: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A place for a device.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// A console's far end.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Two things at one address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// This host's processors are not good enough for a saved machine.
    #[error(transparent)]
    Needs(#[from] NeedsError),
    /// A saved machine does not come back.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// A device does not take its saved state.
    #[error("{name:?} does not come back as it was saved")]
    Restore {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: DeviceError,
    },
    /// Saved memory cannot be served.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// Saved memory cannot be read.
    #[error("Guest memory cannot be read")]
    Read(#[source] io::Error),
    /// An interrupt line.
    #[error("Interrupt line {0} cannot be had")]
    Line(u32, #[source] io::Error),
}

impl BuildError {
    /// Whose fault it is: nearly always the specification's or the host's.
    pub fn kind(&self) -> FaultKind {
        match self {
            BuildError::Kvm(KvmError::Call { .. }) | BuildError::Bus(_) | BuildError::Vcpu(_) => {
                FaultKind::Internal
            }
            BuildError::Kvm(_) => FaultKind::Unsupported,
            BuildError::Attach(error) => error.kind(),
            _ => FaultKind::Invalid,
        }
    }
}

fn processors<E: std::error::Error + Send + Sync + 'static>(error: E) -> BuildError {
    BuildError::Processors(Box::new(error))
}

/// Builds the machine that `plan` describes. Nothing runs yet. The kernel of one that boots is
/// brought into memory by the first vCPU that runs; one that was saved is as if it had been paused.
pub fn build(plan: Plan<'_>) -> Result<Vm, BuildError> {
    let Plan { spec, .. } = plan;
    let config = &spec.machine_config;
    let mut origin = plan.origin;
    // The files come first: a missing one is the likeliest mistake and the cheapest to find.
    let files = match &origin {
        Origin::Boot => Some(open_files(spec)?),
        Origin::Saved(_) => None,
    };
    let was = match &mut origin {
        Origin::Boot => None,
        Origin::Saved(restored) => Some(restored.saved.section("annex")?),
    };
    let mut annex = Annex::open(spec, was.as_ref())?;
    let template = cpu::template(spec).map_err(processors)?;
    let kvm = kvm::open_for(&template)?;
    if let Origin::Saved(restored) = &origin
        && let Some(needs) = &restored.needs
    {
        needs.check(&kvm)?;
    }
    let vm = kvm::create_vm(&kvm)?;
    let (ram, beneath, served) = ram(config, &mut origin)?;
    torn::watch(&ram, &beneath).map_err(BuildError::Read)?;
    let slots = memory::register(&vm, &ram, config.track_dirty_pages)?;
    annex.register(&vm, slots)?;
    let memory = annex.joined_to(ram.clone(), config.track_dirty_pages)?;
    irqchip::create(&vm).map_err(processors)?;
    let fds = (0..u64::from(config.vcpu_count))
        .map(|index| vm.create_vcpu(index).map_err(kvm::call("create a vCPU")))
        .collect::<Result<Vec<_>, _>>()?;
    let shape = StateShape::new(&kvm, &vm, false).map_err(processors)?;
    let shape = Arc::new(shape.with_msrs(&template.msr_indices()));
    let host = Arc::new(KvmHost::new(vm));

    let (mmio, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let pci = match config.transport {
        spec::Transport::Mmio => None,
        spec::Transport::Pci => Some(pci_bus(&plan.ejected, &mmio, &ports)?),
    };
    if plan.platform.boot_timer {
        let timer = Arc::new(BootTimer::new(Arc::clone(&plan.milestones)));
        mmio.insert(layout::MMIO_WINDOW.start, boot_timer::LENGTH, timer)?;
    }
    let mut places =
        Places::new(memory.clone(), host.clone(), mmio.clone(), pci.clone(), plan.faults.clone());
    if let Origin::Saved(restored) = &origin {
        places.as_they_were(restored.saved.slots());
    }
    let parts = Parts {
        spec,
        faults: &plan.faults,
        reporter: &plan.reporter,
        mmds: plan.mmds.as_ref(),
        handed: plan.handed,
    };
    let board = Board::build(&parts, &host, &ports, &mut places)?;
    let (serial, consoles) = Consoles::open(spec, &*host, &ports, &mut places)?;
    attach_devices(&parts, &mut places)?;
    annex.attach(spec, &host, &mut places)?;
    let registers = (config.vcpus_max() > config.vcpu_count)
        .then(|| Arc::new(processors::Processors::new(config.vcpu_count)));
    if let Some(registers) = &registers {
        ports.insert(processors::BASE.into(), processors::LEN.into(), registers.clone())?;
    }

    // What a machine that was saved got when it booted is in its memory and its vCPUs.
    let boots = files.is_some();
    let cpuid = (boots || registers.is_some()).then(|| cpuid_of(&kvm, config, fds.first(), &template));
    let cpuid = cpuid.transpose()?;
    annex.physical_bits = cpuid.as_ref().map_or(0, cpuid::Cpuid::physical_bits);
    let mut severed = Vec::new();
    let loading = match (origin, files, &cpuid) {
        (Origin::Boot, Some(files), Some(cpuid)) => {
            let tables = Tables { serial: &serial, places: &places, board: &board, has_pci: pci.is_some() };
            let rsdp = tables.write(&memory, config, registers.is_some(), plan.platform.keyboard)?;
            boot_vcpus(spec, files, &memory, rsdp, &fds, (cpuid, &template))?
        }
        (Origin::Saved(restored), ..) => {
            let state = State {
                fds: &fds,
                shape: &shape,
                board: &board,
                consoles: &consoles,
                places: &places,
                registers: registers.as_deref(),
            };
            let mut restored = restored;
            severed = state.severed(&mut restored.saved)?;
            annex.physical_bits = state.restore(*restored, &host, &memory, &annex, config)?;
            Loading::done()
        }
        // Files are open and CPUID is made where a machine boots.
        (Origin::Boot, ..) => Loading::done(),
    };
    let milestones = Arc::clone(&plan.milestones);
    let buses = Buses { mmio, ports, milestones, loading: Arc::new(loading) };
    let vcpus = Vcpus::spawn(fds, &buses, &plan.reporter)?;
    let room = registers.zip(cpuid).map(|(registers, cpuid)| {
        let made_from = ((cpuid, template.clone()), (buses, Arc::clone(&plan.reporter)));
        Room::new(config.vcpus_max(), made_from.0, made_from.1, registers)
    });
    Ok(Vm {
        vcpus,
        room,
        shape,
        template,
        devices: places.take_devices(),
        places,
        severed,
        annex,
        beneath,
        tracks_dirty_pages: config.track_dirty_pages,
        watched: false,
        huge_pages: config.huge_pages == spec::HugePages::Huge2M,
        carried: Gathering::default(),
        power: board.power,
        i8042: board.keyboard,
        platform: plan.platform,
        pvpanic: board.pvpanic,
        milestones: Arc::clone(&plan.milestones),
        ram,
        memory,
        consoles,
        host,
        served,
        prefetching: None,
    })
}

/// RAM, what shows through it, and who brings what is missing.
fn ram(
    config: &spec::MachineConfig,
    origin: &mut Origin,
) -> Result<(Memory, Beneath, Option<Served>), BuildError> {
    let empty = || memory::map(config, memory::Backing::Empty);
    let Origin::Saved(restored) = origin else { return Ok((empty()?, Beneath::Nothing, None)) };
    let huge = config.huge_pages == spec::HugePages::Huge2M;
    match &mut restored.memory {
        Source::Lazy(lazy) => {
            // What is to be brought beforehand is brought by who brings the rest.
            let config = spec::MachineConfig { prefault: false, ..config.clone() };
            let ram = memory::map(&config, memory::Backing::Empty)?;
            let served = lazy.begin(&ram, if huge { 2 << 20 } else { 4096 })?;
            Ok((ram, Beneath::Unknown, Some(served)))
        }
        // Pages of the reserved pool cannot be those of a file.
        source if huge => {
            let ram = empty()?;
            let read = |offset, bytes: &mut [u8]| source.read(offset, bytes);
            capture::fill(&ram, &pages::pieces(&ram), read).map_err(BuildError::Read)?;
            Ok((ram, Beneath::Nothing, None))
        }
        Source::File(file) => {
            let ram = memory::map(config, memory::Backing::File(file))?;
            Ok((ram, Beneath::File(Arc::clone(file)), None))
        }
        Source::Layers(layers) => {
            let ram = memory::map(config, memory::Backing::Layers(layers))?;
            Ok((ram, Beneath::Layers(Arc::clone(layers)), None))
        }
    }
}

/// Writes what a kernel finds when it starts, and gives the vCPUs their first state.
fn boot_vcpus(
    spec: &Spec,
    files: Files,
    memory: &Memory,
    rsdp: u64,
    fds: &[VcpuFd],
    (cpuid, template): (&cpuid::Cpuid, &Template),
) -> Result<Loading, BuildError> {
    generation::at_boot(memory).map_err(named("The generation id".to_owned()))?;
    let command_line = command_line(spec)?;
    let boot_plan = boot::Plan::new(boot::Payload {
        kernel: &files.kernel,
        initrd: files.initrd.as_ref(),
        command_line: &command_line,
        entry: boot::EntryChoice::Auto,
        ram: spec.machine_config.mem_size_mib << 20,
        rsdp: Some(rsdp),
    })?;
    let loaded = boot_plan.finish(memory)?;
    let parts = loading::parts(&boot_plan);
    let loading = Loading::ahead(files, parts, memory.clone());
    if spec.machine_config.gdb_socket_path.is_some() {
        // A debugger looks at memory, and changes it, before the guest runs.
        loading.finish()?;
    }
    for (index, fd) in (0..).zip(fds) {
        let cpuid = cpuid.for_vcpu(index).map_err(processors)?;
        regs::configure_vcpu(fd, index, &cpuid, &loaded).map_err(processors)?;
    }
    template.change_msrs(fds).map_err(processors)?;
    Ok(loading)
}

/// What the firmware tables are made of.
struct Tables<'a> {
    serial: &'a [acpi::SerialPort],
    places: &'a Places,
    board: &'a Board,
    has_pci: bool,
}

impl Tables<'_> {
    /// Writes the tables and returns where they begin.
    fn write(
        &self,
        memory: &Memory,
        config: &spec::MachineConfig,
        has_room: bool,
        keyboard: bool,
    ) -> Result<u64, acpi::AcpiError> {
        let sleep = acpi::Sleep { control: port(power::SLEEP_CONTROL), status: port(power::SLEEP_STATUS) };
        let events = acpi::Events { line: self.board.line, status: port(power::EVENT_STATUS) };
        acpi::write(
            memory,
            &acpi::Description {
                vcpus: config.vcpu_count,
                processors: has_room.then_some(acpi::Processors {
                    max: config.vcpus_max(),
                    present: processors::PRESENT,
                    inserted: processors::INSERTED,
                }),
                serial: self.serial,
                virtio_mmio: self.places.pages(),
                pci: self.has_pci.then(pci_host),
                reset: Some((port(power::RESET), power::RESET_VALUE)),
                sleep: Some(sleep),
                events: Some(events),
                power_button: true,
                i8042: keyboard,
                pvpanic: self.board.pvpanic.is_some().then_some(pvpanic::PORT),
                generation_id: Some(layout::GENERATION_ID),
                vm_clock: Some(layout::VM_CLOCK),
            },
        )
    }
}

/// What saved state goes back to.
struct State<'a> {
    fds: &'a [VcpuFd],
    shape: &'a StateShape,
    board: &'a Board,
    consoles: &'a Consoles,
    places: &'a Places,
    registers: Option<&'a processors::Processors>,
}

impl State<'_> {
    /// What is left of devices that were taken by force, in their slots again.
    fn severed(&self, saved: &mut Saved) -> Result<Vec<Left>, BuildError> {
        let one = |part: Part| {
            let Part { name, slot, sections, .. } = part;
            let missing = || SavedError::Order(format!("what is left in {name} is in no slot"));
            let slot = slot.ok_or_else(missing)?;
            let left = Severed::saved(&sections).map_err(SavedError::from)?;
            let left = self.places.left_in(slot, left)?;
            left.restore(&sections).map_err(|source| BuildError::Restore { name, source })?;
            Ok((slot, left))
        };
        saved.severed().into_iter().map(one).collect()
    }

    /// Brings everything to where it was. The clock comes before the vCPUs (a vCPU's own clock is
    /// made of it), and devices last, whose lines may be raised at once. Returns the width of the
    /// guest's physical addresses.
    fn restore(
        &self,
        restored: Restored,
        host: &KvmHost,
        memory: &Memory,
        annex: &Annex,
        config: &spec::MachineConfig,
    ) -> Result<u8, BuildError> {
        let Restored { mut saved, memory: source, clock, .. } = restored;
        saved.clock()?.load(host.vm(), clock).map_err(SavedError::from)?;
        saved.irqchip()?.load(host.vm()).map_err(SavedError::from)?;
        // At most 64 vCPUs.
        let states = saved.vcpus(self.fds.len() as u8)?;
        for (index, (state, fd)) in states.iter().zip(self.fds).enumerate() {
            let loaded = state.load(fd, self.shape).and_then(|()| arch::state::announce_pause(fd));
            loaded.map_err(|source| SavedError::Vcpu { index, source })?;
        }
        for (name, device) in self.places.devices() {
            let part = saved.take(device.about().kind, name)?;
            let taken = device.restore(&part.sections);
            taken.map_err(|source| BuildError::Restore { name: name.clone(), source })?;
        }
        if config.transport == spec::Transport::Pci
            && let Ok(pci) = self.places.hotplug()
        {
            pci.restore(&saved.section("pci")?).map_err(SavedError::from)?;
        }
        if let Some(registers) = self.registers {
            registers.restore(&saved.section("processors")?).map_err(SavedError::from)?;
        }
        let serial = saved.section_if_there("serial")?;
        self.consoles.restore(serial.as_ref()).map_err(SavedError::from)?;
        self.board.keyboard.restore(&saved.section("i8042")?).map_err(SavedError::from)?;
        self.board.power.restore(&saved.section("power")?).map_err(SavedError::from)?;
        let pieces = capture::plugged(memory, annex);
        if !pieces.is_empty() {
            let read = |offset, bytes: &mut [u8]| source.read(offset, bytes);
            capture::fill(memory, &pieces, read).map_err(BuildError::Read)?;
        }
        let renewed = generation::renew(memory, &self.board.power);
        renewed.map_err(named("The generation id".to_owned()))?;
        saved.finish()?;
        Ok(states.first().map_or(0, |first| cpuid::physical_bits(first.cpuid())))
    }
}

/// Opens what is to be booted.
fn open_files(spec: &Spec) -> Result<Files, BootError> {
    let source = &spec.boot_source;
    let open_initrd = |path: &PathBuf| BootFile::open(What::Initrd, path);
    Ok(Files {
        kernel: BootFile::open(What::Kernel, &source.kernel_image_path)?,
        initrd: source.initrd_path.as_ref().map(open_initrd).transpose()?,
    })
}

fn cpuid_of(
    kvm: &Kvm,
    config: &spec::MachineConfig,
    first: Option<&VcpuFd>,
    template: &Template,
) -> Result<cpuid::Cpuid, BuildError> {
    let offered = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm::call("tell what its processors can do"))?;
    let wanted = cpuid::CpuConfig {
        vcpus: config.vcpus_max(),
        smt: config.smt,
        // A host that cannot tell leaves the guest to measure.
        tsc_khz: first.and_then(|fd| fd.get_tsc_khz().ok()),
        pmu: false,
        nested: false,
    };
    let mut cpuid = cpuid::Cpuid::normalise(&offered, &wanted).map_err(processors)?;
    template.change_cpuid(&mut cpuid, &offered).map_err(processors)?;
    Ok(cpuid)
}

/// What devices are made of.
struct Parts<'a> {
    spec: &'a Spec,
    faults: &'a Arc<Faults>,
    reporter: &'a Reporter,
    mmds: Option<&'a Arc<Mmds>>,
    handed: &'a Handed,
}

/// What every machine has besides its processors and devices.
struct Board {
    power: Arc<Power>,
    keyboard: Arc<I8042>,
    pvpanic: Option<Arc<PvPanic>>,
    line: u32,
}

impl Board {
    fn build(
        parts: &Parts<'_>,
        host: &Arc<KvmHost>,
        ports: &Bus,
        places: &mut Places,
    ) -> Result<Board, BuildError> {
        let reporter = Arc::clone(parts.reporter);
        let callback: power::PowerCallback = Arc::new(move |event| {
            reporter(Report::Ended(match event {
                PowerEvent::Off => Ending::Off,
                PowerEvent::Reset => Ending::Reset,
            }));
        });
        let line_of = |gsi| host.line(gsi).map_err(|e| BuildError::Line(gsi, e));
        // The first free line: nothing was attached yet.
        let line = places.line().unwrap_or(layout::INTERRUPT_LINES.start);
        let power = Arc::new(Power::new(callback.clone(), line_of(line)?));
        ports.insert(power::BASE.into(), power::LEN.into(), power.clone())?;
        // The controller answers in any case, because `reboot=k` resets through it; shown to
        // the guest, and so probed, it is only where somebody can press its keys.
        let keyboard = Arc::new(I8042::new(callback, line_of(i8042::GSI)?));
        ports.insert(i8042::BASE.into(), i8042::LEN.into(), keyboard.clone())?;
        let pvpanic = parts.spec.machine_config.pvpanic.then(|| {
            let faults = Arc::clone(parts.faults);
            Arc::new(PvPanic::new(Arc::new(move |event| faults.panicked(event))))
        });
        if let Some(port) = &pvpanic {
            ports.insert(pvpanic::PORT.into(), pvpanic::LEN.into(), port.clone())?;
        }
        Ok(Board { power, keyboard, pvpanic, line })
    }
}

/// An empty PCI bus, and the registers through which its slots are filled and emptied later.
fn pci_bus(ejected: &hotplug::Ejected, mmio: &Bus, ports: &Bus) -> Result<Arc<Hotplug>, BusError> {
    let root = Arc::new(Root::new());
    mmio.insert(layout::ECAM.start, layout::ECAM_BUS, root.clone())?;
    let pci = Arc::new(Hotplug::new(root, Arc::clone(ejected)));
    ports.insert(hotplug::BASE.into(), hotplug::LEN.into(), pci.clone())?;
    Ok(pci)
}

fn attach_devices(parts: &Parts<'_>, places: &mut Places) -> Result<(), BuildError> {
    let spec = parts.spec;
    // The root device is the first disk, because the command line calls it /dev/vda.
    let (roots, others): (Vec<_>, Vec<_>) = spec.drives.iter().partition(|d| d.is_root_device);
    for drive in roots.into_iter().chain(others) {
        places.attach(&drive.drive_id, disk(drive, parts.handed)?)?;
    }
    for interface in &spec.network_interfaces {
        places.attach(&interface.iface_id, card(interface, parts.mmds, parts.handed)?)?;
    }
    if let Some(vsock) = &spec.vsock {
        let config = vsock::VsockConfig { guest_cid: vsock.guest_cid, uds_path: vsock.uds_path.clone() };
        let device = vsock::Vsock::new(config).map_err(named("The vsock device".to_owned()))?;
        places.attach("vsock", Box::new(device))?;
    }
    if let Some(balloon) = &spec.balloon {
        let config = balloon::BalloonConfig {
            amount_mib: balloon.amount_mib,
            deflate_on_oom: balloon.deflate_on_oom,
            stats_polling_interval_s: balloon.stats_polling_interval_s,
            free_page_hinting: balloon.free_page_hinting,
            free_page_reporting: balloon.free_page_reporting,
        };
        let device = balloon::Balloon::new(&config, spec.machine_config.mem_size_mib)
            .map_err(named("The balloon".to_owned()))?;
        places.attach("balloon", Box::new(device))?;
    }
    if let Some(entropy) = &spec.entropy {
        places.attach("entropy", generator(entropy))?;
    }
    Ok(())
}

/// A network card on its tap, and on the metadata service where that names it.
pub(super) fn card(
    interface: &spec::NetworkInterface,
    mmds: Option<&Arc<Mmds>>,
    handed: &Handed,
) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let what = format!("Network interface {:?}", interface.iface_id);
    let config =
        net_config(interface, handed).map_err(|source| BuildError::Device { what: what.clone(), source })?;
    let mut card = net::Net::new(config).map_err(named(what.clone()))?;
    let named_there = |mmds: &&Arc<Mmds>| mmds.config().interfaces.contains(&interface.iface_id);
    if let Some(mmds) = mmds.filter(named_there) {
        card.connect_mmds(Arc::clone(mmds)).map_err(named(what))?;
    }
    Ok(Box::new(card))
}

/// An entropy device.
pub(super) fn generator(entropy: &spec::Entropy) -> Box<dyn VirtioDevice> {
    Box::new(rng::Rng::limited(limiter(entropy.rate_limiter.as_ref())))
}

/// An error of a part, with the part's name.
pub(super) fn named<E: std::error::Error + Send + Sync + 'static>(
    what: String,
) -> impl FnOnce(E) -> BuildError {
    move |source| BuildError::Device { what, source: Box::new(source) }
}

/// The kernel command line: what was given, then what follows from the devices.
fn command_line(spec: &Spec) -> Result<CommandLine, BootError> {
    let given = spec.boot_source.boot_args.as_deref().unwrap_or(spec::DEFAULT_BOOT_ARGS);
    let mut line = CommandLine::new(given)?;
    // Without PCI the guest need not look for it. With it, there is nothing behind the ports
    // through which an old chipset would be asked first, two hundred exits long.
    line.push(match spec.machine_config.transport {
        spec::Transport::Mmio => "pci=off",
        spec::Transport::Pci => "pci=noearly",
    })?;
    if let Some(root) = spec.drives.iter().find(|d| d.is_root_device) {
        let device =
            root.partuuid.as_ref().map_or_else(|| "/dev/vda".to_owned(), |id| format!("PARTUUID={id}"));
        line.push(&format!("root={device} {}", if root.is_read_only { "ro" } else { "rw" }))?;
    }
    if let Some((index, root)) = spec.pmem.iter().enumerate().find(|(_, pmem)| pmem.root_device) {
        line.push(&format!("root=/dev/pmem{index} {}", if root.read_only { "ro" } else { "rw" }))?;
    }
    Ok(line)
}

fn port(number: u16) -> acpi::Register {
    acpi::Register::Io(number)
}

fn pci_host() -> acpi::PciHost {
    let window = layout::PCI_WINDOW_32;
    acpi::PciHost {
        ecam: layout::ECAM.start as u32,
        last_bus: 0,
        window_32: window.start as u32..window.end as u32,
        window_64: None,
        hotplug: Some(acpi::PciHotplug { port: hotplug::BASE, slots: root::SLOTS }),
    }
}

// The tables and the registers behind them are written down in two crates; they must agree.
const _: () = assert!(acpi::POWER_OFF_VALUE >> 2 & 7 == power::S5_TYPE);
const _: () = assert!(acpi::event::POWER_BUTTON as u32 == power::EVENT_POWER_BUTTON);
const _: () = assert!(acpi::event::PROCESSORS as u32 == power::EVENT_PROCESSORS);
const _: () = assert!(acpi::event::GENERATION as u32 == power::EVENT_GENERATION);
const _: () = assert!(acpi::event::PCI as u32 == power::EVENT_PCI);
const _: () = assert!(hotplug::INSERTED == 0 && hotplug::WANTED == 4 && hotplug::EJECT == 8);

/// A disk, from its file's path or from the file that came for it.
pub(super) fn disk(drive: &spec::Drive, handed: &Handed) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let what = format!("Drive {:?}", drive.drive_id);
    let config = block_config(drive);
    let disk = if drive.by_descriptor {
        let (file, path) = handed.disk(drive).map_err(named(what.clone()))?;
        block::Block::with_file(block::BlockConfig { path, ..config }, file)
    } else {
        block::Block::new(config)
    };
    Ok(Box::new(disk.map_err(named(what))?))
}

fn block_config(drive: &spec::Drive) -> block::BlockConfig {
    block::BlockConfig {
        path: drive.path_on_host.clone(),
        read_only: drive.is_read_only,
        cache: match drive.cache_type {
            spec::CacheType::Unsafe => block::Cache::Unsafe,
            spec::CacheType::Writeback => block::Cache::Writeback,
        },
        engine: match drive.io_engine {
            spec::IoEngine::Sync => block::Engine::Sync,
            spec::IoEngine::Async => block::Engine::Async,
        },
        direct: drive.direct,
        id: drive.drive_id.clone(),
        queues: drive.num_queues,
        queue_size: drive.queue_size,
        discard: drive.discard,
        limits: limiter(drive.rate_limiter.as_ref()),
    }
}

/// One limit as devices take it.
pub fn bucket(bucket: spec::TokenBucket) -> BucketConfig {
    BucketConfig {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_time_ms: bucket.refill_time,
    }
}

/// Limits as devices take them.
pub fn limiter(limits: Option<&spec::RateLimiter>) -> LimiterConfig {
    let limits = limits.copied().unwrap_or_default();
    LimiterConfig { bandwidth: limits.bandwidth.map(bucket), ops: limits.ops.map(bucket) }
}

fn net_config(
    interface: &spec::NetworkInterface,
    handed: &Handed,
) -> Result<net::NetConfig, Box<dyn std::error::Error + Send + Sync>> {
    let tap = match (&interface.host_dev_name, interface.host_dev_fd) {
        _ if interface.by_descriptor => net::TapSource::Descriptors(handed.tap(interface)?),
        (_, Some(fd)) => {
            // SAFETY: the specification names a descriptor that was inherited for this purpose; it
            // is above the standard ones and nothing in this process closes it. The device gets a
            // copy, so that a start that was refused can be tried again.
            let inherited = unsafe { BorrowedFd::borrow_raw(fd) };
            net::TapSource::Descriptors(vec![inherited.try_clone_to_owned()?])
        }
        (name, None) => net::TapSource::Name { name: name.clone().unwrap_or_default(), create: false },
    };
    Ok(net::NetConfig {
        tap,
        mac: interface.guest_mac.as_deref().map(str::parse).transpose()?,
        mtu: interface.mtu,
        pairs: interface.num_queue_pairs,
        // Guests may bridge, as behind any network card.
        drop_spoofed: false,
        rx_limits: limiter(interface.rx_rate_limiter.as_ref()),
        tx_limits: limiter(interface.tx_rate_limiter.as_ref()),
    })
}
