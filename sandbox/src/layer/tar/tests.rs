use super::*;
use crate::testing::{Item, Tar};

fn read(bytes: &[u8]) -> Result<(Entry, Vec<u8>), LayerError> {
    let mut reader = Reader::new(bytes);
    let entry = reader.next_entry()?.expect("an entry");
    // Lossless: small files.
    let mut content = vec![0; entry.size as usize];
    for &(offset, length) in &entry.segments {
        reader.read_content(&mut content[offset as usize..(offset + length) as usize])?;
    }
    assert!(reader.next_entry()?.is_none());
    Ok((entry, content))
}

#[test]
fn numbers_are_octal_or_base_256() {
    assert_eq!(number(b"0000644\0"), Some(0o644));
    assert_eq!(number(b"   644 \0"), Some(0o644));
    assert_eq!(number(b"\0\0\0\0"), Some(0));
    assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 0]), Some(256));
    assert_eq!(number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe]), Some(-2));
    assert_eq!(number(&[0xbf; 12]), None);
    for bad in [&b"9"[..], b"-1", b"0x1", b"1 1"] {
        assert_eq!(number(bad), None);
    }
}

#[test]
fn times_have_fractions_and_may_lie_before_1970() {
    assert_eq!(pax_time("12"), Some((12, 0)));
    assert_eq!(pax_time("12.5"), Some((12, 500_000_000)));
    assert_eq!(pax_time("12.1234567899"), Some((12, 123_456_789)));
    assert_eq!(pax_time("-1.25"), Some((-2, 750_000_000)));
    assert_eq!(pax_time("-0.25"), Some((-1, 750_000_000)));
    assert_eq!(pax_time("x"), None);
    assert_eq!(pax_time("1.x"), None);
}

#[test]
fn long_and_odd_names_come_through() {
    let long = [b"dir/".repeat(60), b"\xff\xfe name".to_vec()].concat();
    let target = b"t/".repeat(100);
    let item = Item { kind: b'2', link: &target, ..Item::default() };
    let (entry, _) = read(&Tar::default().item(&long, &item).bytes()).unwrap();
    assert_eq!((entry.path, entry.link), (long, target));
    let pax: &[(&str, &[u8])] = &[("path", b"from\xffpax"), ("linkpath", b"to")];
    let item = Item { kind: b'2', pax, ..Item::default() };
    let (entry, _) = read(&Tar::default().item(b"short", &item).bytes()).unwrap();
    assert_eq!((&entry.path[..], &entry.link[..]), (&b"from\xffpax"[..], &b"to"[..]));
}

#[test]
fn an_archive_may_end_without_its_zero_blocks_and_links_have_no_content() {
    let tar = Tar::default().file("a", b"1").unfinished();
    assert_eq!(read(&tar).unwrap().1, b"1");
    // The size of a hard link's header is not followed by bytes.
    let item = Item { kind: b'1', link: b"a", size: Some(5), ..Item::default() };
    let (entry, content) = read(&Tar::default().item(b"b", &item).bytes()).unwrap();
    assert_eq!((entry.kind, content.len()), (Kind::HardLink, 0));
}

#[test]
fn sparse_files_of_pax_1_0_are_expanded() {
    let mut map = b"2\n0\n3\n4096\n2\n".to_vec();
    map.resize(512, 0);
    let data = [&map[..], b"abcde"].concat();
    let pax: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"real"),
        ("GNU.sparse.realsize", b"5000"),
    ];
    let item = Item { pax, data: &data, ..Item::default() };
    let (entry, content) = read(&Tar::default().item(b"GNUSparseFile.0/real", &item).bytes()).unwrap();
    assert_eq!((&entry.path[..], entry.size), (&b"real"[..], 5000));
    let mut wanted = vec![0; 5000];
    wanted[..3].copy_from_slice(b"abc");
    wanted[4096..4098].copy_from_slice(b"de");
    assert_eq!(content, wanted);
}

#[test]
fn sparse_files_of_gnu_and_pax_0_1_are_expanded() {
    let pax: &[(&str, &[u8])] = &[("GNU.sparse.map", b"1,2,6,1"), ("GNU.sparse.size", b"8")];
    let item = Item { pax, data: b"abc", ..Item::default() };
    assert_eq!(read(&Tar::default().item(b"s", &item).bytes()).unwrap().1, b"\0ab\0\0\0c\0");

    let item = Item { kind: b'S', data: b"abc", ..Item::default() };
    let mut tar = Tar::default().item(b"s", &item).bytes();
    for (at, value) in [(386, 1), (398, 2), (410, 6), (422, 1), (483, 8)] {
        tar[at..at + 12].copy_from_slice(format!("{value:011o}\0").as_bytes());
    }
    let sum = checksums(tar[..512].try_into().unwrap()).0;
    tar[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(read(&tar).unwrap().1, b"\0ab\0\0\0c\0");
}

#[test]
fn sparse_maps_that_do_not_fit_are_refused() {
    for map in ["0,9", "0,2", "0,3,2,0", "4,3,0,0", "0,3,9,0", "0", "x,y", "18446744073709551615,3", "6,3"] {
        let pax: &[(&str, &[u8])] = &[("GNU.sparse.map", map.as_bytes()), ("GNU.sparse.size", b"8")];
        let item = Item { pax, data: b"abc", ..Item::default() };
        let result = read(&Tar::default().item(b"s", &item).bytes());
        assert!(matches!(result, Err(LayerError::Malformed { .. })), "{map}");
    }
    let pax: &[(&str, &[u8])] =
        &[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"5")];
    for data in [&b"9999999\n"[..], &[b'1'; 4096], &[b'\n'; 512]] {
        let item = Item { pax, data, ..Item::default() };
        assert!(read(&Tar::default().item(b"s", &item).bytes()).is_err());
    }
}

#[test]
fn broken_headers_and_records_are_refused() {
    let records: [&[u8]; 5] = [b"5 a=b\n", b"99 a=b\n", b"a=b\n", b"6 abcd", b"3 \n"];
    for body in records {
        let item = Item { kind: b'x', data: body, ..Item::default() };
        let tar = Tar::default().item(b"p", &item).file("a", b"").bytes();
        assert!(matches!(read(&tar), Err(LayerError::Malformed { .. })), "{body:?}");
    }
    let pax: &[(&str, &[u8])] = &[("uid", b"4294967296")];
    let tar = Tar::default().item(b"a", &Item { pax, ..Item::default() }).bytes();
    assert!(matches!(read(&tar), Err(LayerError::Malformed { .. })));
    let mut tar = Tar::default().file("a", b"").bytes();
    tar[0] ^= 1;
    assert!(matches!(read(&tar), Err(LayerError::Malformed { .. })));
}

#[test]
fn no_bytes_make_the_reader_panic_or_loop() {
    let good = Tar::default()
        .item(
            b"a",
            &Item {
                data: b"data",
                pax: &[("mtime", b"1.5"), ("SCHILY.xattr.user.a", b"b")],
                ..Item::default()
            },
        )
        .item(&b"long/".repeat(40), &Item { kind: b'S', data: b"abc", ..Item::default() })
        .bytes();
    // A fixed sequence of changes; the generator is that of Numerical Recipes.
    let mut state = 1u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize
    };
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..1 + random() % 4 {
            let at = random() % bytes.len();
            bytes[at] = random() as u8;
        }
        // Most changes break the checksum; repair the headers so that the fields are reached.
        for block in bytes.chunks_exact_mut(512) {
            if &block[257..262] == b"ustar" {
                let sum = checksums((&*block).try_into().unwrap()).0;
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        let mut reader = Reader::new(&bytes[..]);
        while let Ok(Some(_)) = reader.next_entry() {}
    }
}
