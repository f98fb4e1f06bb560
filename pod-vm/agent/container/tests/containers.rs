//! Real containers, made by this crate on the kernel that runs the tests.
//!
//! One after the other on the main thread: the crate clones its caller, which therefore must have no other thread.

mod lab;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use lab::{Lab, Outcome};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::json;

type Test = fn(&Lab) -> Result<()>;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let tests: [(&str, Test); 18] = [
        ("runs_a_program_in_namespaces_of_its_own", namespaces),
        ("identity_is_what_was_asked_for", identity),
        ("file_systems_are_mounted_as_asked", mounts),
        ("a_link_of_the_image_leads_nowhere_outside", hostile_links),
        ("paths_are_hidden_and_protected", hidden),
        ("devices_are_there_and_others_are_refused", devices),
        ("a_read_only_root", read_only),
        ("the_environment_gets_a_home", home),
        ("a_terminal", terminal),
        ("a_filter_holds_with_new_privileges_and_without", filter),
        ("a_filter_that_is_older_than_some_calls", old_filter),
        ("starts_only_when_told", start),
        ("what_cannot_be_executed_is_named", not_found),
        ("a_failed_mount_is_named", failed_mount),
        ("executes_one_more_process", execute),
        ("a_user_namespace_owns_the_others", user_namespace),
        ("a_pod_s_user_namespace_owns_what_its_containers_make", pod_namespaces),
        ("is_killed_and_removed_with_its_cgroup", kill),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || {
            let lab = Lab::new().map_err(|error| Failed::from(format!("{error:#}")))?;
            test(&lab).map_err(|error| Failed::from(format!("{error:#}")))
        })
    });
    libtest_mimic::run(&arguments, trials.into()).exit_code()
}

fn expect(outcome: &Outcome, wanted: &[&str]) -> Result<()> {
    for line in wanted {
        ensure!(outcome.output.contains(line), "{line:?} is missing in:\n{}", outcome.output);
    }
    ensure!(outcome.code == 0, "it ended with {}:\n{}", outcome.code, outcome.output);
    Ok(())
}

fn namespaces(lab: &Lab) -> Result<()> {
    let outcome = lab.shell(
        "echo pid $$; hostname; readlink /proc/self/ns/net /proc/self/ns/cgroup; ls /proc | grep -c '^[0-9]'",
        |spec| spec["hostname"] = json!("inside"),
    )?;
    let own = std::fs::read_link("/proc/self/ns/net")?.display().to_string();
    ensure!(!outcome.output.contains(&own), "the network is the caller's");
    expect(&outcome, &["pid 1\n", "inside\n"])
}

fn identity(lab: &Lab) -> Result<()> {
    let outcome = lab.shell(
        "id; pwd; ulimit -n; umask; cat /proc/self/oom_score_adj; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status",
        |spec| {
            let process = &mut spec["process"];
            process["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [44, 70], "umask": 0o027});
            process["cwd"] = json!("/made/by/us");
            process["noNewPrivileges"] = json!(true);
            process["oomScoreAdj"] = json!(500);
            process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
            let set = json!(["CAP_CHOWN", "CAP_NET_BIND_SERVICE"]);
            process["capabilities"] = json!({
                "bounding": set, "permitted": set, "inheritable": ["CAP_NET_BIND_SERVICE"],
                "effective": set, "ambient": ["CAP_NET_BIND_SERVICE"],
            });
        },
    )?;
    expect(
        &outcome,
        &[
            "uid=1000 gid=1001 groups=44,70\n",
            "/made/by/us\n",
            "\n100\n",
            "\n0027\n",
            "\n500\n",
            // An execve by a user other than root leaves what is ambient (capabilities(7)).
            "CapEff:\t0000000000000400\n",
            "CapBnd:\t0000000000000401\n",
            "NoNewPrivs:\t1\n",
        ],
    )
}

fn mounts(lab: &Lab) -> Result<()> {
    let volume = lab.directory("volume")?;
    std::fs::create_dir(volume.join("inner"))?;
    std::fs::write(volume.join("file"), "from outside\n")?;
    let file = volume.join("file");
    let script = "cat /data/file /etc/deep/file; touch /data/x; echo $?; touch /ro/x 2>&1; \
                  grep -E ' (/ro|/scratch|/data) ' /proc/self/mountinfo; df -k /scratch | tail -n 1";
    let outcome = lab.shell(script, |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("mounts");
        mounts
            .push(json!({"destination": "/data", "source": volume, "options": ["rbind", "rprivate", "rw"]}));
        mounts.push(json!({"destination": "/ro", "source": volume, "options": ["bind", "ro", "noexec"]}));
        mounts.push(json!({"destination": "/etc/deep/file", "source": file, "options": ["bind", "ro"]}));
        mounts.push(json!({
            "destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "size=64k", "mode=1777"],
        }));
    })?;
    ensure!(volume.join("x").exists(), "a write did not reach the volume");
    ensure!(outcome.output.matches("from outside").count() == 2, "{}", outcome.output);
    expect(&outcome, &["\n0\n", "Read-only file system", " /ro ro,", "noexec", " /scratch rw,nosuid", " 64 "])
}

fn hostile_links(lab: &Lab) -> Result<()> {
    let outside = lab.directory("outside")?;
    std::os::unix::fs::symlink(&outside, lab.rootfs().join("data"))?;
    std::os::unix::fs::symlink("../../../../../..", lab.rootfs().join("up"))?;
    let volume = lab.directory("volume")?;
    std::fs::write(volume.join("file"), "volume\n")?;
    let outcome = lab.shell("cat /data/file; cat /up/tmp/v/file", |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("mounts");
        mounts.push(json!({"destination": "/data", "source": volume, "options": ["bind"]}));
        mounts.push(json!({"destination": "/up/tmp/v", "source": volume, "options": ["bind"]}));
    })?;
    ensure!(std::fs::read_dir(&outside)?.next().is_none(), "something was made outside");
    ensure!(!std::path::Path::new("/tmp/v").exists(), "something was made in the caller's root");
    expect(&outcome, &["volume\nvolume\n"])
}

fn hidden(lab: &Lab) -> Result<()> {
    std::fs::write(lab.rootfs().join("etc/secret"), "secret\n")?;
    std::fs::create_dir(lab.rootfs().join("etc/secrets"))?;
    std::fs::write(lab.rootfs().join("etc/secrets/a"), "secret\n")?;
    let script =
        "cat /etc/secret; ls /etc/secrets; echo 1 >/proc/sys/kernel/domainname; touch /etc/x && echo made";
    let outcome = lab.shell(script, |spec| {
        spec["linux"]["maskedPaths"] = json!(["/etc/secret", "/etc/secrets", "/proc/kcore", "/not/there"]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/not/there"]);
    })?;
    ensure!(!outcome.output.contains("secret\n"), "{}", outcome.output);
    expect(&outcome, &["Read-only file system", "made\n"])
}

fn devices(lab: &Lab) -> Result<()> {
    let script = "echo x >/dev/null && head -c 3 /dev/zero | wc -c; readlink /dev/stdin; stat -c '%t:%T %a %u' /dev/fuse; \
                  head -c 1 /dev/fuse 2>&1; mknod /dev/mem2 c 1 1 && head -c 1 /dev/mem2 2>&1; true";
    let outcome = lab.shell(script, |spec| {
        spec["linux"]["devices"] = json!([
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 7, "gid": 0},
        ]);
        let all = json!(["CAP_MKNOD", "CAP_DAC_OVERRIDE"]);
        spec["process"]["capabilities"] = json!({"bounding": all, "permitted": all, "effective": all});
        spec["linux"]["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}]});
    })?;
    expect(
        &outcome,
        &[
            "3\n",
            "/proc/self/fd/0\n",
            "a:e5 640 7\n",
            "/dev/fuse: Operation not permitted",
            "/dev/mem2: Operation not permitted",
        ],
    )
}

fn read_only(lab: &Lab) -> Result<()> {
    let outcome = lab.shell("touch /x 2>&1; touch /dev/shm/x && echo shm; true", |spec| {
        spec["root"]["readonly"] = json!(true);
    })?;
    expect(&outcome, &["/x: Read-only file system", "shm\n"])
}

fn home(lab: &Lab) -> Result<()> {
    std::fs::write(lab.rootfs().join("etc/passwd"), "web:x:33:33::/var/www:/bin/sh\n")?;
    let as_user = |uid: u32| {
        lab.shell("echo home=$HOME", move |spec| spec["process"]["user"] = json!({"uid": uid, "gid": 0}))
    };
    expect(&as_user(33)?, &["home=/var/www\n"])?;
    expect(&as_user(5)?, &["home=/\n"])?;
    // A fifo in its place holds nobody up.
    std::fs::remove_file(lab.rootfs().join("etc/passwd"))?;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        lab.rootfs().join("etc/passwd"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )?;
    expect(&as_user(33)?, &["home=/\n"])
}

fn terminal(lab: &Lab) -> Result<()> {
    let outcome = lab.shell("tty; stty size; test -c /dev/console && echo console", |spec| {
        spec["process"]["terminal"] = json!(true);
        spec["process"]["consoleSize"] = json!({"height": 40, "width": 120});
    })?;
    expect(&outcome, &["/dev/pts/0\r\n", "40 120\r\n", "console\r\n"])
}

fn filter(lab: &Lab) -> Result<()> {
    for no_new_privileges in [true, false] {
        let profile = podvisor_spec::default_seccomp(&[]);
        let outcome = lab.shell(
            "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status; unshare -U true; unshare -m true; id -u",
            move |spec| {
                spec["linux"]["seccomp"] = serde_json::to_value(profile).expect("a profile");
                spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
                spec["process"]["user"] = json!({"uid": 5, "gid": 5});
            },
        )?;
        ensure!(outcome.output.matches("Operation not permitted").count() == 2, "{}", outcome.output);
        expect(&outcome, &["Seccomp:\t2\n", "\n5\n"])?;
    }
    Ok(())
}

/// One written before these calls were there refuses them as it does all that it does not know.
fn old_filter(lab: &Lab) -> Result<()> {
    for no_new_privileges in [true, false] {
        let outcome = lab.shell("grep Seccomp: /proc/self/status", move |spec| {
            let young = json!(["faccessat2", "close_range", "statx", "openat2", "clone3", "execveat"]);
            let refused = json!([{"names": young, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]);
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": refused});
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        })?;
        expect(&outcome, &["Seccomp:\t2\n"])?;
    }
    Ok(())
}

fn start(lab: &Lab) -> Result<()> {
    let volume = lab.directory("volume")?;
    let spec = lab.spec("touch /data/started", |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("mounts");
        mounts.push(json!({"destination": "/data", "source": volume, "options": ["bind"]}));
    });
    let mut container = lab.create(&spec)?;
    container.ready()?;
    ensure!(!volume.join("started").exists(), "it ran before its start");
    container.start()?;
    let outcome = container.wait()?;
    ensure!(outcome.code == 0 && volume.join("started").exists(), "{}", outcome.output);
    Ok(())
}

fn not_found(lab: &Lab) -> Result<()> {
    let failed = |program: &str| -> Result<String> {
        let spec = lab.spec("", |spec| spec["process"]["args"] = json!([program]));
        let mut container = lab.create(&spec)?;
        let error = container.ready().expect_err("it cannot be executed");
        ensure!(container.wait()?.code == 127);
        Ok(format!("{error:#}"))
    };
    let text = failed("nothing-of-this-name")?;
    ensure!(text.contains("\"nothing-of-this-name\": executable file not found in $PATH"), "{text}");
    let text = failed("/etc")?;
    ensure!(text.contains("\"/etc\"") && text.contains("Is a directory"), "{text}");
    std::fs::write(lab.rootfs().join("bin/plain"), "text")?;
    let text = failed("plain")?;
    ensure!(text.contains("Permission denied"), "{text}");
    Ok(())
}

fn failed_mount(lab: &Lab) -> Result<()> {
    let spec = lab.spec("true", |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("mounts");
        mounts.push(json!({"destination": "/data", "type": "tmpfs", "options": ["size=lots"]}));
    });
    let mut container = lab.create(&spec)?;
    let text = format!("{:#}", container.ready().expect_err("the option is wrong"));
    container.wait()?;
    ensure!(text.contains("mount tmpfs at /data"), "{text}");
    Ok(())
}

fn execute(lab: &Lab) -> Result<()> {
    let spec = lab.spec("echo mine >/tmp/file; sleep 1000", |_| ());
    let mut container = lab.create(&spec)?;
    container.ready()?;
    container.start()?;
    let process = json!({
        "args": ["sh", "-c", "until test -s /tmp/file; do :; done; cat /tmp/file; ps | grep -c 'sleep 1000'; id -u; cat /proc/self/cgroup"],
        "env": ["PATH=/bin"], "cwd": "/tmp", "user": {"uid": 7, "gid": 7},
    });
    let outcome = container.execute(&process)?;
    expect(&outcome, &["mine\n", "\n7\n", "0::/\n"])?;
    let missing = json!({"args": ["no-such"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
    let text = format!("{:#}", container.execute(&missing).expect_err("there is no such program"));
    ensure!(text.contains("executable file not found"), "{text}");
    container.kill()?;
    ensure!(container.wait()?.code == 137);
    Ok(())
}

fn user_namespace(lab: &Lab) -> Result<()> {
    lab.give_to(100_000)?;
    let script = "cat /proc/self/uid_map; id -u; echo 1 >/proc/sys/net/ipv4/ip_forward && echo may; head -c 1 /dev/zero | wc -c; \
                  cat /proc/self/cgroup";
    let outcome = lab.shell(script, |spec| {
        let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping;
        spec["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({"type": "user"}));
        let set = json!(["CAP_NET_ADMIN"]);
        spec["process"]["capabilities"] = json!({"bounding": set, "permitted": set, "effective": set});
    })?;
    expect(&outcome, &["         0     100000      65536\n", "\n0\n", "may\n", "\n1\n"])
}

/// Two containers in the namespaces of one pod, with a shared pid namespace and without.
fn pod_namespaces(lab: &Lab) -> Result<()> {
    use podvisor_container::{IdRange, PodNamespaces, start_init};
    lab.give_to(200_000)?;
    let range = IdRange { outside: 200_000, length: 65_536 };
    let directory = lab.directory("namespaces")?;
    let pod = PodNamespaces::make(range, range, &directory)?;
    pod.inside(|| rustix::system::sethostname(b"the-pod"))??;
    pod.inside(|| std::fs::write("/proc/sys/net/ipv4/ip_default_ttl", "77"))??;
    ensure!(
        pod.inside(|| std::fs::read_to_string("/proc/net/dev"))??.lines().count() == 3,
        "not its network"
    );
    pod.as_root(|| {
        std::fs::write("/proc/sys/kernel/shmmni", "33").or_else(|error| match error.kind() {
            // Before Linux 6.9 that was for the node's root.
            std::io::ErrorKind::PermissionDenied => Ok(()),
            _ => Err(error),
        })
    })?;
    let failed =
        pod.as_root(|| std::fs::write("/proc/sys/kernel/panic", "0")).expect_err("it is not the pod's");
    ensure!(format!("{failed:#}").contains("denied"), "{failed:#}");
    ensure!(rustix::system::uname().nodename() != c"the-pod", "it is inside still");

    let init_cgroup = lab.cgroup("init")?;
    let init = start_init(&init_cgroup, Some(&pod.user()))?;
    let shared = format!("/proc/{}/ns/pid", init.pid.as_raw_pid());
    let script = "cat /proc/self/uid_map /proc/1/comm /proc/sys/net/ipv4/ip_default_ttl; hostname; id -u; \
                  echo 1 >/proc/sys/net/ipv4/ip_forward && echo may; cat /proc/self/cgroup; ls /sys/class/net";
    for (pid, first) in
        [(json!({"type": "pid"}), "sh\n"), (json!({"type": "pid", "path": shared}), "podvisor-init\n")]
    {
        let outcome = lab.shell(script, |spec| {
            let pin = |kind: &str, name: &str| json!({"type": kind, "path": directory.join(name)});
            spec["linux"]["namespaces"] = json!([
                {"type": "mount"}, {"type": "cgroup"}, pid, pin("user", "user"), pin("network", "net"),
                pin("ipc", "ipc"), pin("uts", "uts"),
            ]);
            let mounts = spec["mounts"].as_array_mut().expect("mounts");
            mounts
                .push(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}));
            mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
            let set = json!(["CAP_NET_ADMIN"]);
            spec["process"]["capabilities"] = json!({"bounding": set, "permitted": set, "effective": set});
        })?;
        expect(
            &outcome,
            &["         0     200000      65536\n", first, "\n77\nthe-pod\n0\nmay\n", "0::/\n", "\nlo\n"],
        )?;
    }
    init_cgroup.place().kill()?;
    rustix::process::waitpid(Some(init.pid), rustix::process::WaitOptions::empty())?;
    init_cgroup.place().remove()?;
    drop(pod);
    for name in ["user", "net", "ipc", "uts"] {
        rustix::mount::unmount(directory.join(name), rustix::mount::UnmountFlags::empty())?;
    }
    Ok(())
}

fn kill(lab: &Lab) -> Result<()> {
    let spec = lab.spec("(setsid sleep 1000 &) ; (setsid sleep 1000 &) ; sleep 1000", |_| ());
    let mut container = lab.create(&spec)?;
    container.ready()?;
    container.start()?;
    container.until_processes(3)?;
    container.kill()?;
    ensure!(container.wait()?.code == 137);
    container.remove()
}
