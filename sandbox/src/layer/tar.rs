//! # Reading a tar stream that a stranger wrote
//!
//! The formats read: ustar, GNU (long names, base-256 numbers, sparse files) and PAX (any
//! attribute by name, extended attributes, sparse files 0.1 and 1.0). Where programs differ, the
//! reading is that of Go's `archive/tar`, because Docker, containerd and the registries' own
//! scanners use that: two readings of one archive are how hidden files are smuggled.
//!
//! The `tar` crate was the first choice and writes the archives of the tests. It cannot read
//! hostile layers: it collects an extension header of any declared size in memory, and it
//! splits PAX records at line feeds, so that a `security.capability` value with a byte 0x0a in
//! it (`CAP_DAC_OVERRIDE` with `CAP_FOWNER`) is taken for a broken record.

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::LayerError;
use crate::limits::{EXTENSION_BYTES, SPARSE_SEGMENTS};

/// A tar block.
const BLOCK: u64 = 512;

/// What an entry says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    Character,
    Block,
    Directory,
    Fifo,
}

/// One entry, with everything the headers before it said about it.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub path: Vec<u8>,
    /// Target of a hard or symbolic link.
    pub link: Vec<u8>,
    pub kind: Kind,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Length of the file's content, holes included.
    pub size: u64,
    /// Where in the file the stored bytes belong: offset and length, ascending.
    pub segments: Vec<(u64, u64)>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What extension headers have said so far about the next entry.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Extension {
    /// The last record of that name; an empty value takes the record back (POSIX pax).
    fn get(&self, key: &str) -> Option<&[u8]> {
        let found = self.records.iter().rev().find(|(k, _)| k == key.as_bytes())?;
        (!found.1.is_empty()).then_some(&found.1[..])
    }

    fn number(&self, key: &str) -> Result<Option<u64>, &'static str> {
        let Some(text) = self.get(key) else {
            return Ok(None);
        };
        let number = std::str::from_utf8(text).ok().and_then(|t| t.parse().ok());
        number.map(Some).ok_or("has a PAX number that is none")
    }
}

/// Reads entries one after the other.
pub(crate) struct Reader<R> {
    input: R,
    /// Bytes of the current entry's content that nobody has read.
    content: u64,
    /// Bytes after the content up to the next block.
    padding: u64,
    offset: u64,
}

impl<R: Read> Reader<R> {
    pub(crate) fn new(input: R) -> Self {
        Self { input, content: 0, padding: 0, offset: 0 }
    }

    /// Where in the stream the next unread byte is.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The stream, for what comes after the archive's end.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }

    /// The next entry, or `None` at the end of the archive.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, LayerError> {
        let mut extension = Extension::default();
        loop {
            self.skip(self.content + self.padding)?;
            (self.content, self.padding) = (0, 0);
            let Some(block) = self.header()? else {
                return Ok(None);
            };
            let flag = block[156];
            match flag {
                b'x' | b'L' | b'K' => {
                    let body = self.extension_body(&block)?;
                    match flag {
                        b'L' => extension.path = Some(until_nul(&body).to_vec()),
                        b'K' => extension.link = Some(until_nul(&body).to_vec()),
                        _ => self.pax(&body, &mut extension.records)?,
                    }
                }
                // Defaults for all later entries: read by nobody who applies layers.
                b'g' => {
                    self.extension_body(&block)?;
                }
                _ => return self.entry(&block, &extension).map(Some),
            }
        }
    }

    /// Reads the next stored bytes of the current entry.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let want = buffer.len().min(usize::try_from(self.content).unwrap_or(usize::MAX));
        self.fill(&mut buffer[..want])?;
        self.content -= want as u64;
        Ok(want)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), LayerError> {
        self.input.read_exact(buffer).map_err(|e| self.broken(e))?;
        self.offset += buffer.len() as u64;
        Ok(())
    }

    fn broken(&self, error: io::Error) -> LayerError {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return LayerError::Truncated { offset: self.offset };
        }
        LayerError::Read(error)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), LayerError> {
        let skipped = io::copy(&mut (&mut self.input).take(bytes), &mut io::sink());
        let skipped = skipped.map_err(|e| self.broken(e))?;
        self.offset += skipped;
        if skipped < bytes {
            return Err(self.broken(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }

    /// The next header block; `None` at the two zero blocks or where the stream ends.
    fn header(&mut self) -> Result<Option<[u8; 512]>, LayerError> {
        let mut block = [0u8; 512];
        // Between two entries an archive may just end: some writers leave the zero blocks out.
        let mut got = 0;
        while got < block.len() {
            match self.input.read(&mut block[got..]) {
                Ok(0) if got == 0 => return Ok(None),
                Ok(0) => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.broken(e)),
            }
        }
        self.offset += BLOCK;
        if block.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        let sums = checksums(&block);
        match number(&block[148..156]) {
            Some(sum) if sum == sums.0 || sum == sums.1 => Ok(Some(block)),
            _ => Err(self.malformed("has a header with a wrong checksum")),
        }
    }

    fn malformed(&self, why: &'static str) -> LayerError {
        LayerError::Malformed { offset: self.offset, why }
    }

    fn extension_body(&mut self, block: &[u8; 512]) -> Result<Vec<u8>, LayerError> {
        let size = number(&block[124..136]).and_then(|n| u64::try_from(n).ok());
        let size = size.ok_or_else(|| self.malformed("has an extension of unreadable size"))?;
        if size > EXTENSION_BYTES {
            return Err(self.malformed("has an extension header above 1 MiB"));
        }
        // Lossless: at most EXTENSION_BYTES.
        let mut body = vec![0; size as usize];
        self.fill(&mut body)?;
        self.skip(size.next_multiple_of(BLOCK) - size)?;
        Ok(body)
    }

    /// `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record in decimal.
    fn pax(&self, mut body: &[u8], records: &mut Vec<(Vec<u8>, Vec<u8>)>) -> Result<(), LayerError> {
        let bad = || self.malformed("has a broken PAX record");
        while !body.is_empty() {
            let space = body.iter().position(|&b| b == b' ').ok_or_else(bad)?;
            let digits = std::str::from_utf8(&body[..space]).map_err(|_| bad())?;
            let length: usize = digits.parse().map_err(|_| bad())?;
            if length <= space + 1 || length > body.len() || body[length - 1] != b'\n' {
                return Err(bad());
            }
            let record = &body[space + 1..length - 1];
            let equals = record.iter().position(|&b| b == b'=').ok_or_else(bad)?;
            records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
            body = &body[length..];
        }
        Ok(())
    }

    fn entry(&mut self, block: &[u8; 512], extension: &Extension) -> Result<Entry, LayerError> {
        let fields = Fields(block);
        let path = extension.get("path").map(<[u8]>::to_vec);
        let path = path.or_else(|| extension.path.clone()).unwrap_or_else(|| fields.path());
        let link = extension.get("linkpath").map(<[u8]>::to_vec);
        let link = link.or_else(|| extension.link.clone()).unwrap_or_else(|| fields.link());
        let Some(kind) = fields.kind(&path) else {
            return Err(LayerError::Kind { entry: super::shown(&path), flag: block[156] });
        };
        let stored = self.stored_size(&fields, kind, extension)?;
        self.content = stored;
        self.padding = stored.next_multiple_of(BLOCK) - stored;
        let owner = |key, range| self.owner(&fields, extension, key, range);
        let mut entry = Entry {
            kind,
            // Lossless: twelve bits.
            mode: (fields.value(100..108).unwrap_or(0) & 0o7777) as u16,
            uid: owner("uid", 108..116)?,
            gid: owner("gid", 116..124)?,
            mtime: self.mtime(&fields, extension)?,
            device: fields.device().ok_or_else(|| self.malformed("has a device number out of range"))?,
            size: stored,
            segments: if stored > 0 { vec![(0, stored)] } else { Vec::new() },
            xattrs: xattrs(extension),
            path,
            link,
        };
        self.sparse(block, extension, &mut entry)?;
        Ok(entry)
    }

    /// How many bytes follow the header. Links, directories and devices have none whatever the
    /// header says, as in Go's reader.
    fn stored_size(&self, fields: &Fields<'_>, kind: Kind, ext: &Extension) -> Result<u64, LayerError> {
        if kind != Kind::File {
            return Ok(0);
        }
        let size = match ext.number("size").map_err(|why| self.malformed(why))? {
            Some(size) => Some(size),
            None => fields.value(124..136).and_then(|n| u64::try_from(n).ok()),
        };
        // Far above any limit, far below where sums could overflow.
        let size = size.filter(|&n| n < 1 << 60);
        size.ok_or_else(|| self.malformed("has a file of unreadable size"))
    }

    fn owner(
        &self,
        fields: &Fields<'_>,
        extension: &Extension,
        key: &str,
        range: std::ops::Range<usize>,
    ) -> Result<u32, LayerError> {
        let wide = match extension.number(key).map_err(|why| self.malformed(why))? {
            Some(number) => i64::try_from(number).ok(),
            None => fields.value(range),
        };
        let id = wide.and_then(|n| u32::try_from(n).ok());
        id.ok_or_else(|| self.malformed("has an owner beyond 32 bits"))
    }

    fn mtime(&self, fields: &Fields<'_>, ext: &Extension) -> Result<(i64, u32), LayerError> {
        let bad = || self.malformed("has an unreadable time");
        match ext.get("mtime") {
            Some(text) => std::str::from_utf8(text).ok().and_then(pax_time).ok_or_else(bad),
            None => Ok((fields.value(136..148).ok_or_else(bad)?, 0)),
        }
    }

    /// Replaces size and segments where the entry is a sparse file of one of the four forms.
    fn sparse(&mut self, block: &[u8; 512], ext: &Extension, entry: &mut Entry) -> Result<(), LayerError> {
        let number = |key| ext.number(key).map_err(|why| self.malformed(why));
        let (major, minor) = (number("GNU.sparse.major")?, number("GNU.sparse.minor")?);
        let (segments, size) = if block[156] == b'S' {
            let size = Fields(block).value(483..495).and_then(|n| u64::try_from(n).ok());
            (self.old_gnu_map(block)?, size)
        } else if (major, minor) == (Some(1), Some(0)) {
            let size = number("GNU.sparse.realsize")?;
            (self.stored_map()?, size)
        } else if let Some(map) = ext.get("GNU.sparse.map") {
            let size = number("GNU.sparse.size")?;
            (self.number_pairs(map.split(|&b| b == b','))?, size)
        } else if ext.get("GNU.sparse.numblocks").is_some() {
            return Err(self.malformed("has a sparse file of the obsolete form 0.0"));
        } else {
            return Ok(());
        };
        if let Some(name) = ext.get("GNU.sparse.name") {
            entry.path = name.to_vec();
        }
        let size = size.ok_or_else(|| self.malformed("has a sparse file without a size"))?;
        let (mut end, mut stored) = (0u64, 0u64);
        for &(offset, length) in &segments {
            let next = offset.checked_add(length).filter(|&n| offset >= end && n <= size);
            end = next.ok_or_else(|| self.malformed("has a sparse file with a wrong map"))?;
            stored += length;
        }
        if stored != self.content {
            return Err(self.malformed("has a sparse file with a wrong map"));
        }
        entry.size = size;
        entry.segments = segments;
        entry.segments.retain(|s| s.1 > 0);
        Ok(())
    }

    /// Four pairs in the header, 21 in each block that follows it.
    fn old_gnu_map(&mut self, header: &[u8; 512]) -> Result<Vec<(u64, u64)>, LayerError> {
        let mut segments = Vec::new();
        self.map_fields(&header[386..482], &mut segments)?;
        let mut more = header[482] != 0;
        while more {
            let mut block = [0; 512];
            self.fill(&mut block)?;
            self.map_fields(&block[..504], &mut segments)?;
            more = block[504] != 0;
        }
        Ok(segments)
    }

    fn map_fields(&self, fields: &[u8], segments: &mut Vec<(u64, u64)>) -> Result<(), LayerError> {
        for pair in fields.chunks_exact(24) {
            if pair[0] == 0 {
                break;
            }
            let read = |f| number(f).and_then(|n| u64::try_from(n).ok());
            let (offset, length) = (read(&pair[..12]), read(&pair[12..]));
            let segment = offset.zip(length).filter(|_| segments.len() < SPARSE_SEGMENTS);
            segments.push(segment.ok_or_else(|| self.malformed("has a sparse file with a wrong map"))?);
        }
        Ok(())
    }

    /// PAX 1.0: the map stands in the content's first blocks, one decimal a line.
    fn stored_map(&mut self) -> Result<Vec<(u64, u64)>, LayerError> {
        let bad = "has a sparse file with a wrong map";
        let mut text = Vec::new();
        let mut lines_wanted = 1;
        loop {
            let mut block = [0; 512];
            if self.read_content(&mut block)? < block.len() {
                return Err(self.malformed(bad));
            }
            text.extend_from_slice(&block);
            let lines = text.iter().filter(|&&b| b == b'\n').count();
            if lines_wanted == 1 && lines > 0 {
                let first = text.split(|&b| b == b'\n').next().unwrap_or_default();
                let count: Option<usize> = std::str::from_utf8(first).ok().and_then(|t| t.parse().ok());
                let count = count.filter(|&n| n <= SPARSE_SEGMENTS);
                lines_wanted = 1 + 2 * count.ok_or_else(|| self.malformed(bad))?;
            }
            if lines_wanted > 1 && lines >= lines_wanted || lines_wanted == 1 && lines > 0 {
                let numbers = text.split(|&b| b == b'\n').take(lines_wanted).skip(1);
                return self.number_pairs(numbers);
            }
            if text.len() > (lines_wanted + 1) * 21 + 512 {
                return Err(self.malformed(bad));
            }
        }
    }

    fn number_pairs<'a>(&self, texts: impl Iterator<Item = &'a [u8]>) -> Result<Vec<(u64, u64)>, LayerError> {
        let numbers: Option<Vec<u64>> = texts.map(|t| std::str::from_utf8(t).ok()?.parse().ok()).collect();
        let numbers = numbers.filter(|n| n.len() % 2 == 0 && n.len() / 2 <= SPARSE_SEGMENTS);
        let numbers = numbers.ok_or_else(|| self.malformed("has a sparse file with a wrong map"))?;
        Ok(numbers.chunks_exact(2).map(|p| (p[0], p[1])).collect())
    }
}

/// The fixed fields of a header block (POSIX.1-1988 ustar, GNU tar's variation).
struct Fields<'a>(&'a [u8; 512]);

impl Fields<'_> {
    fn value(&self, range: std::ops::Range<usize>) -> Option<i64> {
        number(&self.0[range])
    }

    fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.0[..100]);
        let prefix = until_nul(&self.0[345..500]);
        // GNU headers ("ustar" and two spaces) keep other things where ustar has the prefix.
        if &self.0[257..263] == b"ustar\0" && !prefix.is_empty() {
            [prefix, b"/", name].concat()
        } else {
            name.to_vec()
        }
    }

    fn link(&self) -> Vec<u8> {
        until_nul(&self.0[157..257]).to_vec()
    }

    fn kind(&self, path: &[u8]) -> Option<Kind> {
        Some(match self.0[156] {
            // Before POSIX a directory was a file whose name ends with a slash.
            b'0' | b'\0' if path.ends_with(b"/") => Kind::Directory,
            b'0' | b'\0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Character,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            _ => return None,
        })
    }

    fn device(&self) -> Option<(u32, u32)> {
        if !matches!(self.0[156], b'3' | b'4') {
            return Some((0, 0));
        }
        let major = u32::try_from(self.value(329..337)?).ok()?;
        let minor = u32::try_from(self.value(337..345)?).ok()?;
        // What a Linux dev_t holds: 12 bits and 20 bits.
        (major < 1 << 12 && minor < 1 << 20).then_some((major, minor))
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

/// Unsigned and signed sum of a header, its checksum field taken as spaces.
fn checksums(block: &[u8; 512]) -> (i64, i64) {
    let field = |i: usize, b: u8| if (148..156).contains(&i) { b' ' } else { b };
    let bytes = || block.iter().enumerate().map(|(i, &b)| field(i, b));
    (bytes().map(i64::from).sum(), bytes().map(|b| i64::from(b.cast_signed())).sum())
}

/// A numeric field: octal text, or base 256 when the first bit is set. Empty is 0.
fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let start: i128 = if first & 0x40 != 0 { -1 } else { 0 };
        let head = start << 6 | i128::from(first & 0x3f);
        let mut value = head;
        for &byte in &field[1..] {
            value = value.checked_mul(256)? + i128::from(byte);
        }
        return i64::try_from(value).ok();
    }
    let mut value = 0i64;
    for &byte in until_nul(field).trim_ascii() {
        let digit = byte.checked_sub(b'0').filter(|&d| d < 8)?;
        value = value.checked_mul(8)?.checked_add(i64::from(digit))?;
    }
    Some(value)
}

/// `-12.5`: seconds and the fraction of one.
fn pax_time(text: &str) -> Option<(i64, u32)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits = &fraction[..fraction.len().min(9)];
    let nanos: u32 = format!("{digits:0<9}").parse().ok()?;
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

fn xattrs(extension: &Extension) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut xattrs = BTreeMap::new();
    for (key, value) in &extension.records {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            xattrs.insert(name.to_vec(), value.clone());
        }
    }
    xattrs
}

#[cfg(test)]
mod tests;
