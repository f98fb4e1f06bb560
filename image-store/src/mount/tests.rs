//! On the real kernel, in a mount namespace of the test's own.

#![allow(unsafe_code)]

use std::fs;
use std::os::unix::fs::symlink;

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::*;

/// Runs `test` in a thread with mounts of its own; they go with the thread.
pub(crate) fn privately(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(|| {
        // SAFETY: only UnshareFlags::FILES has a condition, and it is not among the flags.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.expect("these tests need root");
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        test();
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

struct Place {
    directory: tempfile::TempDir,
    rootfs: Rootfs,
}

impl Place {
    fn new(layers: usize, writable: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = directory.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let rootfs = Rootfs {
            key: "key".to_owned(),
            lower: (0..layers).rev().map(|number| path(&format!("layers/{number:064}"))).collect(),
            upper: writable.then(|| path("fs")),
            work: writable.then(|| path("work")),
        };
        for name in ["target", "empty/a", "empty/b"] {
            path(name);
        }
        Self { directory, rootfs }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn target(&self, name: &str) -> PathBuf {
        self.path("target").join(name)
    }

    /// Both ways of mounting must give the same.
    fn each_way(&self, check: impl Fn(&Self)) {
        let lower = lower(&self.rootfs, &self.path("empty"));
        let target = self.path("target");
        attach(&modern(&self.rootfs, &lower, None).expect("mount by descriptors"), &target).unwrap();
        check(self);
        unmount(&target, UnmountFlags::empty()).unwrap();
        classic(&self.rootfs, &lower, &target, None, &self.path("l")).expect("mount by options");
        check(self);
        unmount(&target, UnmountFlags::empty()).unwrap();
    }
}

#[test]
fn layers_lie_on_each_other() {
    privately(|| {
        let place = Place::new(3, true);
        fs::write(place.rootfs.lower[2].join("low"), "low").unwrap();
        fs::write(place.rootfs.lower[2].join("both"), "low").unwrap();
        fs::write(place.rootfs.lower[0].join("both"), "high").unwrap();
        place.each_way(|place| {
            assert_eq!(fs::read_to_string(place.target("low")).unwrap(), "low");
            assert_eq!(fs::read_to_string(place.target("both")).unwrap(), "high");
            fs::write(place.target("new"), "new").unwrap();
            assert!(place.path("fs/new").exists());
            fs::remove_file(place.target("new")).unwrap();
        });
        mount(&place.rootfs, &place.path("target"), None, &place.path("l"), &place.path("empty")).unwrap();
        assert_eq!(fs::read_to_string(place.target("both")).unwrap(), "high");
        unmount(place.path("target"), UnmountFlags::empty()).unwrap();
    });
}

#[test]
fn an_image_without_layers_and_views_without_a_writable_one() {
    privately(|| {
        for (layers, writable) in [(0, true), (0, false), (1, true), (1, false), (2, false)] {
            let place = Place::new(layers, writable);
            if let Some(layer) = place.rootfs.lower.first() {
                fs::write(layer.join("file"), "content").unwrap();
            }
            place.each_way(|place| {
                assert_eq!(place.target("file").exists(), layers > 0);
                let written = fs::write(place.target("new"), "new");
                assert_eq!(written.is_ok(), writable, "{layers} layers: {written:?}");
            });
        }
    });
}

#[test]
fn the_same_layer_twice() {
    privately(|| {
        let mut place = Place::new(2, true);
        fs::write(place.rootfs.lower[0].join("file"), "content").unwrap();
        place.rootfs.lower.push(place.rootfs.lower[0].clone());
        place.each_way(|place| assert!(place.target("file").exists()));
    });
}

#[test]
fn many_layers() {
    privately(|| {
        let mut place = Place::new(490, true);
        let lower = lower(&place.rootfs, &place.path("empty"));
        attach(&modern(&place.rootfs, &lower, None).unwrap(), &place.path("target")).unwrap();
        unmount(place.path("target"), UnmountFlags::empty()).unwrap();
        let refused = classic(&place.rootfs, &lower, &place.path("target"), None, &place.path("l"));
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ArgumentListTooLong);
        // What docker takes at most. All names begin alike here, so the links are as long as names are.
        place.rootfs.lower.truncate(20);
        place.each_way(|_| {});
    });
}

#[test]
fn short_links_survive_and_tell_layers_apart() {
    let place = Place::new(0, true);
    let links = place.path("l");
    fs::create_dir(&links).unwrap();
    let (first, second) = (Path::new("/layers/0123456789ab"), Path::new("/layers/01234567ffff"));
    assert_eq!(short(first, &links).unwrap(), links.join("01234567"));
    assert_eq!(short(second, &links).unwrap(), links.join("01234567f"));
    assert_eq!(short(first, &links).unwrap(), links.join("01234567"));
    // Left by a store elsewhere.
    symlink("/elsewhere/abcdefgh", links.join("abcdefgh")).unwrap();
    assert_eq!(short(Path::new("/layers/abcdefghij"), &links).unwrap(), links.join("abcdefghi"));
}

#[test]
fn odd_paths() {
    privately(|| {
        let mut place = Place::new(1, true);
        let odd = place.path("with,comma:and\\colon");
        fs::create_dir(&odd).unwrap();
        for name in ["fs", "work"] {
            fs::create_dir(odd.join(name)).unwrap();
        }
        place.rootfs.upper = Some(odd.join("fs"));
        place.rootfs.work = Some(odd.join("work"));
        let lower = lower(&place.rootfs, &place.path("empty"));
        classic(&place.rootfs, &lower, &place.path("target"), None, &place.path("l")).unwrap();
        fs::write(place.target("new"), "new").unwrap();
        assert!(odd.join("fs/new").exists());
        unmount(place.path("target"), UnmountFlags::empty()).unwrap();
        let missing = Rootfs { upper: Some(place.path("missing")), ..place.rootfs.clone() };
        let refused = mount(&missing, &place.path("target"), None, &place.path("l"), &place.path("empty"));
        assert!(
            matches!(refused, Err(ImageError::Mount { source, .. }) if source.kind() == io::ErrorKind::NotFound)
        );
        mount(&place.rootfs, &place.path("target"), None, &place.path("l"), &place.path("empty")).unwrap();
        assert!(place.target("new").exists());
        unmount(place.path("target"), UnmountFlags::empty()).unwrap();
        fs::write(place.path("file"), "").unwrap();
        let no_directory = Rootfs { upper: Some(place.path("file")), ..place.rootfs.clone() };
        let refused =
            mount(&no_directory, &place.path("target"), None, &place.path("l"), &place.path("empty"));
        let Err(ImageError::Mount { source, .. }) = refused else { panic!("{refused:?}") };
        assert!(
            source.to_string().contains("is not a directory)"),
            "the kernel's own words are missing: {source}"
        );
    });
}

#[test]
fn a_label_is_never_left_out() {
    privately(|| {
        let place = Place::new(1, true);
        let label = "system_u:object_r:container_file_t:s0:c1,c2";
        let (target, links, empty) = (place.path("target"), place.path("l"), place.path("empty"));
        match mount(&place.rootfs, &target, Some(label), &links, &empty) {
            Ok(()) => {
                let mut value = [0; 256];
                let length = rustix::fs::getxattr(&target, "security.selinux", &mut value).unwrap();
                assert_eq!(String::from_utf8_lossy(&value[..length]).trim_end_matches('\0'), label);
            }
            // Without SELinux there is no such option.
            Err(error) => assert!(!Path::new("/sys/fs/selinux/enforce").exists(), "{error:?}"),
        }
    });
}
