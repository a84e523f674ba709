//! Requests before the start: they change the specification and nothing else.
//!
//! A changed copy is checked as a whole and then takes the place of the old one, so a refused
//! request leaves no trace. Files are looked at, not opened: a wrong path is told to the
//! request that named it, and the builder opens what it uses.

use std::path::Path;

use api::{
    Fault, FaultKind, Reply, Request, Spec,
    spec::{MachineConfig, NamedTemplate},
};

/// The specification after `request`, and the answer; or why it is refused.
pub fn change(spec: &Spec, request: Request) -> Result<(Spec, Reply), Fault> {
    let mut spec = spec.clone();
    match request {
        Request::Balloon => {
            let balloon = spec.balloon.clone();
            let missing = || Fault::new(FaultKind::NotFound, "The machine has no balloon");
            return Ok((spec, Reply::Balloon(balloon.ok_or_else(missing)?)));
        }
        Request::PutBootSource(source) => {
            must_be_file("kernel_image_path", &source.kernel_image_path)?;
            source.initrd_path.as_deref().map_or(Ok(()), |path| must_be_file("initrd_path", path))?;
            spec.boot_source = source;
        }
        Request::PutMachineConfig(config) => set_machine(&mut spec, config),
        Request::PatchMachineConfig(patch) => {
            let named = patch.cpu_template.is_some();
            let config = patch.applied_to(&spec.machine_config);
            let custom = spec.cpu_config.take();
            set_machine(&mut spec, config);
            if !named {
                spec.cpu_config = custom;
            }
        }
        Request::PutCpuConfig(config) => {
            config.check()?;
            spec.cpu_config = Some(config.into());
            spec.machine_config.cpu_template = None;
        }
        Request::PutDrive(drive) => {
            // One without a path is refused below, or came as a descriptor.
            if !drive.path_on_host.as_os_str().is_empty() {
                must_be_file("path_on_host", &drive.path_on_host)?;
            }
            spec.put_drive(drive);
        }
        Request::PutPmem(pmem) => {
            must_be_file("path_on_host", &pmem.path_on_host)?;
            spec.put_pmem(pmem);
        }
        Request::PutNetworkInterface(interface) => spec.put_network_interface(interface),
        Request::PutVsock(vsock) => spec.vsock = Some(vsock),
        Request::PutEntropy(entropy) => spec.entropy = Some(entropy),
        Request::PutSerial(serial) => spec.serial = Some(serial),
        Request::PutBalloon(balloon) => spec.balloon = Some(balloon),
        Request::PutMemoryHotplug(memory) => spec.memory_hotplug = Some(memory),
        Request::PutMmdsConfig(config) => spec.mmds_config = Some(config),
        _ => return Err(Fault::new(FaultKind::Conflict, crate::phase::TOO_EARLY)),
    }
    spec.check_parts()?;
    Ok((spec, Reply::Done))
}

/// Takes over vCPUs and memory. Of a named and a custom template the later one counts.
fn set_machine(spec: &mut Spec, mut config: MachineConfig) {
    if config.cpu_template.is_some() {
        spec.cpu_config = None;
    }
    config.cpu_template = config.cpu_template.filter(|template| *template != NamedTemplate::None);
    spec.machine_config = config;
}

/// Says so when nothing can be read at `path`. A block device is as good as a file.
fn must_be_file(field: &str, path: &Path) -> Result<(), Fault> {
    let wrong = |message: String| Err(Fault::new(FaultKind::Invalid, message));
    match std::fs::metadata(path) {
        Err(error) => Err(Fault {
            kind: FaultKind::Invalid,
            message: format!("{field} {} cannot be opened", path.display()),
            causes: vec![error.to_string()],
        }),
        Ok(found) if found.is_dir() => wrong(format!("{field} {} is a directory", path.display())),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use api::spec::BootSource;

    use super::*;

    #[test]
    fn a_refused_request_leaves_the_specification_as_it_was() {
        let spec = Spec::default();
        let config = MachineConfig { vcpu_count: 0, ..MachineConfig::default() };
        let fault = change(&spec, Request::PutMachineConfig(config)).unwrap_err();
        assert!(fault.message.contains("vcpu_count is 0"));
        assert_eq!(spec, Spec::default());
    }

    #[test]
    fn a_kernel_that_is_not_there_is_told_at_once() {
        let source = BootSource { kernel_image_path: "/nowhere/vmlinux".into(), ..BootSource::default() };
        let fault = change(&Spec::default(), Request::PutBootSource(source)).unwrap_err();
        assert_eq!(
            fault.to_string(),
            "kernel_image_path /nowhere/vmlinux cannot be opened: No such file or directory (os error 2)"
        );
    }
}
