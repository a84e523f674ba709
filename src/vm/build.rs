//! From a specification to a machine: the only builder.
//!
//! Boot, restore, clone and migration all come through here and differ in what is loaded
//! afterwards. The order is the one the parent module argues for.

use std::{os::fd::BorrowedFd, path::PathBuf, sync::Arc};

use api::{FaultKind, Spec, spec};
use arch::{
    acpi, boot, cpuid, irqchip,
    kernel::{BootError, BootFile, CommandLine, What},
    layout, regs,
    state::StateShape,
    template::Template,
};
use devices::{
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
    virtio::{VirtioDevice, balloon, block, net, rng, vsock},
};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuFd};

use super::{
    Ending, Vm,
    annex::Annex,
    attach::{AttachError, Places},
    boot_timer::{self, BootTimer},
    console::{ConsoleError, Consoles},
    cpu,
    faults::Faults,
    generation,
    handed::Handed,
    host::KvmHost,
    kvm::{self, KvmError},
    loading::{self, Files, Loading},
    memory::{self, MemoryError},
    processors::Room,
};
use crate::{
    metrics::Milestones,
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
    /// Show a keyboard controller, so that Ctrl+Alt+Del can be pressed. A guest spends some
    /// thirty exits on finding it, so it is there only where somebody can press.
    pub keyboard: bool,
    /// Put the boot timer's register in its place.
    pub boot_timer: bool,
    /// The metadata service, for the interfaces that its configuration names.
    pub mmds: Option<Arc<Mmds>>,
    /// Descriptors that came for devices.
    pub handed: &'a Handed,
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
    /// An interrupt line.
    #[error("Interrupt line {0} cannot be had")]
    Line(u32, #[source] std::io::Error),
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

/// Builds the machine that `plan` describes. Nothing runs yet, and its kernel is brought into memory
/// by the first vCPU that runs.
pub fn build(plan: &Plan<'_>) -> Result<Vm, BuildError> {
    let spec = plan.spec;
    let config = &spec.machine_config;
    // The files come first: a missing one is the likeliest mistake and the cheapest to find.
    let files = open_files(spec)?;
    let mut annex = Annex::open(spec)?;
    let template = cpu::template(spec).map_err(processors)?;
    let kvm = kvm::open_for(&template)?;
    let vm = kvm::create_vm(&kvm)?;
    let ram = memory::map(config)?;
    let slots = memory::register(&vm, &ram, config.track_dirty_pages)?;
    annex.register(&vm, slots)?;
    let memory = annex.joined_to(ram.clone(), config.track_dirty_pages)?;
    irqchip::create(&vm).map_err(processors)?;
    let fds = (0..u64::from(config.vcpu_count))
        .map(|index| vm.create_vcpu(index).map_err(kvm::call("create a vCPU")))
        .collect::<Result<Vec<_>, _>>()?;
    let cpuid = cpuid_of(&kvm, config, fds.first(), &template)?;
    annex.physical_bits = cpuid.physical_bits();
    let shape = StateShape::new(&kvm, &vm, false).map_err(processors)?;
    let shape = Arc::new(shape.with_msrs(&template.msr_indices()));
    let host = Arc::new(KvmHost::new(vm));

    let (mmio, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let pci = match config.transport {
        spec::Transport::Mmio => None,
        spec::Transport::Pci => Some(pci_bus(plan, &mmio, &ports)?),
    };
    if plan.boot_timer {
        let timer = Arc::new(BootTimer::new(Arc::clone(&plan.milestones)));
        mmio.insert(layout::MMIO_WINDOW.start, boot_timer::LENGTH, timer)?;
    }
    let mut places =
        Places::new(memory.clone(), host.clone(), mmio.clone(), pci.clone(), plan.faults.clone());
    let platform = Platform::build(plan, &host, &ports, &mut places)?;
    let (serial, consoles) = Consoles::open(spec, &*host, &ports, &mut places)?;
    attach_devices(plan, &mut places)?;
    annex.attach(spec, &host, &mut places)?;

    let registers = (config.vcpus_max() > config.vcpu_count)
        .then(|| Arc::new(processors::Processors::new(config.vcpu_count)));
    if let Some(registers) = &registers {
        ports.insert(processors::BASE.into(), processors::LEN.into(), registers.clone())?;
    }
    let sleep = acpi::Sleep { control: port(power::SLEEP_CONTROL), status: port(power::SLEEP_STATUS) };
    let events = acpi::Events { line: platform.line, status: port(power::EVENT_STATUS) };
    let rsdp = acpi::write(
        &memory,
        &acpi::Description {
            vcpus: config.vcpu_count,
            processors: registers.is_some().then_some(acpi::Processors {
                max: config.vcpus_max(),
                present: processors::PRESENT,
                inserted: processors::INSERTED,
            }),
            serial: &serial,
            virtio_mmio: places.pages(),
            pci: pci.is_some().then(pci_host),
            reset: Some((port(power::RESET), power::RESET_VALUE)),
            sleep: Some(sleep),
            events: Some(events),
            power_button: true,
            i8042: platform.keyboard.is_some(),
            pvpanic: platform.pvpanic.is_some().then_some(pvpanic::PORT),
            generation_id: Some(layout::GENERATION_ID),
            vm_clock: Some(layout::VM_CLOCK),
        },
    )?;
    generation::at_boot(&memory).map_err(named("The generation id".to_owned()))?;
    let command_line = command_line(spec)?;
    let boot_plan = boot::Plan::new(boot::Payload {
        kernel: &files.kernel,
        initrd: files.initrd.as_ref(),
        command_line: &command_line,
        entry: boot::EntryChoice::Auto,
        ram: config.mem_size_mib << 20,
        rsdp: Some(rsdp),
    })?;
    let loaded = boot_plan.finish(&memory)?;
    let parts = loading::parts(&boot_plan);
    let loading = Loading::ahead(files, parts, memory.clone());
    if config.gdb_socket_path.is_some() {
        // A debugger looks at memory, and changes it, before the guest runs.
        loading.finish()?;
    }
    for (index, fd) in (0..).zip(&fds) {
        let cpuid = cpuid.for_vcpu(index).map_err(processors)?;
        regs::configure_vcpu(fd, index, &cpuid, &loaded).map_err(processors)?;
    }
    template.change_msrs(&fds).map_err(processors)?;
    let milestones = Arc::clone(&plan.milestones);
    let buses = Buses { mmio, ports, milestones, loading: Arc::new(loading) };
    let vcpus = Vcpus::spawn(fds, &buses, &plan.reporter)?;
    let made_from = ((cpuid, template), (buses, Arc::clone(&plan.reporter)));
    Ok(Vm {
        vcpus,
        room: registers.map(|registers| Room::new(config.vcpus_max(), made_from.0, made_from.1, registers)),
        shape,
        devices: places.take_devices(),
        places,
        severed: Vec::new(),
        annex,
        power: platform.power,
        keyboard: platform.keyboard,
        pvpanic: platform.pvpanic,
        milestones: Arc::clone(&plan.milestones),
        ram,
        memory,
        consoles,
        host,
    })
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

/// What every machine has besides its processors and devices.
struct Platform {
    power: Arc<Power>,
    keyboard: Option<Arc<I8042>>,
    pvpanic: Option<Arc<PvPanic>>,
    line: u32,
}

impl Platform {
    fn build(
        plan: &Plan<'_>,
        host: &Arc<KvmHost>,
        ports: &Bus,
        places: &mut Places,
    ) -> Result<Platform, BuildError> {
        let reporter = Arc::clone(&plan.reporter);
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
        let pvpanic = plan.spec.machine_config.pvpanic.then(|| {
            let faults = Arc::clone(&plan.faults);
            Arc::new(PvPanic::new(Arc::new(move |event| faults.panicked(event))))
        });
        if let Some(port) = &pvpanic {
            ports.insert(pvpanic::PORT.into(), pvpanic::LEN.into(), port.clone())?;
        }
        Ok(Platform { power, keyboard: plan.keyboard.then_some(keyboard), pvpanic, line })
    }
}

/// An empty PCI bus, and the registers through which its slots are filled and emptied later.
fn pci_bus(plan: &Plan<'_>, mmio: &Bus, ports: &Bus) -> Result<Arc<Hotplug>, BusError> {
    let root = Arc::new(Root::new());
    mmio.insert(layout::ECAM.start, layout::ECAM_BUS, root.clone())?;
    let pci = Arc::new(Hotplug::new(root, Arc::clone(&plan.ejected)));
    ports.insert(hotplug::BASE.into(), hotplug::LEN.into(), pci.clone())?;
    Ok(pci)
}

fn attach_devices(plan: &Plan<'_>, places: &mut Places) -> Result<(), BuildError> {
    let spec = plan.spec;
    // The root device is the first disk, because the command line calls it /dev/vda.
    let (roots, others): (Vec<_>, Vec<_>) = spec.drives.iter().partition(|d| d.is_root_device);
    for drive in roots.into_iter().chain(others) {
        places.attach(&drive.drive_id, disk(drive, plan.handed)?)?;
    }
    for interface in &spec.network_interfaces {
        places.attach(&interface.iface_id, card(interface, plan.mmds.as_ref(), plan.handed)?)?;
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
