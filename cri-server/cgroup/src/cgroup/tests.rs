//! On this host's real hierarchies, in a cgroup of the test's own.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// A cgroup for one test, killed and removed at its end.
struct Own(Cgroup);

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Own {
    fn new() -> Self {
        Self::on(&Layout::detect().unwrap())
    }

    fn on(layout: &Layout) -> Self {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = format!("/podvisor-test-{}-{number}", std::process::id());
        Self(layout.cgroup(&path))
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.remove().unwrap();
    }
}

/// A process that sleeps until it is killed.
fn sleeper() -> Child {
    Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap()
}

fn pid(child: &Child) -> i32 {
    i32::try_from(child.id()).unwrap()
}

#[test]
fn life() {
    life_on(&Layout::detect().unwrap());
}

/// The hybrid layout has a unified hierarchy without controllers, which is enough for everything but limits and statistics.
#[test]
fn life_on_the_unified_hierarchy() {
    let unified = Path::new("/sys/fs/cgroup/unified");
    if unified.join("cgroup.procs").exists() {
        life_on(&Layout::V2 { mount: unified.into() });
    } else {
        println!("skipped: this host has no hybrid layout");
    }
}

fn life_on(layout: &Layout) {
    let own = Own::on(layout);
    let leaf = own.0.child("a/b");
    assert!(!leaf.exists());
    assert_eq!(leaf.pids().unwrap(), []);
    leaf.create().unwrap();
    leaf.create().unwrap();
    assert!(leaf.exists());
    for directory in leaf.directories() {
        assert!(directory.is_dir(), "{}", directory.display());
    }

    let mut child = sleeper();
    leaf.add(pid(&child)).unwrap();
    assert_eq!(leaf.pids().unwrap(), [pid(&child)]);
    assert_eq!(own.0.pids().unwrap(), []);
    assert_eq!(own.0.all_pids().unwrap(), [pid(&child)]);
    let found = layout.processes().unwrap().cgroup_of(pid(&child)).unwrap();
    assert_eq!(found.path(), leaf.path());
    for directory in leaf.directories() {
        assert!(found.directories().contains(&directory), "{}", directory.display());
    }

    own.0.kill().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    own.0.remove().unwrap();
    assert!(own.0.directories().into_iter().all(|directory| !directory.exists()));
    own.0.remove().unwrap();
    own.0.kill().unwrap();
    assert!(own.0.stats().unwrap_err().is_not_found());
    assert!(own.0.add(pid(&child)).unwrap_err().is_not_found());
}

#[test]
fn kill_reaches_forking_and_paused_processes() {
    let own = Own::new();
    own.0.create().unwrap();
    let mut paused = sleeper();
    let cell = own.0.child("paused");
    cell.create().unwrap();
    cell.add(pid(&paused)).unwrap();
    cell.freeze(true).unwrap();
    // Forks as fast as it can, each child living on its own; bounded by pids.max so that a failed test does not take the machine along.
    let bomb = own.0.child("bomb");
    bomb.create().unwrap();
    if let Some(directory) = bomb.directory("pids") {
        write(&directory.join("pids.max"), "100").unwrap();
    }
    let mut forking = Command::new("sh")
        .args(["-c", "read go; while :; do sleep 1000 & done"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    bomb.add(pid(&forking)).unwrap();
    io::Write::write_all(&mut forking.stdin.take().unwrap(), b"go\n").unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while bomb.pids().unwrap().len() < 10 {
        assert!(Instant::now() < deadline, "nothing was forked");
        std::thread::yield_now();
    }
    own.0.kill().unwrap();
    forking.wait().unwrap();
    paused.wait().unwrap();
    own.0.remove().unwrap();
    assert!(!own.0.exists());
}

#[test]
fn remove_tells_when_processes_stay() {
    let own = Own::new();
    own.0.create().unwrap();
    let mut child = sleeper();
    own.0.add(pid(&child)).unwrap();
    let directory = own.0.directories()[0].to_path_buf();
    let error = remove_tree(&directory, Instant::now()).unwrap_err();
    assert!(matches!(&error, CgroupError::Remove { path, .. } if *path == directory), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn the_root_is_safe() {
    let layout = Layout::detect().unwrap();
    for path in ["", "/", "/../..", "/a/.."] {
        let root = layout.cgroup(path);
        assert!(matches!(root.kill(), Err(CgroupError::Root { action: "kill" })));
        assert!(matches!(root.remove(), Err(CgroupError::Root { action: "remove" })));
    }
}

/// A process can be at the root of one hierarchy and elsewhere in another: removing "its cgroup" must not touch that root.
#[test]
fn roots_of_single_hierarchies_are_safe() {
    let Layout::V1 { controllers } = Layout::detect().unwrap() else {
        println!("skipped: this host has one hierarchy");
        return;
    };
    let own = Own::new();
    let bystander = own.0.child("bystander");
    bystander.create().unwrap();
    let mut paths: BTreeMap<_, _> =
        controllers.keys().map(|name| (name.clone(), own.0.path[..].to_owned())).collect();
    paths.insert("cpu".to_owned(), String::new());
    let mixed = Cgroup::at_each(&Layout::V1 { controllers }, &paths);
    mixed.remove().unwrap();
    assert!(bystander.directory("cpu").unwrap().exists());
    assert!(!bystander.directory("memory").unwrap().exists());
}

#[test]
fn statistics_and_out_of_memory() {
    let own = Own::new();
    own.0.create().unwrap();
    let fresh = own.0.stats().unwrap();
    assert_eq!(fresh.memory.unwrap().limit, None);
    assert_eq!(fresh.memory.unwrap().available, None);
    assert_eq!(own.0.oom_kills().unwrap(), 0);

    let limit = if Layout::detect().unwrap().is_v2() { "memory.max" } else { "memory.limit_in_bytes" };
    write(&own.0.directory("memory").unwrap().join(limit), "33554432").unwrap();
    // tail must hold an endless line of zeros.
    let mut hungry = Command::new("sh")
        .args(["-c", "read go; tail /dev/zero"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    own.0.add(pid(&hungry)).unwrap();
    let counted = own.0.stats().unwrap();
    assert_eq!(counted.pids, Some(1));
    assert_eq!(counted.memory.unwrap().limit, Some(33_554_432));
    assert!(counted.memory.unwrap().available.is_some());
    io::Write::write_all(&mut hungry.stdin.take().unwrap(), b"go\n").unwrap();

    assert!(!hungry.wait().unwrap().success());
    assert!(own.0.oom_kills().unwrap() > 0);
    let used = own.0.stats().unwrap();
    assert!(used.cpu.unwrap().usage_ns > 0);
    assert!(used.memory.unwrap().page_faults > 0);

    own.0.remove().unwrap();
    assert!(own.0.oom_kills().unwrap_err().is_not_found());
}
