//! What a program sees in a container of this crate is what it sees in one that runc makes of the same spec.
//!
//! One after the other on the main thread: the crate clones its caller, which therefore must have no other thread.

mod lab;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use lab::Lab;
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use serde_json::{Value, json};

/// Says everything about itself and its surroundings that does not differ from run to run.
const PROBE: &str = r#"
exec 2>&1
echo "-- identity"; id; umask; pwd; env | sort
grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|SigBlk)' /proc/self/status
cat /proc/self/oom_score_adj /proc/self/limits
echo "-- names"; hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/shmmni
echo "-- mounts"; sed -E 's/^[0-9]+ [0-9]+ [0-9]+:[0-9]+ [^ ]* //; s/(shared|master|propagate_from):[0-9]+/\1/g; s/ - sysfs sysfs ro/ - sysfs sysfs rw/; s/ master - devtmpfs/ - devtmpfs/' /proc/self/mountinfo | grep -v ' /sys/fs/cgroup' | sort
echo "-- devices"; ls -lnR /dev | sed -E 's/ [A-Z][a-z]{2} +[0-9]+ [0-9:]+ / /; s/^total .*//'
echo "-- descriptors"; ls /proc/self/fd | tr '\n' ' '; echo; for fd in 1 2; do readlink /proc/self/fd/$fd | sed 's/[0-9]\+//'; done
echo "-- hidden"; for path in /proc/kcore /proc/timer_list /etc/secret /etc/hidden; do ls -ln $path 2>&1 | sed -E 's/ [A-Z][a-z]{2} +[0-9]+ [0-9:]+ / /'; head -c 10 $path 2>&1 | wc -c; done
for path in /proc/sys /proc/irq /etc/kept /; do touch $path/new 2>&1; done; echo 1 2>&1 >/proc/sys/kernel/panic
echo "-- works"; for device in null zero full random urandom tty; do head -c 1 /dev/$device 2>&1 | wc -c; done; echo x 2>&1 >/dev/null
ls -ln /volume /single 2>&1 | sed -E 's/ [A-Z][a-z]{2} +[0-9]+ [0-9:]+ / /'; touch /volume/new 2>&1; touch /volume/inner/new 2>&1
mkdir -p /tmp/m; mount -t tmpfs none /tmp/m 2>&1; unshare -U true 2>&1; chroot / /bin/true 2>&1; mknod /tmp/node c 1 3 2>&1; chown 5 /tmp/m 2>&1
kill -0 1 2>&1; cat /proc/self/cgroup | sed 's/.*://' | sort -u
true
"#;

type Change = fn(&mut Value, &Path);

/// Which process is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    First,
    /// One that is started in the running container.
    Another,
}

/// Where ids of a user namespace are.
const OUTSIDE: u32 = 100_000;

fn set(spec: &mut Value, pointer: &str, value: Value) {
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    spec.pointer_mut(parent).expect("its parent")[key] = value;
}

fn push(spec: &mut Value, pointer: &str, value: Value) {
    spec.pointer_mut(pointer).and_then(Value::as_array_mut).expect("a list").push(value);
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let cases: [(&str, Change); 15] = [
        ("a_plain_container", |_, _| ()),
        ("a_user_with_groups", |spec, _| {
            set(
                spec,
                "/process/user",
                json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 44], "umask": 0o027}),
            );
        }),
        ("a_user_with_capabilities", |spec, _| {
            set(spec, "/process/user", json!({"uid": 1000, "gid": 1001}));
            let some = json!(["CAP_NET_BIND_SERVICE", "CAP_CHOWN"]);
            set(
                spec,
                "/process/capabilities",
                json!({"bounding": some, "permitted": some, "effective": some,
                "inheritable": some, "ambient": ["CAP_CHOWN"]}),
            );
        }),
        ("no_capabilities", |spec, _| set(spec, "/process/capabilities", json!({}))),
        ("no_new_privileges", |spec, _| set(spec, "/process/noNewPrivileges", json!(true))),
        ("the_default_filter", |spec, _| {
            let profile = podvisor_spec::default_seccomp(&[]);
            set(spec, "/linux/seccomp", serde_json::to_value(profile).expect("a profile"));
        }),
        ("limits", |spec, _| {
            set(spec, "/process/oomScoreAdj", json!(321));
            set(
                spec,
                "/process/rlimits",
                json!([
                    {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
                    {"type": "RLIMIT_AS", "soft": 1_u64 << 40, "hard": u64::MAX},
                ]),
            );
        }),
        ("names_and_sysctls", |spec, _| {
            set(spec, "/hostname", json!("inside"));
            set(spec, "/domainname", json!("example"));
            set(spec, "/linux/sysctl", json!({"net.ipv4.ip_default_ttl": "77", "kernel.shmmni": "33"}));
        }),
        ("hidden_and_protected_paths", |spec, _| {
            set(
                spec,
                "/linux/maskedPaths",
                json!(["/proc/kcore", "/proc/timer_list", "/etc/secret", "/etc/hidden", "/not/there"]),
            );
            set(spec, "/linux/readonlyPaths", json!(["/proc/sys", "/proc/irq", "/etc/kept", "/not/there"]));
        }),
        ("a_read_only_root", |spec, _| set(spec, "/root/readonly", json!(true))),
        ("volumes", |spec, volume| {
            for (destination, source, options) in [
                ("/volume", "volume", json!(["rbind", "ro", "rprivate"])),
                ("/volume/inner", "inner", json!(["bind", "rw", "nosuid", "noexec", "rslave"])),
                ("/single", "volume/file", json!(["bind", "nodev", "noatime"])),
                ("/made/for/it", "inner", json!(["rbind"])),
            ] {
                // As the daemon has it where a mount is to follow the node's.
                set(spec, "/linux/rootfsPropagation", json!("rslave"));
                let source = volume.join(source);
                push(
                    spec,
                    "/mounts",
                    json!({"destination": destination, "type": "bind", "source": source, "options": options}),
                );
            }
        }),
        ("file_systems", |spec, _| {
            for (destination, kind, options) in [
                ("/dev/shm", "tmpfs", json!(["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"])),
                ("/dev/mqueue", "mqueue", json!(["nosuid", "noexec", "nodev"])),
                ("/sys", "sysfs", json!(["nosuid", "noexec", "nodev", "ro"])),
                ("/scratch", "tmpfs", json!(["rw", "size=1m", "uid=7", "gid=8", "mode=0750", "strictatime"])),
            ] {
                push(
                    spec,
                    "/mounts",
                    json!({"destination": destination, "type": kind, "source": kind, "options": options}),
                );
            }
        }),
        ("devices", |spec, _| {
            set(
                spec,
                "/linux/devices",
                json!([
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 5, "gid": 6},
                {"path": "/dev/deep/loop", "type": "b", "major": 7, "minor": 0},
                ]),
            );
        }),
        ("a_user_namespace", |spec, _| {
            let mapping = json!([{"containerID": 0, "hostID": OUTSIDE, "size": 65_536}]);
            set(spec, "/linux/uidMappings", mapping.clone());
            set(spec, "/linux/gidMappings", mapping);
            push(spec, "/linux/namespaces", json!({"type": "user"}));
        }),
        ("a_working_directory_that_is_not_there", |spec, _| {
            set(spec, "/process/cwd", json!("/made/for/work"));
            set(spec, "/process/user", json!({"uid": 5, "gid": 6}));
        }),
    ];
    let trial = |name: String, change: Change, how: How| {
        Trial::test(name, move || compare(change, how).map_err(|error| Failed::from(format!("{error:#}"))))
    };
    let trials = cases.into_iter().flat_map(|(name, change)| {
        [
            trial(name.to_owned(), change, How::First),
            trial(format!("one_more_in_{name}"), change, How::Another),
        ]
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// The spec that a pod's container has, with what this one has besides.
fn spec(lab: &Lab, change: Change, volumes: &Path) -> Value {
    lab.spec(PROBE, |spec| {
        let all = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FSETID",
            "CAP_FOWNER",
            "CAP_MKNOD",
            "CAP_NET_RAW",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SETFCAP",
            "CAP_SETPCAP",
            "CAP_NET_BIND_SERVICE",
            "CAP_SYS_CHROOT",
            "CAP_KILL",
        ]);
        set(spec, "/process/capabilities", json!({"bounding": all, "permitted": all, "effective": all}));
        set(spec, "/process/env", json!(["PATH=/bin", "TERM=xterm", "EMPTY="]));
        let mounts = spec["mounts"].as_array_mut().expect("mounts");
        mounts.retain(|mount| mount["destination"] != "/dev/shm" && mount["destination"] != "/sys/fs/cgroup");
        change(spec, volumes);
    })
}

/// A root and volumes that were not used before: what one container changes the other must not see.
fn prepare(lab: &Lab) -> Result<Volumes> {
    let volumes = lab.directory("volumes")?;
    // A mount of their own: runc makes the one that the root file system is on private.
    mount("tmpfs", &volumes, "tmpfs", MountFlags::empty(), c"")?;
    mount_change(&volumes, MountPropagationFlags::SHARED)?;
    fs::create_dir_all(volumes.join("volume/inner"))?;
    fs::create_dir_all(volumes.join("inner"))?;
    fs::write(volumes.join("volume/file"), "text")?;
    for directory in ["etc/hidden", "etc/kept"] {
        fs::create_dir_all(lab.rootfs().join(directory))?;
    }
    fs::write(lab.rootfs().join("etc/secret"), "secret")?;
    fs::write(
        lab.rootfs().join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1001:u:/srv/user:/bin/sh\n",
    )?;
    Ok(Volumes(volumes))
}

/// A directory with a mount, which goes with it.
struct Volumes(PathBuf);

impl Drop for Volumes {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn compare(change: Change, how: How) -> Result<()> {
    let with_spec = |run: fn(&Lab, &mut Value, How) -> Result<String>| {
        let lab = Lab::new()?;
        let volumes = prepare(&lab)?;
        let mut spec = spec(&lab, change, &volumes.0);
        if !spec["linux"]["uidMappings"].is_null() {
            lab.give_to(OUTSIDE)?;
        }
        run(&lab, &mut spec, how)
    };
    let (ours, runc) = (with_spec(by_us)?, with_spec(by_runc)?);
    // Covers of hidden directories are mounted more strictly here.
    let ours = ours.replace(
        "/etc/hidden ro,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw,size=0k",
        "/etc/hidden ro,relatime - tmpfs tmpfs ro",
    );
    ensure!(ours == runc, "{}", difference(&ours, &runc));
    Ok(())
}

/// The process that asks, taken out of a spec whose own sleeps instead.
fn another(spec: &mut Value) -> Value {
    let process = spec["process"].clone();
    spec["process"]["args"] = json!(["sleep", "1000"]);
    process
}

fn by_us(lab: &Lab, spec: &mut Value, how: How) -> Result<String> {
    let process = another(spec);
    if how == How::First {
        spec["process"] = process.clone();
    }
    let mut container = lab.create(spec)?;
    container.ready()?;
    container.start()?;
    let outcome = if how == How::First { container.wait()? } else { container.execute(&process)? };
    if how == How::Another {
        container.kill()?;
        container.wait()?;
    }
    container.remove()?;
    ensure!(outcome.code == 0, "it ended with {}:\n{}", outcome.code, outcome.output);
    Ok(outcome.output)
}

fn by_runc(lab: &Lab, spec: &mut Value, how: How) -> Result<String> {
    let process = another(spec);
    if how == How::First {
        spec["process"] = process.clone();
    }
    let bundle = lab.directory("bundle")?;
    fs::write(bundle.join("config.json"), spec.to_string())?;
    fs::write(bundle.join("process.json"), process.to_string())?;
    let name = format!("container-{}", std::process::id());
    let runc = || {
        let mut runc = Command::new(podvisor_critest::tools_dir().join("runc"));
        runc.arg("--root").arg(bundle.join("state")).stdin(Stdio::null());
        runc
    };
    let output = match how {
        How::First => said(runc().arg("run").arg("--bundle").arg(&bundle).arg(&name)),
        How::Another => {
            let mut run = runc();
            run.args(["run", "--detach", "--bundle"]).arg(&bundle).arg(&name);
            let started =
                run.stdout(Stdio::null()).stderr(Stdio::null()).status().context("`make deps` makes runc")?;
            ensure!(started.success(), "runc run --detach: {started}");
            said(runc().arg("exec").arg("--process").arg(bundle.join("process.json")).arg(&name))
        }
    };
    let _ = runc().args(["delete", "--force"]).arg(&name).stderr(Stdio::null()).status();
    output
}

/// What it writes, to one pipe as in the lab.
fn said(runc: &mut Command) -> Result<String> {
    let (reader, writer) = std::io::pipe()?;
    let mut child =
        runc.stdout(writer.try_clone()?).stderr(writer).spawn().context("`make deps` makes runc")?;
    runc.stdout(Stdio::null()).stderr(Stdio::null());
    let output = std::io::read_to_string(reader)?;
    let status = child.wait()?;
    ensure!(status.success(), "runc: {status}:\n{output}");
    Ok(output)
}

/// Lines that only one of them has, with the part of the probe that they are in.
fn difference(ours: &str, runc: &str) -> String {
    let lines = |text: &str| -> Vec<(String, String)> {
        let mut part = String::new();
        text.lines()
            .map(|line| {
                if let Some(name) = line.strip_prefix("-- ") {
                    name.clone_into(&mut part);
                }
                (part.clone(), line.to_owned())
            })
            .collect()
    };
    let (ours, runc) = (lines(ours), lines(runc));
    let only = |these: &[(String, String)], those: &[(String, String)]| {
        let those: BTreeSet<_> = those.iter().collect();
        these
            .iter()
            .filter(|line| !those.contains(line))
            .map(|(part, line)| format!("{part}: {line}"))
            .collect::<Vec<_>>()
    };
    format!(
        "only here:\n  {}\nonly with runc:\n  {}\n",
        only(&ours, &runc).join("\n  "),
        only(&runc, &ours).join("\n  ")
    )
}
