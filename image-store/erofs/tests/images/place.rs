//! Where a test puts layers together, and looks at them both ways: through overlayfs and through the image made of them.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{BufReader, BufWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use podvisor_erofs::{BLOCK, Layout, Summary, write_image, write_layer};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};
use tempfile::TempDir;

/// Layers `0`, `1`, ... in a directory, the lowest first.
pub(crate) struct Place {
    directory: TempDir,
    layers: usize,
}

impl Place {
    pub(crate) fn new(layers: usize) -> Self {
        // On a disk: the kernel mounts no EROFS from a file of a tmpfs.
        let directory = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("make a scratch directory");
        let place = Self { directory, layers };
        for layer in 0..layers {
            fs::create_dir(place.layer(layer)).expect("make a layer");
        }
        for name in ["a", "b"] {
            fs::create_dir(place.path(name)).expect("make an empty layer");
        }
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn layer(&self, number: usize) -> PathBuf {
        self.path(&number.to_string())
    }

    /// Makes the data blob and the index of a layer.
    pub(crate) fn index(&self, number: usize, shares: bool) -> Summary {
        let data = File::create(self.path(&format!("{number}.data"))).expect("make a blob");
        let index = File::create(self.path(&format!("{number}.index"))).expect("make an index");
        let tree = File::open(self.layer(number)).expect("open a layer");
        write_layer(tree.as_fd(), &data, BufWriter::new(index), shares).expect("write a layer").1
    }

    /// Makes the image of all layers, as a file that has everything in it.
    pub(crate) fn image(&self) -> (PathBuf, Layout) {
        let open = |name: String| File::open(self.path(&name)).expect("open");
        for layer in 0..self.layers {
            self.index(layer, false);
        }
        let mut indexes: Vec<_> =
            (0..self.layers).map(|layer| BufReader::new(open(format!("{layer}.index")))).collect();
        let path = self.path("image");
        let mut image = File::create(&path).expect("make an image");
        let layout = write_image(&mut indexes, &mut image).expect("write an image");
        let mut length = image.metadata().expect("stat").len();
        assert_eq!(length, u64::from(layout.metadata) * BLOCK);
        assert_eq!(layout.blobs.len(), self.layers);
        for (layer, &blocks) in layout.blobs.iter().enumerate() {
            let blob = open(format!("{layer}.data"));
            assert_eq!(blob.metadata().expect("stat").len(), u64::from(blocks) * BLOCK);
            copy_sparse(&blob, &image, length);
            length += u64::from(blocks) * BLOCK;
        }
        image.set_len(length).expect("set the length");
        (path, layout)
    }

    /// What overlayfs shows of the layers.
    pub(crate) fn overlay(&self) -> OwnedFd {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).expect("overlayfs");
        let empty = ["a", "b"].map(|name| self.path(name));
        for layer in (0..self.layers).rev().map(|layer| self.layer(layer)).chain(empty) {
            fsconfig_set_string(&context, "lowerdir+", layer).expect("a layer");
        }
        mounted(&context)
    }
}

/// Copies what is no hole to `at`.
fn copy_sparse(from: &File, to: &File, at: u64) {
    let mut begin = 0;
    while let Ok(data) = rustix::fs::seek(from, rustix::fs::SeekFrom::Data(begin)) {
        let end = rustix::fs::seek(from, rustix::fs::SeekFrom::Hole(data)).expect("seek");
        let (mut read, mut write) = (data, at + data);
        while read < end {
            let length = usize::try_from(end - read).expect("a length");
            let copied = rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut write), length);
            assert!(copied.expect("copy") > 0);
        }
        begin = end;
    }
}

/// The image as the kernel shows it; no place in the file system has it.
pub(crate) fn erofs(image: &Path) -> OwnedFd {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).expect("erofs");
    fsconfig_set_string(&context, "source", image).expect("a file as a device");
    mounted(&context)
}

fn mounted(context: &OwnedFd) -> OwnedFd {
    fsconfig_set_flag(context, "ro").expect("read-only");
    if let Err(error) = fsconfig_create(context) {
        let mut said = [0; 1024];
        let length = rustix::io::read(context, &mut said).unwrap_or_default();
        panic!("{error}: {}", String::from_utf8_lossy(&said[..length]));
    }
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).expect("mount")
}

/// Has erofs-utils read all of an image.
pub(crate) fn check(image: &Path) {
    let output = Command::new("fsck.erofs")
        .args(["--extract", "-d3"])
        .arg(image)
        .output()
        .expect("fsck.erofs is there: `make deps` installs it");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("No errors found"), "fsck.erofs: {said}");
}
