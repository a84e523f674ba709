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
        self.metrics.configure(&wanted).map_err(|e| fault(&e))?;
        self.spec.metrics = Some(wanted);
        Ok(())
    }

    /// Writes a line now, or says that it was lost.
    pub(super) fn flush_metrics(&mut self) -> Result<(), Fault> {
        let reading = self.reading();
        self.metrics.flush(&reading).map_err(|e| fault(&e))
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
            (Phase::NotStarted, Phase::Running | Phase::Paused) => {
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
        if let Some(mmds) = &self.mmds {
            reading.add("mmds", mmds.counters());
        }
        reading
    }
}

fn fault(error: &MetricsError) -> Fault {
    Fault::from_error(error.kind(), error)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use api::{FaultKind, Reply, Request, Spec};

    use crate::{
        controller::{Controller, Settings},
        metrics::Milestones,
        phase::TOO_EARLY,
        signals::Signals,
        vm::Ending,
    };

    fn controller() -> Controller {
        let signals = Signals::block(&[]).unwrap();
        let settings = Settings { id: "m-1".to_owned(), ..Settings::default() };
        Controller::new(settings, Arc::new(Milestones::default()), Spec::default(), None, signals).unwrap()
    }

    fn wanted(path: &std::path::Path) -> Request {
        Request::PutMetrics(api::spec::Metrics { metrics_path: path.to_owned(), ..Default::default() })
    }

    #[test]
    fn where_metrics_go_is_said_once_and_nothing_is_written_before_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let mut controller = controller();
        assert!(controller.obey(wanted(dir.path())).is_err());
        assert_eq!(controller.spec().metrics, None);
        controller.obey(wanted(&first)).unwrap();
        let fault = controller.obey(wanted(&second)).unwrap_err();
        assert!(fault.kind == FaultKind::Conflict && fault.message.contains("first"), "{fault}");
        assert!(!second.exists());
        assert_eq!(controller.spec().metrics.as_ref().unwrap().metrics_path, first);
        assert_eq!(controller.obey(Request::FlushMetrics).unwrap_err().message, TOO_EARLY);
        assert_eq!(std::fs::read_to_string(&first).unwrap(), "");
    }

    #[test]
    fn the_page_is_there_before_the_start_and_the_last_line_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics");
        let mut controller = controller();
        controller.obey(wanted(&path)).unwrap();
        let Reply::Text(page) = controller.obey(Request::OpenMetrics).unwrap() else { panic!("no text") };
        assert!(
            page.contains(r#"nacelle_machine_state{machine="m-1",nacelle_machine_state="NotStarted"} 1"#)
        );
        controller.handle().ended(Ending::Off);
        assert_eq!(controller.run().unwrap(), Ending::Off);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1);
    }
}
