//! When metrics are read and written: at the start, each minute, when asked, at the end.

use std::time::{Duration, Instant};

use api::{Fault, spec};

use super::Controller;
use crate::{
    metrics::{MetricsError, Reading},
    phase::Phase,
};

impl Controller {
    /// Says where metrics are written. This can be said once, before the start.
    pub fn configure_metrics(&mut self, wanted: spec::Metrics) -> Result<(), Fault> {
        self.metrics.configure(&wanted).map_err(fault)?;
        self.spec.metrics = Some(wanted);
        Ok(())
    }

    /// Writes a line now, or says that it was lost.
    pub(super) fn flush_metrics(&mut self) -> Result<(), Fault> {
        let reading = self.reading();
        self.metrics.flush(&reading).map_err(fault)
    }

    /// Writes the line that is due, if any.
    pub(super) fn report_when_due(&mut self) {
        if self.metrics.is_due(Instant::now()) {
            self.report();
        }
    }

    /// Writes a line now if it was said where to. One that is lost is counted and logged.
    pub(super) fn report(&mut self) {
        if self.metrics.is_configured() {
            let reading = self.reading();
            self.metrics.flush_or_log(&reading);
        }
    }

    /// Everything as text in OpenMetrics.
    pub(super) fn metrics_page(&mut self) -> String {
        let reading = self.reading();
        self.metrics.page(&reading)
    }

    /// A request has brought the machine from `before` to its present phase in this time.
    pub(super) fn measure_change(&mut self, before: Phase, took: Duration) {
        match (before, self.phase) {
            (Phase::NotStarted, Phase::Running) => {
                let reading = self.reading();
                self.metrics.begin(&reading);
            }
            (_, Phase::Paused) => self.metrics.paused(took),
            (Phase::Paused, Phase::Running) => self.metrics.resumed(took),
            _ => {}
        }
    }

    fn reading(&self) -> Reading {
        let config = &self.spec.machine_config;
        let mut reading = Reading {
            id: self.settings.id.clone(),
            phase: self.phase.name(),
            milestones: self.milestones.since_exec(),
            vcpus: config.vcpu_count.into(),
            memory: config.mem_size_mib.saturating_mul(1 << 20),
            ..Reading::default()
        };
        if let Some(live) = &self.live {
            reading.add_machine(&live.vm);
        }
        reading
    }
}

fn fault(error: MetricsError) -> Fault {
    Fault::from_error(error.kind(), &error)
}
