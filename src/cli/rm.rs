//! `nacelle rm`: forgets machines and what they wrote.

use clap::Args as ClapArgs;

use super::{
    ending,
    failure::{Failure, Outcome},
    output,
    remote::Host,
    state::{Machine, State, Status},
};

/// Remove machines that ended, with all they wrote
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Kill those that run
    #[arg(short, long)]
    force: bool,
    /// Names, ids or starts of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Removes them.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    Ok(output::each(&args.machines, |word| {
        match host {
            None => {
                let state = State::open()?;
                remove(&state, &mut state.find(word)?, args.force)?;
            }
            Some(host) => host.remove(word, args.force)?,
        }
        output::print(&format!("{word}\n"))
    }))
}

/// Removes one; one that runs only by `force`.
pub fn remove(state: &State, machine: &mut Machine, force: bool) -> Outcome<()> {
    let name = machine.record.name.clone();
    match machine.record.status() {
        Status::Exited | Status::Dead | Status::Suspended => {}
        // What it wrote is thrown away, so it need not end in order.
        _ if force => ending::cut_off(machine)?,
        _ => {
            return Err(Failure::new(format!(
                "Machine {name} runs; stop it first with 'nacelle stop {name}', or remove it with -f"
            )));
        }
    }
    // Monitors of dead machines may outlive their keeper by a moment.
    if let Some(monitor) = machine.record.monitor {
        monitor.signal(libc::SIGKILL);
    }
    ending::wait_for_keeper(machine);
    let _lock = state.lock()?;
    machine.remove()
}

#[cfg(test)]
mod tests {
    use super::{
        super::state::{self, ProcessName, Record},
        *,
    };

    fn machine(state: &State, keeper: Option<ProcessName>, monitor: Option<ProcessName>) -> Machine {
        let record = Record {
            started: Some(state::now()),
            monitor,
            keeper,
            ..Record::example(&state::fresh_id().unwrap(), "one")
        };
        state.create(record).unwrap()
    }

    fn sleeper() -> (std::process::Child, Option<ProcessName>) {
        let child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let name = ProcessName::of(child.id() as i32);
        (child, name)
    }

    #[test]
    fn a_dead_machine_is_removed_and_its_name_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::at(dir.path().to_owned()).unwrap();
        let mut dead = machine(&state, None, None);
        remove(&state, &mut dead, false).unwrap();
        assert!(state.machines().unwrap().is_empty());
        machine(&state, None, None);
    }

    #[test]
    fn a_running_machine_is_removed_only_by_force_which_leaves_no_process() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::at(dir.path().to_owned()).unwrap();
        let ((mut keeper, keeper_name), (mut monitor, monitor_name)) = (sleeper(), sleeper());
        let mut running = machine(&state, keeper_name, monitor_name);
        let refused = remove(&state, &mut running, false).unwrap_err().message;
        assert!(refused.contains("nacelle stop one"), "{refused}");
        let reaper =
            std::thread::spawn(move || (monitor.wait().unwrap(), keeper.kill(), keeper.wait().unwrap()));
        remove(&state, &mut running, true).unwrap();
        let (monitor, _, _) = reaper.join().unwrap();
        assert!(!monitor.success());
        assert!(state.machines().unwrap().is_empty());
    }
}
