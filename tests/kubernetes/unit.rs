//! podvisor as an administrator has it: from its own package, as a unit of systemd's. Only in the lab (tests/lab/test), which has a systemd.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::machine::run;

const UNIT: &str = "podvisor.service";

/// Where the unit's command is replaced by one with the tests' configuration.
const DROP_IN: &str = "/run/systemd/system/podvisor.service.d";

/// Images lie there, which the lab's own root cannot hold: it is an overlay.
const STATE: &str = "/var/lib/podvisor";

/// Holds what is swapped.
const SWAP: &str = "/run/kubernetes-test.swap";

/// Where kubelet tells logind how long it may take.
const LOGIND: &str = "/etc/systemd/logind.conf.d";

/// More of kubelet's configuration: what it does with systemd and cgroup v2 only.
pub(crate) const KUBELET: &str = r#"{
    "memorySwap": {"swapBehavior": "LimitedSwap"},
    "memoryReservationPolicy": "TieredReservation",
    "memoryThrottlingFactor": 0.9,
    "shutdownGracePeriod": "330s",
    "shutdownGracePeriodCriticalPods": "30s"
}"#;

/// kubelet counts files that lie on the same device as their directory; on an overlay they do not.
const OF_KUBELET: &str = "/var/lib/kubelet";

/// Packages of two versions, which tests/lab/test builds.
const PACKAGES: [&str; 2] = ["LAB_PACKAGE", "LAB_NEXT_PACKAGE"];

/// The installed package; it is purged when this is dropped.
#[derive(Debug)]
pub(crate) struct Unit(());

impl Unit {
    /// Whether this is the lab with systemd.
    pub(crate) fn is_wanted() -> bool {
        env::var_os(PACKAGES[0]).is_some()
    }

    /// Makes room for the state, and swap. The package comes with [`Unit::install`].
    pub(crate) fn prepare() -> Result<Self> {
        fs::create_dir_all(STATE)?;
        mount("state", STATE, "tmpfs", MountFlags::empty(), c"mode=0711").context("mounting the state")?;
        let unit = Self(());
        fs::create_dir_all(OF_KUBELET)?;
        mount("kubelet", OF_KUBELET, "tmpfs", MountFlags::empty(), None)
            .context("mounting kubelet's directory")?;
        fs::File::create(SWAP)?.set_len(2 << 30).context("making room for swap")?;
        // A file of a tmpfs cannot be swapped to.
        let device = run(Command::new("losetup").args(["--find", "--show", SWAP]))?;
        run(Command::new("mkswap").arg(device.trim()))?;
        run(Command::new("swapon").arg(device.trim()))?;
        Ok(unit)
    }

    /// Installs the package of a version, 0 or 1; an older daemon is restarted by it.
    pub(crate) fn install(version: usize, configuration: &Path) -> Result<()> {
        let command = format!(
            "[Service]\nExecStart=\nExecStart=/usr/bin/podvisor serve --config {}\n",
            configuration.display()
        );
        fs::create_dir_all(DROP_IN)?;
        fs::write(Path::new(DROP_IN).join("tests.conf"), command).context("writing a drop-in of the unit")?;
        let package =
            env::var(PACKAGES[version]).with_context(|| format!("{} is not set", PACKAGES[version]))?;
        run(Command::new("dpkg").args(["--install", &package])).map(drop)
    }

    /// Returns when the daemon serves (`Type=notify`).
    pub(crate) fn start() -> Result<()> {
        systemctl(&["start", UNIT])?;
        ensure!(systemctl(&["is-active", UNIT])?.trim() == "active", "the unit is not active");
        Ok(())
    }

    pub(crate) fn stop() -> Result<()> {
        systemctl(&["stop", UNIT]).map(drop)
    }

    /// SIGKILL for the daemon alone; systemd starts another one.
    pub(crate) fn kill() -> Result<()> {
        let before = main_process()?;
        systemctl(&["kill", "--kill-who=main", "--signal=KILL", UNIT])?;
        crate::until("the daemon is dead", || {
            ensure!(main_process()? != before, "process {before} goes on");
            Ok(())
        })
    }

    pub(crate) fn reload() -> Result<()> {
        systemctl(&["reload", UNIT]).map(drop)
    }

    pub(crate) fn log() -> String {
        run(Command::new("journalctl").args(["--no-pager", "--output=cat", "--unit", UNIT]))
            .unwrap_or_default()
    }
}

impl Drop for Unit {
    /// What fails is found by the search for what is left.
    fn drop(&mut self) {
        let _ = Self::stop();
        let _ = run(Command::new("dpkg").args(["--purge", "podvisor"]));
        let _ = fs::remove_dir_all(DROP_IN);
        let _ = systemctl(&["daemon-reload"]);
        // Started by kubelet's asking.
        let _ = systemctl(&["stop", "systemd-logind.service"]);
        let _ = fs::remove_dir_all(LOGIND);
        for device in
            run(Command::new("losetup").args(["--noheadings", "--output", "NAME", "--associated", SWAP]))
                .unwrap_or_default()
                .split_whitespace()
        {
            let _ = run(Command::new("swapoff").arg(device));
            let _ = run(Command::new("losetup").args(["--detach", device]));
        }
        let _ = fs::remove_file(SWAP);
        for mounted in [OF_KUBELET, STATE] {
            let _ = unmount(mounted, UnmountFlags::DETACH);
        }
    }
}

fn main_process() -> Result<String> {
    Ok(systemctl(&["show", "--property=MainPID", "--value", UNIT])?.trim().to_owned())
}

pub(crate) fn systemctl(arguments: &[&str]) -> Result<String> {
    run(Command::new("systemctl").args(arguments))
}
