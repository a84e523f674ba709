use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::progress::{Event, Silent};
use crate::reference::ReferenceError;
use crate::testing::{Tar, config, gzip, manifest};

mod registry;

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn store(&self) -> Store {
        Store::new(&self.path("store")).unwrap()
    }

    fn open(&self, source: &str) -> Result<Image, StoreError> {
        self.open_with(source, &OpenOptions::default())
    }

    fn open_with(&self, source: &str, options: &OpenOptions) -> Result<Image, StoreError> {
        self.store().open(&Source::parse(source).unwrap(), options, &mut Silent)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// An OCI layout directory of one image.
    fn layout(&self, name: &str, config: &[u8], layers: &[Vec<u8>]) -> String {
        let manifest = manifest(config, layers);
        for blob in layers.iter().map(Vec::as_slice).chain([config, &manifest]) {
            self.file(&format!("{name}/blobs/sha256/{}", Digest::of(blob).hex()), blob);
        }
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
            "digest": Digest::of(&manifest).to_string(), "size": manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": "v1"}}]});
        self.file(&format!("{name}/index.json"), index.to_string().as_bytes());
        self.file(&format!("{name}/oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#);
        self.path(name).to_str().unwrap().to_owned()
    }

    /// What lies in the store's directories that could be a half-made thing.
    fn leftovers(&self) -> Vec<PathBuf> {
        let names = |dir| {
            let entries = fs::read_dir(self.path("store").join(dir)).unwrap();
            entries.map(|e| e.unwrap().path()).collect::<Vec<_>>()
        };
        let mut all = names("tmp");
        all.extend(names("images"));
        all.extend(names("blobs/sha256"));
        all
    }
}

/// Error and causes, as the command line prints them.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += ": ";
        text += &error.to_string();
        cause = error.source();
    }
    text
}

fn layers() -> Vec<Vec<u8>> {
    vec![
        Tar::default().dir("bin").file("bin/sh", &[b'#'; 10_000]).file("gone", b"").bytes(),
        Tar::default().file(".wh.gone", b"").file("etc/new", b"new").bytes(),
    ]
}

fn saved(config_bytes: &[u8], names: &[(&str, &[u8])], tags: &[&str]) -> Vec<u8> {
    let layer_names: Vec<&str> = names.iter().map(|n| n.0).collect();
    let config_name = format!("{}.json", Digest::of(config_bytes).hex());
    let list = serde_json::json!([{"Config": config_name, "RepoTags": tags, "Layers": layer_names}]);
    let mut tar = Tar::default().file(&config_name, config_bytes);
    for (name, bytes) in names {
        tar = tar.file(name, bytes);
    }
    tar.file("manifest.json", list.to_string().as_bytes()).bytes()
}

fn listing(image: &Image) -> Vec<String> {
    let out = Command::new("/usr/bin/dump.erofs").arg("--ls").arg("--path=/").arg(&image.root).output();
    let out = out.expect("dump.erofs is needed for this test: install the package erofs-utils");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let names = text.lines().filter_map(|l| l.split_whitespace().last().map(str::to_owned));
    names.collect()
}

#[test]
fn one_image_has_one_key_whatever_road_it_comes_by() {
    let place = Place::new();
    let plain = layers();
    let zipped: Vec<Vec<u8>> = plain.iter().map(|l| gzip(l)).collect();
    let config = config(&plain);
    let layout = place.layout("layout", &config, &zipped);
    let old_names = [("a/layer.tar", &plain[0][..]), ("b/layer.tar", &plain[1][..])];
    let tar = saved(&config, &old_names, &["app:v1"]);
    let archive = place.file("saved.tar", &tar);
    let packed = place.file("saved.tar.gz", &gzip(&tar));
    let mut layout_tar = tar::Builder::new(Vec::new());
    layout_tar.append_dir_all(".", &layout).unwrap();
    let layout_tar = place.file("layout.tar", &layout_tar.into_inner().unwrap());
    let sources = [
        layout.clone(),
        format!("oci:{layout}:v1"),
        archive.clone(),
        packed,
        layout_tar,
        format!("docker-archive:{archive}:docker.io/library/app:v1"),
    ];
    for source in sources {
        let image = place.open(&source).unwrap_or_else(|e| panic!("{source}: {}", chain(&e)));
        assert_eq!(image.key, Digest::of(&config).hex());
        assert_eq!(image.config.config.cmd, ["/bin/sh"]);
        assert_eq!(image.root.metadata().unwrap().len(), image.bytes);
        let names = listing(&image);
        assert!(names.iter().any(|n| n == "etc") && !names.iter().any(|n| n == "gone"), "{names:?}");
    }
    assert_eq!(place.store().list().unwrap().len(), 1);
}

#[test]
fn an_archive_seen_before_is_not_read_again() {
    let place = Place::new();
    let plain = layers();
    let tar = saved(&config(&plain), &[("a", &plain[0]), ("b", &plain[1])], &[]);
    let archive = place.file("saved.tar", &gzip(&tar));
    let first = place.open(&archive).unwrap();
    let mut cached = None;
    let mut watch = |event: Event<'_>| {
        if let Event::Ready { cached: c, .. } = event {
            cached = Some(c);
        }
        assert!(!matches!(event, Event::Apply { .. }));
    };
    let source = Source::parse(&archive).unwrap();
    let again = place.store().open(&source, &OpenOptions::default(), &mut watch).unwrap();
    assert_eq!((again, cached), (first.clone(), Some(true)));
    assert!(place.store().remove(&first.key).unwrap());
    assert!(!place.store().remove(&first.key).unwrap());
    assert!(!place.store().remove("../../etc").unwrap());
    assert!(place.store().list().unwrap().is_empty());
    assert!(place.open(&archive).is_ok());
}

#[test]
fn a_layer_with_a_wrong_digest_is_named_and_nothing_stays() {
    let place = Place::new();
    let plain = layers();
    let config = config(&plain);
    let layout = place.layout("layout", &config, &plain);
    let blob = format!("layout/blobs/sha256/{}", Digest::of(&plain[1]).hex());
    let mut bytes = plain[1].clone();
    bytes[600] ^= 1;
    place.file(&blob, &bytes);
    let error = chain(&place.open(&layout).unwrap_err());
    assert!(error.contains("Layer 2 of 2") && error.contains("digest"), "{error}");
    assert_eq!(place.leftovers(), Vec::<PathBuf>::new());
    place.file(&blob, &plain[1][..700]);
    let error = chain(&place.open(&layout).unwrap_err());
    assert!(error.contains("Layer 2 of 2") && error.contains("digest"), "{error}");
    place.file(&blob, &plain[1]);
    place.file(&format!("layout/blobs/sha256/{}", Digest::of(&config).hex()), b"{}");
    let error = chain(&place.open(&layout).unwrap_err());
    assert!(error.contains("damaged"), "{error}");
    assert_eq!(place.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_configuration_cannot_claim_the_layers_of_another_image() {
    let place = Place::new();
    let honest = layers();
    let evil = vec![Tar::default().file("evil", b"").bytes(), honest[1].clone()];
    let layout = place.layout("layout", &config(&honest), &evil);
    let error = chain(&place.open(&layout).unwrap_err());
    assert!(error.contains("diff id"), "{error}");
    let few = place.layout("few", &config(&honest[..1]), &honest);
    assert!(matches!(place.open(&few), Err(StoreError::Layers { described: 1, actual: 2, .. })));
    assert_eq!(place.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn a_layer_that_leaves_the_root_is_an_error_that_names_layer_and_entry() {
    let place = Place::new();
    let bad = vec![layers().remove(0), Tar::default().file("../../evil", b"x").bytes()];
    let layout = place.layout("layout", &config(&bad), &bad);
    let error = chain(&place.open(&layout).unwrap_err());
    assert!(error.contains("Layer 2 of 2") && error.contains("../../evil"), "{error}");
    assert_eq!(place.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn files_that_are_no_images_are_told_apart() {
    let place = Place::new();
    let dangling = Tar::default().file("manifest.json", br#"[{"Config":"../../no","Layers":[]}]"#).bytes();
    let cases = [
        (place.file("garbage", &[0xa5; 4000]), "no readable tar"),
        (place.file("empty", b""), "no image"),
        (place.file("root.tar", &Tar::default().file("etc/passwd", b"").bytes()), "root file system"),
        (place.file("cut.gz", &gzip(&[1; 4000])[..20]), "cannot be read"),
        (place.file("list.tar", &Tar::default().file("manifest.json", b"nonsense").bytes()), "manifest"),
        (place.file("miss.tar", &dangling), "lacks its part"),
    ];
    for (path, expected) in cases {
        let error = chain(&place.open(&path).unwrap_err());
        assert!(error.contains(expected), "{path}: {error}");
    }
    let missing = Source::parse("./no/such/image.tar").unwrap_err();
    assert!(matches!(missing, ReferenceError::Missing { .. }));
}

#[test]
fn of_several_images_one_must_be_chosen() {
    let place = Place::new();
    let plain = layers();
    let config = config(&plain[..1]);
    let name = format!("{}.json", Digest::of(&config).hex());
    let entry = |tag: &str| serde_json::json!({"Config": name, "RepoTags": [tag], "Layers": ["l"]});
    let list = serde_json::json!([entry("a:1"), entry("b:2")]).to_string();
    let tar = Tar::default().file(&name, &config).file("l", &plain[0]).file("manifest.json", list.as_bytes());
    let path = place.file("two.tar", &tar.bytes());
    let error = chain(&place.open(&path).unwrap_err());
    assert!(error.contains("'a:1'") && error.contains("'b:2'"), "{error}");
    assert_eq!(place.open(&format!("docker-archive:{path}:b:2")).unwrap().name, "b:2");
    assert!(place.open(&format!("docker-archive:{path}:c")).is_err());
}

#[test]
fn links_between_layers_of_old_archives_are_followed() {
    let place = Place::new();
    let plain = vec![layers().remove(0); 2];
    let config = config(&plain);
    let name = format!("{}.json", Digest::of(&config).hex());
    let list = serde_json::json!([{"Config": name, "Layers": ["a/layer.tar", "b/layer.tar"]}]).to_string();
    let tar = Tar::default()
        .file(&name, &config)
        .file("a/layer.tar", &plain[0])
        .symlink("b/layer.tar", "../a/layer.tar")
        .file("manifest.json", list.as_bytes());
    place.open(&place.file("old.tar", &tar.bytes())).unwrap();
}

#[test]
fn a_root_directory_becomes_an_image_and_again_when_it_changes() {
    let place = Place::new();
    place.file("root/bin/sh", &[b'#'; 5000]);
    place.file("root/etc/name", b"one");
    fs::hard_link(place.path("root/bin/sh"), place.path("root/bin/ash")).unwrap();
    std::os::unix::fs::symlink("/etc/name", place.path("root/link")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(place.path("root/socket")).unwrap();
    let root = place.path("root").to_str().unwrap().to_owned();
    let first = place.open(&root).unwrap();
    assert_eq!(place.open(&format!("dir:{root}")).unwrap().key, first.key);
    let names = listing(&first);
    for name in ["bin", "etc", "link"] {
        assert!(names.iter().any(|n| n == name), "{name}: {names:?}");
    }
    assert!(!names.iter().any(|n| n == "socket"));
    place.file("root/etc/name", b"two");
    let second = place.open(&root).unwrap();
    assert_ne!(second.key, first.key);
    assert!(first.root.exists());
    // The store itself, inside the directory, does not become part of the image.
    let inside = Store::new(&place.path("root/cache")).unwrap();
    let source = Source::parse(&root).unwrap();
    let image = inside.open(&source, &OpenOptions::default(), &mut Silent).unwrap();
    assert_eq!(inside.open(&source, &OpenOptions::default(), &mut Silent).unwrap().key, image.key);
}

#[test]
fn damaged_entries_of_the_cache_are_made_again() {
    let place = Place::new();
    let plain = layers();
    let layout = place.layout("layout", &config(&plain), &plain);
    let image = place.open(&layout).unwrap();
    for damage in ["cut image", "cut record", "no image"] {
        match damage {
            "cut image" => File::options().write(true).open(&image.root).unwrap().set_len(100).unwrap(),
            "cut record" => fs::write(image.root.with_extension("json"), "{\"name\"").unwrap(),
            _ => fs::remove_file(&image.root).unwrap(),
        }
        assert!(place.store().list().unwrap().is_empty(), "{damage}");
        let again = place.open(&layout).unwrap();
        assert_eq!((again.key, again.bytes), (image.key.clone(), image.bytes), "{damage}");
    }
}

#[test]
fn many_users_at_once_make_one_image() {
    let place = Place::new();
    let plain = layers();
    let layout = place.layout("layout", &config(&plain), &plain);
    let made = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut watch = |event: Event<'_>| {
                    if let Event::Ready { cached: false, .. } = event {
                        made.fetch_add(1, Ordering::Relaxed);
                    }
                };
                let source = Source::parse(&layout).unwrap();
                place.store().open(&source, &OpenOptions::default(), &mut watch).unwrap();
            });
        }
    });
    assert_eq!(made.load(Ordering::Relaxed), 1);
    let image = place.store().list().unwrap().remove(0);
    let held = place.store().disk.lock(&"0".repeat(64), Duration::ZERO, || {}).unwrap();
    assert!(held.is_some());
    assert!(image.root.metadata().unwrap().size() > 0);
}

#[test]
fn an_image_that_somebody_else_makes_for_too_long_is_an_error() {
    let place = Place::new();
    let plain = layers();
    let config = config(&plain);
    let layout = place.layout("layout", &config, &plain);
    let _held = place.store().disk.lock(Digest::of(&config).hex(), Duration::ZERO, || {}).unwrap();
    let options = OpenOptions { wait: Duration::from_millis(50), ..OpenOptions::default() };
    assert!(matches!(place.open_with(&layout, &options), Err(StoreError::Busy { .. })));
}

#[test]
fn an_image_for_another_processor_is_refused_by_name() {
    let place = Place::new();
    let foreign = br#"{"architecture":"s390x","os":"linux","rootfs":{"diff_ids":[]}}"#;
    let layout = place.layout("layout", foreign, &[]);
    let error = chain(&place.open(&layout).unwrap_err());
    assert!(error.contains("s390x") && error.contains(crate::config::host_architecture()), "{error}");
}

/// Runs in a process of its own, below.
#[test]
fn full_disk_child() {
    let Some(dir) = std::env::var_os("NACELLE_TEST_FULL_DISK") else {
        return;
    };
    let dir = PathBuf::from(dir);
    let source = Source::parse(dir.join("layout").to_str().unwrap()).unwrap();
    let store = Store::new(&dir.join("store")).unwrap();
    let error = store.open(&source, &OpenOptions::default(), &mut Silent).unwrap_err();
    println!("ERROR {}", chain(&error));
    for name in ["tmp", "images", "refs", "blobs/sha256"] {
        let left = fs::read_dir(dir.join("store").join(name)).unwrap().count();
        assert_eq!(left, 0, "{name}");
    }
    // A writable layer on a disk with no room for its sixty kilobytes.
    let mut filler = File::create(dir.join("store/filler")).unwrap();
    while io::Write::write_all(&mut filler, &[1; 4096]).is_ok() {}
    let layer = dir.join("store/layer");
    let error = crate::writable::create(&layer, 16 << 20).unwrap_err();
    println!("LAYER {}", chain(&error));
    assert!(!layer.exists());
    println!("CLEAN");
}

#[test]
fn a_full_disk_is_one_clear_error_and_leaves_nothing() {
    let place = Place::new();
    let noise: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let big = vec![Tar::default().file("big", &noise).bytes()];
    place.layout("layout", &config(&big), &big);
    place.store();
    let me = std::env::current_exe().unwrap();
    let run = |command: &mut Command| {
        let command = command.env("NACELLE_TEST_FULL_DISK", place.dir.path());
        let out = command.arg(&me).output().unwrap();
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
    };
    let child = r#"exec "$0" --exact store::tests::full_disk_child --nocapture"#;
    // A real full disk needs a mount; without the right to make one, a file size limit gives
    // an error in the same places.
    let store = place.path("store");
    let mount = format!("mount -t tmpfs -o size=1m full '{}'; {child}", store.display());
    let limit = format!("trap '' XFSZ; ulimit -f 500; {child}");
    let may_mount = Command::new("unshare").args(["-m", "true"]).status();
    let said = if may_mount.is_ok_and(|status| status.success()) {
        run(Command::new("unshare").args(["-m", "sh", "-ec", &mount]))
    } else {
        run(Command::new("sh").args(["-c", &limit]))
    };
    for expected in ["ERROR", "cannot be written", "LAYER", "CLEAN"] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    assert!(said.contains("No space left") || said.contains("File too large"), "{said}");
}
