//! From what a specification says of its processors to the changes that are made to them.
//!
//! Two ways lead here: a template of its own (`cpu-config`, in the specification or in a file
//! that it names) and, older, one that has a name (`cpu_template`). Where both are given the
//! template of its own counts.

use std::{
    fs::OpenOptions,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use api::{
    Fault, Spec,
    spec::{
        Bitmap, CONFIG_FILE_MAX, CpuConfig, CpuSource, CpuidModifier, CpuidRegister, KvmCapability,
        MsrModifier, NamedTemplate, RegisterModifier,
    },
};
use arch::template::{Bits, LeafChange, MsrChange, Named, Register, Template, TemplateError};

/// Why a machine's processors cannot be what its specification says.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The file with the template cannot be read.
    #[error("CPU template {} cannot be read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What the file holds is no template.
    #[error(transparent)]
    Content(Fault),
    /// The name is that of a template for Arm processors.
    #[error("The CPU template V1N1 is for Arm processors; this host is an x86_64")]
    Arm,
    /// The template is not for this host.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// The changes that `spec` asks for; none where it asks for none. May read a file.
pub fn template(spec: &Spec) -> Result<Template, CpuError> {
    match (&spec.cpu_config, spec.machine_config.cpu_template) {
        (Some(CpuSource::Here(config)), _) => Ok(changes(config)),
        (Some(CpuSource::File(path)), _) => {
            let text = read(path).map_err(|source| CpuError::File { path: path.clone(), source })?;
            Ok(changes(&CpuConfig::from_json(path, &text).map_err(CpuError::Content)?))
        }
        (None, Some(name)) => named(name),
        (None, None) => Ok(Template::default()),
    }
}

fn named(name: NamedTemplate) -> Result<Template, CpuError> {
    let name = match name {
        NamedTemplate::None => return Ok(Template::default()),
        NamedTemplate::V1N1 => return Err(CpuError::Arm),
        NamedTemplate::C3 => Named::C3,
        NamedTemplate::T2 => Named::T2,
        NamedTemplate::T2S => Named::T2S,
        NamedTemplate::T2CL => Named::T2CL,
        NamedTemplate::T2A => Named::T2A,
    };
    Ok(name.template()?)
}

/// Reads a text file of bounded length; whatever else `path` may be, this does not wait for it.
fn read(path: &Path) -> io::Result<String> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "It is not a regular file"));
    }
    let mut text = String::new();
    file.take(CONFIG_FILE_MAX as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

fn changes(config: &CpuConfig) -> Template {
    let leaves = config.cpuid_modifiers.iter().map(|leaf| LeafChange {
        leaf: leaf.leaf,
        subleaf: leaf.subleaf,
        flags: leaf.flags,
        registers: leaf
            .modifiers
            .iter()
            // A bitmap of 32 bits has none above.
            .map(|m| {
                let bits = Bits { mask: m.bitmap.mask as u32, value: m.bitmap.value as u32 };
                (register(m.register), bits)
            })
            .collect(),
    });
    let msrs = config
        .msr_modifiers
        .iter()
        .map(|m| MsrChange { index: m.addr, bits: Bits { mask: m.bitmap.mask, value: m.bitmap.value } });
    let capabilities = config.kvm_capabilities.iter().map(|capability| match *capability {
        KvmCapability::Add(number) => (number, true),
        KvmCapability::Remove(number) => (number, false),
    });
    Template { leaves: leaves.collect(), msrs: msrs.collect(), capabilities: capabilities.collect() }
}

/// The template as it stands in a specification: what [`template`] reads back.
pub fn config(template: &Template) -> CpuConfig {
    let bits = |mask: u64, value: u64| (mask, value & mask);
    let leaves = template.leaves.iter().map(|leaf| CpuidModifier {
        leaf: leaf.leaf,
        subleaf: leaf.subleaf,
        flags: leaf.flags,
        modifiers: leaf
            .registers
            .iter()
            .map(|&(register, new)| {
                let (mask, value) = bits(new.mask.into(), new.value.into());
                RegisterModifier { register: name(register), bitmap: Bitmap { mask, value } }
            })
            .collect(),
    });
    let msrs = template.msrs.iter().map(|msr| {
        let (mask, value) = bits(msr.bits.mask, msr.bits.value);
        MsrModifier { addr: msr.index, bitmap: Bitmap { mask, value } }
    });
    let capabilities = template.capabilities.iter().map(|&(number, wanted)| match wanted {
        true => KvmCapability::Add(number),
        false => KvmCapability::Remove(number),
    });
    CpuConfig {
        kvm_capabilities: capabilities.collect(),
        cpuid_modifiers: leaves.collect(),
        msr_modifiers: msrs.collect(),
        ..CpuConfig::default()
    }
}

fn name(register: Register) -> CpuidRegister {
    match register {
        Register::Eax => CpuidRegister::Eax,
        Register::Ebx => CpuidRegister::Ebx,
        Register::Ecx => CpuidRegister::Ecx,
        Register::Edx => CpuidRegister::Edx,
    }
}

fn register(register: CpuidRegister) -> Register {
    match register {
        CpuidRegister::Eax => Register::Eax,
        CpuidRegister::Ebx => Register::Ebx,
        CpuidRegister::Ecx => Register::Ecx,
        CpuidRegister::Edx => Register::Edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{
        "kvm_capabilities": ["171", "!56"],
        "cpuid_modifiers": [{ "leaf": "0x7", "subleaf": "0x1", "flags": 1,
            "modifiers": [{ "register": "ebx", "bitmap": "0b1x0" }] }],
        "msr_modifiers": [{ "addr": "0x10a", "bitmap": "0b01" }] }"#;

    fn expected() -> Template {
        Template {
            leaves: vec![LeafChange {
                leaf: 7,
                subleaf: 1,
                flags: 1,
                registers: vec![(Register::Ebx, Bits { mask: 5, value: 4 })],
            }],
            msrs: vec![MsrChange { index: 0x10a, bits: Bits { mask: 3, value: 1 } }],
            capabilities: vec![(171, true), (56, false)],
        }
    }

    fn spec(cpu_config: Option<CpuSource>, name: Option<NamedTemplate>) -> Spec {
        let mut spec = Spec { cpu_config, ..Spec::default() };
        spec.machine_config.cpu_template = name;
        spec
    }

    #[test]
    fn a_template_is_the_same_in_the_specification_and_in_a_file() {
        let config: CpuConfig = serde_json::from_str(TEXT).unwrap();
        // It counts for more than a name, even one that fits no processor here.
        let here = spec(Some(config.into()), Some(NamedTemplate::V1N1));
        assert_eq!(template(&here).unwrap(), expected());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), TEXT).unwrap();
        let there = spec(Some(CpuSource::File(file.path().to_owned())), None);
        assert_eq!(template(&there).unwrap(), expected());
    }

    #[test]
    fn a_template_comes_back_from_its_specification() {
        assert_eq!(changes(&config(&expected())), expected());
    }

    #[test]
    fn no_template_changes_nothing() {
        assert_eq!(template(&spec(None, None)).unwrap(), Template::default());
        assert_eq!(template(&spec(None, Some(NamedTemplate::None))).unwrap(), Template::default());
    }

    #[test]
    fn a_file_that_is_none_is_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cpu.json");
        let error = |path: &Path| {
            let error = template(&spec(Some(CpuSource::File(path.to_owned())), None)).unwrap_err();
            Fault::from_error(api::FaultKind::Invalid, &error).to_string()
        };
        assert!(error(&path).contains("cannot be read: No such file"));
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .unwrap();
        assert!(error(&path).contains("not a regular file"));
        let path = directory.path().join("wrong.json");
        std::fs::write(&path, r#"{"msr_modifier": []}"#).unwrap();
        assert!(error(&path).contains("did you mean `msr_modifiers`?"), "{}", error(&path));
        std::fs::write(&path, " ".repeat(CONFIG_FILE_MAX + 2)).unwrap();
        assert!(error(&path).contains("is larger than"));
    }

    #[test]
    fn a_name_for_other_processors_is_refused() {
        let error = template(&spec(None, Some(NamedTemplate::V1N1))).unwrap_err();
        assert!(error.to_string().contains("V1N1"));
        // No processor is of both makers.
        let both = [NamedTemplate::T2CL, NamedTemplate::T2A].map(|name| template(&spec(None, Some(name))));
        assert!(both.iter().any(Result::is_err));
    }
}
