//! Writing the "newc" cpio format (Linux, `driver-api/early-userspace/buffer-format`).
//!
//! Each entry is a header of 110 ASCII characters, the name with its zero byte, and the
//! content, both padded to four bytes. Times are zero so that equal input gives equal bytes.

/// An archive being written.
pub(super) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

/// What differs between entries.
struct Entry<'a> {
    name: &'a str,
    mode: u32,
    links: u32,
    device: (u32, u32),
    content: &'a [u8],
}

impl Archive {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), inode: 0 }
    }

    pub(super) fn directory(&mut self, name: &str, mode: u32) {
        let mode = libc::S_IFDIR | mode;
        self.entry(&Entry { name, mode, links: 2, device: (0, 0), content: b"" });
    }

    pub(super) fn character_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        let mode = libc::S_IFCHR | mode;
        self.entry(&Entry { name, mode, links: 1, device: (major, minor), content: b"" });
    }

    pub(super) fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        let mode = libc::S_IFREG | mode;
        self.entry(&Entry { name, mode, links: 1, device: (0, 0), content });
    }

    /// The archive with its end mark, padded to 512 bytes as other tools do.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let end = Entry { name: "TRAILER!!!", mode: 0, links: 1, device: (0, 0), content: b"" };
        self.entry(&end);
        let length = self.bytes.len().next_multiple_of(512);
        self.bytes.resize(length, 0);
        self.bytes
    }

    fn entry(&mut self, entry: &Entry<'_>) {
        self.inode += 1;
        // Callers cap content far below 4 GiB; a larger one would be cut, not overflow.
        let size = u32::try_from(entry.content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(entry.name.len() + 1).unwrap_or(u32::MAX);
        let fields = [
            self.inode,
            entry.mode,
            0, // owner
            0, // group
            entry.links,
            0, // time
            size,
            0, // device the file is on
            0,
            entry.device.0,
            entry.device.1,
            name_size,
            0, // checksum, unused in this format
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(entry.name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(entry.content);
        self.pad();
    }

    fn pad(&mut self) {
        let length = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(length, 0);
    }
}
