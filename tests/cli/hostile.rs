//! Images that mean harm or are damaged, and disks that are full: one sentence, nothing left,
//! nothing on the host.

use std::{
    ffi::CString,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use super::{
    host::{Ended, Host, SMALL, entries, is_root, test_image, walk},
    image::{Image, Layer, digest},
};

fn run(host: &Host, image: &str, script: &str) -> Ended {
    host.nacelle(&[&["run", "-q"], &SMALL[..], &[image, "sh", "-c", script]].concat())
}

/// Runs an image that cannot be one, and checks that nothing of it is left.
fn refused(layer: Layer) -> Ended {
    let host = Host::with_own_cache();
    let image = Image::busybox().layer(layer).layout(&host.dir().join("layout"));
    let ended = run(&host, &image, "echo ran").expect(125);
    assert_eq!(ended.text(), "");
    assert_eq!(host.cached(), Vec::<PathBuf>::new());
    host.assert_nothing_left();
    ended
}

#[test]
fn a_layer_that_reaches_out_of_the_root_is_refused() {
    refused(Layer::new().file("../escaped", 0o644, b"x")).says(&["Layer 2 of 2", "../escaped"]);
    refused(Layer::new().file("etc/../../../escaped", 0o644, b"x")).says(&["Layer 2 of 2", "escaped"]);
    refused(Layer::new().hard_link("shadow", "../../etc/shadow")).says(&["Layer 2 of 2", "shadow"]);
    refused(Layer::new().hard_link("shadow", "/no/such/file")).says(&["Layer 2 of 2", "/no/such/file"]);
    assert!(!Path::new("/escaped").exists());
}

#[test]
fn links_of_a_layer_lead_nowhere_on_the_host() {
    let host = Host::with_own_cache();
    let outside = host.dir().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    let target = outside.to_str().unwrap();
    let layer = Layer::new()
        .symlink("away", target)
        .file("away/planted", 0o644, b"x")
        .symlink("up", "../../../../../../../..")
        .file("up/planted-at-the-top", 0o644, b"x");
    let image = Image::busybox().layer(layer).layout(&host.dir().join("layout"));
    // Whether it is refused or stays within the image does not matter here.
    let ended = run(&host, &image, "cat /away/secret || echo unseen");
    match ended.code {
        0 => assert_eq!(ended.text(), "unseen\n"),
        _ => drop(ended.expect(125).says(&["Layer 2 of 2"])),
    }
    assert_eq!(entries(&outside), [outside.join("secret")]);
    assert!(!Path::new("/planted-at-the-top").exists());
    host.assert_nothing_left();
}

#[test]
fn a_damaged_layer_is_noticed_by_its_digest() {
    let host = Host::with_own_cache();
    let dir = host.dir().join("layout");
    let image = Image::busybox();
    let path = image.layout(&dir);
    let (blobs, manifest) = image.blobs();
    for blob in [&blobs[1], &blobs[0], &manifest] {
        let file = dir.join("blobs/sha256").join(&digest(blob)[7..]);
        let mut bytes = blob.clone();
        let place = bytes.len() / 2;
        bytes[place] ^= 0x20;
        fs::write(&file, &bytes).unwrap();
        run(&host, &path, "true").expect(125).says(&["digest"]);
        fs::write(&file, blob).unwrap();
    }
    let file = dir.join("blobs/sha256").join(&digest(&blobs[1])[7..]);
    fs::write(&file, &blobs[1][..blobs[1].len() - 100]).unwrap();
    run(&host, &path, "true").expect(125);
    fs::remove_file(&file).unwrap();
    run(&host, &path, "true").expect(125).says(&[&digest(&blobs[1])[7..]]);
    assert_eq!(host.cached(), Vec::<PathBuf>::new());
    host.assert_nothing_left();
}

#[test]
fn an_image_for_another_processor_is_refused() {
    let host = Host::with_own_cache();
    let image = Image::busybox().top("architecture", "s390x").layout(&host.dir().join("layout"));
    run(&host, &image, "true").expect(125).says(&["s390x", "amd64"]);
    host.assert_nothing_left();
}

#[test]
fn devices_and_set_uid_programs_are_in_the_guest_alone() {
    let host = Host::with_own_cache();
    let layer = Layer::new().device("odd/mem", 1, 1).device("odd/nothing", 1, 3).file(
        "odd/become-root",
        0o6755,
        b"#!/bin/sh\n",
    );
    let image = Image::busybox().layer(layer).layout(&host.dir().join("layout"));
    let script = "stat -c '%F %t %T' /odd/mem /odd/nothing; stat -c %a /odd/become-root; echo gone >/odd/nothing && cat /odd/nothing";
    let expected = "character special file 1 1\ncharacter special file 1 3\n6755\n";
    assert_eq!(run(&host, &image, script).expect(0).text(), expected);
    // The image is one file, and nothing else on the host is what the layer asked for.
    let images: Vec<PathBuf> = entries(&host.cache().join("images"));
    assert_eq!(images.iter().filter(|path| path.extension().is_some_and(|e| e == "erofs")).count(), 1);
    for path in walk(host.dir()) {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        assert!(!kind.is_char_device() && !kind.is_block_device(), "{}", path.display());
        assert_eq!(metadata.permissions().mode() & 0o6000, 0, "{}", path.display());
        assert!(!path.ends_with("become-root"), "{}", path.display());
    }
}

/// A small file system in memory, until it is dropped.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf, size: &str) -> Small {
        fs::create_dir_all(&path).unwrap();
        let target = CString::new(path.as_os_str().as_bytes()).unwrap();
        let options = CString::new(format!("size={size}")).unwrap();
        // SAFETY: zero-terminated strings that outlive the call.
        let mounted = unsafe {
            libc::mount(c"small".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast())
        };
        assert_eq!(mounted, 0, "no tmpfs: {}", std::io::Error::last_os_error());
        Small(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let target = CString::new(self.0.as_os_str().as_bytes()).unwrap();
        // SAFETY: a zero-terminated string that outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn a_full_disk_is_said_and_nothing_half_made_stays() {
    assert!(is_root(), "this test mounts small file systems: run it as root");
    let host = Host::with_own_cache();
    let _small = Small::mount(host.cache().to_owned(), "1M");
    run(&host, &test_image(), "true").expect(125).says(&["nacelle: ", "No space left on device"]);
    assert_eq!(host.cached(), Vec::<PathBuf>::new());
    host.assert_nothing_left();
}

#[test]
fn a_state_directory_without_room_is_said_and_nothing_stays() {
    assert!(is_root(), "this test mounts small file systems: run it as root");
    let host = Host::new();
    let _small = Small::mount(host.dir().join("state"), "64k");
    host.run(&[], "true").expect(125).says(&["nacelle: ", "No space left on device"]);
    host.assert_nothing_left();
    host.run(&["-d"], "true").expect(125).says(&["No space left on device"]);
    host.assert_nothing_left();
}
