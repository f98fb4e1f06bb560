//! `podvisor check`: what this machine can do, why not, and what to do about it. Reads only.

use std::path::Path;

use podvisor_cgroup::Layout;
use podvisor_config::{Config, HandlerKind, NetworkMode, Vm};

use crate::apparmor::AppArmor;
use crate::hypervisor::{self, Kvm, Virtualizer};
use crate::node::{cgroup_driver, find_program, guest_of, kernel_version};
use crate::selinux::SeLinux;

/// One finding.
enum Finding {
    Good(String),
    /// Something is missing that not every node needs.
    Note(String),
    /// No pod can run, with what to do.
    Bad(String),
}

/// Prints all findings; false when pods cannot run.
pub(crate) fn check(config: &Config) -> bool {
    let mut findings = vec![kernel(), user_namespaces()];
    findings.extend(cgroups(config));
    findings.extend(handlers(config));
    findings.push(monitor(config));
    findings.push(apparmor());
    findings.push(selinux());
    findings.push(checkpoints());
    findings.extend(network(config));
    findings.push(kvm());
    findings.push(Finding::Note(
        "kubelet's /metrics/cadvisor shows pods and containers only with `featureGates: {PodAndContainerStatsFromCRI: true}` \
         in its configuration"
            .into(),
    ));
    let mut works = true;
    for finding in findings {
        match finding {
            Finding::Good(text) => println!("ok    {text}"),
            Finding::Note(text) => println!("note  {text}"),
            Finding::Bad(text) => {
                works = false;
                println!("FAIL  {text}");
            }
        }
    }
    works
}

fn kernel() -> Finding {
    let (major, minor) = kernel_version();
    let overlay = std::fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("\toverlay");
    if (major, minor) < (5, 6) {
        return Finding::Bad(format!("kernel {major}.{minor}: podvisor needs 5.6 or newer (openat2)"));
    }
    if overlay {
        Finding::Good(format!("kernel {major}.{minor} with overlayfs"))
    } else {
        Finding::Bad(format!("kernel {major}.{minor} without overlayfs: load it with `modprobe overlay`"))
    }
}

/// Whether the kernel can; the handlers' features in Status say the rest.
fn user_namespaces() -> Finding {
    let (major, minor) = kernel_version();
    let most = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    match most.trim().parse::<u64>() {
        Ok(0) => {
            Finding::Note("user namespaces are switched off: set the sysctl user.max_user_namespaces".into())
        }
        Ok(_) if (major, minor) >= (5, 19) => {
            Finding::Good("user namespaces of pods, with images by id-mapped layers".into())
        }
        Ok(_) => Finding::Note(format!(
            "kernel {major}.{minor}: user namespaces of pods need 5.19 or newer (id-mapped layers)"
        )),
        Err(_) => Finding::Note("this kernel has no user namespaces: pods cannot have one".into()),
    }
}

fn cgroups(config: &Config) -> Vec<Finding> {
    let driver = cgroup_driver(config.runtime.cgroup_driver);
    let layout = match Layout::detect() {
        Ok(layout) => layout,
        Err(error) => return vec![Finding::Bad(format!("cgroups: {}", crate::error::chain(&error)))],
    };
    let version = if layout.is_v2() { "version 2" } else { "version 1" };
    let mut findings = vec![Finding::Good(format!("cgroups {version}, driver {}", driver.name()))];
    for controller in ["memory", "cpu", "pids"] {
        if !layout.has(controller) {
            findings.push(Finding::Note(format!(
                "cgroup controller {controller} is missing: its limits do not work"
            )));
        }
    }
    if !layout.is_v2() {
        findings.push(Finding::Note(
            "kubelet 1.35 and newer refuses cgroups version 1 unless failCgroupV1 is false".into(),
        ));
    }
    findings
}

fn handlers(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let kvm = Kvm::probe();
    for (name, handler) in &config.handlers {
        let path = match &handler.kind {
            HandlerKind::Oci { path, .. } => path,
            HandlerKind::Vm(vm) => {
                findings.push(virtual_machines(config, name, vm, &kvm));
                continue;
            }
        };
        let trusted = *name == config.runtime.trusted_handler;
        findings.push(match find_program(path) {
            Some(program) => Finding::Good(format!("handler {name}: {}", program.display())),
            None if trusted => Finding::Bad(format!(
                "handler {name} (the trusted one): {} is not installed; install it or set runtime.trusted_handler",
                path.display()
            )),
            None => Finding::Note(format!("handler {name}: {} is not installed", path.display())),
        });
    }
    findings
}

fn monitor(config: &Config) -> Finding {
    let beside = std::env::current_exe().map(|path| path.with_file_name("podvisor-monitor"));
    let program = config.runtime.monitor.clone().or(beside.ok()).unwrap_or_default();
    match find_program(&program) {
        Some(program) => Finding::Good(format!("monitor: {}", program.display())),
        None => Finding::Bad(format!(
            "monitor: {} is no executable file; install it or set runtime.monitor",
            program.display()
        )),
    }
}

fn apparmor() -> Finding {
    if !AppArmor::enabled() {
        return Finding::Note("AppArmor is not in this kernel, or switched off".into());
    }
    match find_program(Path::new("apparmor_parser")) {
        Some(_) => Finding::Good("AppArmor, with podvisor's default profile".into()),
        None => Finding::Note(
            "AppArmor is on, but apparmor_parser is not installed: containers without a profile of their own run without one, and \
             those that ask for the runtime's default are refused; install apparmor"
                .into(),
        ),
    }
}

fn selinux() -> Finding {
    match SeLinux::find() {
        SeLinux::Off => {
            Finding::Note("SELinux is not in this kernel, switched off, or without a policy".into())
        }
        SeLinux::WithoutContexts(why) => Finding::Note(format!(
            "SELinux is on, but containers run without labels, and those that ask for one are refused: {why}"
        )),
        SeLinux::On(policy) => Finding::Good(format!("SELinux: {policy}")),
    }
}

fn checkpoints() -> Finding {
    match find_program(Path::new("criu")) {
        Some(program) => Finding::Good(format!(
            "checkpoints of containers, for handlers that drive CRIU: {} (`criu check` says what it can on this kernel)",
            program.display()
        )),
        None => Finding::Note("containers cannot be checkpointed: CRIU is not installed".into()),
    }
}

fn network(config: &Config) -> Vec<Finding> {
    match config.network.mode {
        NetworkMode::Builtin => vec![match find_program(Path::new("nft")) {
            Some(_) => Finding::Good(format!("network: built-in, bridge {}", config.network.bridge)),
            None => Finding::Bad("network: the built-in network needs nft; install nftables".into()),
        }],
        NetworkMode::Cni => {
            let directory = &config.network.cni_config_dir;
            let configured = std::fs::read_dir(directory).is_ok_and(|entries| {
                entries.flatten().any(|entry| {
                    entry
                        .path()
                        .extension()
                        .is_some_and(|end| end == "conflist" || end == "conf" || end == "json")
                })
            });
            vec![if configured {
                Finding::Good(format!("network: CNI, configured in {}", directory.display()))
            } else {
                Finding::Note(format!(
                    "network: no CNI configuration in {} yet; the node is not ready until a network add-on puts one there",
                    directory.display()
                ))
            }]
        }
    }
}

fn kvm() -> Finding {
    match Kvm::probe() {
        Kvm::Usable => Finding::Good("KVM runs distributions' kernels".into()),
        Kvm::Unusable(why) => Finding::Note(why),
    }
}

/// A handler of type `vm`: what its machines run on, with which guest.
fn virtual_machines(config: &Config, name: &str, vm: &Vm, kvm: &Kvm) -> Finding {
    let choice = match hypervisor::choose(vm, kvm) {
        Ok(choice) => choice,
        Err(why) => return Finding::Note(format!("handler {name}: {why}")),
    };
    match guest_of(vm, &config.root) {
        Err(why) => Finding::Note(format!("handler {name}: {why}")),
        Ok(guest) if choice.virtualizer == Virtualizer::Emulation => Finding::Note(format!(
            "handler {name}: virtual machines by QEMU's translator, which is no isolation boundary; guest kernel {}",
            guest.kernel_release()
        )),
        Ok(guest) => Finding::Good(format!(
            "handler {name}: virtual machines by {}; guest kernel {}",
            choice.virtualizer.words(),
            guest.kernel_release()
        )),
    }
}
