//! A small container image made from Debian's static busybox: an OCI image layout
//! (image-spec v1.1, image-layout.md) with one gzip layer.
//!
//! ```text
//!   $NACELLE_CACHE_DIR/xtask/busybox-HASH/
//!     oci-layout  index.json
//!     blobs/sha256/<layer> <config> <manifest>
//! ```
//!
//! Made on the spot, because a first run should need neither a registry nor its trust; real all
//! the same: links for every applet, users, a PATH, a default command. The same busybox gives
//! the same bytes, so its digest can be a cache key.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

use crate::{host, progress};

/// What a container's processes find their programs by.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Directories of the image and their permissions.
const DIRECTORIES: [(&str, u32); 14] = [
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var", 0o755),
    ("var/tmp", 0o1777),
];
/// Small files of the image.
const FILES: [(&str, &str); 5] = [
    ("etc/group", "root:x:0:\ntty:x:5:\nwww-data:x:33:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    (
        "etc/os-release",
        "NAME=\"nacelle busybox\"\nID=nacelle-busybox\nPRETTY_NAME=\"A busybox image for nacelle\"\n",
    ),
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var:/bin/sh\n\
         nobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
];

/// Gives the folder of the busybox image, made first if it is not there.
pub fn busybox() -> Result<PathBuf> {
    host::need("the example image", &host::RUN_PACKAGES)?;
    let program = host::find_program("busybox").context("There is no busybox to make an image of")?;
    let bytes = fs::read(&program).with_context(|| format!("Cannot read {}", program.display()))?;
    let listing = host::run(Command::new(&program).arg("--list"))?;
    let applets = String::from_utf8_lossy(&listing).lines().map(str::to_owned).collect();
    let home = host::cache_directory("NACELLE_CACHE_DIR", "")?.join("xtask");
    fs::create_dir_all(&home)?;
    // The layout below belongs to the key as the program does.
    let place = home.join(format!("busybox-{}", &digest(&[&bytes, &b"1"[..]].concat())[..16]));
    if !place.exists() {
        progress::step("Making an image of busybox", || {
            let work = tempfile::Builder::new().prefix("image-").tempdir_in(&home)?;
            let layout = work.path().join("layout");
            write_layout(&layout, &bytes, &applets)?;
            match fs::rename(&layout, &place) {
                // Another run was first with the same bytes.
                Err(_) if place.exists() => Ok(()),
                result => result.with_context(|| format!("Cannot make {}", place.display())),
            }
        })?;
    }
    Ok(place)
}

fn write_layout(layout: &Path, busybox: &[u8], applets: &BTreeSet<String>) -> Result<()> {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let store = |bytes: &[u8]| -> Result<String> {
        let name = digest(bytes);
        fs::write(blobs.join(&name), bytes)?;
        Ok(format!("sha256:{name}"))
    };
    let plain = layer(busybox, applets)?;
    let mut packer = GzBuilder::new().mtime(0).write(Vec::new(), Compression::default());
    packer.write_all(&plain)?;
    let packed = packer.finish()?;
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {"Env": [PATH], "Cmd": ["sh"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", digest(&plain))]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "busybox and its applets"}],
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": store(&config)?,
            "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": store(&packed)?,
            "size": packed.len(),
        }],
    }))?;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": store(&manifest)?,
            "size": manifest.len(),
            "platform": {"architecture": "amd64", "os": "linux"},
            "annotations": {"org.opencontainers.image.ref.name": "latest"},
        }],
    });
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(layout.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

/// The layer as a plain tar file.
fn layer(busybox: &[u8], applets: &BTreeSet<String>) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, mode) in DIRECTORIES {
        archive.append_data(&mut header(EntryType::Directory, mode, 0), format!("{name}/"), &[][..])?;
    }
    for (name, text) in FILES {
        let mut header = header(EntryType::Regular, 0o644, text.len());
        archive.append_data(&mut header, name, text.as_bytes())?;
    }
    let mut program = header(EntryType::Regular, 0o755, busybox.len());
    archive.append_data(&mut program, "bin/busybox", busybox)?;
    for applet in applets.iter().filter(|applet| *applet != "busybox" && !applet.contains('/')) {
        let mut link = header(EntryType::Symlink, 0o777, 0);
        archive.append_link(&mut link, format!("bin/{applet}"), "busybox")?;
    }
    Ok(archive.into_inner()?)
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

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applets() -> BTreeSet<String> {
        ["sh", "busybox", "ls", "[["].map(str::to_owned).into()
    }

    #[test]
    fn every_digest_of_the_layout_is_that_of_its_blob() {
        let folder = tempfile::tempdir().unwrap();
        let layout = folder.path().join("layout");
        write_layout(&layout, b"program", &applets()).unwrap();
        for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            assert_eq!(digest(&fs::read(entry.path()).unwrap()), name);
        }
        let index = fs::read_to_string(layout.join("index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        let manifest = index["manifests"][0]["digest"].as_str().unwrap().replace("sha256:", "");
        assert!(layout.join("blobs/sha256").join(manifest).exists());
    }

    #[test]
    fn the_same_program_gives_the_same_bytes() {
        assert_eq!(layer(b"x", &applets()).unwrap(), layer(b"x", &applets()).unwrap());
    }

    #[test]
    fn applets_are_links_beside_the_program_and_the_program_is_none() {
        let bytes = layer(b"program", &applets()).unwrap();
        let mut archive = tar::Archive::new(&bytes[..]);
        let mut links = Vec::new();
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            if entry.header().entry_type() == EntryType::Symlink {
                assert_eq!(entry.link_name().unwrap().unwrap(), Path::new("busybox"));
                links.push(entry.path().unwrap().to_string_lossy().into_owned());
            }
        }
        assert_eq!(links, ["bin/[[", "bin/ls", "bin/sh"]);
    }
}
