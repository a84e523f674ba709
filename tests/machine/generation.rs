//! What tells a guest which machine it is: the generation id and VMClock.

use api::spec::Transport;

use crate::{kernel::Kernel, vm::Setup};

/// Prints `$2` bytes at physical address `$1`, in hexadecimal.
const PEEK: &str = r#"
peek() { dd if=/dev/mem bs=16 skip=$(($1 / 16)) count=$(($2 / 16)) 2>/dev/null | hexdump -v -e '/1 "%02x"'; }
"#;

#[test]
fn a_guest_drives_its_generation_id_and_keeps_off_both_pages() {
    let script = format!(
        "{PEEK}
fact driver $(ls /sys/bus/acpi/drivers/vmgenid | grep NCEL)
fact clock $(ls /sys/bus/acpi/devices | grep AMZNC10C)
fact id $(peek 0x9f000 16)
fact page $(peek 0x9e000 112)
part map dmesg
"
    );
    let ended = Setup::new(Kernel::debian(), Transport::Mmio).script(script).start().succeed();
    ended.is("driver", "NCEL0001:00");
    ended.is("clock", "AMZNC10C:00");
    let id = ended.fact("id");
    assert!(id.len() == 32 && id != "0".repeat(32), "{id:?}");
    let page = ended.fact("page");
    assert!(page.starts_with("56434c4b" /* VCLK */) && page.len() == 224, "{page}");
    let map = ended.part("map");
    assert!(map.contains("[mem 0x000000000009e000-0x000000000009ffff] reserved"), "{map}");
}
