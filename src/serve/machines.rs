//! One machine or all of them: seen, waited for, stopped, removed.
//!
//! The code is that of the commands of the same names. It reads files and waits, so it runs on
//! threads for that; what may take seconds needs a turn first ([`Service::slow`]).

use std::{sync::Arc, time::Duration};

use hyper::StatusCode;
use serde::Deserialize;
use serde_json::json;

use super::{
    Service,
    answer::{Answered, Refusal, done, json_of},
    routes::Asked,
};
use crate::cli::{
    ending,
    failure::{Failure, Outcome},
    inspect, kill, list, resume, rm,
    state::{Machine, Status},
    stats, suspend, wait,
};

/// Longest time a command may be given to end, in seconds.
const GRACE_MAX: u64 = 3600;

impl Service {
    /// The machine called `word`.
    pub async fn find(self: &Arc<Self>, word: &str) -> Result<Machine, Refusal> {
        let (service, word) = (Arc::clone(self), word.to_owned());
        let found = off_thread(move || Ok(service.state.find(&word))).await?;
        found.map_err(|failure| Refusal::of(StatusCode::NOT_FOUND, &failure))
    }

    /// Does something to a machine that may take seconds.
    async fn slowly<T: Send + 'static>(
        self: &Arc<Self>,
        word: &str,
        act: impl FnOnce(&Service, Machine) -> Outcome<T> + Send + 'static,
    ) -> Result<T, Refusal> {
        let machine = self.find(word).await?;
        let _turn = self.slow.acquire().await.map_err(|_| Refusal::failed("The service is ending"))?;
        let service = Arc::clone(self);
        off_thread(move || act(&service, machine)).await
    }
}

/// Runs what blocks where it may.
pub async fn off_thread<T: Send + 'static>(
    act: impl FnOnce() -> Outcome<T> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(act).await {
        Ok(outcome) => outcome.map_err(Refusal::from),
        Err(_) => Err(Refusal::failed("A thread of the service failed")),
    }
}

/// `GET /healthz`: it answers, and can read the state directory.
pub async fn health(service: &Arc<Service>) -> Answered {
    let reader = Arc::clone(service);
    let counted = off_thread(move || reader.state.machines().map(|machines| machines.len())).await;
    let count = counted.map_err(|refusal| Refusal::failed(refusal.message))?;
    json_of(&json!({ "status": "ok", "machines": count }))
}

/// `GET /machines`, those that run; with `all` every one.
pub async fn list(service: &Arc<Service>, asked: &Asked) -> Answered {
    asked.only(&["all"])?;
    let all = asked.flag("all")?;
    let service = Arc::clone(service);
    json_of(&off_thread(move || list::rows(&service.state, all)).await?)
}

/// `GET /machines/{name}`.
pub async fn inspect(service: &Arc<Service>, name: &str) -> Answered {
    let machine = service.find(name).await?;
    json_of(&off_thread(move || Ok(inspect::value(&machine))).await?)
}

/// `DELETE /machines/{name}`, one that runs only by `force`.
pub async fn remove(service: &Arc<Service>, asked: &mut Asked, name: &str) -> Answered {
    asked.only(&["force"])?;
    let force = asked.flag("force")?;
    let machine = service.find(name).await?;
    if !force && matches!(machine.record.status(), Status::Running | Status::Created) {
        let text = format!("Machine {name} runs; stop it first, or remove it with force=true");
        return Err(Refusal::new(StatusCode::CONFLICT, text));
    }
    service.slowly(name, move |service, mut machine| rm::remove(&service.state, &mut machine, force)).await?;
    Ok(done())
}

/// `POST /machines/{name}/wait`: answered when it has ended, with its exit code.
pub async fn wait(service: &Arc<Service>, asked: &mut Asked, name: &str) -> Answered {
    asked.streams()?;
    let mut changes = service.hub.changes();
    let mut machine = service.find(name).await?;
    // A machine that is removed at its end takes its record with it; what is held open stays.
    let mut held = machine.ending();
    loop {
        changes.mark_unchanged();
        let over;
        (machine, held, over) = off_thread(move || {
            let over = ending::is_over(&mut machine).then(|| wait::code(&machine, held.as_ref()));
            Ok((machine, held, over))
        })
        .await?;
        if let Some(code) = over {
            let code = code.map_err(|failure| Refusal::of(StatusCode::GONE, &failure))?;
            let reason = machine.record.end.as_ref().and_then(|end| end.reason.as_ref());
            return json_of(&json!({ "exit_code": code, "reason": reason }));
        }
        if changes.changed().await.is_err() {
            return Err(Refusal::failed("The service is ending"));
        }
    }
}

/// The body of `POST /machines/{name}/stop`.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Stop {
    /// Seconds a command may take before it is killed.
    timeout_s: u64,
}

impl Default for Stop {
    fn default() -> Stop {
        Stop { timeout_s: 10 }
    }
}

/// `POST /machines/{name}/stop`: asks it to end and sees to it.
pub async fn stop(service: &Arc<Service>, asked: &mut Asked, name: &str) -> Answered {
    asked.streams()?;
    let Stop { timeout_s } = asked.json().await?;
    if timeout_s > GRACE_MAX {
        return Err(Refusal::wrong(format!("timeout_s is {timeout_s}; it must be at most {GRACE_MAX}")));
    }
    let grace = Duration::from_secs(timeout_s);
    service.slowly(name, move |_, mut machine| ending::stop(&mut machine, grace)).await?;
    Ok(done())
}

/// The body of `POST /machines/{name}/kill`.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Kill {
    /// Signal, by name or number.
    signal: String,
}

impl Default for Kill {
    fn default() -> Kill {
        Kill { signal: "KILL".to_owned() }
    }
}

/// `POST /machines/{name}/kill`: sends its command a signal.
pub async fn kill(service: &Arc<Service>, asked: &mut Asked, name: &str) -> Answered {
    let wanted: Kill = asked.json().await?;
    let number = kill::signal(&wanted.signal)
        .map_err(|rule| Refusal::wrong(format!("signal is {:?}; {rule}", wanted.signal)))?;
    let machine = service.find(name).await?;
    if matches!(machine.record.status(), Status::Exited | Status::Dead) {
        let text = format!("Machine {name} has ended; there is nothing to send a signal to");
        return Err(Refusal::new(StatusCode::CONFLICT, text));
    }
    service.slowly(name, move |_, mut machine| kill::send(&mut machine, number)).await?;
    Ok(done())
}

/// `POST /machines/{name}/suspend`: answered when it is in its snapshot and has no process.
pub async fn suspend(service: &Arc<Service>, asked: &mut Asked, name: &str) -> Answered {
    asked.streams()?;
    let machine = service.find(name).await?;
    if !matches!(machine.record.status(), Status::Running | Status::Suspended) {
        let text = format!(
            "Machine {name} is {}; only a running one can be suspended",
            machine.record.status().word()
        );
        return Err(Refusal::new(StatusCode::CONFLICT, text));
    }
    service.slowly(name, |_, mut machine| suspend::suspend(&mut machine, &())).await?;
    Ok(done())
}

/// `POST /machines/{name}/resume`: answered when a paused or suspended one goes on.
pub async fn resume(service: &Arc<Service>, name: &str) -> Answered {
    let machine = service.find(name).await?;
    if !matches!(machine.record.status(), Status::Running | Status::Suspended) {
        let status = machine.record.status().word();
        let text = format!("Machine {name} is {status}; only one that is paused or suspended can go on");
        return Err(Refusal::new(StatusCode::CONFLICT, text));
    }
    service.slowly(name, |service, mut machine| resume::resume(&service.program, &mut machine)).await?;
    Ok(done())
}

/// `GET /machines/{name}/stats`: what it uses, measured for a second.
pub async fn stats(service: &Arc<Service>, name: &str) -> Answered {
    let figures = service
        .slowly(name, |service, machine| {
            let name = &machine.record.name;
            let text = format!("Machine {name} does not run; only running ones use anything");
            let status = machine.record.status();
            let figures = match status {
                Status::Running => stats::figures(&service.state, &machine.record.id)?,
                _ => None,
            };
            figures.ok_or_else(|| Failure::new(text))
        })
        .await
        .map_err(|refusal| match refusal.status {
            StatusCode::BAD_REQUEST => Refusal::new(StatusCode::CONFLICT, refusal.message),
            _ => refusal,
        })?;
    json_of(&figures)
}
