//! Requests and answers on one control connection.

use super::{ANSWER_TIMEOUT, ClientError, WORK_TIMEOUT, connection::Deadline, printable};
use crate::protocol::{
    Event, Exit, Failure, Hello, Identity, Interface, Open, Outcome, Part, PathStat, ProcessId, ProcessSpec,
    ProcessSummary, Reply, Request, Setup, Size, Stats, VERSION, frame, frame::FrameError,
};
use serde::Serialize;
use std::{os::unix::net::UnixStream, time::Duration};

/// The agent of a machine, over one control connection.
///
/// Calls are answered in order and block. To signal a process while another thread waits for
/// it, open a second one with [`super::Machine::control`]. After a [`ClientError::Timeout`]
/// the connection is of no more use, since the late answer would be taken for the next one;
/// every later call then fails with [`ClientError::Closed`].
#[derive(Debug)]
pub struct Agent {
    connection: UnixStream,
    hello: Hello,
    timeout: Duration,
    usable: bool,
}

impl Agent {
    /// Greets the agent over a connection: one from [`super::connect`] or
    /// [`super::ReadyListener::accept`]. `timeout` is for this and for later quick answers.
    ///
    /// # Errors
    /// [`ClientError::Version`] when the agent is of another version, and all about answers.
    pub fn over(mut connection: UnixStream, timeout: Duration) -> Result<Self, ClientError> {
        let what = "answer";
        let reply = ask(&mut connection, &Open::Control { version: VERSION }, timeout, what)?;
        let Reply::Hello(mut hello) = reply else { return Err(unexpected(reply, what)) };
        if hello.version != VERSION {
            return Err(ClientError::Version { agent: hello.version, ours: VERSION });
        }
        hello.kernel = printable(&hello.kernel);
        hello.agent = printable(&hello.agent);
        Ok(Self { connection, hello, timeout, usable: true })
    }

    /// Who answers.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Makes the container's surroundings: root, name, network, clock. Once a machine.
    ///
    /// # Errors
    /// [`ClientError::Agent`] with what could not be made.
    pub fn setup(&mut self, setup: Setup) -> Result<(), ClientError> {
        let request = Request::Setup(Box::new(setup));
        self.done(&request, WORK_TIMEOUT, "set the container up")
    }

    /// Starts the container's main process, number [`crate::protocol::MAIN`]. Nothing it
    /// writes is lost before its streams are opened. Returns its number in the guest's kernel.
    ///
    /// # Errors
    /// [`ClientError::Agent`]; [`ClientError::exit_code`] tells 127, 126 and 125 apart.
    pub fn start(&mut self, process: ProcessSpec) -> Result<u32, ClientError> {
        let request = Request::Start(Box::new(process));
        self.started(&request, "start the command").map(|(_, pid)| pid)
    }

    /// Starts a further process in the container. Returns its number here and in the kernel.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn exec(&mut self, process: ProcessSpec) -> Result<(ProcessId, u32), ClientError> {
        self.started(&Request::Exec(Box::new(process)), "start the command")
    }

    /// Sends a signal (1 to 64) to a process.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when it has ended already.
    pub fn signal(&mut self, process: ProcessId, signal: i32) -> Result<(), ClientError> {
        self.done(&Request::Signal { process, signal }, self.timeout, "send the signal")
    }

    /// Tells a process with a terminal its new size.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when it has no terminal or has ended.
    pub fn resize(&mut self, process: ProcessId, size: Size) -> Result<(), ClientError> {
        self.done(&Request::Resize { process, size }, self.timeout, "resize the terminal")
    }

    /// Ends a process's standard input, after what an open input stream still brings. With a
    /// terminal this types its end-of-file character.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when there is no such process.
    pub fn close_stdin(&mut self, process: ProcessId) -> Result<(), ClientError> {
        self.done(&Request::CloseStdin { process }, self.timeout, "close standard input")
    }

    /// Waits until a process has ended and its output has been read (or its streams given
    /// up). With a limit, `None` says that it still runs.
    ///
    /// # Errors
    /// [`ClientError::Closed`] when the machine goes away meanwhile.
    pub fn wait(&mut self, process: ProcessId, limit: Option<Duration>) -> Result<Option<Exit>, ClientError> {
        let timeout_ms = limit.map(|l| u64::try_from(l.as_millis()).unwrap_or(u64::MAX));
        let patience = limit.map(|l| l.saturating_add(self.timeout));
        let what = "report the end of the command";
        match self.ask(&Request::Wait { process, timeout_ms }, patience, what)? {
            Reply::Exited(exit) => Ok(Some(exit)),
            Reply::Running {} => Ok(None),
            other => Err(unexpected(other, what)),
        }
    }

    /// The processes the agent started, those lately ended included.
    ///
    /// # Errors
    /// Those about answers.
    pub fn list(&mut self) -> Result<Vec<ProcessSummary>, ClientError> {
        let what = "list the processes";
        let mut list = match self.ask(&Request::List {}, Some(self.timeout), what)? {
            Reply::Processes(list) => list,
            other => return Err(unexpected(other, what)),
        };
        for process in &mut list {
            process.user = printable(&process.user);
            process.args.iter_mut().for_each(|a| *a = printable(a));
        }
        Ok(list)
    }

    /// What the container and the machine use.
    ///
    /// # Errors
    /// Those about answers.
    pub fn stats(&mut self) -> Result<Stats, ClientError> {
        let what = "report its use of resources";
        match self.ask(&Request::Stats {}, Some(self.timeout), what)? {
            Reply::Stats(mut stats) => {
                stats.network.iter_mut().for_each(|n| n.name = printable(&n.name));
                stats.io.iter_mut().for_each(|d| d.device = printable(&d.device));
                Ok(*stats)
            }
            other => Err(unexpected(other, what)),
        }
    }

    /// What is at a path of the container.
    ///
    /// # Errors
    /// [`ClientError::Agent`] with [`crate::protocol::FailureKind::NoSuchPath`].
    pub fn stat(&mut self, path: &str, follow: bool) -> Result<PathStat, ClientError> {
        let what = "look at a path";
        let request = Request::Stat { path: path.into(), follow };
        match self.ask(&request, Some(self.timeout), what)? {
            Reply::Path(stat) => Ok(stat),
            other => Err(unexpected(other, what)),
        }
    }

    /// Writes every dirty page to the machine's disks.
    ///
    /// # Errors
    /// Those about answers.
    pub fn sync(&mut self) -> Result<(), ClientError> {
        self.done(&Request::Sync {}, WORK_TIMEOUT, "write its disks")
    }

    /// Sets the machine's clock and feeds its random generator, as after a restore.
    ///
    /// # Errors
    /// [`ClientError::Agent`].
    pub fn set_time(&mut self, unix_ns: u64, entropy: Vec<u8>) -> Result<(), ClientError> {
        self.done(&Request::SetTime { unix_ns, entropy }, self.timeout, "set its clock")
    }

    /// Makes a restored machine another one than it was saved as; what came of each part. An
    /// agent of before there was this answers with [`crate::protocol::FailureKind::BadRequest`],
    /// as for values that could not be meant, and has done nothing.
    ///
    /// # Errors
    /// [`ClientError::Agent`].
    pub fn identify(&mut self, identity: Identity) -> Result<Vec<Outcome>, ClientError> {
        let what = "become another machine";
        let request = Request::Identify(Box::new(identity));
        match self.ask(&request, Some(WORK_TIMEOUT), what)? {
            Reply::Identified(outcomes) => Ok(outcomes.into_iter().map(clean_outcome).collect()),
            other => Err(unexpected(other, what)),
        }
    }

    /// Configures interfaces anew.
    ///
    /// # Errors
    /// [`ClientError::Agent`].
    pub fn network(&mut self, interfaces: Vec<Interface>) -> Result<(), ClientError> {
        self.done(&Request::Network { interfaces }, WORK_TIMEOUT, "configure its network")
    }

    /// Ends every process, writes the disks and turns the machine off (or restarts it). The
    /// answer comes just before the end; a machine that is gone instead has done it too.
    ///
    /// # Errors
    /// [`ClientError::Timeout`], [`ClientError::Agent`].
    pub fn shutdown(&mut self, reboot: bool) -> Result<(), ClientError> {
        match self.done(&Request::Shutdown { reboot }, WORK_TIMEOUT, "shut down") {
            Err(ClientError::Closed { .. }) => Ok(()),
            other => other,
        }
    }

    #[cfg(test)]
    pub(super) fn timeout_for_test(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    fn done(&mut self, request: &Request, timeout: Duration, what: &'static str) -> Result<(), ClientError> {
        expect_done(self.ask(request, Some(timeout), what)?, what)
    }

    fn started(&mut self, request: &Request, what: &'static str) -> Result<(ProcessId, u32), ClientError> {
        match self.ask(request, Some(WORK_TIMEOUT), what)? {
            Reply::Started { process, pid } => Ok((process, pid)),
            other => Err(unexpected(other, what)),
        }
    }

    fn ask(
        &mut self,
        request: &Request,
        timeout: Option<Duration>,
        what: &'static str,
    ) -> Result<Reply, ClientError> {
        if !self.usable {
            return Err(ClientError::Closed { what });
        }
        let result = exchange(&mut self.connection, request, timeout, what);
        self.usable = result.is_ok();
        result
    }
}

/// Events of a machine as they happen.
#[derive(Debug)]
pub struct Events {
    connection: UnixStream,
}

impl Events {
    pub(super) fn new(connection: UnixStream) -> Self {
        Self { connection }
    }

    /// The next event; `None` when the machine is gone. Without a limit it waits for ever.
    ///
    /// # Errors
    /// [`ClientError::Timeout`] after `limit`, [`ClientError::Answer`].
    pub fn next(&mut self, limit: Option<Duration>) -> Result<Option<Event>, ClientError> {
        let what = "send an event";
        let mut from = match limit {
            Some(limit) => Deadline::after(&self.connection, limit),
            None => Deadline::never(&self.connection),
        };
        match frame::read(&mut from) {
            Ok(Event::Broken(failure)) => Ok(Some(Event::Broken(clean(&failure)))),
            Ok(event) => Ok(Some(event)),
            Err(e) => match ClientError::from_frame(what, limit.unwrap_or(ANSWER_TIMEOUT), e) {
                ClientError::Closed { .. } => Ok(None),
                error => Err(error),
            },
        }
    }
}

/// Sends one message and reads the reply to it within `timeout`.
pub(super) fn ask<T: Serialize>(
    connection: &mut UnixStream,
    message: &T,
    timeout: Duration,
    what: &'static str,
) -> Result<Reply, ClientError> {
    exchange(connection, message, Some(timeout), what)
}

fn exchange<T: Serialize>(
    connection: &mut UnixStream,
    message: &T,
    timeout: Option<Duration>,
    what: &'static str,
) -> Result<Reply, ClientError> {
    let shown = timeout.unwrap_or(ANSWER_TIMEOUT);
    let failed = |e: FrameError| ClientError::from_frame(what, shown, e);
    // Even a request that may take for ever must be taken off our hands at once.
    connection
        .set_write_timeout(Some(timeout.unwrap_or(ANSWER_TIMEOUT).max(Duration::from_millis(1))))
        .map_err(ClientError::Stream)?;
    frame::write(connection, message).map_err(failed)?;
    let mut from = match timeout {
        Some(timeout) => Deadline::after(connection, timeout),
        None => Deadline::never(connection),
    };
    frame::read(&mut from).map_err(failed)
}

/// Reads the reply that ends a transfer.
pub(super) fn read_reply(
    connection: &UnixStream,
    timeout: Duration,
    what: &'static str,
) -> Result<Reply, ClientError> {
    frame::read(&mut Deadline::after(connection, timeout))
        .map_err(|e| ClientError::from_frame(what, timeout, e))
}

pub(super) fn expect_done(reply: Reply, what: &'static str) -> Result<(), ClientError> {
    match reply {
        Reply::Done {} => Ok(()),
        other => Err(unexpected(other, what)),
    }
}

/// The error for a reply that is not the one expected: the agent's own words if it failed.
pub(super) fn unexpected(reply: Reply, what: &'static str) -> ClientError {
    match reply {
        Reply::Failed(failure) => ClientError::Agent(clean(&failure)),
        _ => ClientError::Answer { what, source: None },
    }
}

fn clean_outcome(outcome: Outcome) -> Outcome {
    let part = match outcome.part {
        Part::Interface(name) => Part::Interface(printable(&name)),
        other => other,
    };
    Outcome { part, failure: outcome.failure.as_ref().map(clean) }
}

fn clean(failure: &Failure) -> Failure {
    Failure::new(failure.kind, printable(&failure.message))
}
