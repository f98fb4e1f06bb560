//! A place of its own for each test: a thread in new mount, network, IPC and UTS namespaces with an empty `/run`. What
//! the test leaves there ends with the thread. Processes and threads started from it live there too.
#![allow(dead_code)] // not every test binary uses all of it

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

/// Runs `test` in a thread of its own place.
pub(crate) fn isolated<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::Builder::new().spawn(move || {
        unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS);
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        rustix::mount::mount("run", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
        run("ip", &["link", "set", "lo", "up"]);
        test()
    });
    thread.unwrap().join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[allow(unsafe_code)]
fn unshare(flags: UnshareFlags) {
    // SAFETY: CLONE_FILES, which makes this call unsafe, is not among the flags that the function above passes.
    unsafe { rustix::thread::unshare_unsafe(flags) }.expect("these tests need root");
}

/// A program's standard output; panics with its standard error when it fails.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}: {out}{err}", output.status);
    out.into_owned()
}

/// Polls until `condition` holds; panics after ten seconds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within ten seconds");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Names in a directory, sorted; empty when there is none.
pub(crate) fn names(directory: impl AsRef<Path>) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
