//! What is allowed when, and why not.
//!
//! ```text
//!        ┌───────────────Load────────────────┐
//!        │                                   ▼
//!   NotStarted ──Start──► Running ◄──Resume── Paused
//!        │                  │ └─────Pause──────►│
//!        └──────Stop────────┴───────Stop────────┴────► Ended
//! ```
//!
//! A pure function: the controller asks it first, so a refused request never touches the
//! machine, and the rules are tested without one.

use api::{Fault, FaultKind, MachineState};

/// Why something must wait for the start. The words are Firecracker's, which programs look for.
pub const TOO_EARLY: &str = "The requested operation is not supported before starting the microVM";
/// Why something had to be done before the start.
pub const TOO_LATE: &str = "The requested operation is not supported after starting the microVM";

/// Where a machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Configured; nothing runs yet.
    NotStarted,
    /// vCPUs run.
    Running,
    /// vCPUs and devices stand still.
    Paused,
    /// It is over; nothing brings it back.
    Ended,
}

/// What somebody wants to do to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Read, or change what may be changed at any time.
    Look,
    /// Describe the machine that is to start.
    Prepare,
    /// Read or change what only a started machine has.
    Change,
    /// Copy all of the machine: it must stand still.
    Copy,
    /// Begin to run.
    Start,
    /// Become a machine that was saved.
    Load,
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Tell the guest something through a key or button: it must run to notice.
    Press,
    /// End.
    Stop,
}

impl Phase {
    /// The phase after `verb`, or why it is refused. `Pause` when paused and `Resume` when
    /// running are accepted and change nothing, so that they can be repeated safely.
    pub fn after(self, verb: Verb) -> Result<Phase, Fault> {
        let refused = |text: &str| Err(Fault::new(FaultKind::Conflict, text));
        match (self, verb) {
            (Phase::Ended, Verb::Look) => Ok(Phase::Ended),
            (Phase::Ended, _) => refused("The machine has ended; start a new one"),
            (_, Verb::Look) => Ok(self),
            (_, Verb::Stop) => Ok(Phase::Ended),
            (Phase::NotStarted, Verb::Prepare) => Ok(Phase::NotStarted),
            (Phase::NotStarted, Verb::Start) => Ok(Phase::Running),
            (Phase::NotStarted, Verb::Load) => Ok(Phase::Paused),
            (Phase::NotStarted, _) => refused(TOO_EARLY),
            (_, Verb::Start | Verb::Prepare | Verb::Load) => refused(TOO_LATE),
            (_, Verb::Change) => Ok(self),
            (Phase::Running, Verb::Copy) => refused("The machine runs; pause it first"),
            (Phase::Paused, Verb::Copy) => Ok(Phase::Paused),
            (_, Verb::Pause) => Ok(Phase::Paused),
            (_, Verb::Resume) => Ok(Phase::Running),
            (Phase::Paused, Verb::Press) => refused("The machine is paused; resume it first"),
            (Phase::Running, Verb::Press) => Ok(Phase::Running),
        }
    }

    /// Its name in events.
    pub fn name(self) -> &'static str {
        match self {
            Phase::NotStarted => "NotStarted",
            Phase::Running => "Running",
            Phase::Paused => "Paused",
            Phase::Ended => "Ended",
        }
    }

    /// The state as the API shows it.
    pub fn shown(self) -> MachineState {
        match self {
            Phase::NotStarted => MachineState::NotStarted,
            Phase::Running => MachineState::Running,
            Phase::Paused | Phase::Ended => MachineState::Paused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 4] = [Phase::NotStarted, Phase::Running, Phase::Paused, Phase::Ended];

    #[test]
    fn only_a_fresh_machine_starts_and_an_ended_one_does_nothing() {
        for phase in PHASES {
            assert_eq!(phase.after(Verb::Start).is_ok(), phase == Phase::NotStarted);
            assert_eq!(phase.after(Verb::Load).is_ok(), phase == Phase::NotStarted);
            assert_eq!(phase.after(Verb::Stop).is_ok(), phase != Phase::Ended);
        }
        for verb in [Verb::Start, Verb::Pause, Verb::Resume, Verb::Press, Verb::Stop, Verb::Change] {
            assert_eq!(Phase::Ended.after(verb).unwrap_err().kind, FaultKind::Conflict);
        }
    }

    #[test]
    fn what_describes_a_machine_comes_before_its_start_and_what_changes_it_after() {
        for phase in [Phase::Running, Phase::Paused] {
            assert_eq!(phase.after(Verb::Prepare).unwrap_err().message, TOO_LATE);
            assert_eq!(phase.after(Verb::Change), Ok(phase));
        }
        assert_eq!(Phase::NotStarted.after(Verb::Prepare), Ok(Phase::NotStarted));
        for verb in [Verb::Change, Verb::Copy, Verb::Pause, Verb::Resume, Verb::Press] {
            assert_eq!(Phase::NotStarted.after(verb).unwrap_err().message, TOO_EARLY);
        }
        assert!(Phase::Running.after(Verb::Copy).is_err() && Phase::Paused.after(Verb::Copy).is_ok());
    }

    #[test]
    fn pause_and_resume_can_be_repeated() {
        for phase in [Phase::Running, Phase::Paused] {
            assert_eq!(phase.after(Verb::Pause), Ok(Phase::Paused));
            assert_eq!(phase.after(Verb::Resume), Ok(Phase::Running));
        }
    }

    #[test]
    fn a_paused_guest_cannot_be_told_anything() {
        assert!(Phase::Paused.after(Verb::Press).unwrap_err().message.contains("resume it first"));
    }
}
