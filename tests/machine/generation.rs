//! What tells a guest which machine it is: the generation id and VMClock.

use std::env;

use api::spec::Transport;

use crate::{kernel::Kernel, vm::Setup};

/// Prints `$2` bytes at physical address `$1`, in hexadecimal.
pub const PEEK: &str = r#"
peek() { dd if=/dev/mem bs=16 skip=$(($1 / 16)) count=$(($2 / 16)) 2>/dev/null | hexdump -v -e '/1 "%02x"'; }
"#;

#[test]
fn a_guest_finds_its_generation_id_and_keeps_off_both_pages() {
    let script = format!(
        "{PEEK}
fact devices $(ls /sys/bus/acpi/devices | grep -e AMZNC10C -e NCEL0001)
fact id $(peek 0x9f000 16)
fact page $(peek 0x9e000 112)
part map dmesg
"
    );
    let ended = Setup::new(Kernel::debian(), Transport::Mmio).script(script).start().succeed();
    ended.is("devices", "AMZNC10C:00 NCEL0001:00");
    let id = ended.fact("id");
    assert!(id.len() == 32 && id != "0".repeat(32), "{id:?}");
    let page = ended.fact("page");
    assert!(page.starts_with("56434c4b" /* VCLK */) && page.len() == 224, "{page}");
    let map = ended.part("map");
    assert!(map.contains("[mem 0x000000000009e000-0x000000000009ffff] reserved"), "{map}");
}

#[test]
fn a_kernel_with_a_driver_for_it_drives_its_generation_id() {
    // Debian's cloud kernel has none.
    let expected = env::var_os("NACELLE_TEST_BUILT_KERNEL").map_or("", |_| "NCEL0001:00");
    let script = "fact driven $(ls /sys/bus/acpi/drivers/vmgenid | grep NCEL)";
    let ended = Setup::new(Kernel::quick(), Transport::Mmio).script(script).start().succeed();
    ended.is("driven", expected);
}
