//! What a command that makes machines of a snapshot has put up, and must take away again.
//!
//! ```text
//!   $NACELLE_STATE_DIR/making/<12 digits>/
//!     owner              the command, by number and start time
//!     snapshot/          a snapshot that is only there to make machines of
//!     machine-<id>       one that is being made; gone once it runs
//! ```
//!
//! A command that ends takes its scaffold away, with the machines that do not run by then. One
//! that was killed cannot; the next command that opens the state does it ([`sweep`]). Without
//! scaffolds that is one system call.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use super::{
    failure::{Outcome, doing},
    state::{self, Machine, ProcessName, State, Status},
};

const OWNER: &str = "owner";
const MACHINE: &str = "machine-";

/// A directory for what is needed while machines are made.
#[derive(Debug)]
pub struct Scaffold {
    state: State,
    dir: PathBuf,
}

impl Scaffold {
    /// Makes one for this process.
    pub fn begin(state: &State) -> Outcome<Scaffold> {
        let id = state::fresh_id()?;
        let dir = state.making().join(id.get(..12).unwrap_or(&id));
        // A sweeper must not see it without its owner.
        let new = state.making().join(format!("{}.new", id.get(..12).unwrap_or(&id)));
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&new);
        let owner = ProcessName::of(std::process::id() as i32);
        let owner = serde_json::to_vec(&owner).unwrap_or_default();
        let made =
            made.and_then(|()| fs::write(new.join(OWNER), owner)).and_then(|()| fs::rename(&new, &dir));
        doing(made, || format!("{} cannot be made", dir.display()))?;
        Ok(Scaffold { state: state.clone(), dir })
    }

    /// Where a snapshot can be that goes with the scaffold.
    pub fn snapshot(&self) -> PathBuf {
        self.dir.join("snapshot")
    }

    /// From now on, and until [`Scaffold::runs`], a machine goes with the scaffold.
    pub fn holds(&self, machine: &Machine) -> Outcome<()> {
        let path = self.mark(machine);
        doing(fs::write(&path, ""), || format!("{} cannot be written", path.display()))
    }

    /// A machine stands on its own.
    pub fn runs(&self, machine: &Machine) {
        let _ = fs::remove_file(self.mark(machine));
    }

    fn mark(&self, machine: &Machine) -> PathBuf {
        self.dir.join(format!("{MACHINE}{}", machine.record.id))
    }
}

impl Drop for Scaffold {
    fn drop(&mut self) {
        take_away(&self.state, &self.dir);
    }
}

/// Takes away what commands left that were killed.
pub fn sweep(state: &State) {
    let Ok(entries) = fs::read_dir(state.making()) else { return };
    for dir in entries.flatten().map(|entry| entry.path()) {
        let owner = fs::read(dir.join(OWNER)).ok();
        let owner: Option<ProcessName> = owner.and_then(|text| serde_json::from_slice(&text).ok()).flatten();
        // One without an owner was being made when its command was killed, or is being made now;
        // that takes less than a minute.
        let dead = owner.map_or_else(|| is_old(&dir), |owner| !owner.is_alive());
        if dead {
            take_away(state, &dir);
        }
    }
}

fn is_old(dir: &Path) -> bool {
    let age = fs::metadata(dir).and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
    age.is_some_and(|age| age.as_secs() > 60)
}

fn take_away(state: &State, dir: &Path) {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    for name in names.filter_map(|name| name.into_string().ok()) {
        let machine = name.strip_prefix(MACHINE).and_then(|id| state.find(id).ok());
        // One whose keeper is at work comes up without its maker.
        let kept = |m: &Machine| m.record.started.is_some() || m.record.status() == Status::Created;
        if let Some(machine) = machine.filter(|m| !kept(m)) {
            let _ = state.lock().and_then(|_lock| machine.remove());
        }
    }
    // The owner goes last: until then somebody else can finish this.
    let _ = fs::remove_dir_all(dir.join("snapshot"));
    let _ = fs::remove_dir_all(dir);
}

#[cfg(test)]
mod tests {
    use super::{super::state::Record, *};

    fn state() -> (tempfile::TempDir, State) {
        let dir = tempfile::tempdir().unwrap();
        let state = State::at(dir.path().join("state")).unwrap();
        (dir, state)
    }

    #[test]
    fn what_does_not_run_goes_with_its_scaffold() {
        let (_dir, state) = state();
        let scaffold = Scaffold::begin(&state).unwrap();
        let [fails, runs] = ["a1", "b1"].map(|id| state.create(Record::example(id, id)).unwrap());
        scaffold.holds(&fails).unwrap();
        scaffold.holds(&runs).unwrap();
        scaffold.runs(&runs);
        fs::create_dir(scaffold.snapshot()).unwrap();
        drop(scaffold);
        assert_eq!(fs::read_dir(state.making()).unwrap().count(), 0);
        let left: Vec<String> = state.machines().unwrap().into_iter().map(|m| m.record.name).collect();
        assert_eq!(left, ["b1"]);
    }

    #[test]
    fn the_scaffold_of_a_killed_command_is_swept_and_no_other() {
        let (_dir, state) = state();
        let mut command = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let owner = ProcessName::of(command.id() as i32);
        let [living, killed] = [Scaffold::begin(&state).unwrap(), Scaffold::begin(&state).unwrap()];
        fs::write(killed.dir.join(OWNER), serde_json::to_vec(&owner).unwrap()).unwrap();
        let machine = state.create(Record::example("a1", "one")).unwrap();
        killed.holds(&machine).unwrap();
        fs::create_dir(killed.snapshot()).unwrap();
        sweep(&state);
        assert!(killed.dir.exists() && living.dir.exists());
        command.kill().unwrap();
        command.wait().unwrap();
        sweep(&state);
        assert!(!killed.dir.exists() && living.dir.exists());
        assert!(state.machines().unwrap().is_empty());
    }
}
