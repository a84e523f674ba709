//! The machine's consoles: a serial port, a virtio console, and what stands at their far ends.

use std::{path::PathBuf, sync::Arc, time::Duration};

use api::spec::{self, ConsoleMode, Spec};
use arch::acpi;
use devices::{
    bus::{Bus, BusError},
    host::Host,
    legacy::{
        Output, OutputError,
        serial::{self, Serial},
    },
    state::{Section, StateError},
    worker::Worker,
};

use super::{
    attach::{AttachError, Places},
    build,
};

/// Why a console could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Its far end.
    #[error("The {name} cannot be opened")]
    Far {
        /// Which console.
        name: &'static str,
        /// Why.
        #[source]
        source: OutputError,
    },
    /// Its interrupt.
    #[error("The serial port's interrupt line cannot be had")]
    Line(#[source] std::io::Error),
    /// Its place.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Its address.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// How long output may take to drain when the machine has ended.
const FINISH: Duration = Duration::from_millis(500);

/// The consoles of one machine. They hold what is read or written on their far ends.
#[derive(Default)]
pub struct Consoles {
    serial: Option<Arc<Serial>>,
}

impl Consoles {
    /// Opens the consoles of `spec` and puts them in place. Also returns what the tables say
    /// about the serial port, if there is one.
    pub fn open(
        spec: &Spec,
        host: &dyn Host,
        ports: &Bus,
        places: &mut Places,
    ) -> Result<(Vec<acpi::SerialPort>, Consoles), ConsoleError> {
        let mut consoles = Consoles::default();
        let mut tables = Vec::new();
        let wanted = spec.serial.clone().unwrap_or_default();
        if wanted.far_end() != ConsoleMode::Off {
            let far = output(wanted.far_end(), wanted.serial_out_path.as_ref());
            let line = host.line(serial::GSI).map_err(ConsoleError::Line)?;
            let port = Serial::new(&far, line, Worker::new("serial"))
                .map_err(|source| ConsoleError::Far { name: "serial port", source })?;
            if let Some(place) = port.place() {
                log::info!("The serial port is at {}", place.display());
            }
            port.limit(wanted.rate_limiter.map(build::bucket));
            let port = Arc::new(port);
            ports.insert(serial::BASE.into(), serial::LEN.into(), port.clone())?;
            tables.push(acpi::SerialPort { port: serial::BASE, line: serial::GSI });
            consoles.serial = Some(port);
        }
        if let Some(console) = spec.console.as_ref().filter(|c| c.mode != ConsoleMode::Off) {
            open_virtio(console, places)?;
        }
        Ok((tables, consoles))
    }

    /// Waits, for a bounded time, until what the guest wrote has left.
    pub fn finish(&self) {
        if let Some(serial) = &self.serial {
            serial.finish(FINISH);
        }
    }

    /// State of the serial port, if there is one.
    pub fn save(&self) -> Option<Section> {
        self.serial.as_ref().map(|serial| serial.save())
    }

    /// Takes over the state of the serial port.
    pub fn restore(&self, saved: Option<&Section>) -> Result<(), StateError> {
        match (&self.serial, saved) {
            (Some(serial), Some(saved)) => serial.restore(saved),
            _ => Ok(()),
        }
    }

    /// Counters of the serial port.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.serial.as_ref().map(|s| s.counters()).unwrap_or_default()
    }
}

fn output(mode: ConsoleMode, path: Option<&PathBuf>) -> Output {
    match (mode, path) {
        (ConsoleMode::Stdio, _) => Output::Stdio,
        (ConsoleMode::Pty, _) => Output::Pty,
        (ConsoleMode::File, Some(path)) => Output::File(path.clone()),
        (ConsoleMode::Socket, Some(path)) => Output::Socket(path.clone()),
        _ => Output::None,
    }
}
fn open_virtio(console: &spec::Console, places: &mut Places) -> Result<(), ConsoleError> {
    let far = output(console.mode, console.path.as_ref());
    let device = devices::virtio::console::Console::new(&far)
        .map_err(|source| ConsoleError::Far { name: "virtio console", source })?;
    Ok(places.attach("console", Box::new(device))?)
}
