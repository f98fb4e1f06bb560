//! Layers that nobody would make in earnest.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufReader, Cursor};
use std::os::unix::ffi::OsStrExt;

use podvisor_erofs::{BLOCK, ErofsError, IndexWriter, Kind, Node, write_image};
use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};

use crate::place::{Place, check, erofs};
use crate::tree::{assert_same, filler, listed, see};

#[test]
fn every_byte_in_names_and_the_longest_ones() {
    let place = Place::new(1);
    for byte in (1..=255).filter(|&byte| !matches!(byte, b'/' | b'.')) {
        fs::write(place.layer(0).join(OsStr::from_bytes([byte].as_slice())), [byte]).unwrap();
        let long = [byte; 255];
        fs::create_dir(place.layer(0).join(OsStr::from_bytes(&long))).unwrap();
    }
    let (image, _) = place.image();
    check(&image);
    assert_same(&see(&place.overlay()), &see(&erofs(&image)));
}

#[test]
fn a_hundred_thousand_names_in_a_directory() {
    let place = Place::new(2);
    let directory = place.layer(0).join("d");
    fs::create_dir(&directory).unwrap();
    let first = directory.join("0");
    fs::write(&first, "x").unwrap();
    for number in 1..100_000 {
        // A file has at most 65,000 names on ext4.
        if number % 4 == 0 {
            File::create(directory.join(number.to_string())).unwrap();
        } else if number % 4 == 1 {
            fs::hard_link(&first, directory.join(number.to_string())).unwrap();
        } else {
            std::os::unix::fs::symlink("0", directory.join(number.to_string())).unwrap();
        }
    }
    fs::create_dir(place.layer(1).join("d")).unwrap();
    fs::create_dir(place.layer(1).join("d/5")).unwrap();
    let (image, layout) = place.image();
    check(&image);
    let mount = erofs(&image);
    assert_eq!(listed(&mount), 100_002);
    let at = format!("/proc/self/fd/{}/d", std::os::fd::AsRawFd::as_raw_fd(&mount));
    for number in [0, 1, 4, 49_999, 50_001, 99_997, 99_996] {
        assert!(fs::metadata(format!("{at}/{number}")).unwrap().is_file(), "{number}");
    }
    assert!(fs::metadata(format!("{at}/5")).unwrap().is_dir());
    assert!(fs::metadata(format!("{at}/100000")).is_err());
    assert!(u64::from(layout.metadata) * BLOCK < 12 << 20, "{layout:?}");
}

#[test]
fn deeper_than_any_path() {
    const DEPTH: usize = 5000;
    let place = Place::new(1);
    let directory = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = openat(CWD, place.layer(0), directory, Mode::empty()).unwrap();
    for _ in 0..DEPTH {
        mkdirat(&at, "d", Mode::from(0o755)).unwrap();
        at = openat(&at, "d", directory, Mode::empty()).unwrap();
    }
    let (image, _) = place.image();
    let mut at = openat(erofs(&image), ".", directory, Mode::empty()).unwrap();
    for _ in 0..DEPTH {
        at = openat(&at, "d", directory, Mode::empty()).unwrap();
    }
    let mut up = openat(&at, "..", directory, Mode::empty()).unwrap();
    for _ in 1..DEPTH {
        up = openat(&up, "..", directory, Mode::empty()).unwrap();
    }
    assert!(openat(&up, "d", directory, Mode::empty()).is_ok());
    drop((at, up));
}

/// Every byte of an index changed, and every length of it.
#[test]
fn a_damaged_index_is_an_error() {
    let place = Place::new(1);
    fs::create_dir(place.layer(0).join("d")).unwrap();
    fs::write(place.layer(0).join("d/f"), "content").unwrap();
    std::os::unix::fs::symlink("to", place.layer(0).join("s")).unwrap();
    place.index(0, false);
    let index = fs::read(place.path("0.index")).unwrap();
    let write = |bytes: &[u8]| write_image(&mut [Cursor::new(bytes.to_vec())], &mut Vec::new());
    write(&index).unwrap();
    for at in 0..index.len() {
        for bit in [1, 0x80] {
            let mut bytes = index.clone();
            bytes[at] ^= bit;
            assert!(write(&bytes).is_err(), "byte {at} of {} changed", index.len());
        }
        assert!(write(&index[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn what_does_not_fit_says_so() {
    let mut index = IndexWriter::new(Vec::new()).unwrap();
    index.file(b"", &Node::default()).unwrap();
    index.leave().unwrap();
    let (bytes, _) = index.finish(u32::MAX - 2, [0; 32]).unwrap();
    let error = write_image(&mut [Cursor::new(bytes)], &mut Vec::new()).unwrap_err();
    assert!(matches!(error, ErofsError::TooLarge { .. }), "{error}");

    let mut index = IndexWriter::new(Vec::new()).unwrap();
    let error = index.file(&[b'n'; 256], &Node { kind: Kind::Fifo, ..Node::default() }).unwrap_err();
    assert!(matches!(error, ErofsError::TooLarge { limit: 255, .. }), "{error}");
}

/// With copy_file_range(2), which shares blocks where the file system can, a blob has the same bytes.
#[test]
fn shared_or_copied_is_the_same() {
    let place = Place::new(1);
    for (number, size) in [0, 1, 4095, 4096, 4097, 1_000_000].into_iter().enumerate() {
        fs::write(place.layer(0).join(number.to_string()), vec![filler(number + 1); size]).unwrap();
    }
    let copied = place.index(0, false);
    let blob = fs::read(place.path("0.data")).unwrap();
    assert_eq!(place.index(0, true), copied);
    assert!(fs::read(place.path("0.data")).unwrap() == blob);
    let mut index = BufReader::new(File::open(place.path("0.index")).unwrap());
    assert_eq!(podvisor_erofs::Summary::read(&mut index).unwrap(), copied);
}
