//! The part of a program that the kernel loads (ELF-64, System V ABI chapters 4 and 5).

/// Why a file has no loadable part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElfError {
    /// It is no 64-bit little-endian ELF program, or is cut off.
    NotAProgram,
    /// It names a dynamic loader.
    Dynamic,
}

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;

/// A copy of the static program `file` without what lies behind its last loaded segment
/// (symbols, debug information, section headers), which is where linkers put it.
///
/// # Errors
/// [`ElfError`] when it is not a program that can run alone.
pub fn loadable_part(file: &[u8]) -> Result<Vec<u8>, ElfError> {
    let not = ElfError::NotAProgram;
    let ident = file.get(..6).ok_or(not)?;
    let kind = u16_at(file, 16).ok_or(not)?;
    // 2: program at fixed addresses, 3: relocatable, which a static-pie program is too.
    if ident != b"\x7fELF\x02\x01" || !matches!(kind, 2 | 3) {
        return Err(not);
    }
    let table = usize::try_from(u64_at(file, 32).ok_or(not)?).map_err(|_| not)?;
    let size = usize::from(u16_at(file, 54).ok_or(not)?);
    let count = usize::from(u16_at(file, 56).ok_or(not)?);
    let mut end = table.checked_add(size * count).ok_or(not)?;
    let mut loads = 0;
    for i in 0..count {
        let at = table.checked_add(size * i).ok_or(not)?;
        match u32_at(file, at).ok_or(not)? {
            PT_INTERP => return Err(ElfError::Dynamic),
            PT_LOAD => {
                let offset = u64_at(file, at.checked_add(8).ok_or(not)?).ok_or(not)?;
                let length = u64_at(file, at.checked_add(32).ok_or(not)?).ok_or(not)?;
                let last = offset.checked_add(length).ok_or(not)?;
                end = end.max(usize::try_from(last).map_err(|_| not)?);
                loads += 1;
            }
            _ => {}
        }
    }
    let mut part = file.get(..end).filter(|_| loads > 0).ok_or(not)?.to_vec();
    // No section headers any more: their offset, count and the index of their names.
    part.get_mut(40..48).ok_or(not)?.fill(0);
    part.get_mut(60..64).ok_or(not)?.fill(0);
    Ok(part)
}

fn bytes<const N: usize>(file: &[u8], at: usize) -> Option<[u8; N]> {
    file.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(file: &[u8], at: usize) -> Option<u16> {
    bytes(file, at).map(u16::from_le_bytes)
}

fn u32_at(file: &[u8], at: usize) -> Option<u32> {
    bytes(file, at).map(u32::from_le_bytes)
}

fn u64_at(file: &[u8], at: usize) -> Option<u64> {
    bytes(file, at).map(u64::from_le_bytes)
}
