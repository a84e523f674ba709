//! Archives for the tests, made with the `tar` crate's headers, and with names that its own
//! path checks would refuse.

use std::fs::File;
use std::io::Write;

use crate::digest::Digest;

/// A tar archive in the making.
#[derive(Default)]
pub(crate) struct Tar(Vec<u8>);

/// One header; the fields of [`Default`] are those of a plain file.
pub(crate) struct Item<'a> {
    pub kind: u8,
    pub link: &'a [u8],
    pub mode: u32,
    pub owner: (u64, u64),
    pub mtime: u64,
    pub device: (u32, u32),
    pub data: &'a [u8],
    /// What the header says about the length, where that is not the truth.
    pub size: Option<u64>,
    pub pax: &'a [(&'a str, &'a [u8])],
}

impl Default for Item<'_> {
    fn default() -> Self {
        Self {
            kind: b'0',
            link: b"",
            mode: 0o644,
            owner: (0, 0),
            mtime: 1_700_000_000,
            device: (0, 0),
            data: b"",
            size: None,
            pax: &[],
        }
    }
}

impl Tar {
    pub(crate) fn item(mut self, path: &[u8], item: &Item<'_>) -> Self {
        if !item.pax.is_empty() {
            let mut body = Vec::new();
            for (key, value) in item.pax {
                let rest = key.len() + value.len() + 3;
                let mut length = rest + rest.to_string().len();
                length = rest + length.to_string().len();
                body.extend(format!("{length} {key}=").as_bytes());
                body.extend(*value);
                body.push(b'\n');
            }
            self.raw(b"pax", b'x', &body, &Item::default());
        }
        if path.len() > 100 {
            self.raw(b"long", b'L', &[path, b"\0"].concat(), &Item::default());
        }
        if item.link.len() > 100 {
            self.raw(b"long", b'K', &[item.link, b"\0"].concat(), &Item::default());
        }
        self.raw(path, item.kind, item.data, item);
        self
    }

    fn raw(&mut self, path: &[u8], kind: u8, data: &[u8], item: &Item<'_>) {
        let mut header = tar::Header::new_gnu();
        header.set_mode(item.mode);
        header.set_uid(item.owner.0);
        header.set_gid(item.owner.1);
        header.set_mtime(item.mtime);
        header.set_size(item.size.unwrap_or(data.len() as u64));
        header.set_device_major(item.device.0).unwrap();
        header.set_device_minor(item.device.1).unwrap();
        let bytes = header.as_mut_bytes();
        let (path, link) = (&path[..path.len().min(100)], &item.link[..item.link.len().min(100)]);
        bytes[..path.len()].copy_from_slice(path);
        bytes[157..157 + link.len()].copy_from_slice(link);
        bytes[156] = kind;
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    pub(crate) fn file(self, path: &str, data: &[u8]) -> Self {
        self.item(path.as_bytes(), &Item { data, ..Item::default() })
    }

    pub(crate) fn dir(self, path: &str) -> Self {
        let item = Item { kind: b'5', mode: 0o755, ..Item::default() };
        self.item(path.as_bytes(), &item)
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.link(b'2', path, target)
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.link(b'1', path, target)
    }

    fn link(self, kind: u8, path: &str, target: &str) -> Self {
        let item = Item { kind, link: target.as_bytes(), ..Item::default() };
        self.item(path.as_bytes(), &item)
    }

    pub(crate) fn bytes(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }

    /// What has been written so far, without the end of an archive.
    pub(crate) fn unfinished(self) -> Vec<u8> {
        self.0
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A configuration for this host with these uncompressed layers.
pub(crate) fn config(layers: &[Vec<u8>]) -> Vec<u8> {
    let ids: Vec<String> = layers.iter().map(|l| Digest::of(l).to_string()).collect();
    let json = serde_json::json!({
        "architecture": crate::config::host_architecture(),
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"], "Env": ["A=1"]},
        "rootfs": {"type": "layers", "diff_ids": ids},
    });
    serde_json::to_vec(&json).unwrap()
}

/// A manifest of a configuration and layers as they are stored.
pub(crate) fn manifest(config: &[u8], layers: &[Vec<u8>]) -> Vec<u8> {
    let part = |bytes: &Vec<u8>| {
        serde_json::json!({"digest": Digest::of(bytes).to_string(), "size": bytes.len(),
            "mediaType": "application/vnd.oci.image.layer.v1.tar"})
    };
    let json = serde_json::json!({
        "schemaVersion": 2,
        "config": part(&config.to_vec()),
        "layers": layers.iter().map(part).collect::<Vec<_>>(),
    });
    serde_json::to_vec(&json).unwrap()
}

/// An empty file for an image.
pub(crate) fn scratch() -> File {
    tempfile::tempfile().unwrap()
}
