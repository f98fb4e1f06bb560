//! Guests built from Debian's kernels 6.1 and 6.12 (`make kernels`), booted by QEMU without KVM: the kernel starts from its PVH
//! entry, the first process runs, every module can be loaded in the order of the list, and devices find their drivers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use podvisor_guest::{Built, Guests, Inputs, build};

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"), PathBuf::from)
}

/// The only entry of a directory.
fn only(directory: &Path) -> PathBuf {
    let entries = fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("{}: {error}; `make kernels` fetches it", directory.display()));
    let entries: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries[0].clone()
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// A kernel of the tests, and a first process that says what it sees.
fn inputs(suite: &str, scratch: &Path) -> Inputs {
    let package = target().join("kernels").join(suite).join("package");
    let boot = package.join("boot");
    let vmlinuz = fs::read_dir(&boot)
        .unwrap_or_else(|error| panic!("{}: {error}; `make kernels` fetches it", boot.display()))
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("vmlinuz-"))
        .expect("the package has a kernel");
    let agent = scratch.join("init");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/init.c");
    run(Command::new("cc").args(["-static", "-Os", "-s", "-Wall", "-Werror", "-o"]).arg(&agent).arg(source));
    let modules = only(&package.join("lib/modules"));
    Inputs { vmlinuz, modules, agent, extra_modules: Vec::new(), package: None, shell: None }
}

/// Boots a guest with a device of each kind; gives what its console said.
fn boot(kernel: &Path, initramfs: &Path) -> String {
    let mut qemu = Command::new("timeout");
    qemu.args(["300", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"]);
    // Without a clock (rtc) the kernel waits seconds for one; with cmpxchg16b the translator is unreliable under load.
    qemu.args(["-M", "microvm,acpi=on,pit=off,pic=off,rtc=on", "-accel", "tcg", "-cpu", "max,-cx16"]);
    qemu.args(["-m", "256", "-display", "none", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    // The translator's TSC is the machine's own; on a busy machine the kernel fails to measure it, and then stands still.
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap();
    let megahertz =
        processor.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split_once(": ")).unwrap().1;
    let kilohertz = megahertz.replace('.', "");
    let command_line = "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on no5lvl cryptomgr.notests=1";
    qemu.args(["-append", &format!("{command_line} tsc_early_khz={kilohertz}")]);
    for device in ["virtio-rng", "virtio-balloon", "virtio-serial"] {
        qemu.args(["-device", &format!("{device}-device")]);
    }
    qemu.args([
        "-drive",
        "if=none,id=disk,driver=null-co,size=1M",
        "-device",
        "virtio-blk-device,drive=disk",
    ]);
    qemu.args(["-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-device,netdev=net"]);
    run(&mut qemu)
}

/// The lines of `/modules` in the initramfs as (when, name, needs).
fn list(built: &Built) -> Vec<(String, String, BTreeSet<String>)> {
    let magic = b"podvisor-modules 1\n";
    let start =
        built.initramfs().windows(magic.len()).position(|window| window == magic).unwrap() + magic.len();
    let end = built.initramfs()[start..].iter().position(|byte| *byte == 0).unwrap();
    let text = std::str::from_utf8(&built.initramfs()[start..start + end]).unwrap();
    let words = |line: &str| {
        let mut words = line.split(' ').map(str::to_owned);
        (words.next().unwrap(), words.next().unwrap(), words.collect())
    };
    text.lines().filter(|line| !line.starts_with("alias ")).map(words).collect()
}

fn boots(suite: &str, version: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let inputs = inputs(suite, scratch.path());
    let mut steps = Vec::new();
    let built = build(&inputs, &mut |step| steps.push(step.to_owned())).unwrap();
    assert!(steps.iter().any(|step| step.starts_with("packing ")), "{steps:?}");
    let again = build(&inputs, &mut |_| {}).unwrap();
    assert!(built.kernel() == again.kernel() && built.initramfs() == again.initramfs(), "two builds differ");
    assert_eq!(built.manifest(), again.manifest());

    let guests = Guests::open(scratch.path());
    guests.install(&built, true).unwrap();
    let guest = guests.current().unwrap().expect("a current guest");
    assert!(guest.kernel_release().starts_with(version), "{}", guest.kernel_release());
    assert_eq!(guest.protocol(), 7);
    let manifest = guest.manifest();
    assert!(manifest.missing.is_empty(), "{:?}", manifest.missing);
    // Most of what is only read by debuggers, and the zeros, are gone.
    assert!(manifest.kernel.size < 42_000_000 && manifest.initramfs.size < 12_000_000, "{manifest:?}");

    let console = boot(&guest.kernel(), &guest.initramfs());
    println!("{console}");
    let said: Vec<&str> = console
        .lines()
        .filter_map(|line| line.trim_end().split_once("test: "))
        .map(|(_, text)| text)
        .collect();
    let has = |text: &str| said.contains(&text);
    assert!(has(&format!("kernel {}", guest.kernel_release())));
    for entry in ["init", "modules", "lib", "dev", "proc", "sys", "run", "tmp"] {
        assert!(has(&format!("entry /{entry}")), "{entry}");
    }
    let listed = list(&built);
    assert_eq!(listed.len(), manifest.modules.len());
    for (when, name, _) in &listed {
        // There is no KVM below it.
        let fine = has(&format!("{when} {name} loaded")) || name == "ptp_kvm";
        assert!(fine, "module {name} was not loaded");
    }
    for device in ["virtio_rng", "virtio_balloon", "virtio_console", "virtio_blk", "virtio_net"] {
        assert!(has(&format!("device {device}")), "{device}");
    }
    for file_system in ["nodev\toverlay", "nodev\tvirtiofs", "\terofs", "\text4"] {
        assert!(has(&format!("/proc/filesystems: {file_system}")), "{file_system}");
    }
    assert!(has("end"));
}

#[test]
fn kernel_6_1_boots() {
    boots("bookworm", "6.1.");
}

#[test]
fn kernel_6_12_boots() {
    boots("bookworm-backports", "6.12.");
}

/// depmod finds the same dependencies from the symbols.
#[test]
fn dependencies_are_those_of_depmod() {
    for suite in ["bookworm", "bookworm-backports"] {
        let scratch = tempfile::tempdir_in(target()).unwrap();
        let inputs = inputs(suite, scratch.path());
        let built = build(&inputs, &mut |_| {}).unwrap();
        let release = &built.manifest().kernel.release;
        // depmod writes into the directory: a copy made of links.
        let copy = scratch.path().join("lib/modules").join(release);
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        run(Command::new("cp").arg("-al").arg(&inputs.modules).arg(&copy));
        let depmod =
            Command::new("/sbin/depmod").arg("-b").arg(scratch.path()).arg(release).output().unwrap();
        assert!(depmod.status.success(), "{}", String::from_utf8_lossy(&depmod.stderr));

        let name = |path: &str| {
            let file = path.rsplit('/').next().unwrap();
            file.split_once(".ko").unwrap().0.replace('-', "_")
        };
        let text = fs::read_to_string(copy.join("modules.dep")).unwrap();
        let expected: BTreeMap<String, BTreeSet<String>> = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(module, needs)| (name(module), needs.split_whitespace().map(name).collect()))
            .collect();
        // Wishes are a list of their own: `softdep MODULE pre: …`.
        let text = fs::read_to_string(copy.join("modules.softdep")).unwrap();
        let wishes: BTreeSet<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("softdep ")?.split_once(" pre: "))
            .flat_map(|(_, wishes)| wishes.split_whitespace().map(|wish| wish.replace('-', "_")))
            .collect();
        let mut before = BTreeSet::new();
        for (_, module, needs) in list(&built) {
            let expected = &expected[&module];
            let more: Vec<&String> = needs.difference(expected).collect();
            assert!(expected.is_subset(&needs), "{suite}: {module} needs {expected:?}, found were {needs:?}");
            assert!(
                more.iter().all(|module| wishes.contains(*module)),
                "{suite}: {module} does not need {more:?}"
            );
            assert!(needs.is_subset(&before), "{suite}: {module} stands before what it needs");
            before.insert(module);
        }
    }
}
