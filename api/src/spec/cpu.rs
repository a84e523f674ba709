//! What a machine's processors show: Firecracker's CPU templates.
//!
//! ```json
//! { "kvm_capabilities": ["171", "!56"],
//!   "cpuid_modifiers": [ { "leaf": "0x7", "subleaf": "0x0", "flags": 1,
//!                          "modifiers": [ { "register": "ebx", "bitmap": "0bxxxx_0xx1" } ] } ],
//!   "msr_modifiers": [ { "addr": "0x10a", "bitmap": "0b1x" } ] }
//! ```
//!
//! The same object is the body of `PUT /cpu-config`, the value of `cpu-config` in a
//! configuration file, and the content of a file that such a value names ([`CpuSource`]).
//! Numbers are strings there, because JSON has no hexadecimal ones; capabilities are decimal.
//! Everything is written back the way Firecracker's own tools write it, so that a template
//! that went through here can be compared with the one that came in.
//!
//! The named templates of `machine-config` ([`NamedTemplate`]) are older, and deprecated; they
//! say the same by a name.

use std::{borrow::Cow, fmt, path::PathBuf};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::CONFIG_FILE_MAX;
use crate::{Fault, FaultKind, explain_json};

/// Changes to what the processors show and to what is asked of KVM: a CPU template.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Changes to the capabilities that KVM must have for the machine to be built.
    #[serde(default)]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes to CPUID, carried out in this order.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes to model-specific registers, carried out in this order.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
    /// Registers of Arm processors: accepted when empty, see [`CpuConfig::check`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reg_modifiers: Vec<serde_json::Value>,
    /// Features of Arm processors: accepted when empty, see [`CpuConfig::check`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vcpu_features: Vec<serde_json::Value>,
}

impl CpuConfig {
    /// Reads a template from the text of a file called `name` and checks it.
    pub fn from_json(name: &std::path::Path, text: &str) -> Result<CpuConfig, Fault> {
        let name = name.display();
        if text.len() > CONFIG_FILE_MAX {
            let message = format!("CPU template {name} is larger than {CONFIG_FILE_MAX} bytes");
            return Err(Fault::new(FaultKind::Invalid, message));
        }
        let config: CpuConfig = serde_json::from_str(text).map_err(|e| Fault {
            kind: FaultKind::Invalid,
            message: format!("{name} is not a CPU template"),
            causes: vec![explain_json(&e)],
        })?;
        config.check()?;
        Ok(config)
    }

    /// Checks what the format alone does not: nothing may be meant for another processor.
    pub fn check(&self) -> Result<(), Fault> {
        let arm = [("reg_modifiers", &self.reg_modifiers), ("vcpu_features", &self.vcpu_features)];
        match arm.into_iter().find(|(_, list)| !list.is_empty()) {
            None => Ok(()),
            Some((field, _)) => Err(Fault::new(
                FaultKind::Invalid,
                format!("The CPU template has {field}, which Arm processors have; this host is an x86_64"),
            )),
        }
    }
}

/// Where the template of a configuration file is: in it, or in a file of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum CpuSource {
    /// Path of a file that holds a [`CpuConfig`]; the builder reads it.
    File(PathBuf),
    /// The template itself.
    Here(CpuConfig),
}

impl From<CpuConfig> for CpuSource {
    fn from(config: CpuConfig) -> CpuSource {
        CpuSource::Here(config)
    }
}

impl<'de> Deserialize<'de> for CpuSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        // By hand, because a derived choice forgets which field of the template was wrong.
        impl<'de> Visitor<'de> for Either {
            type Value = CpuSource;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a CPU template, or the path of a file that holds one")
            }

            fn visit_str<E: Error>(self, path: &str) -> Result<CpuSource, E> {
                Ok(CpuSource::File(PathBuf::from(path)))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CpuSource, A::Error> {
                CpuConfig::deserialize(MapAccessDeserializer::new(map)).map(CpuSource::Here)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// The templates that have a name, for `cpu_template` in `machine-config`. Deprecated in
/// Firecracker since 1.5 in favour of [`CpuConfig`]. Each is for a few processor models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum NamedTemplate {
    /// No template.
    #[default]
    None,
    /// Like EC2's C3: Intel Skylake, Cascade Lake, Ice Lake.
    C3,
    /// Like EC2's T2: Intel Skylake, Cascade Lake, Ice Lake.
    T2,
    /// T2 for snapshots that move between Intel Skylake and Cascade Lake.
    T2S,
    /// Like Intel Cascade Lake: Intel Cascade Lake, Ice Lake.
    T2CL,
    /// The same instructions as T2CL: AMD Milan.
    T2A,
    /// Arm Neoverse V1 as N1: never right on this processor.
    V1N1,
}

/// One change to the capabilities asked for, numbered as in `linux/kvm.h`; as a string,
/// `"171"` or `"!171"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmCapability {
    /// KVM must have it too.
    Add(u32),
    /// It need not be there.
    Remove(u32),
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            KvmCapability::Add(number) => serializer.collect_str(number),
            KvmCapability::Remove(number) => serializer.collect_str(&format_args!("!{number}")),
        }
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let (digits, removed) = text.strip_prefix('!').map_or((&*text, false), |rest| (rest, true));
        let number = digits.parse().map_err(|e| {
            D::Error::custom(format!(
                "{text:?} is no KVM capability; one is a decimal number, with '!' before it to remove it: {e}"
            ))
        })?;
        Ok(if removed { KvmCapability::Remove(number) } else { KvmCapability::Add(number) })
    }
}

/// Changes to one CPUID entry, which KVM must offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// The leaf (EAX of the instruction), as `"0x..."` or `"0b..."`.
    #[serde(with = "prefixed")]
    pub leaf: u32,
    /// The subleaf (ECX of the instruction), written the same way.
    #[serde(with = "prefixed")]
    pub subleaf: u32,
    /// Flags of the entry (KVM API section 4.46): 1 where the subleaf matters.
    pub flags: u32,
    /// Changes to its four registers, carried out in this order.
    pub modifiers: Vec<RegisterModifier>,
}

/// Change of one of the four registers that CPUID answers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// Which one.
    pub register: CpuidRegister,
    /// Its new bits.
    pub bitmap: Bitmap<32>,
}

/// One of the four registers that CPUID answers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Change of one model-specific register, which KVM must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its number, as `"0x..."` or `"0b..."`.
    #[serde(with = "prefixed")]
    pub addr: u32,
    /// Its new bits.
    pub bitmap: Bitmap<64>,
}

/// New values for some of `BITS` bits (32 or 64). As a string: `0b`, which may be left out,
/// then from the highest bit down `0` (cleared), `1` (set), `x` (left as it is) and `_`, which
/// counts for nothing. Bits that a short string does not reach are left as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bitmap<const BITS: u32> {
    /// Bits that get a new value.
    pub mask: u64,
    /// Their new values; zero outside the mask.
    pub value: u64,
}

impl<const BITS: u32> Bitmap<BITS> {
    /// `old` with the change made.
    pub fn apply(self, old: u64) -> u64 {
        old & !self.mask | self.value
    }
}

impl<const BITS: u32> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |bit: u32| match (self.mask >> bit & 1, self.value >> bit & 1) {
            (0, _) => 'x',
            (_, 0) => '0',
            _ => '1',
        };
        let digits: String = (0..BITS).rev().map(digit).collect();
        serializer.collect_str(&format_args!("0b{digits}"))
    }
}

impl<'de, const BITS: u32> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let skipped = if text.starts_with("0b") { 2 } else { 0 };
        let mut bitmap = Bitmap::default();
        let mut bits = 0;
        for (at, digit) in text.chars().enumerate().skip(skipped) {
            let (mask, value) = match digit {
                '_' => continue,
                'x' => (0, 0),
                '0' => (1, 0),
                '1' => (1, 1),
                _ => {
                    let at = at + 1;
                    return Err(D::Error::custom(format!(
                        "bitmap {text:?} has {digit:?} at position {at}; only 0, 1, x and _ may follow 0b"
                    )));
                }
            };
            bits += 1;
            if bits > BITS {
                let at = at + 1;
                return Err(D::Error::custom(format!(
                    "bitmap {text:?} has more than the {BITS} bits of its register, from position {at} on"
                )));
            }
            bitmap.mask = bitmap.mask << 1 | mask;
            bitmap.value = bitmap.value << 1 | value;
        }
        Ok(bitmap)
    }
}

/// Numbers as strings, `0x` or `0b` before them; written as `0x`.
mod prefixed {
    use std::borrow::Cow;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{number:#x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let number = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => u32::from_str_radix(digits, 16),
            (_, Some(digits)) => u32::from_str_radix(digits, 2),
            _ => {
                return Err(D::Error::custom(format!(
                    "{text:?} must begin with 0x (hexadecimal) or 0b (binary)"
                )));
            }
        };
        number.map_err(|e| D::Error::custom(format!("{text:?} is no number of 32 bits: {e}")))
    }
}

#[cfg(test)]
mod tests;
