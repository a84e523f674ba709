use super::*;
use crate::testing::{Item, Tar, gzip, scratch};
use crate::tree::Node;

/// Applies layers and gives the tree and the image file.
fn apply_with(layers: &[Vec<u8>], limits: &Limits) -> Result<(Tree, std::fs::File), LayerError> {
    let file = scratch();
    let mut contents = Contents::new(file.try_clone().unwrap());
    let mut applier = Applier::new(&mut contents, limits);
    for layer in layers {
        applier.apply(&layer[..], None, &Digest::of(layer))?;
    }
    Ok((applier.into_tree(), file))
}

fn apply(layers: &[Vec<u8>]) -> Result<Tree, LayerError> {
    apply_with(layers, &Limits::default()).map(|(tree, _)| tree)
}

fn failure(layer: Vec<u8>) -> String {
    apply(&[layer]).expect_err("a bad layer was applied").to_string()
}

fn text(node: &Node) -> Option<&[u8]> {
    match &node.body {
        Body::File(Content::Inline(bytes)) => Some(bytes),
        _ => None,
    }
}

#[test]
fn a_name_with_dots_is_an_error_that_names_the_entry() {
    for name in ["../evil", "a/../../evil", "a/../b", "..", "/../x", "./.."] {
        let error = failure(Tar::default().file(name, b"x").bytes());
        assert!(error.contains(name) && error.contains(".."), "{error}");
    }
    for kind in [b'1', b'2', b'3', b'5', b'6'] {
        let item = Item { kind, link: b"x", ..Item::default() };
        failure(Tar::default().item(b"../evil", &item).bytes());
    }
    failure(Tar::default().file("../.wh.evil", b"").bytes());
}

#[test]
fn an_absolute_name_is_one_inside_the_image() {
    let tree = apply(&[Tar::default().file("/etc/passwd", b"in").file("//x///y", b"z").bytes()]).unwrap();
    assert_eq!(text(tree.at("etc/passwd").unwrap()), Some(&b"in"[..]));
    assert_eq!(text(tree.at("x/y").unwrap()), Some(&b"z"[..]));
}

#[test]
fn a_hard_link_out_of_the_root_is_an_error_that_names_both_ends() {
    for target in ["../../etc/shadow", "a/../../x", "/etc/shadow", "missing", "dir", "/", ""] {
        let layer = Tar::default().dir("dir").hard_link("evil", target).bytes();
        let error = failure(layer);
        assert!(error.contains("'evil'") && error.contains(&format!("'{target}'")), "{error}");
    }
}

#[test]
fn a_file_through_a_link_to_the_hosts_root_lands_in_the_image() {
    let layer = Tar::default()
        .symlink("out", "/")
        .symlink("up", "../../../../../..")
        .file("out/tmp/a", b"1")
        .file("up/tmp/b", b"2")
        .hard_link("c", "up/tmp/a")
        .bytes();
    let tree = apply(&[layer]).unwrap();
    for (path, bytes) in [("tmp/a", b"1"), ("tmp/b", b"2"), ("c", b"1")] {
        assert_eq!(text(tree.at(path).unwrap()), Some(&bytes[..]), "{path}");
    }
    assert!(!std::path::Path::new("/tmp/a").exists() || std::fs::read("/tmp/a").unwrap() != b"1");
}

#[test]
fn a_link_planted_by_one_layer_does_not_lead_the_next_one_out() {
    let first = Tar::default().symlink("dir", "/etc").bytes();
    let second = Tar::default().file("dir/cron.d/evil", b"x").file("dir/.wh.passwd", b"").bytes();
    let tree = apply(&[first, second]).unwrap();
    assert!(tree.at("etc/cron.d/evil").is_some());
}

#[test]
fn links_that_run_in_a_ring_and_files_as_parents_are_errors() {
    let ring = Tar::default().symlink("a", "b").symlink("b", "a").file("a/x", b"").bytes();
    assert!(failure(ring).contains("40 symbolic links"));
    let file = Tar::default().file("f", b"").file("f/x", b"").bytes();
    assert!(failure(file).contains("no directory"));
}

#[test]
fn whiteouts_hide_lower_files_only() {
    let low = Tar::default().file("a", b"").file("d/x", b"").file("d/y", b"").file("o/old", b"").bytes();
    let up = Tar::default()
        .file("d/new", b"")
        .file(".wh.a", b"")
        .file("d/.wh.x", b"")
        .file("d/.wh.new", b"")
        .file("o/before", b"")
        .file("o/.wh..wh..opq", b"")
        .file("o/after", b"")
        .file(".wh.missing", b"")
        .file("no/such/.wh.dir", b"")
        .file("none/.wh..wh..opq", b"")
        .file(".wh..wh.plnk/1.2", b"")
        .file(".wh..wh.orph", b"")
        .bytes();
    let tree = apply(&[low, up]).unwrap();
    for there in ["d/y", "d/new", "o/before", "o/after"] {
        assert!(tree.at(there).is_some(), "{there}");
    }
    for hidden in ["a", "d/x", "o/old", "no", "none", ".wh.a", ".wh..wh.plnk", ".wh..wh.orph"] {
        assert!(tree.at(hidden).is_none(), "{hidden}");
    }
}

#[test]
fn a_whiteout_of_no_name_is_an_error() {
    for name in [".wh.", ".wh..", ".wh...", "d/.wh..."] {
        let error = failure(Tar::default().dir("d").file(name, b"").bytes());
        assert!(error.contains("whiteout"), "{error}");
    }
}

#[test]
fn files_directories_and_links_replace_each_other() {
    let low = Tar::default().file("a", b"f").file("b/x", b"").symlink("c", "b").file("e/keep", b"").bytes();
    let item = Item { kind: b'5', mode: 0o1777, ..Item::default() };
    let up = Tar::default().dir("a").file("a/in", b"").file("b", b"f").dir("c").item(b"e/", &item).bytes();
    let tree = apply(&[low, up]).unwrap();
    assert!(tree.at("a/in").is_some());
    assert_eq!(text(tree.at("b").unwrap()), Some(&b"f"[..]));
    assert!(matches!(tree.at("c").unwrap().body, Body::Directory(_)));
    assert!(tree.at("e/keep").is_some());
    assert_eq!(tree.at("e").unwrap().meta.mode, 0o1777);
}

#[test]
fn hard_links_reach_into_lower_layers_and_count() {
    let low = Tar::default().file("a", b"data").symlink("s", "a").bytes();
    let up = Tar::default()
        .hard_link("b", "a")
        .hard_link("c/d", "/./b")
        .hard_link("t", "s")
        .hard_link("b", "b")
        .bytes();
    let tree = apply(&[low, up]).unwrap();
    assert_eq!(tree.at("a").unwrap().links, 3);
    assert_eq!(text(tree.at("c/d").unwrap()), Some(&b"data"[..]));
    assert!(matches!(tree.at("t").unwrap().body, Body::Symlink(_)));
}

#[test]
fn devices_owners_and_attributes_survive() {
    let capability = [1, 0, 0, 2, 0x0a, 0x0a, b'=', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let layer = Tar::default()
        .item(b"null", &Item { kind: b'3', device: (1, 3), mode: 0o666, ..Item::default() })
        .item(b"disk", &Item { kind: b'4', device: (259, 70000), ..Item::default() })
        .item(b"pipe", &Item { kind: b'6', ..Item::default() })
        .item(b"su", &Item { mode: 0o104_755, owner: (0, 42), data: b"#!", ..Item::default() })
        .item(
            b"x",
            &Item {
                owner: (1 << 31, 5),
                pax: &[
                    ("SCHILY.xattr.security.capability", &capability),
                    ("SCHILY.xattr.com.apple.quarantine", b"1"),
                    ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                    ("SCHILY.xattr.user.note", b"hi"),
                    ("uid", b"4000000000"),
                    ("mtime", b"1234567890.25"),
                    ("comment", b"a=b\nc"),
                ],
                ..Item::default()
            },
        )
        .bytes();
    let tree = apply(&[layer]).unwrap();
    assert_eq!(tree.at("null").unwrap().body, Body::Character(1, 3));
    assert_eq!(tree.at("disk").unwrap().body, Body::Block(259, 70000));
    assert_eq!(tree.at("pipe").unwrap().body, Body::Fifo);
    let su = &tree.at("su").unwrap().meta;
    assert_eq!((su.mode, su.uid, su.gid), (0o4755, 0, 42));
    let x = &tree.at("x").unwrap().meta;
    assert_eq!((x.uid, x.gid, x.mtime), (4_000_000_000, 5, (1_234_567_890, 250_000_000)));
    let names: Vec<&[u8]> = x.xattrs.keys().map(|k| &k[..]).collect();
    assert_eq!(names, [&b"security.capability"[..], b"user.note"]);
    assert_eq!(x.xattrs[&b"security.capability"[..]], capability);
}

#[test]
fn caps_are_reached_before_the_memory_is() {
    let limits = Limits { entries: 100_000, ..Limits::default() };
    let mut tar = Tar::default();
    for n in 0..=100_000 {
        tar = tar.file(&format!("d/{n}"), b"");
    }
    let error = apply_with(&[tar.bytes()], &limits).unwrap_err();
    assert!(matches!(error, LayerError::Limit { what: "entries", limit: 100_000 }), "{error}");

    let limits = Limits { metadata_bytes: 100_000, ..Limits::default() };
    let value = vec![b'x'; 60_000];
    let pax: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", &value)];
    let tar = Tar::default()
        .item(b"a", &Item { pax, ..Item::default() })
        .item(b"b", &Item { pax, ..Item::default() });
    assert!(matches!(apply_with(&[tar.bytes()], &limits), Err(LayerError::Limit { .. })));

    let deep = "d/".repeat(600) + "f";
    assert!(failure(Tar::default().file(&deep, b"").bytes()).contains("deeper"));
    assert!(failure(Tar::default().file(&"x".repeat(300), b"").bytes()).contains("255"));
    assert!(failure(Tar::default().file(&"x/".repeat(3000), b"").bytes()).contains("4096"));
    assert!(failure(Tar::default().symlink("s", &"x".repeat(4096)).bytes()).contains("4095"));
}

#[test]
fn huge_declared_sizes_cost_nothing() {
    for size in [1 << 20, 1 << 40, (1 << 60) - 1] {
        let item = Item { size: Some(size), data: b"short", ..Item::default() };
        let error = apply(&[Tar::default().item(b"f", &item).unfinished()]).unwrap_err();
        assert!(matches!(error, LayerError::Truncated { .. } | LayerError::Limit { .. }), "{size}: {error}");
    }
    let item = Item { kind: b'x', size: Some(1 << 40), ..Item::default() };
    assert!(failure(Tar::default().item(b"pax", &item).unfinished()).contains("1 MiB"));
}

#[test]
fn a_gzip_bomb_ends_at_the_limit() {
    let zeros = vec![0u8; 8 << 20];
    let bomb = gzip(&Tar::default().file("zeros", &zeros).bytes());
    assert!(bomb.len() < 1 << 17);
    let limits = Limits { unpacked_bytes: 1 << 20, ..Limits::default() };
    let error = apply_with(&[bomb], &limits).unwrap_err();
    assert!(matches!(error, LayerError::Limit { limit: 0x10_0000, .. }), "{error}");
    // Padding after the archive's end counts too.
    let padded = gzip(&[Tar::default().bytes(), zeros].concat());
    assert!(matches!(apply_with(&[padded], &limits), Err(LayerError::Limit { .. })));
}

#[test]
fn a_layer_with_another_digest_is_refused() {
    let layer = Tar::default().file("a", b"1").bytes();
    let other = Digest::of(b"other");
    let mut contents = Contents::new(scratch());
    let limits = Limits::default();
    let mut applier = Applier::new(&mut contents, &limits);
    let error = applier.apply(&layer[..], None, &other).unwrap_err();
    assert!(matches!(&error, LayerError::Digest { expected, .. } if *expected == other), "{error}");
    let zipped = gzip(&layer);
    let id = Digest::of(&layer);
    assert!(matches!(applier.apply(&zipped[..], Some(&other), &id), Err(LayerError::Digest { .. })));
    assert!(applier.apply(&zipped[..], Some(&Digest::of(&zipped)), &id).is_ok());
}

#[test]
fn garbage_and_cut_archives_are_errors() {
    assert!(failure(vec![0xa5; 5000]).contains("checksum"));
    assert!(failure(b"too short for a header".to_vec()).contains("ends in the middle"));
    let whole = Tar::default().file("a", &[b'x'; 5000]).bytes();
    for cut in [100, 513, 3000, 5600] {
        assert!(matches!(apply(&[whole[..cut].to_vec()]), Err(LayerError::Truncated { .. })), "{cut}");
    }
    let zipped = gzip(&whole);
    assert!(apply(&[zipped[..zipped.len() - 9].to_vec()]).is_err());
    let odd = Item { kind: b'Z', ..Item::default() };
    assert!(failure(Tar::default().item(b"odd", &odd).bytes()).contains("0x5a"));
}

#[test]
fn contents_that_an_upper_layer_replaced_are_given_back() {
    use std::os::unix::fs::MetadataExt;
    let big = vec![b'x'; 4 << 20];
    let low = Tar::default().file("a", &big).file("b", &big).bytes();
    let up = Tar::default().file(".wh.a", b"").file("b", b"small").bytes();
    let file = scratch();
    let mut contents = Contents::new(file.try_clone().unwrap());
    let limits = Limits::default();
    let mut applier = Applier::new(&mut contents, &limits);
    for layer in [low, up] {
        applier.apply(&layer[..], None, &Digest::of(&layer)).unwrap();
    }
    let tree = applier.into_tree();
    crate::erofs::write(contents, &tree, [0; 16]).unwrap();
    assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20);
}
