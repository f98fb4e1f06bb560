//! Files as Debian's packages have them: programs, set-user-id ones among them, modules, symlinks.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::Path;

use podvisor_erofs::write_layer;

use crate::place::{Place, check, erofs};
use crate::tree::{assert_same, see};

/// Of the machine that runs the tests; nobody installs packages meanwhile.
const TREES: [&str; 3] = ["/usr/sbin", "/usr/lib/git-core", "/usr/share/perl"];

#[test]
fn what_packages_bring() {
    let place = Place::new(TREES.len());
    for (number, tree) in TREES.into_iter().enumerate() {
        assert!(Path::new(tree).is_dir(), "{tree}: the packages of tests/scripts/deps bring it");
        fs::remove_dir(place.layer(number)).unwrap();
        symlink(tree, place.layer(number)).unwrap();
    }
    let (image, layout) = place.image();
    check(&image);
    let mut wanted = see(&place.overlay());
    for seen in wanted.values_mut() {
        // Labels of the machine are not the image's.
        seen.xattrs.retain(|name, _| name == b"security.capability" || name.starts_with(b"user."));
    }
    assert!(wanted.len() > 700, "{} files are too few to mean something", wanted.len());
    assert_same(&wanted, &see(&erofs(&image)));

    // A layer read again is the same blob and the same index.
    let data = File::create(place.path("again")).unwrap();
    let index = BufWriter::new(File::create(place.path("again.index")).unwrap());
    let tree = File::open(TREES[0]).unwrap();
    let (_, again) = write_layer(tree.as_fd(), &data, index, true).unwrap();
    let mut first = BufReader::new(File::open(place.path("0.index")).unwrap());
    assert_eq!(podvisor_erofs::Summary::read(&mut first).unwrap(), again);
    assert_eq!(layout.blobs[0], again.blocks);
}
