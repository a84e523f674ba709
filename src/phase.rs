//! What is allowed when, and why not.
//!
//! ```text
//!   NotStarted ──Start──► Running ◄──Resume── Paused
//!        │                  │ └─────Pause──────►│
//!        └──────Stop────────┴───────Stop────────┴────► Ended
//! ```
//!
//! A pure function: the controller asks it first, so a refused request never touches the
//! machine, and the rules are tested without one.

use api::{Fault, FaultKind, MachineState};

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
    /// Begin to run.
    Start,
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
            (Phase::Ended, _) => refused("The machine has ended; start a new one"),
            (Phase::NotStarted, Verb::Start) => Ok(Phase::Running),
            (_, Verb::Start) => refused("The machine has been started already"),
            (_, Verb::Stop) => Ok(Phase::Ended),
            (Phase::NotStarted, _) => refused("The machine has not been started yet"),
            (_, Verb::Pause) => Ok(Phase::Paused),
            (_, Verb::Resume) => Ok(Phase::Running),
            (Phase::Paused, Verb::Press) => refused("The machine is paused; resume it first"),
            (Phase::Running, Verb::Press) => Ok(Phase::Running),
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
            assert_eq!(phase.after(Verb::Stop).is_ok(), phase != Phase::Ended);
        }
        for verb in [Verb::Start, Verb::Pause, Verb::Resume, Verb::Press, Verb::Stop] {
            assert_eq!(Phase::Ended.after(verb).unwrap_err().kind, FaultKind::Conflict);
        }
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
