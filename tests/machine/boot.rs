//! Kernels in their formats, processors, memory, consoles, and every way a machine ends.

use std::fs;

use api::spec::{Console, ConsoleMode, Entropy, Serial, Transport};

use crate::{
    kernel::Kernel,
    vm::{Ended, Setup},
};

/// Facts that every guest can tell about what it runs on.
const SURVEY: &str = r#"
fact cpus $(nproc)
fact online $(cat /sys/devices/system/cpu/online)
fact siblings $(cat /sys/devices/system/cpu/cpu0/topology/thread_siblings_list)
fact package $(cat /sys/devices/system/cpu/cpu*/topology/physical_package_id | sort -u)
fact cores $(cat /sys/devices/system/cpu/cpu*/topology/core_id | sort -u | wc -l)
fact clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
fact memory $(awk '/MemTotal/{print int($2/1024)}' /proc/meminfo)
fact loader $(cat /proc/sys/kernel/bootloader_type)
fact bus $(readlink -f /sys/bus/virtio/devices/virtio0)
fact x2apic $(grep -cw x2apic /proc/cpuinfo)
part cmdline cat /proc/cmdline
part ram grep 'System RAM' /proc/iomem
trouble() { dmesg | grep -E '[Ee]rror|BUG|WARN|[Ww]arning|[Ff]ail|Fatal|nvalid |inconsisten|[Uu]nable' || true; }
part trouble trouble
"#;

/// What guests complain about and no monitor can help.
const HARMLESS: [&str; 3] = [
    // There is no such table, and nothing reads it.
    "DMI not present or invalid",
    // How the processor of the host is affected by a flaw.
    "Speculative Return Stack Overflow: ",
    // The ports of old are not there; the tables lead to the configuration space later.
    "PCI: Fatal: No config space access function found",
];
/// The same for the lab, whose processor does not tell KVM which extended state a guest turns
/// on, so that KVM tells the guest a wrong size of it. A guest of QEMU's sees it there as well.
const HARMLESS_IN_LAB: [&str; 1] = ["arch/x86/kernel/fpu/xstate.c:606 fpu__init_system_xstate"];

/// `type_of_loader` 15, "undefined", and 11, which Linux notes for itself when started by PVH;
/// each times 16.
const LOADER_LINUX: u64 = 255;
const LOADER_PVH: u64 = 176;

fn is_untroubled(ended: &Ended) {
    let in_lab = std::env::var_os("NACELLE_LAB").is_some();
    let here = HARMLESS_IN_LAB.iter().filter(|_| in_lab);
    let known = |line: &&str| !HARMLESS.iter().chain(here.clone()).any(|harmless| line.contains(harmless));
    let part = ended.part("trouble");
    let trouble: Vec<_> = part.lines().filter(known).collect();
    assert!(trouble.is_empty(), "the guest's kernel complains:\n{}", trouble.join("\n"));
}

#[test]
fn a_stock_bzimage_boots_over_mmio_and_switches_itself_off() {
    let mut setup = Setup::new(Kernel::debian(), Transport::Mmio)
        .parameters("reboot=k nacelle.test=a-b,c")
        .script(format!("{SURVEY}\nfact rng $(cat /sys/class/misc/hw_random/rng_current)"));
    setup.spec.entropy = Some(Entropy::default());
    let ended = setup.start().succeed();
    ended.is("cpus", &1);
    ended.is("online", "0");
    ended.is("clock", "kvm-clock");
    ended.is("rng", "virtio_rng.0");
    ended.is("loader", &LOADER_LINUX);
    assert!(ended.fact("bus").contains("LNRO0005"), "{}", ended.fact("bus"));
    let line = ended.part("cmdline");
    assert!(line.contains(" nacelle.test=a-b,c ") && line.trim().ends_with("pci=off"), "{line}");
    // The kernel keeps some for itself.
    assert!((190..=256).contains(&ended.number("memory")), "{} MiB", ended.number("memory"));
    is_untroubled(&ended);
}

#[test]
fn a_stock_bzimage_boots_over_pci_with_threads_and_reboots_by_the_keyboard_controller() {
    let script = format!("{SURVEY}\necho through the virtio console > /dev/hvc0\nrestart");
    let mut setup =
        Setup::new(Kernel::debian(), Transport::Mmio).flag("--enable-pci").size(4, 256).script(script);
    setup.spec.machine_config.smt = true;
    let [serial, console] = ["serial", "console"].map(|name| setup.folder().join(name));
    setup.spec.serial = Some(Serial { serial_out_path: Some(serial), ..Serial::default() });
    setup.spec.console = Some(Console { mode: ConsoleMode::File, path: Some(console.clone()) });
    let ended = setup.start().wait();
    assert_eq!(ended.code, 0, "{}", ended.log);
    ended.says("The guest asked for a reset");
    ended.is("cpus", &4);
    ended.is("cores", &2);
    ended.is("siblings", "0-1");
    ended.is("package", &0);
    ended.is("x2apic", &4);
    assert!(ended.fact("bus").contains("/pci0000:00/"), "{}", ended.fact("bus"));
    assert!(!ended.part("cmdline").contains("pci=off"));
    assert_eq!(fs::read_to_string(&console).unwrap().replace('\r', ""), "through the virtio console\n");
    is_untroubled(&ended);
}

#[test]
fn an_elf_kernel_with_5_gib_uses_memory_above_the_gap_and_resets_by_acpi() {
    let script = format!(
        r#"{SURVEY}
        free_above() {{ awk '/zone +Normal/{{n=1}} n&&/pages free/{{print $3; exit}}' /proc/zoneinfo; }}
        before=$(free_above)
        dd if=/dev/urandom of=/tmp/first bs=1M count=24
        cp /tmp/first /tmp/second
        cmp /tmp/first /tmp/second
        fact taken $((before - $(free_above)))
        restart"#
    );
    let ended = Setup::new(Kernel::debian(), Transport::Mmio)
        .kernel(|folder| Kernel::debian_elf(folder, true))
        .size(2, 5120)
        .parameters("reboot=a")
        .script(script)
        .start()
        .wait();
    assert_eq!(ended.code, 0, "{}", ended.log);
    ended.says("The guest asked for a reset");
    ended.is("loader", &LOADER_LINUX);
    ended.is("cores", &2);
    assert!((4700..=5120).contains(&ended.number("memory")), "{} MiB", ended.number("memory"));
    assert!(ended.part("ram").contains("100000000-"), "{}", ended.part("ram"));
    // Pages of 4 KiB; Linux takes the memory above 4 GiB first.
    assert!(ended.number("taken") > 40 << 8, "{} pages", ended.number("taken"));
    is_untroubled(&ended);
}

#[test]
fn an_elf_kernel_is_entered_by_pvh_and_its_panic_ends_the_machine() {
    let ended = Setup::new(Kernel::debian(), Transport::Pci)
        .kernel(|folder| Kernel::debian_elf(folder, false))
        .script(format!("{SURVEY}\ndrain; echo c > /proc/sysrq-trigger"))
        .start()
        .wait();
    assert_eq!(ended.code, 0, "{}", ended.log);
    ended.says("The guest asked for a reset");
    ended.is("loader", &LOADER_PVH);
    ended.is("cpus", &1);
    assert!(ended.console.contains("Kernel panic - not syncing: sysrq triggered crash"));
    is_untroubled(&ended);
}

/// Only some of them are started at boot: each takes the lab a second. The last one is then
/// started by hand.
#[test]
fn sixty_four_vcpus_are_there_and_a_triple_fault_ends_the_machine() {
    let script = format!(
        r#"{SURVEY}
        fact present $(cat /sys/devices/system/cpu/present)
        echo 1 > /sys/devices/system/cpu/cpu63/online
        fact last $(taskset -c 63 cat /proc/self/stat | cut -d' ' -f39)
        restart"#
    );
    let ended = Setup::new(Kernel::quick(), Transport::Mmio)
        .size(64, 512)
        .parameters("reboot=t maxcpus=3")
        .script(script)
        .start()
        .wait();
    assert_eq!(ended.code, 0, "{}", ended.log);
    ended.says("The guest ended by a triple fault");
    ended.is("cpus", &3);
    ended.is("present", "0-63");
    ended.is("last", &63);
    ended.is("siblings", &0);
    is_untroubled(&ended);
}

#[test]
fn a_pty_is_the_console_and_a_signal_ends_the_machine() {
    let mut setup = Setup::new(Kernel::quick(), Transport::Mmio)
        .script("echo ready; read line; fact heard \"$line\"; read line");
    setup.spec.serial = Some(Serial { mode: Some(ConsoleMode::Pty), ..Serial::default() });
    let mut vm = setup.start();
    vm.wait_for("ready\n");
    vm.say("one two");
    vm.wait_for("@heard=one two\n");
    vm.signal(libc::SIGTERM);
    let ended = vm.wait();
    assert_eq!(ended.code, 128 + libc::SIGTERM);
    ended.says("Signal 15 ended the machine");
}

#[test]
fn a_socket_is_the_console_and_goes_with_the_machine() {
    let mut setup =
        Setup::new(Kernel::quick(), Transport::Pci).script("echo ready; read line; fact heard \"$line\"");
    let path = setup.folder().join("serial.sock");
    let (mode, place) = (Some(ConsoleMode::Socket), Some(path.clone()));
    setup.spec.serial = Some(Serial { mode, serial_out_path: place, ..Serial::default() });
    let mut vm = setup.start();
    vm.wait_for("ready\n");
    vm.say("three four");
    let ended = vm.succeed();
    ended.is("heard", "three four");
    assert!(!path.exists(), "the socket was left behind");
}
