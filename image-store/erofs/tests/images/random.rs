//! Random stacks of layers: the image shows what overlayfs shows.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat, setxattr};

use crate::place::{Place, check, erofs};
use crate::tree::{assert_same, filler, listed, path, see};

/// Around the dots in the order of names, and some that no text has.
const NAMES: [&[u8]; 8] = [b"!", b"-x", b"..a", b".b", b"a", b"a\n", b"b", b"\xff\xfe"];

#[derive(Debug, Clone)]
enum What {
    File { size: usize, links_to: Option<usize> },
    Directory { is_opaque: bool },
    Symlink,
    Fifo,
    Device,
    Whiteout,
}

#[derive(Debug, Clone)]
struct Wish {
    path: Vec<usize>,
    what: What,
    mode: u32,
    owner: u32,
    has_attribute: bool,
}

fn wishes() -> impl Strategy<Value = Wish> {
    let what = prop_oneof![
        3 => (0_usize..9000, proptest::option::of(0_usize..20))
            .prop_map(|(size, links_to)| What::File { size, links_to }),
        3 => any::<bool>().prop_map(|is_opaque| What::Directory { is_opaque }),
        1 => Just(What::Symlink),
        1 => Just(What::Fifo),
        1 => Just(What::Device),
        2 => Just(What::Whiteout),
    ];
    (vec(0..NAMES.len(), 1..4), what, 0_u32..0o10000, 0_u32..3, any::<bool>())
        .prop_map(|(path, what, mode, owner, has_attribute)| Wish { path, what, mode, owner, has_attribute })
}

/// Makes the layer as far as the wishes agree with each other.
fn build(layer: &Path, wishes: &[Wish]) {
    let mut files: Vec<PathBuf> = Vec::new();
    for (number, wish) in wishes.iter().enumerate() {
        let mut at = layer.to_owned();
        at.extend(wish.path.iter().map(|&name| path(NAMES[name])));
        let parent = at.parent().expect("below the layer");
        if fs::create_dir_all(parent).is_err() || fs::symlink_metadata(&at).is_ok() {
            continue;
        }
        let node = |kind, device| mknodat(CWD, &at, kind, Mode::empty(), device).expect("make a node");
        match wish.what {
            What::File { links_to: Some(file), .. } if file < files.len() => {
                fs::hard_link(&files[file], &at).expect("link");
                continue;
            }
            What::File { size, .. } => {
                fs::write(&at, vec![filler(number); size]).expect("write");
                files.push(at.clone());
            }
            What::Directory { is_opaque } => {
                fs::create_dir(&at).expect("make");
                if is_opaque {
                    setxattr(&at, "trusted.overlay.opaque", b"y", XattrFlags::empty()).expect("opaque");
                }
            }
            What::Symlink => symlink("x".repeat(number * 50 + 1), &at).expect("link"),
            What::Fifo => node(FileType::Fifo, 0),
            What::Device => node(FileType::BlockDevice, number as u64 + 1),
            What::Whiteout => node(FileType::CharacterDevice, 0),
        }
        if matches!(wish.what, What::Symlink | What::Whiteout) {
            continue;
        }
        chown(&at, Some(wish.owner), Some(wish.owner)).expect("chown");
        fs::set_permissions(&at, fs::Permissions::from_mode(wish.mode)).expect("chmod");
        if wish.has_attribute && matches!(wish.what, What::File { .. } | What::Directory { .. }) {
            setxattr(&at, "user.number", &[filler(number); 30], XattrFlags::empty()).expect("attribute");
        }
    }
    // The root may be opaque too.
    if wishes.len().is_multiple_of(3) {
        setxattr(layer, "trusted.overlay.opaque", b"y", XattrFlags::empty()).expect("opaque");
    }
}

#[test]
fn a_machine_sees_what_overlayfs_shows() {
    let config = Config { cases: 150, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&vec(vec(wishes(), 0..25), 1..5), |layers| {
            let place = Place::new(layers.len());
            for (number, wishes) in layers.iter().enumerate() {
                build(&place.layer(number), wishes);
            }
            let (image, layout) = place.image();
            check(&image);
            let overlay = place.overlay();
            let mut wanted = see(&overlay);
            for seen in wanted.values_mut() {
                seen.xattrs.retain(|name, _| name.starts_with(b"user."));
            }
            let mount = erofs(&image);
            let found = see(&mount);
            assert_same(&wanted, &found);
            assert_eq!(listed(&mount), found.len(), "every name is one of a file");
            // The same layers, the same bytes.
            let before = fs::read(&image).expect("read");
            drop(mount);
            assert_eq!(place.image().1, layout);
            assert!(fs::read(&image).expect("read") == before, "another image of the same layers");
            Ok(())
        })
        .unwrap();
}
