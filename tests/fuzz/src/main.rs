//! A target under libFuzzer: which one is in `NACELLE_FUZZ_TARGET`, and its seeds are put into the
//! directory in `NACELLE_FUZZ_SEEDS` before the first input is read.

#![no_main]

use std::{env, path::Path, sync::OnceLock};

use fuzz::Target;
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<&Target> = OnceLock::new();

fn target() -> &'static Target {
    TARGET.get_or_init(|| {
        let name = env::var("NACELLE_FUZZ_TARGET").expect("NACELLE_FUZZ_TARGET names the target");
        fuzz::target(&name).expect("NACELLE_FUZZ_TARGET is one of the targets")
    })
}

fuzz_target!(
    init: {
        if let Some(directory) = env::var_os("NACELLE_FUZZ_SEEDS") {
            target().write_seeds(Path::new(&directory)).expect("seeds can be written");
        }
    },
    |data: &[u8]| (target().run)(data)
);
