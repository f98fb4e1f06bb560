//! The agent as the first process of virtual machines, with both of Debian's kernels.

mod guest;

use std::process::Command;

use guest::{Machine, Suite, shell, with_root};
use podvisor_proto::agent::add_root::{Lower, Upper};
use podvisor_proto::agent::request::Verb;
use podvisor_proto::agent::{
    AddInterface, AddRoot, Connect, CreateContainer, DeleteContainer, ErrorCode, Open, Personalise,
    RemoveRoot, Route, Shutdown, StandardStream, StartInit, Stats, TmpfsUpper, UserNamespace, open::Stream,
    reply,
};
use podvisor_proto::hypervisor::{Disk, EndReason, Network};
use serde_json::{Value, json};

/// Each test with each kernel.
macro_rules! with_both_kernels {
    ($($test:ident)*) => {
        mod kernel_6_1 {
            $(#[test] fn $test() { super::$test(super::Suite::Bookworm, "6.1."); })*
        }
        mod kernel_6_12 {
            $(#[test] fn $test() { super::$test(super::Suite::Backports, "6.12."); })*
        }
    };
}

with_both_kernels! {
    a_pod_from_its_start_to_its_end
    what_a_container_wants_too_much_costs_it_alone
    a_network_interface_is_the_pod_s
    modules_are_loaded_when_they_are_asked_for
    containers_of_a_pod_share_what_they_should
    a_pod_with_a_user_namespace
    a_root_file_system_on_disks
}

fn run(program: &str, line: &str) -> String {
    let output = Command::new(program).args(line.split_whitespace()).output().expect("it runs");
    assert!(output.status.success(), "{program} {line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A spec without the namespaces that a guest's containers share.
fn sharing(script: &str) -> Value {
    let mut spec = shell(script);
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}]);
    spec["mounts"].as_array_mut().unwrap().extend([
        json!({"destination": "/dev/shm", "source": "/dev/shm", "options": ["bind"]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}),
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
               "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}),
    ]);
    spec
}

fn with_capabilities(mut spec: Value, names: &[&str]) -> Value {
    spec["process"]["capabilities"] = json!({"bounding": names, "effective": names, "permitted": names});
    spec
}

fn a_pod_from_its_start_to_its_end(suite: Suite, version: &str) {
    let mut machine = Machine::new(suite);
    println!("answered after {:?}, listening after {} ms", machine.took, machine.hello.ready_ns / 1_000_000);
    assert!(machine.hello.kernel_release.starts_with(version), "{}", machine.hello.kernel_release);
    let (output, exit) = machine.run_on_root("c1", &shell("uname -r; echo $$; hostname; exit 3"));
    assert_eq!((output.lines().next(), exit.code), (Some(machine.hello.kernel_release.as_str()), 3));
    let reply::Result::Stats(stats) = machine.ask(Verb::Stats(Stats::default())).unwrap() else { panic!() };
    let used = stats.guest.unwrap();
    println!(
        "agent {} KiB, available {} of {} KiB",
        used.agent_rss >> 10,
        used.memory_available >> 10,
        used.memory_total >> 10
    );
    assert!(used.agent_rss < 4 << 20, "the agent takes {} KiB", used.agent_rss >> 10);
    machine.done(Verb::Shutdown(Shutdown {}));
    assert_eq!(machine.ended().reason(), EndReason::PowerOff);
}

fn what_a_container_wants_too_much_costs_it_alone(suite: Suite, _: &str) {
    let mut machine = Machine::bare(suite, Vec::new());
    // Little is left for the containers, so that it is full soon.
    machine.become_pod(Personalise { reserve: 160 << 20, ..Default::default() });
    machine.running_on_root("stays", &shell("exec sleep 1000"));
    let mut limited = shell("tail /dev/zero");
    limited["linux"]["resources"] = json!({"memory": {"limit": 10 << 20}});
    let (_, exit) = machine.run_on_root("limited", &limited);
    assert_eq!((exit.code, exit.oom_killed), (137, true), "by its own limit");
    // By what all of them may use, and not by the guest's memory.
    let (_, exit) = machine.run_on_root("unlimited", &shell("tail /dev/zero"));
    assert_eq!((exit.code, exit.oom_killed), (137, true), "by the pod's limit");
    // Its own disk has an end before that.
    let (output, exit) =
        machine.run_on_root("writer", &shell("dd if=/dev/zero of=/tmp/fill bs=1M 2>&1; true"));
    assert!(output.contains("No space left on device") && exit.code == 0, "{exit:?} {output}");
    // A bomb is held by its limit.
    let mut bomb = shell("bomb() { bomb | bomb & }; bomb 2>/dev/null; sleep 1; echo over");
    bomb["linux"]["resources"] = json!({"pids": {"limit": 30}});
    let (output, _) = machine.run_on_root("bomb", &bomb);
    assert_eq!(output, "over\n");
    let (output, exit) = machine.run_on_root("after", &shell("echo works"));
    assert_eq!((output.as_str(), exit.code), ("works\n", 0));
    let reply::Result::Stats(stats) = machine.ask(Verb::Stats(Stats::default())).unwrap() else { panic!() };
    assert!(stats.containers.iter().any(|container| container.container_id == "stays"));
    assert!(stats.pod.unwrap().memory_limit <= guest::MEMORY);
}

fn a_network_interface_is_the_pod_s(suite: Suite, _: &str) {
    const ADDRESS: &str = "02:00:00:00:07:09";
    let kernel = suite as u8;
    let (tap, network) = (format!("vm{kernel}"), format!("10.{}.0", 70 + kernel));
    run("ip", &format!("tuntap add dev {tap} mode tap vnet_hdr"));
    run("ip", &format!("address add {network}.1/24 dev {tap}"));
    run("ip", &format!("-6 address add fd00:{kernel}::1/64 dev {tap} nodad"));
    run("ip", &format!("link set {tap} up"));
    let device = Network {
        namespace: format!("/proc/{}/ns/net", std::process::id()),
        tap: tap.clone(),
        hardware_address: ADDRESS.into(),
        mtu: 1400,
    };
    let mut machine = Machine::bare(suite, vec![device]);
    machine.become_pod(Personalise::default());
    let via = |gateway: String| Route { gateway, ..Default::default() };
    machine.done(Verb::AddInterface(AddInterface {
        hardware_address: ADDRESS.into(),
        name: "pod0".into(),
        mtu: 1400,
        addresses: vec![format!("{network}.2/24"), format!("fd00:{kernel}::2/64")],
        routes: vec![
            Route { destination: format!("{network}.0/24"), scope: 253, ..Default::default() },
            Route { destination: format!("fd00:{kernel}::/64"), ..Default::default() },
            via(format!("{network}.1")),
            via(format!("fd00:{kernel}::1")),
        ],
        ..Default::default()
    }));
    run("ping", &format!("-n -c 1 -W 30 {network}.2"));
    run("ping", &format!("-n -c 1 -W 30 fd00:{kernel}::2"));
    let script = format!(
        "cat /sys/class/net/pod0/mtu; ip route | grep -c default; ping -c 1 -W 30 {network}.1 | grep -c ttl; \
         nc -l -p 7777 -e echo hello; echo end"
    );
    let spec = with_capabilities(sharing(&script), &["CAP_NET_RAW"]);
    machine.add_root("c1");
    machine.create("c1", &with_root("c1", &spec), false);
    let stdout = machine.stream("c1", StandardStream::Stdout);
    machine.start("c1");
    assert_eq!([stdout.read_line(), stdout.read_line(), stdout.read_line()].concat(), "1400\n1\n1\n");
    // Inside, as kubectl port-forward asks; the program may not listen yet.
    let text = loop {
        match machine.open(&Open { stream: Some(Stream::Connect(Connect { port: 7777 })) }) {
            Ok(connection) => break connection.read_all(),
            Err(error) => assert!(error.detail.contains("refused"), "{error:?}"),
        }
    };
    assert_eq!((text.as_str(), stdout.read_all().as_str()), ("hello\n", "end\n"));
    let reply::Result::Stats(stats) = machine.ask(Verb::Stats(Stats::default())).unwrap() else { panic!() };
    let counted = &stats.interfaces[0];
    assert!(counted.name == "pod0" && counted.rx_bytes > 0 && counted.tx_bytes > 0, "{counted:?}");
    drop(machine);
    run("ip", &format!("link delete {tap}"));
}

fn modules_are_loaded_when_they_are_asked_for(suite: Suite, _: &str) {
    let mut machine = Machine::new(suite);
    let script = "has() { grep -c \"^$1 \" /proc/modules; }; has bridge; ip link add br9 type bridge && has bridge; \
                  has nf_tables; ip link add d0 type dummy && ip link show d0 | grep -c NOARP; has virtio_net";
    let mut spec = with_capabilities(shell(script), &["CAP_NET_ADMIN"]);
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "network"}));
    let (output, _) = machine.run_on_root("c1", &spec);
    assert_eq!(output, "0\n1\n0\n1\n1\n", "{}", machine.console());
}

fn containers_of_a_pod_share_what_they_should(suite: Suite, _: &str) {
    let mut machine = Machine::bare(suite, Vec::new());
    machine.become_pod(Personalise {
        hostname: "the-pod".into(),
        sysctls: [("kernel.shmmni".into(), "33".into()), ("net.ipv4.ip_default_ttl".into(), "77".into())]
            .into(),
        ..Default::default()
    });
    let (output, _) = machine.run_on_root(
        "c1",
        &sharing(
            "hostname; cat /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_default_ttl; echo text >/dev/shm/file; \
             df -k /dev/shm | tail -1; ip link show lo | grep -c UP; ls /dev/mqueue /sys/fs/cgroup | grep -c memory.max; cat /proc/self/cgroup",
        ),
    );
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(
        (&lines[..3], lines[4..].join(" ")),
        (&["the-pod", "33", "77"][..], "1 1 0::/".to_owned()),
        "{output}"
    );
    assert!(lines[3].contains("65536"), "{output}");
    assert!(matches!(machine.ask(Verb::StartInit(StartInit {})), Ok(reply::Result::Started(_))));
    for (id, script) in [
        ("c2", "exec sleep 1000"),
        ("c3", "cat /dev/shm/file /proc/1/comm; until pidof sleep; do :; done >/dev/null"),
    ] {
        machine.add_root(id);
        let mut spec = with_root(id, &sharing(script));
        spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}]);
        let create = CreateContainer {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            share_pid: true,
            ..Default::default()
        };
        machine.ask(Verb::CreateContainer(create)).unwrap();
    }
    machine.start("c2");
    let stdout = machine.stream("c3", StandardStream::Stdout);
    machine.start("c3");
    assert_eq!(stdout.read_all(), "text\npodvisor-init\n");
    assert_eq!(machine.exit_of("c3").code, 0);
    // What has ended lets its root go.
    machine.done(Verb::RemoveRoot(RemoveRoot { container_id: "c1".into() }));
}

fn a_pod_with_a_user_namespace(suite: Suite, _: &str) {
    const OUTSIDE: u32 = 300_000;
    let mut machine = Machine::bare(suite, Vec::new());
    run("chown", &format!("-hR {OUTSIDE}:{OUTSIDE} {}/rootfs", machine.share().display()));
    machine.become_pod(Personalise {
        hostname: "the-pod".into(),
        sysctls: [("kernel.shmmni".into(), "33".into()), ("net.ipv4.ip_default_ttl".into(), "77".into())]
            .into(),
        user_namespace: Some(UserNamespace { uid: OUTSIDE, uids: 65_536, gid: OUTSIDE, gids: 65_536 }),
        ..Default::default()
    });
    machine.done(Verb::AddRoot(AddRoot {
        container_id: "c1".into(),
        lower: Some(Lower::SharePath("pod/rootfs".into())),
        upper: Some(Upper::SharedUpper("pod/rootfs".into())),
        format: false,
    }));
    let mut spec = sharing(
        "cat /proc/self/uid_map; id -u; hostname; cat /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_default_ttl; \
         touch /tmp/file && ls -ln /tmp/file | cut -c 1-16; hostname x && hostname; \
         echo 5 2>/dev/null >/proc/sys/vm/swappiness || echo denied",
    );
    spec = with_capabilities(spec, &["CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_DAC_OVERRIDE"]);
    let pin =
        |kind: &str, name: &str| json!({"type": kind, "path": format!("/run/podvisor/namespaces/{name}")});
    spec["linux"]["namespaces"].as_array_mut().unwrap().extend([
        pin("user", "user"),
        pin("network", "net"),
        pin("ipc", "ipc"),
        pin("uts", "uts"),
    ]);
    let (output, exit) = machine.run("c1", &with_root("c1", &spec));
    assert_eq!(
        output, "         0     300000      65536\n0\nthe-pod\n33\n77\n-rw-r--r--    1 \nx\ndenied\n",
        "{exit:?}"
    );
    let owner = std::os::unix::fs::MetadataExt::uid(
        &std::fs::metadata(machine.share().join("rootfs/tmp/file")).unwrap(),
    );
    assert_eq!(owner, OUTSIDE, "as on the host");
}

fn a_root_file_system_on_disks(suite: Suite, _: &str) {
    let mut machine = Machine::with_disks(suite, Vec::new(), |directory| {
        let text = |name: &str| directory.join(name).display().to_string();
        run("mkfs.erofs", &format!("{} {}", text("image"), text("share/rootfs")));
        let size = std::fs::metadata(text("image")).unwrap().len().next_multiple_of(4096);
        std::fs::OpenOptions::new().write(true).open(text("image")).unwrap().set_len(size).unwrap();
        std::fs::File::create(text("layer")).unwrap().set_len(16 << 20).unwrap();
        run("mkfs.ext4", &format!("-q {}", text("layer")));
        let disk =
            |serial: &str, name: &str, read_only| Disk { serial: serial.into(), path: text(name), read_only };
        vec![disk("the-image", "image", true), disk("the-layer", "layer", false)]
    });
    machine.become_pod(Personalise::default());
    let root = |id: &str, lower: &str, upper| AddRoot {
        container_id: id.into(),
        lower: Some(Lower::BlockSerial(lower.into())),
        upper: Some(upper),
        format: false,
    };
    let on_disk = || Upper::DiskSerial("the-layer".into());
    machine.done(Verb::AddRoot(root("c1", "the-image", on_disk())));
    let script = "grep -c '^overlay / overlay' /proc/mounts; echo kept >/tmp/file";
    let (output, exit) = machine.run("c1", &with_root("c1", &shell(script)));
    assert!(output.starts_with("1\n") && exit.code == 0, "{exit:?} {output}");
    // The same image for another one, which writes into memory: nothing of the first one's is there.
    let memory = || Upper::Tmpfs(TmpfsUpper { size: 16 << 20 });
    machine.done(Verb::AddRoot(root("c2", "the-image", memory())));
    let (output, exit) = machine.run("c2", &with_root("c2", &shell("ls /tmp; test -x /bin/busybox")));
    assert_eq!((output.as_str(), exit.code), ("", 0));
    machine.done(Verb::RemoveRoot(RemoveRoot { container_id: "c2".into() }));
    machine.done(Verb::DeleteContainer(DeleteContainer { container_id: "c1".into() }));
    machine.done(Verb::RemoveRoot(RemoveRoot { container_id: "c1".into() }));
    // The layer is one container's, and stays what it was.
    machine.done(Verb::AddRoot(root("c3", "the-image", on_disk())));
    let (output, exit) = machine.run("c3", &with_root("c3", &shell("cat /tmp/file")));
    assert_eq!((output.as_str(), exit.code), ("kept\n", 0));

    let refused = |machine: &mut Machine, root| machine.ask(Verb::AddRoot(root)).unwrap_err();
    let error = refused(&mut machine, root("c4", "the-layer", memory()));
    assert!(error.code() == ErrorCode::System && error.detail.contains("mount erofs"), "{error:?}");
    let format = AddRoot { format: true, ..root("c4", "the-image", on_disk()) };
    assert_eq!(refused(&mut machine, format).code(), ErrorCode::Unsupported);
    // None of that has left anything.
    machine.done(Verb::AddRoot(root("c4", "the-image", memory())));
}
