//! A virtual machine of QEMU's translator, with a guest that does what it is told over its console.
#![allow(dead_code)] // each test program uses its part

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use podvisor_guest::{Guests, Inputs, build};

use crate::server::target;

/// A guest that runs.
pub(crate) struct Machine {
    qemu: Child,
    console: Receiver<String>,
    keys: ChildStdin,
    pub(crate) release: String,
    // The kernel and the initramfs are in it.
    _files: tempfile::TempDir,
}

/// For one command, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The lines of the console as they come.
fn lines(console: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// What a command says, or the error's name.
pub(crate) type Answer = Result<String, String>;

/// A guest made of one of the kernels that `make kernels` fetches.
fn files(suite: &str, scratch: &Path) -> (PathBuf, PathBuf) {
    let package = target().join("kernels").join(suite).join("package");
    let only = |directory: PathBuf, prefix: &str| {
        let entries = fs::read_dir(&directory)
            .unwrap_or_else(|error| panic!("{}: {error}; `make kernels` fetches it", directory.display()));
        let mut paths = entries.map(|entry| entry.unwrap().path());
        paths.find(|path| path.file_name().unwrap().to_string_lossy().starts_with(prefix)).unwrap()
    };
    let agent = scratch.join("init");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/init.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-static", "-O2", "-s", "-Wall", "-Werror", "-o"]).arg(&agent).arg(source);
    assert!(compiler.status().unwrap().success());
    let inputs = Inputs {
        vmlinuz: only(package.join("boot"), "vmlinuz-"),
        modules: only(package.join("lib/modules"), ""),
        agent,
        extra_modules: Vec::new(),
        package: None,
        shell: None,
    };
    let guests = Guests::open(scratch);
    guests.install(&build(&inputs, &mut |_| {}).unwrap(), true).unwrap();
    let guest = guests.current().unwrap().unwrap();
    (guest.kernel(), guest.initramfs())
}

impl Machine {
    /// Boots a guest of the kernel of a Debian suite, with a virtio-fs device for each (tag, socket).
    pub(crate) fn start(suite: &str, megabytes: u32, shares: &[(&str, &Path)]) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let (kernel, initramfs) = files(suite, scratch.path());
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
        qemu.args(["-M", "microvm,acpi=on,pit=off,pic=off,rtc=on,memory-backend=memory"]);
        // Virtio 1; the default here is what came before.
        qemu.args(["-global", "virtio-mmio.force-legacy=false"]);
        // With cmpxchg16b the translator is unreliable under load.
        qemu.args(["-accel", "tcg", "-cpu", "max,-cx16", "-m", &megabytes.to_string()]);
        qemu.args(["-object", &format!("memory-backend-memfd,id=memory,size={megabytes}M,share=on")]);
        qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
        // The translator's TSC is the machine's own; on a busy machine the kernel fails to measure it, and then stands still.
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap();
        let megahertz =
            processor.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split_once(": ")).unwrap().1;
        let command_line =
            "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on no5lvl cryptomgr.notests=1";
        qemu.args(["-append", &format!("{command_line} tsc_early_khz={}", megahertz.replace('.', ""))]);
        for (tag, socket) in shares {
            qemu.args(["-chardev", &format!("socket,id={tag},path={}", socket.display())]);
            qemu.args(["-device", &format!("vhost-user-fs-device,chardev={tag},tag={tag}")]);
        }
        let mut qemu = qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let console = lines(qemu.stdout.take().unwrap());
        let keys = qemu.stdin.take().unwrap();
        let mut machine = Self { qemu, console, keys, release: String::new(), _files: scratch };
        machine.release = machine.answer().unwrap();
        machine
    }

    /// Does a command of `init.c`.
    pub(crate) fn ask(&mut self, command: &str) -> Answer {
        writeln!(self.keys, "{command}").unwrap();
        self.answer()
    }

    /// Does one that must succeed, and gives what it says.
    pub(crate) fn done(&mut self, command: &str) -> String {
        self.ask(command).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Does one that must fail, and gives the error's name.
    pub(crate) fn refused(&mut self, command: &str) -> String {
        match self.ask(command) {
            Ok(answer) => panic!("{command}: {answer}"),
            Err(error) => error,
        }
    }

    fn answer(&mut self) -> Answer {
        let mut seen = String::new();
        loop {
            let line = self.console.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("the guest has ended, or hangs: {seen}"));
            // The firmware may have left control sequences before it.
            match line.find("> ok").or_else(|| line.find("> error ")).map(|at| &line[at..]) {
                Some(answer) if answer.starts_with("> ok") => return Ok(answer[4..].trim_start().to_owned()),
                Some(answer) => return Err(answer["> error ".len()..].to_owned()),
                None => seen = format!("{seen}\n{line}"),
            }
        }
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}
