//! Links the program as a kernel: at fixed addresses, without a C library's start.

fn main() {
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
        println!("cargo:rustc-link-arg={argument}");
    }
    println!("cargo:rustc-link-arg=-Wl,-T,{folder}/link.ld,--build-id=none,-z,noexecstack");
    println!("cargo:rerun-if-changed=link.ld");
}
