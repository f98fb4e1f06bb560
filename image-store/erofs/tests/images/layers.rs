//! Everything that a file can be, one by one.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink};

use podvisor_erofs::BLOCK;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev, mknodat, setxattr, utimensat,
};

use crate::place::{Place, check, erofs};
use crate::tree::{assert_same, see};

fn touch(path: &std::path::Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

#[test]
fn no_layer_and_an_empty_one() {
    for layers in [0, 1] {
        let place = Place::new(layers);
        let (image, layout) = place.image();
        assert_eq!(layout.metadata, 2, "the superblock with the root's inode, and what is in the root");
        check(&image);
        let tree = see(&erofs(&image));
        assert_eq!(tree.len(), 1);
        assert_eq!(tree[std::path::Path::new("")].mode, 0o040_755);
    }
}

#[test]
fn every_kind_of_file() {
    let place = Place::new(1);
    let at = |name: &str| place.layer(0).join(name);
    let node = |name: &str, kind, device| mknodat(CWD, at(name), kind, Mode::from(0o600), device).unwrap();
    fs::create_dir(at("directory")).unwrap();
    fs::set_permissions(at("directory"), fs::Permissions::from_mode(0o3771)).unwrap();
    fs::write(at("empty"), "").unwrap();
    fs::write(at("block"), vec![b'x'; 4096]).unwrap();
    fs::write(at("more"), vec![b'y'; 4097]).unwrap();
    fs::write(at("setuid"), "#!").unwrap();
    chown(at("setuid"), Some(4_000_000_000), Some(70_000)).unwrap();
    fs::set_permissions(at("setuid"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::write(at("none"), "secret").unwrap();
    fs::set_permissions(at("none"), fs::Permissions::from_mode(0o000)).unwrap();
    symlink("../some/where", at("symlink")).unwrap();
    lchown(at("symlink"), Some(5), Some(6)).unwrap();
    // Longer than what fits behind an inode.
    symlink("l/".repeat(2047), at("long-symlink")).unwrap();
    node("fifo", FileType::Fifo, 0);
    node("socket", FileType::Socket, 0);
    node("null", FileType::CharacterDevice, makedev(1, 3));
    node("large", FileType::CharacterDevice, makedev(4095, 0xf_edcb));
    node("disk", FileType::BlockDevice, makedev(259, 300));
    fs::hard_link(at("more"), at("directory/again")).unwrap();
    fs::hard_link(at("fifo"), at("directory/fifo")).unwrap();
    fs::hard_link(at("symlink"), at("directory/symlink")).unwrap();
    touch(&at("more"), -3, 999_999_999);
    touch(&at("symlink"), 1 << 33, 1);
    touch(&at("directory"), 5, 7);
    touch(&at(""), 1, 2);

    let (image, _) = place.image();
    check(&image);
    let (wanted, found) = (see(&place.overlay()), see(&erofs(&image)));
    assert_same(&wanted, &found);
    let names = found.values().filter(|seen| seen.first_name.ends_with("directory/again")).count();
    assert_eq!(names, 2, "the two names are of one file");
}

#[test]
fn links_are_counted() {
    let place = Place::new(2);
    fs::write(place.layer(0).join("a"), "a").unwrap();
    for name in ["b", "c"] {
        fs::hard_link(place.layer(0).join("a"), place.layer(0).join(name)).unwrap();
    }
    // Hides one of the names.
    fs::write(place.layer(1).join("b"), "other").unwrap();
    fs::create_dir_all(place.layer(1).join("d/e/f")).unwrap();
    let (image, _) = place.image();
    check(&image);
    let mount = erofs(&image);
    let count = |name: &str| {
        let path = format!("/proc/self/fd/{}/{name}", std::os::fd::AsRawFd::as_raw_fd(&mount));
        fs::metadata(path).unwrap().nlink()
    };
    assert_eq!(
        [count("a"), count("b"), count("c"), count("d"), count("d/e"), count("d/e/f")],
        [2, 1, 2, 3, 3, 2]
    );
}

#[test]
fn attributes() {
    let place = Place::new(1);
    let at = |name: &str| place.layer(0).join(name);
    let set = |name: &str, attribute: &str, value: &[u8]| {
        setxattr(at(name), attribute, value, XattrFlags::empty()).unwrap();
    };
    fs::write(at("file"), "x").unwrap();
    fs::create_dir(at("directory")).unwrap();
    // struct vfs_ns_cap_data, version 2, CAP_NET_BIND_SERVICE permitted and effective.
    let mut capability = vec![1, 0, 0, 2, 0, 4, 0, 0];
    capability.resize(20, 0);
    set("file", "security.capability", &capability);
    // posix_acl_xattr(5): version 2, then tag, permissions, id: owner, user 7, group, mask, others.
    let entry = |tag: u16, mode: u16, id: u32| {
        [&tag.to_le_bytes()[..], &mode.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let none = u32::MAX;
    let acl = [
        vec![2, 0, 0, 0],
        entry(1, 6, none),
        entry(2, 7, 7),
        entry(4, 4, none),
        entry(0x10, 7, none),
        entry(0x20, 4, none),
    ]
    .concat();
    set("file", "system.posix_acl_access", &acl);
    set("directory", "system.posix_acl_access", &acl);
    set("directory", "system.posix_acl_default", &acl);
    set("file", "user.empty", b"");
    set("file", "user.binary", &(0..=255).collect::<Vec<u8>>());
    set("file", &format!("user.{}", "n".repeat(250)), &[7; 1500]);
    for number in 0..20 {
        set("directory", &format!("user.{number}"), &[number; 70]);
    }
    set("", "user.root", &[1; 3000]);
    // What an image may not set, and what is overlayfs' own.
    set("file", "trusted.other", b"x");
    set("file", "user.overlay.opaque", b"y");
    set("directory", "trusted.overlay.opaque", b"y");

    let (image, _) = place.image();
    check(&image);
    let (mut wanted, found) = (see(&place.overlay()), see(&erofs(&image)));
    for seen in wanted.values_mut() {
        seen.xattrs.retain(|name, _| !name.starts_with(b"trusted.") && !name.starts_with(b"user.overlay."));
    }
    assert_same(&wanted, &found);
}

#[test]
fn files_with_holes() {
    let place = Place::new(1);
    let file = |name: &str, length: u64, data: &[(u64, usize)]| {
        let file = fs::File::create(place.layer(0).join(name)).unwrap();
        file.set_len(length).unwrap();
        for &(at, length) in data {
            file.write_all_at(&vec![b'd'; length], at).unwrap();
        }
    };
    file("nothing", 1 << 40, &[]);
    file("one", 1, &[]);
    file("middle", 20 << 20, &[(10 << 20, 5000)]);
    file("end", (20 << 20) + 3, &[(20 << 20, 3)]);
    file("begin", 20 << 20, &[(0, 1)]);
    file("often", 4 << 20, &(0..100).map(|at| (at * 40_000, 100)).collect::<Vec<_>>());
    file("huge", 1 << 40, &[(0, 10), (1 << 39, 10), ((1 << 40) - 1, 1)]);
    fs::hard_link(place.layer(0).join("middle"), place.layer(0).join("middle-again")).unwrap();
    fs::write(place.layer(0).join("plain"), vec![1; 9000]).unwrap();

    let (image, layout) = place.image();
    let on_disk = fs::metadata(place.path("0.data")).unwrap().blocks() * 512;
    assert!(on_disk < 2 << 20, "{on_disk} bytes for 27 KB of content");
    assert!(u64::from(layout.metadata) * BLOCK < 40 << 20, "{layout:?}");
    let (wanted, found) = (see(&place.overlay()), see(&erofs(&image)));
    assert_same(&wanted, &found);
    let mount = erofs(&image);
    let huge =
        fs::File::open(format!("/proc/self/fd/{}/huge", std::os::fd::AsRawFd::as_raw_fd(&mount))).unwrap();
    for (at, wanted) in [(1 << 39, b'd'), ((1 << 39) + 10, 0), ((1 << 40) - 1, b'd'), ((1 << 40) - 2, 0)] {
        let mut found = [9];
        huge.read_exact_at(&mut found, at).unwrap();
        assert_eq!(found[0], wanted, "at {at}");
    }
}
