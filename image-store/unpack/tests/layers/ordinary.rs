//! What well-formed layers become.

use std::fs;
use std::io::{self, Cursor, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use podvisor_unpack::{Compression, Limits, UnpackErrorKind, unpack};
use sha2::{Digest, Sha256};

use crate::scratch::{LIMITS, Scratch, tmpfs, xattr};
use crate::tarball::{device, directory, file, hard_link, item, long, number, pax, symlink, tar};

fn sha256(bytes: &[u8]) -> String {
    let hex: Vec<String> = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{}", hex.concat())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("compress");
    encoder.finish().expect("compress")
}

fn zstandard(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).expect("compress")
}

#[test]
fn every_kind_of_inode_with_its_metadata() {
    let scratch = Scratch::new();
    let unpacked = scratch
        .unpack(&tar(&[
            directory("./").mode(0o711).mtime(5),
            directory("d/").mode(0o3770).owner(7, 8).mtime(1_234_567_890),
            file("d/f", "hello").mode(0o6755).owner(1000, 2_000_000_000),
            symlink("d/s", "/etc/passwd").owner(3, 4).mtime(77),
            hard_link("d/h", "d/f"),
            hard_link("d/hs", "./d/s"),
            item(b'6', "d/p").mode(0o622),
            device(b'3', "d/c", 1, 3).mode(0o666).owner(0, 5),
            device(b'4', "d/b", 259, 300_000).mode(0o660),
            item(0, "old/"),
            item(b'7', "contiguous").content("abc"),
            file("x/y/z", ""),
        ]))
        .expect("unpack");
    assert_eq!((unpacked.size, unpacked.inodes), (8, 11));
    let stat = |name: &str| fs::symlink_metadata(scratch.path(name)).expect(name);
    assert_eq!((stat("").mode() & 0o7777, stat("").mtime()), (0o711, 5));
    let parent = stat("d");
    assert_eq!(
        (parent.mode() & 0o7777, parent.uid(), parent.gid(), parent.mtime()),
        (0o3770, 7, 8, 1_234_567_890)
    );
    let f = stat("d/f");
    assert_eq!((f.mode() & 0o7777, f.uid(), f.gid(), f.nlink()), (0o6755, 1000, 2_000_000_000, 2));
    assert_eq!((f.mtime(), f.ino()), (1_000_000_000, stat("d/h").ino()));
    assert_eq!(fs::read(scratch.path("d/h")).expect("read"), b"hello");
    let link = stat("d/s");
    assert!(link.is_symlink() && stat("d/hs").ino() == link.ino());
    assert_eq!((link.uid(), link.gid(), link.mtime()), (3, 4, 77));
    assert!(stat("d/p").file_type().is_fifo() && stat("d/p").mode() & 0o7777 == 0o622);
    let c = stat("d/c");
    assert!(c.file_type().is_char_device());
    assert_eq!((c.rdev(), c.mode() & 0o7777, c.gid()), (rustix::fs::makedev(1, 3), 0o666, 5));
    assert!(stat("d/b").file_type().is_block_device());
    assert_eq!(stat("d/b").rdev(), rustix::fs::makedev(259, 300_000));
    assert!(stat("old").is_dir() && stat("contiguous").len() == 3);
    let y = stat("x/y");
    assert_eq!((y.mode() & 0o7777, y.uid(), y.gid()), (0o755, 0, 0));
    scratch.assert_canary("ordinary");
}

#[test]
fn compressed_streams_in_several_pieces() {
    // Incompressible enough for several chunks of the stream.
    let mut state = 1_u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(3_000_000)
    .collect();
    let plain = tar(&[file("noise", &noise), file("last", "x")]);
    let (front, back) = plain.split_at(plain.len() / 3);
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    for (compression, layer) in [
        (Compression::None, plain.clone()),
        (Compression::Gzip, [gzip(front), gzip(back)].concat()),
        (Compression::Zstd, [&zstandard(front)[..], &skippable, &zstandard(back)].concat()),
    ] {
        let scratch = Scratch::new();
        let unpacked = scratch.unpack_with(&layer, compression, LIMITS).expect("unpack");
        assert_eq!(unpacked.digest, sha256(&layer), "{compression:?}");
        assert_eq!(unpacked.diff_id, sha256(&plain), "{compression:?}");
        assert_eq!(fs::read(scratch.path("noise")).expect("read"), noise, "{compression:?}");
    }
}

#[test]
fn what_follows_the_end_mark_is_hashed_and_a_missing_mark_is_no_error() {
    let whole = [tar(&[file("a", "1")]), vec![7; 5000]].concat();
    assert_eq!(Scratch::new().unpack(&whole).expect("unpack").diff_id, sha256(&whole));
    let unmarked = file("a", "1").bytes();
    assert_eq!(Scratch::new().unpack(&unmarked).expect("unpack").diff_id, sha256(&unmarked));
    assert_eq!(Scratch::new().unpack(b"").expect("unpack").inodes, 0);
}

#[test]
fn long_names_of_all_kinds() {
    let scratch = Scratch::new();
    let deep = format!("{}/{}", "n".repeat(200), "m".repeat(250));
    let gnu = format!("g/{deep}");
    let posix = format!("p/{deep}");
    let prefix = format!("u/{}", "q".repeat(100));
    scratch
        .unpack(&tar(&[
            long(b'L', &gnu),
            file("cut", "1").gnu(),
            pax(&[("path", posix.as_bytes())]),
            file("cut", "2"),
            file("r", "3").patch(345, &prefix),
            long(b'K', &gnu),
            symlink("ls", "cut").gnu(),
            pax(&[("linkpath", posix.as_bytes())]),
            hard_link("lh", "cut"),
            file(b"caf\xe9", "latin"),
        ]))
        .expect("unpack");
    assert_eq!(fs::read(scratch.path(&gnu)).expect("gnu"), b"1");
    assert_eq!(fs::read(scratch.path(&posix)).expect("posix"), b"2");
    assert_eq!(fs::read(scratch.path(&format!("{prefix}/r"))).expect("ustar"), b"3");
    assert_eq!(fs::read_link(scratch.path("ls")).expect("link").as_os_str(), gnu.as_str());
    assert_eq!(fs::read(scratch.path("lh")).expect("hard link"), b"2");
    let latin = std::ffi::OsString::from_vec(b"caf\xe9".to_vec());
    assert!(scratch.path("").join(latin).exists());
}

#[test]
fn pax_overrides_and_large_numbers() {
    let scratch = Scratch::new();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    scratch
        .unpack(&tar(&[
            item(b'g', "global").content(crate::tarball::pax_record("path", b"elsewhere")),
            pax(&[
                ("uid", b"123456"),
                ("gid", b"3000000000"),
                ("mtime", b"1600000000.123456789"),
                ("size", b"2"),
                ("comment", b"caf\xc3\xa9\nwith a line break"),
                ("SCHILY.xattr.user.note", b"a\0b=c\nd"),
                ("SCHILY.xattr.security.capability", &capability),
            ]),
            file("ping", "ok").mode(0o755).size(0),
            pax(&[("mtime", b"-1.5"), ("SCHILY.xattr.user.dir", b"")]),
            directory("dir"),
            file("big", "").owner(4_000_000_000, 2_097_152).mtime(1 << 34),
            file("signed", "").patch(136, [0xff; 12]),
        ]))
        .expect("unpack");
    let ping = fs::metadata(scratch.path("ping")).expect("stat");
    assert_eq!((ping.uid(), ping.gid(), ping.len()), (123_456, 3_000_000_000, 2));
    assert_eq!((ping.mtime(), ping.mtime_nsec()), (1_600_000_000, 123_456_789));
    assert_eq!(xattr(&scratch.path("ping"), "user.note").as_deref(), Some(&b"a\0b=c\nd"[..]));
    assert_eq!(xattr(&scratch.path("ping"), "security.capability").as_deref(), Some(&capability[..]));
    let dir = fs::metadata(scratch.path("dir")).expect("stat");
    assert_eq!((dir.mtime(), dir.mtime_nsec()), (-2, 500_000_000));
    let big = fs::metadata(scratch.path("big")).expect("stat");
    assert_eq!((big.uid(), big.gid()), (4_000_000_000, 2_097_152));
    assert_eq!(fs::metadata(scratch.path("signed")).expect("stat").mtime(), -1);
    assert!(!scratch.path("elsewhere").exists());
}

#[test]
fn sparse_files_in_every_form() {
    // Two stretches of 512 bytes at 1 MiB and 2 MiB, then a hole up to 3 MiB.
    let (mib, content) = (1_u64 << 20, [[b'a'; 512], [b'b'; 512]].concat());
    let pair = |offset, length| [number(offset, 12), number(length, 12)].concat();
    let old = item(b'S', "old")
        .gnu()
        .patch(386, [pair(mib, 512), pair(2 * mib, 512), pair(3 * mib, 0)].concat())
        .patch(483, number(3 * mib, 12))
        .content(&content);
    let mut extension = vec![0; 512];
    extension[..24].copy_from_slice(&pair(2 * mib, 512));
    let extended = item(b'S', "extended")
        .gnu()
        .patch(386, pair(mib, 512))
        .patch(482, [1])
        .patch(483, number(3 * mib, 12))
        .size(1024)
        .content([&extension[..], &content].concat());
    let version_0_0 = pax(&[
        ("GNU.sparse.size", b"3145728"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"1048576"),
        ("GNU.sparse.numbytes", b"512"),
        ("GNU.sparse.offset", b"2097152"),
        ("GNU.sparse.numbytes", b"512"),
    ]);
    let version_0_1 = pax(&[
        ("GNU.sparse.size", b"3145728"),
        ("GNU.sparse.map", b"1048576,512,2097152,512"),
        ("GNU.sparse.name", b"0.1"),
    ]);
    let version_1_0 = pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"1.0"),
        ("GNU.sparse.realsize", b"3145728"),
    ]);
    let mut map = b"2\n1048576\n512\n2097152\n512\n".to_vec();
    map.resize(512, 0);
    let scratch = Scratch::new();
    let unpacked = scratch
        .unpack(&tar(&[
            old,
            extended,
            version_0_0,
            file("0.0", &content),
            version_0_1,
            file("GNUSparseFile.1/0.1", &content),
            version_1_0,
            file("GNUSparseFile.2/1.0", [map, content.clone()].concat()),
            file("after", "aligned"),
        ]))
        .expect("unpack");
    assert_eq!(unpacked.size, 5 * 1024 + 7);
    let at = |bytes: &[u8], offset: u64| bytes[usize::try_from(offset).expect("small")];
    for name in ["old", "extended", "0.0", "0.1", "1.0"] {
        let bytes = fs::read(scratch.path(name)).expect(name);
        assert_eq!(bytes.len() as u64, 3 * mib, "{name}");
        assert_eq!(
            [at(&bytes, mib - 1), at(&bytes, mib), at(&bytes, 2 * mib + 511), at(&bytes, 2 * mib + 512)],
            [0, b'a', b'b', 0],
            "{name}"
        );
        assert!(fs::metadata(scratch.path(name)).expect(name).blocks() < 100, "{name} has no holes");
    }
    assert_eq!(fs::read(scratch.path("after")).expect("read"), b"aligned");
}

#[test]
fn later_entries_replace_earlier_ones() {
    let scratch = Scratch::new();
    scratch
        .unpack(&tar(&[
            file("file-then-dir", "x"),
            directory("file-then-dir").mode(0o700),
            directory("dir-then-file"),
            file("dir-then-file/a/b", "x"),
            file("dir-then-file", "new"),
            symlink("link-then-file", "keep"),
            file("keep", "kept"),
            file("link-then-file", "new"),
            symlink("link-then-dir", "elsewhere"),
            directory("elsewhere").mode(0o755),
            directory("link-then-dir").mode(0o700),
            file("file-then-link", "x"),
            symlink("file-then-link", "keep"),
            file("twin", "one"),
            hard_link("other-twin", "twin"),
            file("twin", "two"),
            hard_link("twin", "twin"),
            directory("twice").mode(0o700).mtime(1),
            file("twice/in", ""),
            directory("twice").mode(0o750).mtime(2),
            file("linked-over", "x"),
            hard_link("linked-over", "keep"),
        ]))
        .expect("unpack");
    let stat = |name: &str| fs::symlink_metadata(scratch.path(name)).expect(name);
    let read = |name: &str| fs::read_to_string(scratch.path(name)).expect(name);
    assert_eq!(stat("file-then-dir").mode(), 0o040_700);
    assert_eq!(
        (read("dir-then-file"), read("link-then-file"), read("keep")),
        ("new".into(), "new".into(), "kept".into())
    );
    assert!(stat("link-then-dir").is_dir() && stat("elsewhere").mode() & 0o777 == 0o755);
    assert!(stat("file-then-link").is_symlink());
    assert_eq!((read("twin"), read("other-twin")), ("two".into(), "one".into()));
    assert_eq!((stat("twice").mode() & 0o777, stat("twice").mtime()), (0o750, 2));
    assert_eq!(read("linked-over"), "kept");
}

#[test]
fn symlinked_parents_resolve_inside() {
    let scratch = Scratch::new();
    scratch
        .unpack(&tar(&[
            symlink("lib", "usr/lib"),
            file("lib/made-through-dangling-link", "1"),
            directory("usr/lib"),
            file("lib/x", "2"),
            symlink("usr/abs", "/usr/lib/deep"),
            file("usr/abs/y", "3"),
            symlink("usr/up", "../../../../usr/lib"),
            file("usr/up/z", "4"),
            hard_link("lib/hard", "usr/up/z"),
            file("lib/.wh.gone", ""),
            directory("lib/d"),
            file("lib/d/.wh..wh..opq", ""),
        ]))
        .expect("unpack");
    for (name, content) in
        [("made-through-dangling-link", "1"), ("x", "2"), ("deep/y", "3"), ("z", "4"), ("hard", "4")]
    {
        assert_eq!(fs::read_to_string(scratch.path("usr/lib").join(name)).expect(name), content);
    }
    assert!(scratch.path("lib").is_symlink());
    assert_eq!(fs::metadata(scratch.path("usr/lib/gone")).expect("whiteout").rdev(), 0);
    assert!(xattr(&scratch.path("usr/lib/d"), "trusted.overlay.opaque").is_some());
}

#[test]
fn whiteouts_and_opaque_directories() {
    let scratch = Scratch::new();
    let layer = tar(&[
        file("d/.wh.gone", "content that is skipped"),
        file("d/.wh..wh..opq", ""),
        file(".wh..wh.plnk", ""),
        directory(".wh..wh.orph"),
        file(".wh..wh.orph/x", "skipped too"),
        file("kept", "mine"),
        file(".wh.kept", ""),
        directory("merged"),
        file(".wh.merged", ""),
        file(".wh.again", ""),
        file("again", "a file"),
        file(".wh.reborn", ""),
        file("reborn/child", "under a directory that is implied"),
    ]);
    scratch.unpack(&layer).expect("unpack");
    let opaque = |name: &str| xattr(&scratch.path(name), "trusted.overlay.opaque");
    let gone = fs::symlink_metadata(scratch.path("d/gone")).expect("whiteout");
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    assert_eq!(opaque("d").as_deref(), Some(&b"y"[..]));
    assert_eq!(fs::read(scratch.path("kept")).expect("read"), b"mine");
    assert_eq!(opaque("merged").as_deref(), Some(&b"y"[..]));
    assert_eq!(fs::read(scratch.path("again")).expect("read"), b"a file");
    assert_eq!(opaque("reborn").as_deref(), Some(&b"y"[..]));
    let mut names: Vec<_> = fs::read_dir(scratch.path(""))
        .expect("list")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["again", "d", "kept", "merged", "reborn"]);
}

#[test]
fn attributes_that_are_the_nodes_to_give_are_left_out() {
    let scratch = Scratch::new();
    let names = [
        "trusted.overlay.redirect",
        "trusted.overlay.opaque",
        "user.overlay.opaque",
        "security.selinux",
        "security.ima",
        "trusted.other",
    ];
    let keys = names.map(|name| format!("SCHILY.xattr.{name}"));
    let records: Vec<(&str, &[u8])> = keys.iter().map(|key| (key.as_str(), &b"y"[..])).collect();
    scratch.unpack(&tar(&[pax(&records), directory("d"), pax(&records), file("f", "")])).expect("unpack");
    for name in names {
        assert_eq!(
            (xattr(&scratch.path("d"), name), xattr(&scratch.path("f"), name)),
            (None, None),
            "{name}"
        );
    }
}

#[test]
fn a_default_acl_is_not_inherited_by_later_entries() {
    // Version 2; entries (tag, permissions, id): owner rwx, group rwx, other none.
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions) in [(1_u16, 7_u16), (4, 7), (0x20, 0)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend([0xff; 4]);
    }
    let scratch = Scratch::new();
    scratch
        .unpack(&tar(&[
            pax(&[("SCHILY.xattr.system.posix_acl_default", &acl)]),
            directory("d").mode(0o2755).owner(0, 50),
            file("d/sub/f", ""),
        ]))
        .expect("unpack");
    assert!(xattr(&scratch.path("d"), "system.posix_acl_default").is_some());
    let sub = fs::metadata(scratch.path("d/sub")).expect("stat");
    assert_eq!((sub.mode() & 0o7777, sub.gid()), (0o755, 0));
    assert!(xattr(&scratch.path("d/sub"), "system.posix_acl_default").is_none());
    assert!(xattr(&scratch.path("d/sub/f"), "system.posix_acl_access").is_none());
}

#[test]
fn a_full_disk_is_told_from_a_bad_layer() {
    let many: Vec<_> = (0..100).map(|index| file(format!("f{index}"), "")).collect();
    for (options, layer) in
        [(("size", "64k"), tar(&[file("big", vec![1; 1 << 20])])), (("nr_inodes", "50"), tar(&many))]
    {
        let target = tmpfs(&[options]);
        let error = unpack(&layer[..], Compression::None, target.as_fd(), LIMITS).expect_err("no room");
        assert!(error.is_full(), "{options:?}: {error:?}");
    }
}

#[test]
fn without_the_right_to_make_devices_the_error_says_so_and_whiteouts_still_work() {
    std::thread::spawn(|| {
        // Capabilities belong to a thread, so only this one loses it.
        let mut sets = rustix::thread::capabilities(None).expect("read capabilities");
        sets.effective.remove(rustix::thread::CapabilitySet::MKNOD);
        rustix::thread::set_capabilities(None, sets).expect("drop a capability");
        let scratch = Scratch::new();
        scratch.unpack(&tar(&[file(".wh.x", "")])).expect("whiteouts need no capability since Linux 5.8");
        let error = scratch.unpack(&tar(&[device(b'3', "null", 1, 3)])).expect_err("not permitted");
        assert_eq!(error.kind(), UnpackErrorKind::System);
        assert_eq!(error.to_string(), "make device node or fifo 'null'");
        let source = std::error::Error::source(&error).expect("a cause").to_string();
        assert!(source.contains("not permitted"), "{source}");
    })
    .join()
    .expect("the thread");
}

#[test]
fn a_failing_source_is_told_from_a_damaged_stream() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::new(io::ErrorKind::ConnectionReset, "peer went away"))
        }
    }
    let plain = tar(&[file("a", vec![7; 100_000])]);
    for (compression, layer) in [
        (Compression::None, plain.clone()),
        (Compression::Gzip, gzip(&plain)),
        (Compression::Zstd, zstandard(&plain)),
    ] {
        for length in [0, 5, layer.len() / 2, layer.len()] {
            let target = tmpfs(&[]);
            let source = Cursor::new(&layer[..length]).chain(Broken);
            let error = unpack(source, compression, target.as_fd(), LIMITS).expect_err("must fail");
            assert_eq!(error.kind(), UnpackErrorKind::Source, "{compression:?} {length}: {error:?}");
            let source = std::error::Error::source(&error).expect("a cause").to_string();
            assert_eq!(source, "peer went away");
        }
    }
}

#[test]
fn limits_hold() {
    let two = tar(&[file("a", "12345"), file("b/c", "678")]);
    let limits = |bytes, entries| Limits { bytes, entries };
    Scratch::new().unpack_with(&two, Compression::None, limits(8, 3)).expect("exactly the limits");
    for limits in [limits(7, 3), limits(8, 1), limits(8, 2)] {
        let error = Scratch::new().unpack_with(&two, Compression::None, limits).expect_err("beyond");
        assert_eq!(error.kind(), UnpackErrorKind::Corrupt, "{limits:?}");
    }
    // Nothing but zeros after the end mark, and nothing but headers.
    let zeros = gzip(&vec![0; 4 << 20]);
    let headers: Vec<u8> = std::iter::repeat_n(item(b'g', "g").bytes(), 5000).flatten().collect();
    for bomb in [zeros, gzip(&headers)] {
        let error = Scratch::new().unpack_with(&bomb, Compression::Gzip, limits(8, 3)).expect_err("a bomb");
        assert_eq!(error.kind(), UnpackErrorKind::Corrupt);
    }
}

/// On merged-usr systems a directory is named through `/lib` and `/usr/lib`: the last entry counts, on every machine.
#[test]
fn two_names_of_one_directory() {
    for _ in 0..8 {
        let scratch = Scratch::new();
        scratch
            .unpack(&tar(&[
                directory("usr/lib/"),
                symlink("lib", "usr/lib"),
                directory("lib/a/").mode(0o700).owner(1, 1).mtime(1),
                directory("usr/lib/a/").mode(0o711).owner(2, 2).mtime(2),
                directory("usr/lib/b/").mode(0o700).owner(3, 3).mtime(3),
                directory("lib/b/").mode(0o711).owner(4, 4).mtime(4),
            ]))
            .expect("unpack");
        for (name, owner) in [("usr/lib/a", 2), ("usr/lib/b", 4)] {
            let stat = fs::metadata(scratch.path(name)).expect(name);
            assert_eq!(
                (stat.mode() & 0o7777, stat.uid(), stat.mtime()),
                (0o711, owner, i64::from(owner)),
                "{name}"
            );
        }
    }
}

/// What an entry said about a directory does not go to another one that a link's replacement brings to its name.
#[test]
fn a_link_that_is_turned_round() {
    for _ in 0..8 {
        let scratch = Scratch::new();
        scratch
            .unpack(&tar(&[
                directory("one/d/"),
                directory("two/d/").mode(0o755).owner(2, 2),
                symlink("link", "one"),
                directory("link/d/").mode(0o777).owner(1, 1),
                symlink("link", "two"),
            ]))
            .expect("unpack");
        let stat = fs::metadata(scratch.path("two/d")).expect("stat");
        assert_eq!((stat.mode() & 0o7777, stat.uid()), (0o755, 2));
    }
}
