//! Pods in virtual machines: what the containers see, what kubelet sees, and how they end (`vm_devices.rs`: what they are given while they
//! run). Each boot takes seconds, so each test makes of its machine what it can. The guest is made by `make guest`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use podvisor_critest::node::{Options, VM, daemon_program};
use podvisor_critest::target_dir;
use podvisor_proto::cri::{Device, Mount, MountPropagation, NamespaceMode, PodSandboxState};
use podvisor_tests::images::BUSYBOX;
use podvisor_tests::{BlockVolume, Fixture, Pod, ask, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::Tests;

const UNTRUSTED: &str = "io.kubernetes.cri.untrusted-workload";

pub(crate) fn add(tests: &mut Tests) {
    let options = || Options { handler: VM.to_owned(), ..Options::default() };
    tests.add_with("vm::has_a_kernel_of_its_own", options(), has_a_kernel_of_its_own);
    tests.add_with("vm::does_what_crictl_asks", options(), does_what_crictl_asks);
    tests.add_with("vm::has_volumes_of_every_kind", options(), has_volumes_of_every_kind);
    tests.add_with(
        "vm::is_chosen_by_annotation_and_alias",
        Options::default(),
        is_chosen_by_annotation_and_alias,
    );
    tests.add_with("vm::has_the_limits_of_a_trusted_pod", options(), has_the_limits_of_a_trusted_pod);
    tests.add_with("vm::does_not_notice_the_daemon", options(), does_not_notice_the_daemon);
    tests.add_with("vm::keeps_the_guest_it_began_with", options(), keeps_the_guest_it_began_with);
    tests.add_with("vm::dies_and_says_why", options(), dies_and_says_why);
    let micro = "[runtime.handlers.micro]\ntype = \"vm\"\nmachine = \"microvm\"\nallow_emulation = true\n";
    tests.add_with(
        "vm::refuses_what_is_the_hosts",
        Options { more: micro.to_owned(), ..options() },
        refuses_what_is_the_hosts,
    );
    tests.add_with(
        "vm::keeps_containers_within_their_limits",
        options(),
        keeps_containers_within_their_limits,
    );
}

/// What `crictl inspectp` shows.
pub(crate) async fn info(f: &Fixture, pod: &str) -> Result<serde_json::Value> {
    Ok(serde_json::from_str(&f.cri.pod_info(pod).await?)?)
}

/// What it shows of the machine.
pub(crate) async fn machine(f: &Fixture, pod: &str) -> Result<serde_json::Value> {
    Ok(info(f, pod).await?["virtualMachine"].clone())
}

/// A process of the pod's: its monitor, or one of the machine's.
pub(crate) async fn process(f: &Fixture, pod: &str, which: &str) -> Result<Pid> {
    let info = info(f, pod).await?;
    let found = info[which].as_i64().or_else(|| info["virtualMachine"][which].as_i64());
    let pid = found.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    pid.with_context(|| format!("no {which} in {info}"))
}

/// What an administrator types.
async fn does_what_crictl_asks(f: &mut Fixture) -> Result<()> {
    let program = target_dir().join("tools/crictl");
    let endpoint = format!("unix://{}", f.node.socket().display());
    let crictl = |words: &[&str]| -> Result<String> {
        let mut command = Command::new(&program);
        command.args(["--timeout", "5m", "--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint]);
        let output = command.args(words).output().context("running crictl, which `make deps` builds")?;
        ensure!(output.status.success(), "crictl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let logs = f.node.path("crictl-logs");
    fs::create_dir(&logs)?;
    let pod = json!({
        "metadata": {"name": "typed", "namespace": "default", "uid": "typed", "attempt": 0},
        "hostname": "typed",
        "log_directory": logs,
        "linux": {"cgroup_parent": format!("{}/podtyped", ask::CGROUPS)},
    });
    let container = json!({
        "metadata": {"name": "first"},
        "image": {"image": BUSYBOX},
        "log_path": "first.log",
        "command": ["sh", "-c", "echo Hello from $(hostname); trap 'exit 3' TERM; while :; do sleep 0.1; done"],
    });
    let [pod_file, container_file] = [("pod", &pod), ("container", &container)].map(|(name, value)| {
        let path = f.node.path(&format!("{name}.json"));
        fs::write(&path, value.to_string()).map(|()| path.display().to_string())
    });
    let (pod_file, container_file) = (pod_file?, container_file?);
    crictl(&["pull", BUSYBOX])?;
    let pod = crictl(&["runp", "--runtime", VM, &pod_file])?;
    let container = crictl(&["create", &pod, &container_file, &pod_file])?;
    crictl(&["start", &container])?;
    let host = rustix::system::uname().release().to_string_lossy().into_owned();
    let kernel = crictl(&["exec", &container, "uname", "-r"])?;
    let shown: serde_json::Value = serde_json::from_str(&crictl(&["inspectp", &pod])?)?;
    ensure!(kernel != host && shown["info"]["virtualMachine"]["kernelRelease"] == kernel, "{kernel} {shown}");
    eventually("the log is not there", || async {
        let said = crictl(&["logs", &container])?;
        ensure!(said == "Hello from typed", "{said}");
        Ok(())
    })
    .await?;
    crictl(&["stop", "--timeout", "60", &container])?;
    let shown: serde_json::Value = serde_json::from_str(&crictl(&["inspect", &container])?)?;
    ensure!(shown["status"]["exitCode"] == 3, "{shown}");
    crictl(&["rm", &container])?;
    crictl(&["stopp", &pod])?;
    crictl(&["rmp", &pod])?;
    ensure!(crictl(&["pods", "--quiet"])?.is_empty());
    Ok(())
}

async fn has_a_kernel_of_its_own(f: &mut Fixture) -> Result<()> {
    let (pod, first) = f.running("pod", &ask::waiting("first")).await?;
    let host = rustix::system::uname().release().to_string_lossy().into_owned();
    let kernel = f.cri.output(&first, &["uname", "-r"]).await?;
    ensure!(kernel.trim() != host, "{kernel}");
    let machine = machine(f, &pod.id).await?;
    ensure!(machine["kernelRelease"] == kernel.trim(), "{machine} {kernel}");
    // What is best: podvisor-vmm where KVM works.
    let expected = if machine["warning"].is_string() { "qemu" } else { "podvisor-vmm" };
    ensure!(machine["hypervisor"].as_str().is_some_and(|name| name.starts_with(expected)), "{machine}");

    // The pod's containers share its network and its name.
    let second = pod.start(&ask::waiting("second")).await?;
    for container in [&first, &second] {
        ensure!(f.cri.output(container, &["hostname"]).await? == "pod\n");
    }
    f.cri.output(&first, &["sh", "-c", "echo hello | nc -l -p 4000 >/dev/null 2>&1 &"]).await?;
    let said = f.cri.output(&second, &["sh", "-c", "sleep 1; nc 127.0.0.1 4000 </dev/null"]).await?;
    ensure!(said == "hello\n", "{said:?}");
    let address = f.cri.pod_status(&pod.id).await?.network.context("no network")?.ip;
    let seen = f.cri.output(&first, &["ip", "address", "show", "dev", "eth0"]).await?;
    ensure!(seen.contains(&address), "{address}: {seen}");

    // Output, exit codes, standard streams.
    let (text, code) = pod.script("third", "echo out; echo err >&2; exit 4").await?;
    ensure!(text == "out\n" && code == 4, "{text:?} {code}");
    ensure!(pod.log("third.log")?.stderr() == "err\n");
    let failed = f.cri.exec(&first, &["sh", "-c", "echo said; exit 7"], 60).await?;
    ensure!((failed.exit_code, failed.stdout.as_slice()) == (7, &b"said\n"[..]), "{failed:?}");
    let late = f.cri.exec(&first, &["sleep", "4321"], 1).await.err().context("it came to an end")?;
    ensure!(late.code() == tonic::Code::DeadlineExceeded, "{late}");

    let stubborn = pod.start(&ask::script("stubborn", "trap '' TERM; while :; do sleep 1; done")).await?;
    f.cri.stop(&stubborn, 1).await?;
    ensure!(f.cri.status(&stubborn).await?.exit_code == 137);
    f.cri.remove(&stubborn).await?;
    ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
    Ok(())
}

/// A shared mount, in which another one appears.
struct Later(PathBuf);

impl Later {
    fn at(directory: &Path) -> Result<Self> {
        use rustix::mount::{MountPropagationFlags as Propagation, mount_bind, mount_change};
        fs::create_dir_all(directory.join("inner"))?;
        mount_bind(directory, directory)?;
        let later = Self(directory.to_owned());
        mount_change(directory, Propagation::PRIVATE)?;
        mount_change(directory, Propagation::SHARED)?;
        Ok(later)
    }

    fn mount(&self) -> Result<()> {
        let flags = rustix::mount::MountFlags::empty();
        Ok(rustix::mount::mount("later", self.0.join("inner"), "tmpfs", flags, None::<&std::ffi::CStr>)?)
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        for place in [self.0.join("inner"), self.0.clone()] {
            let _ = rustix::mount::unmount(place, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

async fn has_volumes_of_every_kind(f: &mut Fixture) -> Result<()> {
    let directory = f.node.path("volume");
    fs::create_dir_all(directory.join("sub"))?;
    fs::write(directory.join("file"), "from the host\n")?;
    let single = f.node.path("single");
    fs::write(&single, "alone\n")?;
    let path = |path: &Path| path.display().to_string();
    let mut container = ask::waiting("c");
    container.mounts = vec![
        Mount { host_path: path(&directory), container_path: "/data".into(), ..Default::default() },
        Mount {
            host_path: path(&directory),
            container_path: "/read".into(),
            readonly: true,
            ..Default::default()
        },
        Mount { host_path: path(&single), container_path: "/etc/single".into(), ..Default::default() },
        Mount {
            host_path: path(&directory.join("sub")),
            container_path: "/later".into(),
            propagation: MountPropagation::PropagationHostToContainer.into(),
            ..Default::default()
        },
    ];
    // Mounts propagate from a mount that is shared.
    let later = Later::at(&directory.join("sub"))?;
    let (_, id) = f.running("pod", &container).await?;
    let run = async |script: &str| f.cri.output(&id, &["sh", "-c", script]).await;
    ensure!(run("cat /data/file /etc/single").await? == "from the host\nalone\n");
    run("echo from the guest >/data/new && chown 1000:2000 /data/new && chmod 640 /data/new").await?;
    ensure!(fs::read_to_string(directory.join("new"))? == "from the guest\n");
    let metadata = fs::metadata(directory.join("new"))?;
    let (uid, gid) = {
        use std::os::unix::fs::MetadataExt;
        (metadata.uid(), metadata.gid())
    };
    ensure!((uid, gid) == (1000, 2000), "{uid} {gid}");
    ensure!(run("echo x >/read/new 2>&1 || echo refused").await?.contains("refused"));
    // Changes on the host are seen at once, links that are swapped too, as kubelet's volumes do it.
    for version in ["one", "two"] {
        fs::create_dir_all(directory.join(version))?;
        fs::write(directory.join(version).join("value"), version)?;
        let (link, swap) = (directory.join("..data"), directory.join("..data_tmp"));
        std::os::unix::fs::symlink(version, &swap)?;
        fs::rename(&swap, &link)?;
        ensure!(run("cat /data/..data/value").await? == version);
    }
    // A mount that comes later.
    later.mount()?;
    fs::write(directory.join("sub/inner/mounted"), "later\n")?;
    let seen = run("cat /later/inner/mounted").await;
    drop(later);
    ensure!(seen? == "later\n");
    Ok(())
}

async fn is_chosen_by_annotation_and_alias(f: &mut Fixture) -> Result<()> {
    // The guest was not there when the daemon started.
    fs::create_dir_all(f.node.path("root"))?;
    let mut config = f.ask_pod("annotated");
    config.annotations.insert(UNTRUSTED.into(), "true".into());
    fs::create_dir_all(&config.log_directory)?;
    let refused = f.cri.run_pod(&config).await.err().context("a guest that is not there has started")?;
    ensure!(refused.message().contains("podvisor guest build"), "{refused}");
    std::os::unix::fs::symlink(podvisor_critest::node::guests_dir(), f.node.path("root/guests"))?;

    let trusted = f.running("trusted", &ask::waiting("c")).await?;
    let host = f.cri.output(&trusted.1, &["uname", "-r"]).await?;
    let pod = f.run(config).await?;
    let container = pod.start(&ask::waiting("c")).await?;
    ensure!(f.cri.output(&container, &["uname", "-r"]).await? != host);
    f.cri.stop_pod(&pod.id).await?;

    let aliased = f.ask_pod("aliased");
    let id = f.cri.run_pod_by(&aliased, "kata").await?;
    ensure!(f.cri.pod_status(&id).await?.runtime_handler == "kata");
    ensure!(machine(f, &id).await?["kernelRelease"].is_string());
    Ok(())
}

/// A container whose spec names no resource limits has those of the daemon (setrlimit(2)), wherever it runs.
async fn has_the_limits_of_a_trusted_pod(f: &mut Fixture) -> Result<()> {
    const SAME: [&str; 6] =
        ["open files", "processes", "locked memory", "pending signals", "msgqueue size", "stack size"];
    let (machine, inside) = f.running("machine", &ask::waiting("c")).await?;
    let config = f.ask_pod("trusted");
    fs::create_dir_all(&config.log_directory)?;
    let trusted = Pod::known(&f.cri.run_pod_by(&config, "runc").await?, &config, &f.cri);
    let outside = trusted.start(&ask::waiting("c")).await?;
    let limits = async |container: &str| -> Result<Vec<String>> {
        let text = f.cri.output(container, &["cat", "/proc/self/limits"]).await?;
        let of = |what| text.lines().find(|line| line.starts_with(&format!("Max {what}"))).map(str::to_owned);
        SAME.iter().map(|what| of(what).with_context(|| format!("no {what} in {text}"))).collect()
    };
    let (inside, outside) = (limits(&inside).await?, limits(&outside).await?);
    ensure!(inside == outside, "{inside:#?} in a machine, {outside:#?} on the host");
    f.cri.stop_pod(&trusted.id).await?;
    f.cri.stop_pod(&machine.id).await?;
    Ok(())
}

async fn does_not_notice_the_daemon(f: &mut Fixture) -> Result<()> {
    let (pod, stays) = f.running("pod", &ask::waiting("stays")).await?;
    let ends =
        pod.start(&ask::script("ends", "while [ ! -e /end ]; do sleep 0.1; done; echo end; exit 5")).await?;
    let created = pod.create(&ask::script("created", "echo later")).await?;
    for _ in 0..3 {
        f.kill()?;
        f.start()?;
        ensure!(f.cri.pod_status(&pod.id).await?.state() == PodSandboxState::SandboxReady);
        ensure!(f.cri.output(&stays, &["echo", "here"]).await? == "here\n");
    }
    f.cri.output(&ends, &["sh", "-c", "(sleep 2; touch /end) >/dev/null 2>&1 </dev/null &"]).await?;
    f.kill()?;
    f.start()?;
    ensure!(f.cri.wait_exited(&ends).await?.exit_code == 5);
    ensure!(pod.log("ends.log")?.stdout() == "end\n");
    f.cri.start(&created).await?;
    f.cri.wait_exited(&created).await?;
    ensure!(pod.log("created.log")?.stdout() == "later\n");
    Ok(())
}

/// `podvisor guest COMMAND` on a test's node; what it says when it succeeds.
fn guest_command(f: &Fixture, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(daemon_program());
    command.arg("--config").arg(f.node.configuration_file()).arg("guest").args(arguments);
    let output = command.output().context("running podvisor guest")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(output.status.success(), "podvisor guest {arguments:?}: {said}");
    Ok(said)
}

/// Builds a guest from one of Debian's kernels (`make kernels`).
fn build_guest(f: &Fixture, suite: &str) -> Result<()> {
    let package = target_dir().join("kernels").join(suite).join("package");
    let only = |directory: &Path, prefix: &str| -> Result<String> {
        let entries =
            fs::read_dir(directory).with_context(|| format!("{}: make kernels", directory.display()))?;
        let mut names = entries.flatten().map(|entry| entry.path());
        let found = names
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)));
        Ok(found.with_context(|| format!("nothing in {}", directory.display()))?.display().to_string())
    };
    let kernel = only(&package.join("boot"), "vmlinuz-")?;
    let modules = only(&package.join("lib/modules"), "")?;
    let agent = target_dir().join("release/podvisor-agent").display().to_string();
    guest_command(f, &["build", "--kernel", &kernel, "--modules", &modules, "--agent", &agent]).map(drop)
}

/// Another kernel for new pods changes nothing for those that run, nor for a container that comes to them later.
async fn keeps_the_guest_it_began_with(f: &mut Fixture) -> Result<()> {
    fs::remove_file(f.node.path("root/guests"))?;
    build_guest(f, "bookworm")?;
    let (old, first) = f.running("old", &ask::waiting("c")).await?;
    let kernel = f.cri.output(&first, &["uname", "-r"]).await?;
    let guest = machine(f, &old.id).await?["guest"].as_str().context("no guest")?.to_owned();

    build_guest(f, "bookworm-backports")?;
    let new = f.pod("new").await?;
    let second = new.start(&ask::waiting("c")).await?;
    let newer = f.cri.output(&second, &["uname", "-r"]).await?;
    ensure!(kernel.starts_with("6.1.") && newer.starts_with("6.12."), "{kernel} {newer}");
    ensure!(machine(f, &new.id).await?["guest"] != guest.as_str());
    f.kill()?;
    f.start()?;
    let later = old.start(&ask::waiting("later")).await?;
    for container in [&first, &later] {
        ensure!(f.cri.output(container, &["uname", "-r"]).await? == kernel);
    }
    ensure!(machine(f, &old.id).await?["guest"] == guest.as_str());

    let refused = guest_command(f, &["remove", &guest]).err().context("a guest in use was removed")?;
    ensure!(refused.to_string().contains("pods run with guest"), "{refused}");
    f.cri.stop_pod(&old.id).await?;
    f.cri.remove_pod(&old.id).await?;
    guest_command(f, &["remove", &guest])?;
    ensure!(f.cri.output(&second, &["uname", "-r"]).await? == newer);
    Ok(())
}

async fn dies_and_says_why(f: &mut Fixture) -> Result<()> {
    let (other, untouched) = f.running("other", &ask::waiting("c")).await?;
    let (hypervisor, process_name) = match machine(f, &other.id).await?["hypervisor"].as_str() {
        Some(name) if name.starts_with("podvisor-vmm") => ("podvisor-vmm", "the machine"),
        _ => ("podvisor-qemu", "QEMU"),
    };
    let ended = |why: String| format!("the pod's virtual machine ended: {why}");
    for (which, why) in [
        ("hypervisorPid", ended(format!("{hypervisor} was killed by signal 9"))),
        ("fileServerPid", ended("podvisor-fs was killed by signal 9".to_owned())),
        ("pid", ended(format!("the machine's process was killed: {process_name} was killed by SIGKILL"))),
        ("monitorPid", "the pod's monitor died".to_owned()),
    ] {
        let pod = f.pod(&format!("pod-{}", which.to_lowercase())).await?;
        let container = pod.start(&ask::waiting("c")).await?;
        kill_process(process(f, &pod.id, which).await?, Signal::KILL)?;
        let status = f.cri.wait_exited(&container).await.with_context(|| which.to_owned())?;
        let (first, _) = why.split_once(": ").unwrap_or((&why, ""));
        ensure!(
            status.exit_code == 137 && status.message.contains(first.trim_end_matches(" ended")),
            "{which}: {status:?}"
        );
        eventually("the pod is not ready", || async {
            let state = f.cri.pod_status(&pod.id).await?.state();
            ensure!(state == PodSandboxState::SandboxNotready, "it is {state:?}");
            Ok(())
        })
        .await?;
        let told = info(f, &pod.id).await?;
        ensure!(told["why"].as_str().is_some_and(|told| told.starts_with(&why)), "{which}: {told}");
        f.cri.stop_pod(&pod.id).await?;
        f.cri.remove_pod(&pod.id).await?;
    }
    ensure!(f.cri.output(&untouched, &["echo", "here"]).await? == "here\n");
    ensure!(f.cri.pod_status(&other.id).await?.state() == PodSandboxState::SandboxReady);
    Ok(())
}

async fn refuses_what_is_the_hosts(f: &mut Fixture) -> Result<()> {
    for name in ["network", "pid", "ipc"] {
        let mut config = f.ask_pod("pod");
        let options = ask::pod_namespaces(&mut config);
        let host = NamespaceMode::Node.into();
        match name {
            "network" => options.network = host,
            "pid" => options.pid = host,
            _ => options.ipc = host,
        }
        let refused = f.cri.run_pod_by(&config, "vm").await.err().context("it uses the host's namespace")?;
        ensure!(refused.code() == tonic::Code::InvalidArgument, "{refused}");
        ensure!(refused.message().contains(&format!("namespace_options.{name}")), "{refused}");
    }
    let socket = f.node.path("a.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    f.cri.pull(podvisor_tests::images::BUSYBOX).await?;
    let config = f.ask_pod("pod");
    fs::create_dir_all(&config.log_directory)?;
    let pod = Pod::known(&f.cri.run_pod_by(&config, "micro").await?, &config, &f.cri);
    let mount = |host: &Path| Mount {
        host_path: host.display().to_string(),
        container_path: "/x".into(),
        ..Default::default()
    };
    let mut with_socket = ask::waiting("socket");
    with_socket.mounts = vec![mount(&socket)];
    let mut bidirectional = ask::waiting("bidirectional");
    bidirectional.mounts = vec![Mount {
        propagation: MountPropagation::PropagationBidirectional.into(),
        ..mount(&f.node.path("root"))
    }];
    let device = |host: &Path| Device { host_path: host.display().to_string(), ..Default::default() };
    let volume = BlockVolume::of(&f.node.path("volume"), "of nobody\n")?;
    let (mut block, mut character) = (ask::waiting("block"), ask::waiting("character"));
    block.devices = vec![device(volume.device())];
    character.devices = vec![device(Path::new("/dev/zero"))];
    for (container, told) in [
        (&with_socket, "is a socket"),
        (&bidirectional, "mounts[0].propagation"),
        (&character, "only block devices from there"),
        (&block, "nothing can be plugged into this pod's machine"),
    ] {
        let refused = pod.create(container).await.err().context("it was created")?;
        ensure!(format!("{refused:#}").contains(told), "{refused:?}");
    }
    Ok(())
}

async fn keeps_containers_within_their_limits(f: &mut Fixture) -> Result<()> {
    let mut hungry = ask::script("hungry", "x=a; while :; do x=$x$x; done");
    ask::resources(&mut hungry).memory_limit_in_bytes = 32 << 20;
    let (pod, id) = f.running("pod", &hungry).await?;
    let status = f.cri.wait_exited(&id).await?;
    ensure!(status.exit_code == 137 && status.reason == "OOMKilled", "{status:?}");
    let other = pod.start(&ask::waiting("other")).await?;
    let stats = f.cri.container_stats(&other).await?;
    let memory = stats.memory.context("no memory")?.usage_bytes.context("no usage")?.value;
    ensure!(memory > 0 && memory < 64 << 20, "{memory}");
    ensure!(stats.cpu.context("no CPU")?.usage_core_nano_seconds.context("no time")?.value > 0);
    Ok(())
}
