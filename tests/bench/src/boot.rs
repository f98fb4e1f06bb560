//! The time that QEMU takes for a boot of the guest's kernel and initramfs until a process runs, without a pod.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::guests_dir;
use tempfile::TempDir;

use crate::wire::Sample;

/// The first process of a guest in which nothing but a boot is measured.
const FIRST_PROCESS: &str = r#"
static long call(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
void _start(void) {
    call(1, 1, (long)"bench: up\n", 10);
    for (;;) call(34, 0, 0, 0);
}
"#;

/// What the kernel of a translated machine with one processor is told more by podvisor-qemu.
const WORDS: &str = "tsc=reliable noreplace-smp";

/// The guest's files with that process in them.
#[derive(Debug)]
pub(crate) struct Boot {
    directory: TempDir,
}

impl Boot {
    /// The guest's initramfs with the process beside the agent: the kernel unpacks archives one after the other (Documentation/filesystems/
    /// ramfs-rootfs-initramfs.rst; the format is in Documentation/driver-api/early-userspace/buffer-format.rst).
    pub(crate) fn new() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("boot.").tempdir()?;
        let (source, program) = (directory.path().join("first.c"), directory.path().join("first"));
        fs::write(&source, FIRST_PROCESS)?;
        let mut compiler = Command::new("cc");
        compiler.args(["-static", "-nostdlib", "-Os", "-s", "-o"]).arg(&program).arg(&source);
        ensure!(compiler.status().context("running cc")?.success(), "cc has failed");
        let mut archive =
            fs::read(guests_dir().join("current/initramfs")).context("`make guest` makes it")?;
        archive.resize(archive.len().next_multiple_of(512), 0);
        for (name, mode, content) in
            [("bench", 0o100_755, fs::read(&program)?), ("TRAILER!!!", 0, Vec::new())]
        {
            let fields = [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
            archive.extend(b"070701");
            archive.extend(fields.map(|field| format!("{field:08X}")).concat().bytes());
            archive.extend(name.bytes().chain([0]));
            archive.resize(archive.len().next_multiple_of(4), 0);
            archive.extend(content);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
        let boot = Self { directory };
        fs::write(boot.initramfs(), archive)?;
        Ok(boot)
    }

    fn initramfs(&self) -> PathBuf {
        self.directory.path().join("initramfs")
    }

    pub(crate) fn version() -> Result<String> {
        let output = Command::new("qemu-system-x86_64").arg("--version").output()?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
    }

    /// Workload "machine": as anybody starts it, and with what podvisor-qemu tells a kernel.
    pub(crate) fn run(&self) -> Result<Vec<Sample>> {
        let bare = Sample::milliseconds("RunPodSandbox", self.boot("")?);
        Ok(vec![bare, Sample::milliseconds("boot with a pod's words for the kernel", self.boot(WORDS)?)])
    }

    /// The time until the first process runs, of QEMU as anybody starts it for speed: no device but a console.
    fn boot(&self, more: &str) -> Result<Duration> {
        let words = format!(
            "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on no5lvl cryptomgr.notests=1 rdinit=/bench tsc_early_khz={} {more}",
            kilohertz()?
        );
        let began = Instant::now();
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
            .args(["-M", "microvm,acpi=on,pit=off,pic=off,rtc=on"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max,-cx16", "-m", "256"])
            .arg("-kernel")
            .arg(guests_dir().join("current/kernel"))
            .arg("-initrd")
            .arg(self.initramfs())
            .args(["-append", &words])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting qemu-system-x86_64")?;
        let mut lines = BufReader::new(qemu.stdout.take().context("no output")?).lines();
        let said = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("bench: up")));
        let took = began.elapsed();
        qemu.kill()?;
        qemu.wait()?;
        said.context("the first process has not said a word")??;
        Ok(took)
    }
}

/// What the time stamp counter counts, near enough for a boot.
fn kilohertz() -> Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("cpu MHz")).context("no cpu MHz")?;
    Ok(line.trim_start_matches([' ', '\t', ':']).replace('.', ""))
}
