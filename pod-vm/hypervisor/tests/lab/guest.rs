//! Guests of Debian's kernels (`make kernels`) with the tests' first process, built once for each test program.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use podvisor_guest::{Inputs, build};

/// Which of Debian's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    /// 6.1
    Bookworm,
    /// 6.12
    Backports,
}

/// What a machine starts from.
#[derive(Debug, Clone)]
pub struct Guest {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"), PathBuf::from)
}

/// The guest of a suite. It stays in the target directory for the test program's next run.
pub fn guest(suite: Suite) -> Guest {
    static GUESTS: [OnceLock<Guest>; 2] = [OnceLock::new(), OnceLock::new()];
    GUESTS[suite as usize].get_or_init(|| make(suite)).clone()
}

fn make(suite: Suite) -> Guest {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hypervisor/tests/init.c");
    let program = std::env::current_exe().unwrap();
    let name = format!("{}-{suite:?}", program.file_name().unwrap().display());
    let directory = target().join("tmp/guests").join(name);
    let made = Guest { kernel: directory.join("kernel"), initramfs: directory.join("initramfs") };
    let time = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let newest = time(&source).unwrap().max(time(&program).unwrap());
    if [&made.kernel, &made.initramfs].iter().all(|path| time(path).is_ok_and(|made| made > newest)) {
        return made;
    }
    let scratch = tempfile::tempdir().unwrap();
    let agent = scratch.path().join("init");
    let mut compiler = Command::new("cc");
    compiler.args(["-static", "-Os", "-s", "-Wall", "-Werror", "-o"]).arg(&agent).arg(source);
    assert!(compiler.status().unwrap().success());
    fs::create_dir_all(&directory).unwrap();
    with_agent(suite, &agent, &directory)
}

/// A guest with another first process.
pub fn with_agent(suite: Suite, agent: &Path, directory: &Path) -> Guest {
    let name = if suite == Suite::Bookworm { "bookworm" } else { "bookworm-backports" };
    let package = target().join("kernels").join(name).join("package");
    let fetched = |path: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(path)
            .unwrap_or_else(|error| panic!("{}: {error}; `make kernels` fetches it", path.display()));
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let vmlinuz = fetched(&package.join("boot"))
        .into_iter()
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("vmlinuz-"))
        .expect("the package has a kernel");
    let modules = fetched(&package.join("lib/modules")).remove(0);
    let extra_modules = vec!["pvpanic_mmio".to_owned()];
    let inputs =
        Inputs { vmlinuz, modules, agent: agent.to_owned(), extra_modules, package: None, shell: None };
    let built = build(&inputs, &mut |_| {}).unwrap();
    let guest = Guest { kernel: directory.join("kernel"), initramfs: directory.join("initramfs") };
    for (path, content) in [(&guest.kernel, built.kernel()), (&guest.initramfs, built.initramfs())] {
        // Whole or not at all, whatever runs at the same time.
        let mut file = tempfile::NamedTempFile::new_in(directory).unwrap();
        std::io::Write::write_all(&mut file, content).unwrap();
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).unwrap();
        file.persist(path).unwrap();
    }
    guest
}
