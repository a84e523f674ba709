//! What reads bytes of others, given bytes that lie.
//!
//! ```text
//!   libFuzzer (main.rs, `cargo xtask fuzz TARGET`) ─┐
//!   a few thousand changed seeds (`cargo test`) ────┴► Target::run(bytes)
//!                                                          │ pieces.rs, edits.rs: bytes ─► shape
//!      state, index, working-set   formats alone           │ digests made right
//!      snapshot, pair              files in a directory ◄──┤
//!      devices                     registers, rings, workers, on a bench without KVM
//!      spec, cpu, api              JSON and HTTP
//! ```
//!
//! A digest keeps a fuzzer out as well as it keeps damage out, so each target makes digests right
//! after it has taken its input apart: what is tried is what a hostile writer would send. JSON is
//! changed by edits of a valid document rather than letter by letter.
//!
//! A run fails by a panic, by 5 seconds, by memory, or where what was believed does not hold
//! (what was restored can be saved and restored again). Seeds are made by the code that writes the
//! formats, so that there are no files of bytes to keep up with them.

mod api_bodies;
mod devices_restored;
mod directory;
mod documents;
mod edits;
mod formats;
mod pieces;
mod plugged;

use std::{fs, io, path::Path};

/// Something that reads bytes.
pub struct Target {
    /// Its name for `cargo xtask fuzz`.
    pub name: &'static str,
    /// Reads them.
    pub run: fn(&[u8]),
    /// Valid bytes to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 9] = [
    Target { name: "state", run: formats::state, seeds: formats::state_seeds },
    Target { name: "index", run: formats::index, seeds: formats::index_seeds },
    Target { name: "working-set", run: formats::working_set, seeds: formats::working_set_seeds },
    Target { name: "snapshot", run: directory::snapshot, seeds: directory::snapshot_seeds },
    Target { name: "pair", run: directory::pair, seeds: directory::pair_seeds },
    Target { name: "devices", run: devices_restored::run, seeds: devices_restored::seeds },
    Target { name: "spec", run: documents::spec, seeds: documents::spec_seeds },
    Target { name: "cpu", run: documents::cpu, seeds: documents::cpu_seeds },
    Target { name: "api", run: api_bodies::run, seeds: api_bodies::seeds },
];

/// The target of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

impl Target {
    /// Puts the seeds into `directory`, which is made, one file each.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write_seeds(&self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        (self.seeds)()
            .iter()
            .enumerate()
            .try_for_each(|(n, seed)| fs::write(directory.join(format!("seed-{n}")), seed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deals the same numbers in each run.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, limit: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % limit.max(1) as u64) as usize
        }
    }

    fn spoil(bytes: &mut Vec<u8>, dice: &mut Dice) {
        let at = dice.below(bytes.len());
        match dice.below(6) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, dice.below(256) as u8),
            2 => bytes.extend([0x7f; 8]),
            3 => bytes.iter_mut().skip(at).take(1 << dice.below(4)).for_each(|byte| *byte = 0xff),
            4 => bytes.iter_mut().skip(at).take(1 << dice.below(4)).for_each(|byte| *byte = 0),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (at % 8)),
        }
    }

    fn survives(name: &str, rounds: usize) {
        let target = target(name).unwrap();
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty());
        let mut dice = Dice(0x5eed);
        seeds.iter().for_each(|seed| (target.run)(seed));
        for round in 0..rounds {
            let mut bytes = seeds[round % seeds.len()].clone();
            (0..=dice.below(4)).for_each(|_| spoil(&mut bytes, &mut dice));
            (target.run)(&bytes);
        }
    }

    #[test]
    fn every_target_survives_its_seeds_and_what_is_near_them() {
        for target in &TARGETS {
            survives(target.name, if target.name == "devices" { 300 } else { 1000 });
        }
    }

    #[test]
    fn seeds_are_files_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        target("index").unwrap().write_seeds(&directory.path().join("seeds")).unwrap();
        let count = fs::read_dir(directory.path().join("seeds")).unwrap().count();
        assert_eq!(count, (target("index").unwrap().seeds)().len());
        assert!(target("nothing").is_none());
    }
}
