//! Layers that try to get out, to steer overlayfs, or to make the unpacker fall over.

use std::fs;

use podvisor_unpack::UnpackErrorKind;

use crate::scratch::Scratch;
use crate::tarball::{Item, device, directory, file, hard_link, item, long, number, pax, symlink, tar};

/// Each is refused, and nothing outside changes.
#[test]
fn refused() {
    let scratch = Scratch::new();
    let out = scratch.outside().display().to_string();
    drop(scratch);
    let long_component = "x".repeat(256);
    let many_links: Vec<Item> =
        (0..50).map(|index| symlink(format!("l{index}"), format!("l{}", index + 1))).collect();
    let acl = pax(&[("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0nonsense")]);
    let default_acl = pax(&[(
        "SCHILY.xattr.system.posix_acl_default",
        b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x04\0\x07\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff",
    )]);
    let capability = pax(&[("SCHILY.xattr.security.capability", b"nonsense")]);
    let pair = |offset, length| [number(offset, 12), number(length, 12)].concat();
    let old_sparse = |map: Vec<u8>, real_size| {
        item(b'S', "s").gnu().patch(386, map).patch(483, number(real_size, 12)).content([1; 512])
    };
    let new_sparse = |map: &[u8]| {
        let records: [(&str, &[u8]); 4] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"s"),
            ("GNU.sparse.realsize", b"4096"),
        ];
        let mut content = map.to_vec();
        content.resize(content.len().next_multiple_of(512), 0);
        vec![pax(&records), file("s", content)]
    };
    let mapped = |map: &[u8], size: &[u8]| {
        vec![pax(&[("GNU.sparse.map", map), ("GNU.sparse.size", size)]), file("s", [1; 512])]
    };
    let cases: Vec<(&str, Vec<Item>)> = vec![
        ("dot-dot", vec![file("../pwned", "x")]),
        ("dot-dot within", vec![file("a/../../outside/canary", "x")]),
        ("dot-dot at the end", vec![directory("a/..")]),
        ("dot-dot in pax", vec![pax(&[("path", b"../outside/canary")]), file("x", "x")]),
        ("dot-dot in a long name", vec![long(b'L', "../outside/canary"), file("x", "x").gnu()]),
        ("dot-dot in the prefix", vec![file("canary", "x").patch(345, "../outside")]),
        (
            "dot-dot in a sparse name",
            vec![
                pax(&[("GNU.sparse.name", b"../x"), ("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"1")]),
                file("x", "x"),
            ],
        ),
        ("nul in pax", vec![pax(&[("path", b"a\0b")]), file("x", "x")]),
        ("empty name", vec![file("", "x")]),
        ("file as root", vec![file("./", "x")]),
        ("symlink as root", vec![symlink("/", &out)]),
        ("whiteout of nothing", vec![file(".wh.", "")]),
        ("whiteout of dot", vec![file("a/.wh..", "")]),
        ("whiteout of dot-dot", vec![file("a/.wh...", "")]),
        ("below a whiteout name", vec![file(".wh.a/b", "")]),
        ("opaque below a whiteout name", vec![file(".wh.a/.wh..wh..opq", "")]),
        ("hard link out", vec![hard_link("h", "../outside/canary")]),
        ("hard link out, absolute", vec![hard_link("h", format!("{out}/canary"))]),
        ("hard link out through a link", vec![symlink("l", &out), hard_link("h", "l/canary")]),
        ("hard link to a directory", vec![directory("d"), hard_link("h", "d")]),
        ("hard link to the root", vec![hard_link("h", "/")]),
        ("hard link to nothing", vec![hard_link("h", "")]),
        ("hard link over what holds its target", vec![file("d/f", ""), hard_link("d", "d/f")]),
        ("hard link to a missing file", vec![hard_link("h", "missing")]),
        ("link loop as parent", vec![symlink("a", "b"), symlink("b", "a"), file("a/x", "")]),
        ("too many links as parent", [many_links, vec![file("l0/x", "")]].concat()),
        ("file as parent", vec![file("f", ""), file("f/x", "")]),
        ("device as parent", vec![device(b'3', "c", 1, 3), file("c/x", "")]),
        ("long component", vec![pax(&[("path", long_component.as_bytes())]), file("x", "")]),
        (
            "long component as parent",
            vec![pax(&[("path", format!("{long_component}/y").as_bytes())]), file("x", "")],
        ),
        ("name beyond PATH_MAX", vec![pax(&[("path", "a/".repeat(2049).as_bytes())]), file("x", "")]),
        ("long name beyond PATH_MAX", vec![long(b'L', "a/".repeat(3000)), file("x", "").gnu()]),
        ("link beyond PATH_MAX", vec![pax(&[("linkpath", "a/".repeat(2048).as_bytes())]), symlink("x", "")]),
        ("huge long name", vec![long(b'L', "").size(1 << 40)]),
        ("huge pax header", vec![pax(&[]).size(1 << 40)]),
        ("empty symlink", vec![symlink("l", "")]),
        ("nul in symlink", vec![pax(&[("linkpath", b"a\0b")]), symlink("l", "x")]),
        ("size beyond the stream", vec![file("f", "x").size(1 << 20)]),
        ("size beyond the limit", vec![file("f", "x").size(1 << 60)]),
        ("size of all bits", vec![file("f", "x").patch(124, [0xff; 12])]),
        (
            "negative size",
            vec![file("f", "x").patch(124, [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0])],
        ),
        ("size beyond 64 bits", vec![file("f", "x").patch(124, [0x80, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])]),
        ("size in pax beyond 64 bits", vec![pax(&[("size", b"18446744073709551616")]), file("f", "x")]),
        ("negative size in pax", vec![pax(&[("size", b"-1")]), file("f", "x")]),
        ("size that wraps the padding", vec![pax(&[("size", b"9223372036854775807")]), file("f", "x")]),
        ("letters in a number", vec![file("f", "x").patch(100, "00x0644")]),
        ("owner of no one", vec![file("f", "x").owner(0xffff_ffff, 0)]),
        ("owner beyond 32 bits", vec![pax(&[("gid", b"4294967296")]), file("f", "x")]),
        ("negative owner", vec![pax(&[("uid", b"-2")]), file("f", "x")]),
        ("device number too large", vec![device(b'3', "c", 0x1000, 0)]),
        ("multi-volume", vec![item(b'M', "f")]),
        ("volume label", vec![item(b'V', "f")]),
        (
            "bad checksum",
            vec![file("f", "x"), Item { patches: vec![(148, b"7777777".to_vec())], ..file("g", "") }],
        ),
        ("pax without an entry", vec![pax(&[("path", b"x")])]),
        ("long name without an entry", vec![long(b'L', "x")]),
        ("malformed pax", vec![item(b'x', "p").content("999 path=x\n"), file("f", "")]),
        ("malformed global pax", vec![item(b'g', "p").content("3 x"), file("f", "")]),
        ("bad ACL", vec![acl, file("f", "")]),
        ("default ACL on a file", vec![default_acl, file("f", "")]),
        ("bad capability", vec![capability, file("f", "")]),
        (
            "attribute with a huge value",
            vec![pax(&[("SCHILY.xattr.user.x", &vec![b'x'; 65537])]), file("f", "")],
        ),
        (
            "attribute with a long name",
            vec![pax(&[(&format!("SCHILY.xattr.user.{long_component}"), b"x")]), file("f", "")],
        ),
        (
            "attribute larger than an inode has room for",
            vec![
                pax(&[
                    ("SCHILY.xattr.user.x", &vec![b'x'; 65536]),
                    ("SCHILY.xattr.user.y", &vec![b'x'; 65537]),
                ]),
                file("f", ""),
            ],
        ),
        ("sparse map out of order", vec![old_sparse([pair(512, 256), pair(0, 256)].concat(), 4096)]),
        ("sparse map overlapping", vec![old_sparse([pair(0, 256), pair(255, 256)].concat(), 4096)]),
        ("sparse map beyond the file", vec![old_sparse(pair(0, 512), 100)]),
        ("sparse map longer than the data", vec![old_sparse(pair(0, 1024), 4096)]),
        ("sparse map shorter than the data", vec![old_sparse(pair(0, 100), 4096)]),
        ("sparse map that wraps", vec![old_sparse([pair(1 << 62, 256), pair(1 << 63, 256)].concat(), 4096)]),
        ("sparse file beyond the limit", vec![old_sparse(pair(0, 512), 1 << 50)]),
        (
            "sparse sizes that add up past 64 bits",
            mapped(b"0,9223372036854775807,9223372036854775807,9223372036854775807", b"9223372036854775807"),
        ),
        ("sparse map with an odd count", mapped(b"0,512,600", b"4096")),
        ("sparse map with letters", mapped(b"0,x", b"4096")),
        ("sparse map without a size", vec![pax(&[("GNU.sparse.map", b"0,512")]), file("s", [1; 512])]),
        ("sparse length without an offset", vec![pax(&[("GNU.sparse.numbytes", b"5")]), file("s", "x")]),
        (
            "sparse offset without a length",
            vec![pax(&[("GNU.sparse.offset", b"5"), ("GNU.sparse.size", b"9")]), file("s", "x")],
        ),
        ("sparse version of tomorrow", vec![pax(&[("GNU.sparse.major", b"2")]), file("s", "x")]),
        ("leading map with a huge count", new_sparse(b"99999999999\n0\n1\n")),
        ("leading map that never ends", new_sparse(b"3\n0\n1\n")),
        ("leading map with a long number", new_sparse(&[b'1'; 512])),
        ("leading map not matching", new_sparse(b"1\n0\n700\n")),
    ];
    for (what, items) in cases {
        let scratch = Scratch::new();
        let error = scratch.unpack(&tar(&items)).expect_err(what);
        assert_eq!(error.kind(), UnpackErrorKind::Corrupt, "{what}: {error:?}");
        scratch.assert_canary(what);
    }
}

/// Each is unpacked, inside.
#[test]
fn contained() {
    type Case<'a> = (&'a str, Vec<Item>, String);
    let scratch = Scratch::new();
    let out = scratch.outside().display().to_string();
    let cases: [Case<'_>; 13] = [
        ("absolute name", vec![file(format!("{out}/canary"), "x")], format!("{}/canary", &out[1..])),
        (
            "symlink to outside, file over it",
            vec![symlink("c", format!("{out}/canary")), file("c", "x")],
            "c".into(),
        ),
        (
            "relative symlink as parent",
            vec![symlink("l", "../outside"), file("l/canary", "x")],
            "outside/canary".into(),
        ),
        (
            "absolute symlink as parent",
            vec![symlink("m", &out), file("m/canary", "x")],
            format!("{}/canary", &out[1..]),
        ),
        (
            "symlink as parent of a directory's metadata",
            vec![symlink("n", "../outside"), directory("n/sub").mode(0o777)],
            "outside/sub".into(),
        ),
        (
            "directory replaced by a symlink before its metadata is applied",
            vec![
                directory("o").mode(0o777),
                Item { flag: b'2', link: out.clone().into(), ..item(b'2', "o") },
            ],
            "o".into(),
        ),
        (
            "directory's parent replaced by a symlink before its metadata is applied",
            vec![directory("q/sub").mode(0o777).owner(9, 9), symlink("q", "../outside")],
            "q".into(),
        ),
        (
            "symlink chain",
            vec![symlink("a", "b"), symlink("b", "../.."), file("a/etc-passwd", "x")],
            "etc-passwd".into(),
        ),
        (
            "hard link to a symlink, then through it",
            vec![symlink("s", "../outside/canary"), hard_link("t", "s"), file("t", "x")],
            "t".into(),
        ),
        (
            "whiteout through a symlink",
            vec![symlink("w", "../outside"), file("w/.wh.gone", ""), file("w/.wh..wh..opq", "")],
            "outside/gone".into(),
        ),
        (
            "remembered parent replaced by a symlink",
            vec![file("d/1", ""), symlink("d", "../outside"), file("d/canary", "x")],
            "outside/canary".into(),
        ),
        (
            "a process's root",
            vec![symlink("r", "/proc/self/root"), file("r/tmp-pwned", "x")],
            "proc/self/root/tmp-pwned".into(),
        ),
        ("device opened never", vec![device(b'3', "tty", 5, 0), file("tty", "x")], "tty".into()),
    ];
    for (what, items, made) in cases {
        let scratch_of_case = Scratch::new();
        scratch_of_case.unpack(&tar(&items)).unwrap_or_else(|error| panic!("{what}: {error:?}"));
        assert!(fs::symlink_metadata(scratch_of_case.path(&made)).is_ok(), "{what}: {made} is missing");
        scratch_of_case.assert_canary(what);
        scratch.assert_canary(what);
    }
}

#[test]
fn a_tree_as_deep_as_names_allow_and_then_deeper_through_links() {
    let scratch = Scratch::new();
    let deep = "a/".repeat(1000);
    let mut items = vec![directory("x")];
    for round in 0..5 {
        // Each link leads as deep as one name can, seen from the one before.
        let name = if round == 0 { deep.clone() } else { format!("l{}/{deep}", round - 1) };
        items.extend([pax(&[("path", name.as_bytes())]), directory("x")]);
        items.extend([pax(&[("linkpath", name.as_bytes())]), symlink(format!("l{round}"), "x")]);
    }
    let limits = podvisor_unpack::Limits { bytes: 1 << 20, entries: 100_000 };
    scratch.unpack_with(&tar(&items), podvisor_unpack::Compression::None, limits).expect("unpack");
    scratch.assert_canary("deep");
}
