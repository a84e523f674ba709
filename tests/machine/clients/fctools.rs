//! The crate fctools: it starts the program, tells it all through its API or a file, changes
//! what runs, reads metrics from a named pipe, ends the machine and removes what is left.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    rc::Rc,
    time::{Duration, Instant},
};

use ::fctools::{
    extension::metrics::Metrics,
    process_spawner::DirectProcessSpawner,
    runtime::tokio::TokioRuntime,
    vm::{
        Vm, VmState,
        api::{VmApi, VmApiError},
        configuration::{InitMethod, VmConfiguration, VmConfigurationData},
        models::*,
        shutdown::{VmShutdownAction, VmShutdownMethod},
    },
    vmm::{
        arguments::{VmmApiSocket, VmmArguments, VmmLogLevel},
        executor::unrestricted::UnrestrictedVmmExecutor,
        id::VmmId,
        installation::VmmInstallation,
        ownership::VmmOwnershipModel,
        resource::{CreatedResourceType, MovedResourceType, ResourceType, system::ResourceSystem},
    },
};
use api::spec::Transport;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use super::{PATIENCE, PRELUDE, echo_once, firecracker};
use crate::{
    kernel::Kernel,
    net::Tap,
    process::{Stream, code, within},
    side::CALL_BYTES,
    vm::{Ended, Setup, random_file},
};

const MIB: usize = 1 << 20;

/// A file that is there already.
const KEPT: ResourceType = ResourceType::Moved(MovedResourceType::HardLinked);
const MADE: ResourceType = ResourceType::Created(CreatedResourceType::File);
const PIPE: ResourceType = ResourceType::Created(CreatedResourceType::Fifo);

type Files = ResourceSystem<DirectProcessSpawner, TokioRuntime>;

/// A machine in fctools' hands, with the console that it gives away.
struct Driven {
    runtime: Rc<Runtime>,
    vm: Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>,
    console: Stream,
    log: Stream,
    input: File,
    metrics: Option<Stream>,
    setup: Setup,
}

impl Driven {
    /// Starts what `tell` describes.
    fn start(
        mut setup: Setup,
        how: InitMethod,
        tell: impl FnOnce(&Setup, &mut Files) -> VmConfigurationData,
    ) -> Driven {
        setup.write();
        let runtime = Rc::new(Builder::new_current_thread().enable_all().build().unwrap());
        let entered = runtime.enter();
        let mut files = Files::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
        let data = tell(&setup, &mut files);
        let pipe = data.metrics_system.as_ref().map(|told| told.metrics.get_initial_path().to_owned());
        let socket = VmmApiSocket::Enabled(setup.folder().join("api"));
        let executor =
            UnrestrictedVmmExecutor::new(VmmArguments::new(socket)).id(VmmId::new("fctools-1").unwrap());
        let program = firecracker(setup.folder());
        let installation = VmmInstallation::new(program.clone(), program.clone(), program);
        let configuration = VmConfiguration::New { init_method: how, data };
        let mut vm = runtime.block_on(Vm::prepare(executor, files, installation, configuration)).unwrap();
        let started = runtime.block_on(vm.start(PATIENCE));
        let pipes = vm.take_pipes().unwrap_or_else(|e| panic!("{e}, {started:?}"));
        let console = Stream::of(File::from(pipes.stdout.into_inner().into_owned_fd().unwrap()));
        let log = Stream::of(File::from(pipes.stderr.into_inner().into_owned_fd().unwrap()));
        let input = File::from(pipes.stdin.into_inner().into_owned_fd().unwrap());
        drop(entered);
        started.unwrap_or_else(|e| panic!("{e}\n{}", log.text()));
        let metrics = pipe.map(|pipe| Stream::of(File::open(pipe).unwrap()));
        Driven { runtime, vm, console, log, input, metrics, setup }
    }

    fn wait_for(&self, what: &str) {
        let heard = self.console.heard(what, within(PATIENCE.as_secs()));
        assert!(heard, "no {what:?} in\n{}\n{}", self.console.text(), self.log.text());
    }

    /// Has fctools do `what`, which the API is not to refuse.
    fn block_on(&mut self, what: impl AsyncFnOnce(&mut Driven) -> Result<(), VmApiError>) {
        let runtime = Rc::clone(&self.runtime);
        let outcome = runtime.block_on(what(self));
        outcome.unwrap_or_else(|e| panic!("{e}\n{}\n{}", self.console.text(), self.log.text()));
    }

    /// Types a line.
    fn say(&mut self, line: &str) {
        self.input.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Ends the machine by `method`, and has fctools remove what belonged to it.
    fn end(mut self, method: VmShutdownMethod) -> (Ended, VmState, Vec<Metrics>) {
        let action = VmShutdownAction { method, timeout: Some(PATIENCE), graceful: true };
        let outcome = self.runtime.block_on(self.vm.shutdown([action]));
        let outcome = outcome.unwrap_or_else(|e| panic!("{e}\n{}\n{}", self.console.text(), self.log.text()));
        let state = self.vm.get_state();
        for stream in [Some(&self.console), Some(&self.log), self.metrics.as_ref()] {
            assert!(stream.is_none_or(|stream| stream.ended(within(PATIENCE.as_secs()))));
        }
        let lines = self.metrics.as_ref().map(lines).unwrap_or_default();
        let mut log = self.log.text();
        log += &fs::read_to_string(self.setup.folder().join("log")).unwrap_or_default();
        self.runtime.block_on(self.vm.cleanup()).unwrap_or_else(|e| panic!("{e:?}"));
        for gone in ["api", "log", "metrics"] {
            assert!(!self.setup.folder().join(gone).exists(), "{gone} was left behind");
        }
        let ended = self.setup.ended(code(outcome.exit_status), self.console.text(), log);
        (ended, state, lines)
    }
}

/// What came through the metrics' pipe, as fctools takes it: its types want every number.
fn lines(pipe: &Stream) -> Vec<Metrics> {
    let read = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    // The last one may be on its way.
    let text = pipe.text();
    text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(read).collect()
}

/// Asks until `wanted` holds of the answer.
async fn until<A: std::fmt::Debug>(
    mut ask: impl AsyncFnMut() -> Result<A, VmApiError>,
    wanted: impl Fn(&A) -> bool,
) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask().await.unwrap();
        if wanted(&answer) {
            return;
        }
        assert!(Instant::now() < deadline, "it stays at {answer:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Limits that nothing of a test reaches.
fn wide() -> Option<RateLimiter> {
    let bucket = || TokenBucket { size: 1 << 40, one_time_burst: Some(1 << 20), refill_time: 100 };
    Some(RateLimiter { bandwidth: bucket(), ops: bucket() })
}

/// A disk that is only read.
fn drive(files: &mut Files, path: &Path) -> Drive {
    Drive {
        drive_id: "data".to_owned(),
        is_root_device: false,
        cache_type: Some(DriveCacheType::Writeback),
        partuuid: None,
        is_read_only: Some(true),
        block: Some(files.create_resource(path, KEPT).unwrap()),
        rate_limiter: wide(),
        io_engine: Some(DriveIoEngine::Sync),
        socket: None,
    }
}

/// A machine with nothing but a disk.
fn small(setup: &Setup, files: &mut Files) -> VmConfigurationData {
    let source = &setup.spec.boot_source;
    let (vcpu_count, mem_size_mib) = (2, 384);
    VmConfigurationData {
        boot_source: BootSource {
            kernel_image: files.create_resource(&source.kernel_image_path, KEPT).unwrap(),
            boot_args: source.boot_args.clone(),
            initrd: Some(files.create_resource(setup.folder().join("initrd"), KEPT).unwrap()),
        },
        drives: vec![drive(files, &setup.folder().join("disk"))],
        pmem_devices: Vec::new(),
        machine_configuration: MachineConfiguration {
            vcpu_count,
            mem_size_mib,
            smt: Some(false),
            track_dirty_pages: Some(false),
            huge_pages: Some(HugePages::None),
        },
        cpu_template: None,
        network_interfaces: Vec::new(),
        balloon_device: None,
        vsock_device: None,
        logger_system: None,
        metrics_system: None,
        memory_hotplug_configuration: None,
        mmds_configuration: None,
        entropy_device: None,
    }
}

/// A machine with one of everything that fctools knows.
fn large(setup: &Setup, files: &mut Files, tap: &Tap) -> VmConfigurationData {
    let folder = setup.folder();
    let small = small(setup, files);
    let mut file = |name: &str, kind| files.create_resource(folder.join(name), kind).unwrap();
    VmConfigurationData {
        pmem_devices: vec![PmemDevice {
            id: "fast".to_owned(),
            block: file("pmem", KEPT),
            root_device: Some(false),
            read_only: Some(true),
        }],
        cpu_template: Some(CpuTemplate::X86(without_cx16())),
        network_interfaces: vec![NetworkInterface {
            iface_id: "eth0".to_owned(),
            host_dev_name: tap.name.to_owned(),
            guest_mac: Some("06:00:00:00:00:53".to_owned()),
            rx_rate_limiter: wide(),
            tx_rate_limiter: None,
        }],
        balloon_device: Some(BalloonDevice {
            amount_mib: 0,
            deflate_on_oom: false,
            stats_polling_interval_s: Some(1),
            free_page_reporting: Some(true),
            free_page_hinting: Some(true),
        }),
        vsock_device: Some(VsockDevice { guest_cid: 53, uds: file("v.sock", ResourceType::Produced) }),
        logger_system: Some(LoggerSystem {
            logs: Some(file("log", MADE)),
            level: Some(VmmLogLevel::Info),
            show_level: Some(true),
            show_log_origin: Some(true),
            module: None,
        }),
        metrics_system: Some(MetricsSystem { metrics: file("metrics", PIPE) }),
        memory_hotplug_configuration: Some(MemoryHotplugConfiguration {
            total_size_mib: 256,
            block_size_mib: Some(2),
            slot_size_mib: Some(128),
        }),
        mmds_configuration: Some(MmdsConfiguration {
            version: MmdsVersion::V1,
            network_interfaces: vec!["eth0".to_owned()],
            ipv4_address: Some([169, 254, 170, 2].into()),
            imds_compat: Some(true),
        }),
        entropy_device: Some(EntropyDevice { rate_limiter: wide() }),
        ..small
    }
}

/// CPUID leaf 1, ECX bit 13: an instruction that every 64-bit processor of today has.
fn without_cx16() -> X86CpuTemplate {
    let bitmap = format!("0b{}0{}", "x".repeat(18), "x".repeat(13));
    X86CpuTemplate {
        kvm_capabilities: Vec::new(),
        cpuid_modifiers: vec![X86CpuidModifier {
            leaf: "0x1".to_owned(),
            subleaf: "0x0".to_owned(),
            flags: 0,
            modifiers: vec![X86CpuidRegisterModifier { register: X86CpuidRegister::Ecx, bitmap }],
        }],
        msr_modifiers: Vec::new(),
    }
}

/// What is asked and changed before the guest goes on.
async fn first_changes(driven: &mut Driven, other_disk: &Path) -> Result<(), VmApiError> {
    let vm = &mut driven.vm;
    let info = vm.get_info().await?;
    assert_eq!((info.id.as_str(), info.is_paused), ("fctools-1", false));
    assert_eq!(vm.get_firecracker_version().await?, api::FIRECRACKER_VERSION);
    let config = vm.get_machine_configuration().await?;
    assert_eq!((config.vcpu_count, config.mem_size_mib, config.huge_pages), (2, 384, Some(HugePages::None)));

    vm.create_mmds(json!({ "name": "first", "kept": { "a": "1" } })).await?;
    vm.update_mmds(json!({ "name": "second" })).await?;
    let data: Value = vm.get_mmds_untyped().await?;
    assert_eq!(data, json!({ "name": "second", "kept": { "a": "1" } }));

    vm.pause().await?;
    assert!(vm.get_info().await?.is_paused);
    vm.resume().await?;
    assert!(!vm.get_info().await?.is_paused);

    vm.update_balloon_device(UpdateBalloonDevice { amount_mib: 64 }).await?;
    until(async || vm.get_balloon_statistics().await, |told| told.actual_mib == 64).await;
    assert_eq!(vm.get_balloon_device().await?.amount_mib, 64);
    vm.update_balloon_statistics(UpdateBalloonStatistics { stats_polling_interval_s: 2 }).await?;
    let refused = vm.update_balloon_device(UpdateBalloonDevice { amount_mib: 385 }).await;
    let Err(VmApiError::ReceivedErrorResponse { status_code, fault_message }) = refused else {
        panic!("{refused:?}")
    };
    assert!(status_code == 400 && fault_message.contains("385"), "{status_code}: {fault_message}");

    let files = vm.get_resource_system_mut();
    let other = files.create_resource(other_disk, KEPT).unwrap();
    other.start_initialization_with_same_path().unwrap();
    files.synchronize().await.unwrap();
    let (drive_id, iface_id) = ("data".to_owned(), "eth0".to_owned());
    vm.update_drive(UpdateDrive { drive_id, block: Some(other), rate_limiter: wide() }).await?;
    let (rx_rate_limiter, tx_rate_limiter) = (None, wide());
    vm.update_network_interface(UpdateNetworkInterface { iface_id, rx_rate_limiter, tx_rate_limiter }).await
}

/// The same later: memory comes back, and more is plugged.
async fn later_changes(driven: &mut Driven) -> Result<(), VmApiError> {
    let vm = &mut driven.vm;
    vm.start_balloon_free_page_hinting_run(StartBalloonFreePageHintingRun { acknowledge_on_stop: true })
        .await?;
    until(async || vm.get_balloon_free_page_hinting_run_status().await, |run| run.guest_cmd.is_some()).await;
    vm.stop_balloon_free_page_hinting_run().await?;
    vm.update_balloon_device(UpdateBalloonDevice { amount_mib: 0 }).await?;
    until(async || vm.get_balloon_statistics().await, |told| told.actual_mib == 0).await;
    vm.update_memory_hotplug_configuration(UpdateMemoryHotplugConfiguration { requested_size_mib: 128 })
        .await?;
    until(async || vm.get_memory_hotplug_status().await, |memory| memory.plugged_size_mib == 128).await;

    vm.flush_metrics().await
}

/// The sum over `lines`, each of which tells what is new.
fn sum(lines: &[Metrics], count: impl Fn(&Metrics) -> u64) -> u64 {
    lines.iter().map(count).sum()
}

fn check_metrics(lines: &[Metrics]) {
    assert!(lines.len() >= 2, "a flush and the end, at least: {lines:?}");
    for (name, found, expected) in [
        ("boot sources", sum(lines, |line| line.put_api_requests.boot_source_count), 1),
        ("drives", sum(lines, |line| line.put_api_requests.drive_count), 1),
        ("changed drives", sum(lines, |line| line.patch_api_requests.drive_count), 1),
        ("vsocks", sum(lines, |line| line.put_api_requests.vsock_count), 1),
        ("connections", sum(lines, |line| line.vsock.conns_added), 1),
        ("panics", sum(lines, |line| line.vmm.panic_count), 0),
    ] {
        assert_eq!(found, expected, "{name}");
    }
    for (name, found) in [
        ("reads", sum(lines, |line| line.block.read_count)),
        ("packets", sum(lines, |line| line.net.tx_packets_count)),
        ("requests for metadata", sum(lines, |line| line.mmds.rx_accepted)),
        ("pages for the balloon", sum(lines, |line| line.balloon.inflate_count)),
        ("random bytes", sum(lines, |line| line.entropy.entropy_bytes)),
        ("bytes of the console", sum(lines, |line| line.uart.write_count)),
        ("exits", sum(lines, |line| line.vcpu.exit_io_out)),
    ] {
        assert!(found > 0, "no {name}");
    }
}

#[test]
fn a_rust_client_drives_every_device_from_configuration_to_shutdown() {
    let script = r#"
        ask() {
            printf "GET $1 HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\nConnection: close\r\n\r\n" |
                nc -w 5 169.254.170.2 80 | tr -d '\r' | sed '1,/^$/d'
        }
        fact cpus $(nproc)
        fact cx16 $(grep -cw cx16 /proc/cpuinfo)
        fact entropy $(cat /sys/class/misc/hw_random/rng_current)
        fact pmem $(grep -lx 0x001b /sys/bus/virtio/devices/*/device | wc -l)
        fact disk $(head -c 6 /dev/vda)
        fact mac $(cat /sys/class/net/eth0/address)
        ip link set eth0 up
        ip addr add 172.31.83.2/24 dev eth0
        ip route add 169.254.170.2 dev eth0
        ping -c 1 -W 20 172.31.83.1 && fact ping answered
        start=$(total)
        fact before $start
        echo ready; read -r word
        fact name $(ask /name)
        fact balloon $(total)
        echo 3 > /proc/sys/vm/drop_caches
        fact changed $(cat /sys/block/vda/size)
        call && fact call answered
        echo next; read -r word
        settles() { [ $(total) -ge $((start + 131072)) ]; }
        for i in $(seq 200); do settles && break; sleep 0.1; done
        fact after $(total)
        echo last
        while :; do sleep 1; done"#;
    let setup = Setup::new(Kernel::quick(), Transport::Mmio).with_side().script([PRELUDE, script].concat());
    let setup = setup.parameters("reboot=k memhp_default_state=online_movable");
    let disks = ["disk", "other", "pmem"].map(|name| setup.folder().join(name));
    for (path, mib) in disks.iter().zip([1, 3, 4]) {
        random_file(path, mib, 1);
        File::options().write(true).open(path).unwrap().write_all(b"inside").unwrap();
    }
    let tap = Tap::new("nacelle-t83", 83, 1500, 1);
    let served = echo_once(&setup.folder().join("v.sock_6000"));
    let mut driven = Driven::start(setup, InitMethod::ViaApiCalls, |setup, files| large(setup, files, &tap));
    driven.wait_for("ready\n");
    driven.block_on(async |driven| first_changes(driven, &disks[1]).await);
    driven.say("go");
    driven.wait_for("next\n");
    driven.block_on(later_changes);
    driven.say("go");
    driven.wait_for("last\n");
    let (ended, state, lines) = driven.end(VmShutdownMethod::CtrlAltDel);
    assert_eq!((state, ended.code), (VmState::Exited, 0));
    ended.says("The guest asked for a reset");
    for (fact, value) in [("cpus", "2"), ("cx16", "0"), ("entropy", "virtio_rng.0"), ("disk", "inside")] {
        ended.is(fact, value);
    }
    for (fact, value) in [("mac", "06:00:00:00:00:53"), ("ping", "answered"), ("call", "answered")] {
        ended.is(fact, value);
    }
    ended.is("name", "second");
    ended.is("pmem", &1);
    ended.is("changed", &(3 * MIB / 512));
    let [before, balloon, after] = ["before", "balloon", "after"].map(|name| ended.number(name));
    assert_eq!((before - balloon, after - before), (64 << 10, 128 << 10), "KiB taken and added");
    assert_eq!(served.join().unwrap(), CALL_BYTES);
    check_metrics(&lines);
}

#[test]
fn a_rust_client_starts_a_machine_from_the_file_it_writes_and_kills_it() {
    let script = "fact cpus $(nproc)\nfact disk $(head -c 6 /dev/vda)\necho ready\nread -r word";
    let setup = Setup::new(Kernel::quick(), Transport::Mmio).script(script);
    fs::write(setup.folder().join("disk"), [&b"inside"[..], &[0; 506]].concat()).unwrap();
    let file = InitMethod::ViaJsonConfiguration(setup.folder().join("config.json"));
    let mut driven = Driven::start(setup, file, small);
    driven.wait_for("ready\n");
    driven.block_on(async |driven| {
        driven.vm.pause().await?;
        assert!(driven.vm.get_info().await?.is_paused);
        driven.vm.resume().await
    });
    let (ended, state, _) = driven.end(VmShutdownMethod::PauseThenKill);
    assert!(matches!(state, VmState::Crashed(_)), "{state}");
    ended.is("cpus", &2);
    ended.is("disk", "inside");
}
