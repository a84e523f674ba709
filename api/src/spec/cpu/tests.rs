use std::path::Path;

use super::*;
use crate::Spec;

fn read(text: &str) -> Result<CpuConfig, String> {
    CpuConfig::from_json(Path::new("cpu.json"), text).map_err(|e| e.to_string())
}

const WHOLE: &str = r#"{
    "kvm_capabilities": ["171", "!172"],
    "cpuid_modifiers": [{ "leaf": "0x80000001", "subleaf": "0b0111", "flags": 0, "modifiers": [
        { "register": "eax", "bitmap": "0bx00100xxx1xxxxxxxxxxxxxxxxxxxxx1" } ] }],
    "msr_modifiers": [{ "addr": "0x10a", "bitmap": "0b1x_0" }] }"#;

#[test]
fn a_template_reads_as_it_is_meant() {
    let config = read(WHOLE).unwrap();
    assert_eq!(config.kvm_capabilities, [KvmCapability::Add(171), KvmCapability::Remove(172)]);
    let leaf = &config.cpuid_modifiers[0];
    assert_eq!((leaf.leaf, leaf.subleaf, leaf.flags), (0x8000_0001, 7, 0));
    assert_eq!(leaf.modifiers[0].register, CpuidRegister::Eax);
    let bits = leaf.modifiers[0].bitmap;
    assert_eq!((bits.mask, bits.value), (0x7c40_0001, 0x1040_0001));
    assert_eq!(config.msr_modifiers[0].addr, 0x10a);
    assert_eq!(config.msr_modifiers[0].bitmap.apply(0b111), 0b110);
    assert_eq!(config.msr_modifiers[0].bitmap.apply(u64::MAX), u64::MAX - 1);
}

#[test]
fn a_template_is_written_back_in_full_width() {
    let config = read(WHOLE).unwrap();
    let text = serde_json::to_string(&config).unwrap();
    assert!(text.contains(r#""kvm_capabilities":["171","!172"]"#), "{text}");
    assert!(text.contains(r#""leaf":"0x80000001","subleaf":"0x7","flags":0"#), "{text}");
    assert!(text.contains(&format!(r#""bitmap":"0b{}1x0""#, "x".repeat(61))), "{text}");
    assert!(!text.contains("reg_modifiers"), "{text}");
    assert_eq!(read(&text).unwrap(), config);
}

#[test]
fn nothing_is_a_template_too() {
    assert_eq!(read("{}").unwrap(), CpuConfig::default());
    assert_eq!(read(r#"{"reg_modifiers": [], "vcpu_features": []}"#).unwrap(), CpuConfig::default());
}

#[test]
fn the_prefix_of_a_bitmap_may_be_left_out_and_all_bits_may_be_given() {
    let bits: Bitmap<32> = serde_json::from_str(&format!("\"{}\"", "1".repeat(32))).unwrap();
    assert_eq!((bits.mask, bits.value), (0xffff_ffff, 0xffff_ffff));
    let bits: Bitmap<64> = serde_json::from_str(&format!("\"0b{}\"", "0".repeat(64))).unwrap();
    assert_eq!((bits.mask, bits.value), (u64::MAX, 0));
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let bitmap = |bits: &str| format!(r#"{{"msr_modifiers": [{{"addr": "0x1", "bitmap": "{bits}"}}]}}"#);
    let leaf = |leaf: &str, rest: &str| {
        format!(r#"{{"cpuid_modifiers": [{{"leaf": "{leaf}", "subleaf": "0x0", {rest}}}]}}"#)
    };
    let fine = r#""flags": 0, "modifiers": []"#;
    let cases = [
        (bitmap("0b01z"), "'z' at position 5"),
        (bitmap("0b0b1"), "'b' at position 4"),
        (bitmap("0X1"), "'X' at position 2"),
        (bitmap("0bx\u{3fd}"), "'\u{3fd}' at position 4"),
        (bitmap(&format!("0b{}", "x".repeat(65))), "from position 67 on"),
        (leaf("1", fine), "must begin with 0x"),
        (leaf("0x", fine), "no number of 32 bits"),
        (leaf("0x100000000", fine), "no number of 32 bits"),
        (leaf("0x1", r#""flags": 0"#), "missing field `modifiers`"),
        (leaf("0x1", r#""flags": -1, "modifiers": []"#), "expected u32"),
        (
            leaf("0x1", r#""flags": 0, "modifiers": [{"register": "rax", "bitmap": "0b1"}]"#),
            "did you mean `eax`?",
        ),
        (r#"{"kvm_capabilities": ["0xab"]}"#.to_owned(), "decimal number"),
        (r#"{"kvm_capabilities": ["!!1"]}"#.to_owned(), "decimal number"),
        (r#"{"kvm_capabilities": [171]}"#.to_owned(), "invalid type"),
        (r#"{"cpuid_modifier": []}"#.to_owned(), "did you mean `cpuid_modifiers`?"),
        (
            r#"{"reg_modifiers": [{"addr": "0x603000000013c020", "bitmap": "0b1"}]}"#.to_owned(),
            "reg_modifiers",
        ),
        (r#"{"vcpu_features": [{"index": 0, "bitmap": "0b1"}]}"#.to_owned(), "vcpu_features"),
        ("{".to_owned(), "EOF"),
    ];
    for (text, expected) in cases {
        let error = read(&text).unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

fn spec(rest: &str) -> Result<Spec, String> {
    let text = format!(r#"{{"boot-source": {{"kernel_image_path": "vmlinux"}}{rest}}}"#);
    Spec::from_json(Path::new("machine.json"), &text).map_err(|e| e.to_string())
}

#[test]
fn a_machine_has_its_template_inside_or_in_a_file_or_none() {
    assert_eq!(spec("").unwrap().cpu_config, None);
    assert_eq!(spec(r#", "cpu-config": null"#).unwrap().cpu_config, None);
    let file = spec(r#", "cpu-config": "/etc/cpu.json""#).unwrap();
    assert_eq!(file.cpu_config, Some(CpuSource::File("/etc/cpu.json".into())));
    let here = spec(&format!(r#", "cpu-config": {WHOLE}"#)).unwrap();
    assert_eq!(here.cpu_config, Some(read(WHOLE).unwrap().into()));
    for spec in [file, here] {
        let again: Spec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!(again, spec);
    }
}

#[test]
fn a_machine_with_a_wrong_template_is_refused_with_the_reason() {
    let error = spec(r#", "cpu-config": {"msr_modifiers": [{"addr": "0x1", "bitmap": "2"}]}"#).unwrap_err();
    assert!(error.contains("'2' at position 1"), "{error}");
    let error = spec(r#", "cpu-config": {"vcpu_features": [1]}"#).unwrap_err();
    assert!(error.contains("vcpu_features"), "{error}");
    let error = spec(r#", "cpu-config": 7"#).unwrap_err();
    assert!(error.contains("the path of a file"), "{error}");
}

#[test]
fn a_named_template_is_known_or_refused() {
    let named = |name: &str| {
        spec(&format!(
            r#", "machine-config": {{"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": {name}}}"#
        ))
    };
    assert_eq!(named("null").unwrap().machine_config.cpu_template, None);
    assert_eq!(named("\"T2CL\"").unwrap().machine_config.cpu_template, Some(NamedTemplate::T2CL));
    assert!(named("\"V1N1\"").unwrap_err().contains("V1N1"));
    assert!(named("\"T3\"").unwrap_err().contains("unknown variant"));
}
