//! Images for tests: the test image with further layers and other settings, written as an OCI
//! layout or as `docker save` does.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

use super::host::test_image;

/// The SHA-256 of bytes, as digests are written.
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// An image being put together.
pub struct Image {
    config: Value,
    /// Media type and bytes of each layer.
    layers: Vec<(String, Vec<u8>)>,
}

impl Image {
    /// The test image.
    pub fn busybox() -> Image {
        let layout = PathBuf::from(test_image());
        let read = |path: PathBuf| fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let parse = |bytes: Vec<u8>| -> Value { serde_json::from_slice(&bytes).expect("JSON") };
        let blob = |what: &Value| {
            let name = what["digest"].as_str().expect("a digest").replace(':', "/");
            read(layout.join("blobs").join(name))
        };
        let index = parse(read(layout.join("index.json")));
        let manifest = parse(blob(&index["manifests"][0]));
        let layers = manifest["layers"].as_array().expect("layers").iter();
        let kind = |layer: &Value| layer["mediaType"].as_str().expect("a type").to_owned();
        Image {
            config: parse(blob(&manifest["config"])),
            layers: layers.map(|layer| (kind(layer), blob(layer))).collect(),
        }
    }

    /// Sets one of the settings for running it, as `Env` or `User`.
    pub fn setting(mut self, name: &str, value: Value) -> Image {
        self.config["config"][name] = value;
        self
    }

    /// Sets what the configuration says beside that, as `architecture`.
    pub fn top(mut self, name: &str, value: &str) -> Image {
        self.config[name] = value.into();
        self
    }

    /// Adds a layer.
    pub fn layer(mut self, layer: Layer) -> Image {
        let bytes = layer.0.into_inner().expect("a tar in memory");
        let ids = self.config["rootfs"]["diff_ids"].as_array_mut().expect("layer ids");
        ids.push(digest(&bytes).into());
        self.layers.push(("application/vnd.oci.image.layer.v1.tar".to_owned(), bytes));
        self
    }

    fn config_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.config).expect("JSON")
    }

    /// All blobs, the configuration first, and the manifest that names them.
    pub fn blobs(&self) -> (Vec<Vec<u8>>, Vec<u8>) {
        let config = self.config_bytes();
        let entry = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": digest(bytes), "size": bytes.len()});
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": entry("application/vnd.oci.image.config.v1+json", &config),
            "layers": self.layers.iter().map(|(kind, bytes)| entry(kind, bytes)).collect::<Vec<_>>(),
        });
        let layers = self.layers.iter().map(|(_, bytes)| bytes.clone());
        let blobs = std::iter::once(config).chain(layers).collect();
        (blobs, serde_json::to_vec(&manifest).expect("JSON"))
    }

    /// Writes it as an OCI layout, whose path is returned.
    pub fn layout(&self, dir: &Path) -> String {
        let (blobs, manifest) = self.blobs();
        let folder = dir.join("blobs/sha256");
        fs::create_dir_all(&folder).expect("a directory");
        for bytes in blobs.iter().chain([&manifest]) {
            fs::write(folder.join(&digest(bytes)[7..]), bytes).expect("a blob");
        }
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest(&manifest), "size": manifest.len(),
        }]});
        fs::write(dir.join("index.json"), index.to_string()).expect("an index");
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("a layout");
        dir.to_str().expect("UTF-8").to_owned()
    }

    /// Writes it as `docker save` does.
    pub fn saved(&self, file: &Path) -> String {
        let mut archive = tar::Builder::new(fs::File::create(file).expect("a file"));
        let mut add = |name: &str, bytes: &[u8]| {
            archive
                .append_data(&mut header(EntryType::Regular, 0o644, bytes.len()), name, bytes)
                .expect("written");
        };
        let mut names = Vec::new();
        for (number, (_, bytes)) in self.layers.iter().enumerate() {
            names.push(format!("{number}/layer.tar"));
            add(&format!("{number}/layer.tar"), bytes);
        }
        add("config.json", &self.config_bytes());
        let manifest = json!([{"Config": "config.json", "RepoTags": ["saved:latest"], "Layers": names}]);
        add("manifest.json", manifest.to_string().as_bytes());
        archive.finish().expect("written");
        file.to_str().expect("UTF-8").to_owned()
    }
}

/// A layer being put together: a tar in memory, with whatever names a test likes.
pub struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    /// An empty one.
    pub fn new() -> Layer {
        Layer(tar::Builder::new(Vec::new()))
    }

    /// Adds an entry as it is said: names are not checked, as an attacker's would not be.
    fn add(mut self, name: &str, mut header: Header, bytes: &[u8]) -> Layer {
        let field = &mut header.as_old_mut().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        self.0.append(&header, bytes).expect("a tar in memory");
        self
    }

    /// A file.
    pub fn file(self, name: &str, mode: u32, bytes: &[u8]) -> Layer {
        self.add(name, header(EntryType::Regular, mode, bytes.len()), bytes)
    }

    /// A symbolic link.
    pub fn symlink(self, name: &str, target: &str) -> Layer {
        self.link(EntryType::Symlink, name, target)
    }

    /// A hard link.
    pub fn hard_link(self, name: &str, target: &str) -> Layer {
        self.link(EntryType::Link, name, target)
    }

    fn link(self, kind: EntryType, name: &str, target: &str) -> Layer {
        let mut header = header(kind, 0o777, 0);
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        self.add(name, header, &[])
    }

    /// A character device.
    pub fn device(self, name: &str, major: u32, minor: u32) -> Layer {
        let mut header = header(EntryType::Char, 0o666, 0);
        header.set_device_major(major).expect("a number that fits");
        header.set_device_minor(minor).expect("a number that fits");
        self.add(name, header, &[])
    }
}

fn header(kind: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size as u64);
    header
}
