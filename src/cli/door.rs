//! The way to a running machine's agent, on this host or through another one's service.

use std::ops::Deref;

use guest::protocol::ProcessSpec;
use serde_json::Value;

use super::{
    failure::{Failure, Outcome},
    remote::{Host, Tunnel},
    state::State,
};

/// A door to an agent, and what is known of the container behind it.
#[derive(Debug)]
pub struct Door {
    agent: guest::client::Machine,
    /// The container's environment.
    pub env: Vec<String>,
    /// How its main process was started, as far as that is still known.
    pub main: ProcessSpec,
    /// What leads there, where that is elsewhere.
    _tunnel: Option<Tunnel>,
}

impl Door {
    /// The door of the machine called `word`, which must run.
    pub fn open(word: &str, host: Option<&Host>) -> Outcome<Door> {
        let Some(host) = host else {
            let machine = State::open()?.find(word)?;
            let agent = machine.agent()?;
            let main = machine.plan().map(|plan| plan.process).unwrap_or_default();
            return Ok(Door { agent, env: machine.record.env, main, _tunnel: None });
        };
        let seen = host.inspect(word)?;
        let status = seen.pointer("/state/status").and_then(Value::as_str).unwrap_or("lost");
        if status != "running" {
            return Err(Failure::new(format!("Machine {word} is {status}; only a running one can be asked")));
        }
        let part = |name: &str| seen.get(name).cloned().unwrap_or_default();
        let tunnel = host.tunnel(word)?;
        Ok(Door {
            agent: guest::client::Machine::new(tunnel.socket()),
            env: serde_json::from_value(part("environment")).unwrap_or_default(),
            main: serde_json::from_value(part("process")).unwrap_or_default(),
            _tunnel: Some(tunnel),
        })
    }
}

impl Deref for Door {
    type Target = guest::client::Machine;

    fn deref(&self) -> &guest::client::Machine {
        &self.agent
    }
}
