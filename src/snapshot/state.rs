//! The state file: the sections of a machine's state, each under its name, version and digest.
//!
//! ```text
//!   0   magic "NACLSTAT"                  each section:
//!   8   u32 version, 1                      u16 length of kind, kind
//!   12  u32 sections                        u16 version, u64 length
//!   16  sections                            digest of the bytes, the bytes
//!   end digest of all before it
//! ```
//!
//! Numbers are little-endian. The file stands for itself, so that a migration can send it; the
//! manifest repeats the list for whoever only looks.
//!
//! Restoring hashes each byte once: where the digest of the whole is right, that of a section is
//! taken as it stands there. [`verify`] looks at each.

use devices::state::Section;

use super::{
    digest::{Digest, LEN},
    limits::{KIND_MAX, SECTIONS_MAX},
    manifest::SectionEntry,
};

const MAGIC: &[u8; 8] = b"NACLSTAT";
const VERSION: u32 = 1;

/// Encodes sections. Errors name a section that is beyond the caps of the format.
pub fn encode(sections: &[Section]) -> Result<Vec<u8>, String> {
    if sections.len() > SECTIONS_MAX {
        return Err(format!("{} sections are more than {SECTIONS_MAX}", sections.len()));
    }
    let mut file = Vec::from(MAGIC);
    file.extend(VERSION.to_le_bytes());
    file.extend((sections.len() as u32).to_le_bytes());
    for section in sections {
        if section.kind.is_empty() || section.kind.len() > KIND_MAX {
            return Err(format!("the kind {:?} is not 1 to {KIND_MAX} bytes", section.kind));
        }
        file.extend((section.kind.len() as u16).to_le_bytes());
        file.extend(section.kind.as_bytes());
        file.extend(section.version.to_le_bytes());
        file.extend((section.bytes.len() as u64).to_le_bytes());
        file.extend(Digest::of(&section.bytes).0);
        file.extend(&section.bytes);
    }
    file.extend(Digest::of(&file).0);
    Ok(file)
}

/// The manifest's list of these sections.
pub fn entries(sections: &[Section]) -> Vec<SectionEntry> {
    let entry = |s: &Section| SectionEntry {
        kind: s.kind.clone(),
        version: s.version,
        length: s.bytes.len() as u64,
        digest: Digest::of(&s.bytes),
    };
    sections.iter().map(entry).collect()
}

/// Decodes a state file. Errors say what is wrong with it.
pub fn decode(file: &[u8]) -> Result<Vec<Section>, String> {
    let (body, digest) = split(file)?;
    if Digest::of(body).0 != digest {
        return Err("its digest is of other bytes".to_owned());
    }
    Ok(sections(body)?.into_iter().map(|(section, _)| section).collect())
}

/// Decodes a state file that is known by the digest of all of it, and has these sections.
pub fn decode_listed(file: &[u8], entries: &[SectionEntry]) -> Result<Vec<Section>, String> {
    let found = sections(split(file)?.0)?;
    let is_listed = |((section, digest), entry): (&(Section, Digest), &SectionEntry)| {
        (&section.kind, section.version, section.bytes.len() as u64, digest)
            == (&entry.kind, entry.version, entry.length, &entry.digest)
    };
    if found.len() != entries.len() || !found.iter().zip(entries).all(is_listed) {
        return Err("its sections are not those of the manifest".to_owned());
    }
    Ok(found.into_iter().map(|(section, _)| section).collect())
}

/// Checks the digest of each section against its bytes.
pub fn verify(sections: &[Section], entries: &[SectionEntry]) -> Result<(), String> {
    let is_wrong = |(section, entry): &(&Section, &SectionEntry)| Digest::of(&section.bytes) != entry.digest;
    match sections.iter().zip(entries).find(is_wrong) {
        None => Ok(()),
        Some((section, _)) => Err(format!("the digest of section {:?} is of other bytes", section.kind)),
    }
}

fn split(file: &[u8]) -> Result<(&[u8], &[u8]), String> {
    let body = file.len().checked_sub(LEN).and_then(|at| file.split_at_checked(at));
    body.ok_or_else(|| format!("{} bytes are no state file", file.len()))
}

fn sections(body: &[u8]) -> Result<Vec<(Section, Digest)>, String> {
    let mut reader = Reader(body);
    if reader.take(8)? != MAGIC {
        return Err("it does not begin as a state file does".to_owned());
    }
    let version = u32::from_le_bytes(reader.array()?);
    if version != VERSION {
        return Err(format!("its version is {version}; this build reads {VERSION}"));
    }
    let count = u32::from_le_bytes(reader.array()?) as usize;
    if count > SECTIONS_MAX {
        return Err(format!("{count} sections are more than {SECTIONS_MAX}"));
    }
    let sections = (0..count).map(|_| reader.section()).collect::<Result<Vec<_>, _>>()?;
    match reader.0.len() {
        0 => Ok(sections),
        left => Err(format!("{left} bytes follow the last section")),
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let short = || format!("it ends {} bytes before {count} that must be there", self.0.len());
        let (head, rest) = self.0.split_at_checked(count).ok_or_else(short)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| "it is too short".to_owned())
    }

    fn section(&mut self) -> Result<(Section, Digest), String> {
        let length = usize::from(u16::from_le_bytes(self.array()?));
        if length == 0 || length > KIND_MAX {
            return Err(format!("a kind of {length} bytes is not possible"));
        }
        let kind = std::str::from_utf8(self.take(length)?);
        let kind = kind.map_err(|_| "a kind is no text".to_owned())?.to_owned();
        let version = u16::from_le_bytes(self.array()?);
        let length = usize::try_from(u64::from_le_bytes(self.array()?)).unwrap_or(usize::MAX);
        let digest = Digest(self.array()?);
        let bytes = self.take(length)?.to_vec();
        Ok((Section { kind, version, bytes }, digest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(mut body: Vec<u8>) -> Vec<u8> {
        body.extend(Digest::of(&body).0);
        body
    }

    #[test]
    fn sections_come_back_as_they_were() {
        let sections = [Section::new("vcpu", 3, &(1u32, 2u64)), Section::new("empty", 1, &())];
        let file = encode(&sections).unwrap();
        assert_eq!(decode(&file).unwrap(), sections);
        assert_eq!(decode(&encode(&[]).unwrap()).unwrap(), []);
    }

    #[test]
    fn what_is_not_what_the_list_says_is_refused() {
        let sections = [Section::new("vcpu", 3, &(1u32, 2u64)), Section::new("rtc", 1, &9u64)];
        let (file, entries) = (encode(&sections).unwrap(), entries(&sections));
        assert_eq!(decode_listed(&file, &entries).unwrap(), sections);
        verify(&sections, &entries).unwrap();
        assert!(decode_listed(&file, &entries[..1]).unwrap_err().contains("not those of the manifest"));
        for change in [
            |e: &mut SectionEntry| e.kind.push('x'),
            |e: &mut SectionEntry| e.version += 1,
            |e: &mut SectionEntry| e.length += 1,
            |e: &mut SectionEntry| e.digest.0[0] ^= 1,
        ] {
            let mut other = entries.clone();
            change(&mut other[1]);
            assert!(decode_listed(&file, &other).unwrap_err().contains("not those of the manifest"));
        }
        let mut other = sections.clone();
        other[1].bytes[0] ^= 1;
        assert!(verify(&other, &entries).unwrap_err().contains("section \"rtc\""));
    }

    #[test]
    fn every_length_and_every_flipped_bit_is_refused() {
        let file = encode(&[Section::new("vcpu", 1, &vec![7u8; 40]), Section::new("rtc", 1, &9u64)]).unwrap();
        for length in 0..file.len() {
            assert!(decode(&file[..length]).is_err(), "{length}");
        }
        for bit in 0..file.len() * 8 {
            let mut flipped = file.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&flipped).is_err(), "{bit}");
        }
    }

    #[test]
    fn lies_under_a_right_digest_are_refused_without_allocating_what_they_claim() {
        let file = encode(&[Section::new("vcpu", 1, &vec![7u8; 40])]).unwrap();
        let body = &file[..file.len() - LEN];
        // Every byte of the headers in turn becomes the largest, under a new digest.
        for at in 0..body.len() {
            for length in [1, 4, 8] {
                let mut lie = body.to_vec();
                lie.iter_mut().skip(at).take(length).for_each(|b| *b = 0xff);
                if lie != body {
                    // A section's version and a letter of its kind are the owner's to judge.
                    let _ = decode(&sealed(lie));
                }
            }
        }
        let mut lie = body.to_vec();
        lie[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(decode(&sealed(lie)).unwrap_err().contains("4294967295 sections"));
        let mut lie = body.to_vec();
        lie[16 + 2 + 4 + 2..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(decode(&sealed(lie)).unwrap_err().contains("must be there"));
    }
}
