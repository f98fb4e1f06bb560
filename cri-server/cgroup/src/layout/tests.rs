use super::*;

const HYBRID: &str = "\
23 27 0:22 / /sys rw,relatime - sysfs sysfs rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/lib/x,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

fn layout(mountinfo: &str) -> Result<Layout> {
    Layout::from_mounts(&cgroup_mounts(mountinfo))
}

#[test]
fn hybrid_is_version_1() {
    let Layout::V1 { controllers } = layout(HYBRID).unwrap() else { panic!("version 2") };
    let names: Vec<_> = controllers.keys().map(String::as_str).collect();
    assert_eq!(names, ["cpu", "cpuacct", "memory", "systemd", "unified"]);
    assert_eq!(controllers["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
}

#[test]
fn unified() {
    let text = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";
    assert_eq!(layout(text).unwrap(), Layout::V2 { mount: "/sys/fs/cgroup".into() });
}

#[test]
fn systemd_hybrid_with_all_controllers_in_version_2() {
    let text = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
";
    assert_eq!(layout(text).unwrap(), Layout::V2 { mount: "/sys/fs/cgroup/unified".into() });
}

#[test]
fn hidden_mounts_do_not_count() {
    let text = format!("{HYBRID}50 31 0:50 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    assert_eq!(layout(&text).unwrap(), Layout::V2 { mount: "/sys/fs/cgroup".into() });
    let text = format!("{HYBRID}50 31 0:50 / /sys/fs rw - tmpfs tmpfs rw\n");
    assert!(matches!(layout(&text), Err(CgroupError::NotMounted)));
}

#[test]
fn whole_hierarchy_is_preferred_to_a_part() {
    let text = "\
35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
36 31 0:32 / /mnt/cg\\040roup rw - cgroup cgroup rw,memory
";
    let Layout::V1 { controllers } = layout(text).unwrap() else { panic!("version 2") };
    assert_eq!(controllers["memory"], Path::new("/mnt/cg roup"));
}

#[test]
fn process_below_a_partial_mount() {
    let mounts = cgroup_mounts("35 31 0:32 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    let layout = Layout::from_mounts(&mounts).unwrap();
    let cgroup = layout.resolve(7, "0::/docker/abc/leaf:x\n", &mounts).unwrap();
    assert_eq!(cgroup.path(), "/leaf:x");
    assert_eq!(cgroup.directories(), [Path::new("/sys/fs/cgroup/leaf:x")]);
    for outside in ["0::/docker/abcd\n", "0::/../other\n", "1:memory:/docker/abc\n", "garbage", ""] {
        let error = layout.resolve(7, outside, &mounts).unwrap_err();
        assert!(matches!(error, CgroupError::NotVisible { pid: 7, .. }), "{outside:?}");
    }
}

#[test]
fn hierarchies_of_a_process_may_differ() {
    let mounts = cgroup_mounts(HYBRID);
    let layout = Layout::from_mounts(&mounts).unwrap();
    let text = "4:memory:/a/b\n2:cpu,cpuacct:/\n1:name=systemd:/a\n0::/u\n";
    let cgroup = layout.resolve(7, text, &mounts).unwrap();
    let mut directories = cgroup.directories();
    directories.sort();
    assert_eq!(
        directories,
        [
            Path::new("/sys/fs/cgroup/cpu,cpuacct"),
            Path::new("/sys/fs/cgroup/memory/a/b"),
            Path::new("/sys/fs/cgroup/systemd/a"),
            Path::new("/sys/fs/cgroup/unified/u")
        ]
    );
}

#[test]
fn paths_never_leave_the_mount() {
    let layout = Layout::V2 { mount: "/sys/fs/cgroup".into() };
    for (path, expected) in [
        ("/a/b", "/sys/fs/cgroup/a/b"),
        ("a//./b/", "/sys/fs/cgroup/a/b"),
        ("/../../etc", "/sys/fs/cgroup/etc"),
        ("/a/../../b", "/sys/fs/cgroup/b"),
        ("", "/sys/fs/cgroup"),
    ] {
        assert_eq!(layout.cgroup(path).directories(), [Path::new(expected)], "{path}");
    }
}

#[test]
fn this_host() {
    let layout = Layout::detect().unwrap();
    assert!(layout.has("memory"));
    assert!(!layout.has("no-such-controller"));
    let own = layout.processes().unwrap().cgroup_of(i32::try_from(std::process::id()).unwrap()).unwrap();
    assert!(own.exists());
    let gone = layout.processes().unwrap().cgroup_of(i32::MAX).unwrap_err();
    assert!(gone.is_not_found());
}
