//! Namespaces without a process, with the real kernel.

mod lab;

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs;
use std::os::unix::fs::MetadataExt;

use lab::{eventually, isolated, names, run};
use podvisor_network::namespace::{self, IdRange, NamespaceError, Namespaces, Request, UserMappings};

fn request(name: &str) -> Request {
    Request {
        name: name.into(),
        user: None,
        net: true,
        ipc: true,
        uts: Some("web-0".into()),
        sysctls: BTreeMap::from([
            ("net.ipv4.ip_unprivileged_port_start".into(), "1".into()),
            ("kernel.shm_rmid_forced".into(), "1".into()),
            ("kernel.domainname".into(), "example".into()),
        ]),
    }
}

fn mounts_under_run() -> usize {
    fs::read_to_string("/proc/thread-self/mountinfo")
        .unwrap()
        .lines()
        .filter(|line| line.contains(" /run/"))
        .count()
}

fn assert_no_pins() {
    let directories = [
        namespace::NET_DIRECTORY,
        namespace::IPC_DIRECTORY,
        namespace::UTS_DIRECTORY,
        namespace::USER_DIRECTORY,
    ];
    for directory in directories {
        assert_eq!(names(directory), [""; 0], "{directory}");
    }
}

#[test]
fn made_entered_released() {
    isolated(|| {
        let request = request("a");
        let planned = Namespaces::planned(&request);
        let made = namespace::create(&request).unwrap();
        assert_eq!(made, planned);
        let net = made.net.as_deref().unwrap();
        let uts = made.uts.as_deref().unwrap();
        let ipc = made.ipc.as_deref().unwrap();

        let read = |path: &'static str| fs::read_to_string(path).unwrap();
        let port = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
        assert_eq!(namespace::enter(net, || read(port)).unwrap().trim(), "1");
        assert_eq!(read(port).trim(), "1024");
        assert_eq!(namespace::enter(uts, || read("/proc/sys/kernel/hostname")).unwrap().trim(), "web-0");
        assert_eq!(namespace::enter(uts, || read("/proc/sys/kernel/domainname")).unwrap().trim(), "example");
        assert_eq!(namespace::enter(ipc, || read("/proc/sys/kernel/shm_rmid_forced")).unwrap().trim(), "1");
        assert_eq!(read("/proc/sys/kernel/shm_rmid_forced").trim(), "0");

        // The tools of the node see it, and loopback works.
        assert!(run("ip", &["netns", "list"]).starts_with('a'));
        assert!(run("ip", &["-n", "a", "address", "show", "lo"]).contains("127.0.0.1/8"));
        assert!(run("ip", &["-n", "a", "link", "show", "up"]).contains("lo:"));
        let listening = namespace::enter(net, || std::net::TcpListener::bind("127.0.0.1:80")).unwrap();
        listening.unwrap();

        namespace::release(&made).unwrap();
        namespace::release(&made).unwrap();
        assert_no_pins();
        assert!(matches!(namespace::enter(net, || ()), Err(NamespaceError::Enter { .. })));
    });
}

#[test]
fn the_directory_becomes_one_shared_mount_point() {
    isolated(|| {
        // What the machine has there lies below, out of sight.
        let before = mounts_under_run();
        std::thread::scope(|scope| {
            for number in 0..8 {
                scope.spawn(move || namespace::create(&request(&format!("p{number}"))).unwrap());
            }
        });
        assert_eq!(names(namespace::NET_DIRECTORY).len(), 8, "a second mount would hide pins");
        // Three directories, three pins of each pod.
        assert_eq!(mounts_under_run(), before + 3 + 3 * 8);
        let mountinfo = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let line = mountinfo.lines().rfind(|line| line.contains(" /run/netns ")).unwrap();
        assert!(line.contains(" shared:"), "{line}");
        // `ip netns` works beside us.
        run("ip", &["netns", "add", "theirs"]);
        run("ip", &["netns", "delete", "theirs"]);
        for number in 0..8 {
            namespace::release(&Namespaces::planned(&request(&format!("p{number}")))).unwrap();
        }
        assert_no_pins();
        assert_eq!(mounts_under_run(), before + 3);
    });
}

#[test]
fn a_failure_leaves_nothing() {
    isolated(|| {
        let mut refused = request("a");
        refused.sysctls.insert("kernel.panic".into(), "1".into());
        assert!(matches!(namespace::create(&refused), Err(NamespaceError::SysctlRefused { .. })));
        assert_eq!(names("/run"), [""; 0], "refused before anything is touched");

        let mut missing = request("a");
        missing.sysctls.insert("net.ipv4.no_such_thing".into(), "1".into());
        let error = namespace::create(&missing).unwrap_err();
        assert_eq!(error.to_string(), "setting sysctl net.ipv4.no_such_thing to \"1\"");
        assert!(error.source().unwrap().to_string().contains("No such file"));
        let mut garbage = request("a");
        garbage.sysctls.insert("net.ipv4.ip_forward".into(), "yes, please".into());
        assert!(matches!(namespace::create(&garbage), Err(NamespaceError::Sysctl { .. })));
        assert_no_pins();

        // Another's pin in the way is an error, and is left alone; what was made before it goes.
        fs::write("/run/utsns/a", "").unwrap();
        assert!(matches!(namespace::create(&request("a")), Err(NamespaceError::Pin { .. })));
        assert_eq!(names(namespace::NET_DIRECTORY), [""; 0]);
        assert_eq!(names(namespace::IPC_DIRECTORY), [""; 0]);
        assert_eq!(names(namespace::UTS_DIRECTORY), ["a"]);
        // What a crash between making the file and the mount leaves.
        namespace::release(&Namespaces::planned(&request("a"))).unwrap();
        assert_no_pins();
    });
}

#[test]
fn names_are_checked() {
    isolated(|| {
        for name in ["", ".", "..", "a/b", "../x", "a\0b", &"x".repeat(256)] {
            let error = namespace::create(&Request { name: name.into(), net: true, ..Request::default() });
            assert!(matches!(error, Err(NamespaceError::Name { .. })), "{name:?}");
        }
        let long = Request { name: "a".into(), uts: Some("h".repeat(65)), ..Request::default() };
        let error = namespace::create(&long).unwrap_err().to_string();
        assert_eq!(error, "host name has 65 bytes, the kernel takes at most 64");
        let longest = Request { name: "a".into(), uts: Some("h".repeat(64)), ..Request::default() };
        let made = namespace::create(&longest).unwrap();
        assert_eq!((made.net.as_ref(), made.ipc.as_ref()), (None, None));
        namespace::release(&made).unwrap();
    });
}

#[test]
fn a_copy_of_the_mount_table_does_not_keep_a_namespace() {
    isolated(|| {
        let request = Request { name: "a".into(), net: true, ..Request::default() };
        let made = namespace::create(&request).unwrap();
        // Another mount namespace, copied now with the usual slave propagation (as a container's is).
        let mut copy = std::process::Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "slave",
                "sh",
                "-c",
                "echo ready; read line; grep -c ' /run/netns/a ' /proc/self/mountinfo",
            ])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = std::io::BufReader::new(copy.stdout.take().unwrap());
        let mut line = String::new();
        std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        assert_eq!(line, "ready\n");
        namespace::release(&made).unwrap();
        drop(copy.stdin.take());
        line.clear();
        std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        copy.wait().unwrap();
        assert_eq!(line, "0\n", "mounts left in the copy");
    });
}

fn with_user(name: &str, outside: u32) -> Request {
    let range = IdRange { inside: 0, outside, length: 65536 };
    Request { user: Some(UserMappings { uids: range, gids: range }), ..request(name) }
}

#[test]
fn a_user_namespace_owns_the_others() {
    isolated(|| {
        let request = with_user("a", 200_000);
        let made = namespace::create(&request).unwrap();
        assert_eq!(made, Namespaces::planned(&request));
        let user = made.user.clone().unwrap();
        // Nobody is left in it.
        let inode = |path: &str| fs::metadata(path).unwrap().ino();
        let pin = inode(user.to_str().unwrap());
        let users = fs::read_dir("/proc").unwrap().flatten().filter(|process| {
            fs::metadata(process.path().join("ns/user")).is_ok_and(|namespace| namespace.ino() == pin)
        });
        assert_eq!(users.count(), 0);

        let net = made.net.as_deref().unwrap().to_str().unwrap();
        let ipc = made.ipc.as_deref().unwrap().to_str().unwrap();
        let uts = made.uts.as_deref().unwrap().to_str().unwrap();
        let joined = [
            format!("--user={}", user.display()),
            format!("--net={net}"),
            format!("--ipc={ipc}"),
            format!("--uts={uts}"),
        ];
        // As the root of the user namespace, with all that its root may do in the others.
        let inside = |script: &str| {
            let mut arguments: Vec<&str> = joined.iter().map(String::as_str).collect();
            arguments.extend(["--setuid=0", "--setgid=0", "sh", "-ec", script]);
            run("nsenter", &arguments)
        };
        assert_eq!(
            inside("cat /proc/self/uid_map").split_whitespace().collect::<Vec<_>>(),
            ["0", "200000", "65536"]
        );
        assert_eq!(inside("cat /proc/self/setgroups"), "allow\n");
        assert_eq!(inside("hostname; hostname other; hostname"), "web-0\nother\n");
        assert_eq!(
            inside("cat /proc/sys/kernel/shm_rmid_forced /proc/sys/kernel/domainname"),
            "1\nexample\n"
        );
        inside("ip link add v0 type veth peer name v1; ip -o link show up | grep -q ' lo:'");
        inside("echo 7 > /proc/sys/net/ipv4/ip_unprivileged_port_start");
        // What is there from the beginning is its, too.
        inside("unshare --mount sh -ec 'mount -t mqueue none /mnt; test $(stat -c %u:%g /mnt) = 0:0'");
        // And nothing of the node.
        inside("if (echo 1 > /proc/sys/kernel/panic) 2> /dev/null; then exit 9; fi");

        namespace::release(&made).unwrap();
        assert_no_pins();
        // The other tests are threads of this process, which changes it for moments.
        eventually("this process can be dumped as before", || {
            rustix::process::dumpable_behavior().unwrap() == rustix::process::DumpableBehavior::Dumpable
        });
    });
}

#[test]
fn a_user_namespace_alone_and_one_that_cannot_be() {
    isolated(|| {
        let range = IdRange { inside: 0, outside: 300_000, length: 1 };
        let alone = Request {
            name: "u".into(),
            user: Some(UserMappings { uids: range, gids: range }),
            ..Request::default()
        };
        let made = namespace::create(&alone).unwrap();
        assert_eq!(names(namespace::USER_DIRECTORY), ["u"]);
        namespace::release(&made).unwrap();

        let empty = IdRange { length: 0, ..range };
        let refused = Request { user: Some(UserMappings { uids: empty, gids: empty }), ..request("refused") };
        let error = namespace::create(&refused).unwrap_err();
        assert!(matches!(error, NamespaceError::Map { .. }), "{error:?}");
        assert_no_pins();
    });
}

#[test]
fn many_user_namespaces_at_once() {
    isolated(|| {
        std::thread::scope(|scope| {
            for number in 0..16_u32 {
                scope.spawn(move || {
                    let request = with_user(&format!("p{number}"), (number + 1) << 16);
                    namespace::release(&namespace::create(&request).unwrap()).unwrap();
                });
            }
        });
        assert_no_pins();
    });
}
