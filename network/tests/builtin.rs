//! The built-in network with the real kernel: pods, a node (the test's own network namespace) and a world beyond it that
//! has no route back to the pods.

mod lab;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lab::{Pod, eventually, ip, isolated, listen, names, run, wait};
use podvisor_network::{
    BuiltinError, BuiltinOptions, CniOptions, Kind, Network, NetworkError, Options, Protocol, namespace,
};

const PATIENCE: Duration = Duration::from_secs(60);
const NODE: &str = "198.51.100.1";
const WORLD: &str = "198.51.100.2";
const NODE6: &str = "2001:db8::1";
const WORLD6: &str = "2001:db8::2";

fn options(state_dir: &Path, subnets: &[&str]) -> Options {
    let subnets = subnets.iter().map(|text| {
        let (address, length) = text.split_once('/').unwrap();
        (address.parse().unwrap(), length.parse().unwrap())
    });
    let nowhere = PathBuf::from("/run/nowhere");
    Options {
        mode: Kind::Builtin,
        cni: CniOptions {
            config_dir: nowhere.clone(),
            bin_dirs: Vec::new(),
            cache_dir: nowhere,
            timeout: Duration::from_secs(1),
        },
        builtin: BuiltinOptions {
            bridge: "podvisor0".into(),
            subnets: subnets.collect(),
            state_dir: state_dir.to_owned(),
        },
    }
}

fn open(subnets: &[&str]) -> Network {
    wait(Network::open(options(Path::new("/run/state"), subnets))).unwrap()
}

fn dual() -> Network {
    open(&["10.88.0.0/16", "fd00:88::/64"])
}

/// A namespace `world` at the other end of the node's default route.
fn make_world() -> PathBuf {
    ip("netns add world");
    ip("link add uplink type veth peer name eth0 netns world");
    for line in [
        format!("address add {NODE}/24 dev uplink"),
        format!("address add {NODE6}/64 dev uplink nodad"),
        "link set uplink mtu 1400 up".into(),
        format!("-n world address add {WORLD}/24 dev eth0"),
        format!("-n world address add {WORLD6}/64 dev eth0 nodad"),
        "-n world link set eth0 up".into(),
        "-n world link set lo up".into(),
        format!("route add default via {WORLD}"),
        format!("-6 route add default via {WORLD6}"),
    ] {
        ip(&line);
    }
    PathBuf::from("/run/netns/world")
}

fn setup(network: &Network, pod: &Pod) -> Vec<IpAddr> {
    let attachment = wait(network.setup(&pod.sandbox)).unwrap();
    assert!(attachment.cni_result.is_null());
    wait(network.check(Kind::Builtin, &pod.sandbox)).unwrap();
    attachment.addresses
}

fn teardown(network: &Network, pod: &Pod) {
    wait(network.teardown(Kind::Builtin, &pod.sandbox)).unwrap();
    namespace::release(&pod.namespaces).unwrap();
}

/// Serves one TCP connection: answers with the address it saw the client under.
fn serve(listener: TcpListener) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, client) = listener.accept().unwrap();
        stream.write_all(client.ip().to_string().as_bytes()).unwrap();
    })
}

/// What the server at `to` says.
fn ask(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A server in the pod at `port`, asked from wherever `from` runs things, at `to`.
fn asked_through(
    pod: &Pod,
    at: &str,
    from: impl FnOnce(SocketAddr) -> std::io::Result<String>,
    to: &str,
) -> String {
    let listener = pod.inside(|| listen(at));
    let server = serve(listener);
    let answer = from(to.parse().unwrap()).unwrap_or_else(|error| panic!("{to}: {error}"));
    server.join().unwrap();
    answer
}

/// Nothing of any pod is left.
fn assert_bare() {
    eventually("the interfaces are deleted", || !ip("link show").contains("pv"));
    let leases: Vec<_> =
        names("/run/state/leases").into_iter().filter(|name| name.parse::<IpAddr>().is_ok()).collect();
    assert_eq!(leases, [""; 0]);
    assert_eq!(names("/run/state/ports"), [""; 0]);
    let rules = run("nft", &["list", "table", "inet", "podvisor"]);
    for part in ["self4 {", "self6 {", "ports4 {", "ports6 {", "ports4_at {", "ports6_at {"] {
        let (_, rest) = rules.split_once(part).unwrap();
        assert!(!rest.split_once('}').unwrap().0.contains("elements"), "{part} {rest}");
    }
}

#[test]
fn pods_reach_each_other_and_the_world() {
    isolated(|| {
        let world = make_world();
        let network = dual();
        assert_eq!(network.ready(), Ok(()));
        let (a, b) = (Pod::new("aaaa"), Pod::new("bbbb"));
        let of_a = setup(&network, &a);
        let of_b = setup(&network, &b);
        let texts = |addresses: &[IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(texts(&of_a), ["10.88.0.2", "fd00:88::2"]);
        assert_eq!(texts(&of_b), ["10.88.0.3", "fd00:88::3"]);

        // Between pods, at once, each seen under its own address.
        let from_a = |to| a.inside(|| ask(to));
        assert_eq!(asked_through(&b, "0.0.0.0:80", from_a, "10.88.0.3:80"), "10.88.0.2");
        assert_eq!(asked_through(&b, "[::]:80", from_a, "[fd00:88::3]:80"), "fd00:88::2");
        // The node reaches pods, as its gateway address.
        assert_eq!(asked_through(&b, "0.0.0.0:80", ask, "10.88.0.3:80"), "10.88.0.1");
        assert_eq!(asked_through(&b, "[::]:80", ask, "[fd00:88::3]:80"), "fd00:88::1");
        // The world sees the node.
        for (at, to, seen) in [("0.0.0.0:81", WORLD, NODE), ("[::]:81", WORLD6, NODE6)] {
            let listener = namespace::enter(&world, || listen(at)).unwrap();
            let server = serve(listener);
            let to = SocketAddr::new(to.parse().unwrap(), 81);
            assert_eq!(a.inside(|| ask(to)).unwrap(), seen);
            server.join().unwrap();
        }
        run("ip", &["netns", "exec", "aaaa", "ping", "-c", "1", "-W", "5", "10.88.0.3"]);
        run("ip", &["netns", "exec", "aaaa", "ping", "-c", "1", "-W", "5", WORLD6]);
        // Packets fit through the node's own way out.
        assert!(ip("-n aaaa link show eth0").contains("mtu 1400"));

        teardown(&network, &a);
        teardown(&network, &b);
        assert_bare();
    });
}

#[test]
fn pods_cannot_pretend() {
    isolated(|| {
        let network = dual();
        let (a, b) = (Pod::new("aaaa"), Pod::new("bbbb"));
        setup(&network, &a);
        setup(&network, &b);
        // A foreign source address goes nowhere.
        let server = b.inside(|| UdpSocket::bind("0.0.0.0:53")).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        ip("-n aaaa address add 203.0.113.7/32 dev eth0");
        let send = |from: &'static str| {
            a.inside(|| UdpSocket::bind(from).unwrap().send_to(from.as_bytes(), "10.88.0.3:53").unwrap())
        };
        send("203.0.113.7:1");
        send("10.88.0.2:2");
        let mut text = [0; 64];
        let (length, from) = server.recv_from(&mut text).unwrap();
        assert_eq!((&text[..length], from.to_string()), (&b"10.88.0.2:2"[..], "10.88.0.2:2".into()));

        // Nor does what is meant for the node's own loopback (CVE-2020-8558).
        let local = UdpSocket::bind("127.0.0.1:53").unwrap();
        local.set_read_timeout(Some(PATIENCE)).unwrap();
        ip("-n aaaa address del 127.0.0.1/8 dev lo");
        a.inside(|| fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1")).unwrap();
        ip("-n aaaa route flush table local root 127.0.0.0/8");
        ip("-n aaaa route add 127.0.0.0/8 via 10.88.0.1 src 10.88.0.2");
        a.inside(|| UdpSocket::bind("10.88.0.2:3").unwrap().send_to(b"bad", "127.0.0.1:53").unwrap());
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"good", "127.0.0.1:53").unwrap();
        let (length, _) = local.recv_from(&mut text).unwrap();
        assert_eq!(&text[..length], b"good");

        teardown(&network, &a);
        teardown(&network, &b);
        assert_bare();
    });
}

#[test]
fn host_ports_with_filtered_bridges() {
    isolated(|| host_ports("1"));
}

#[test]
fn host_ports_without_filtered_bridges() {
    isolated(|| host_ports("0"));
}

/// br_netfilter sends translated packets from port to port of the bridge; without it they are routed.
fn host_ports(bridge_netfilter: &str) {
    for file in ["iptables", "ip6tables"] {
        // Where the node has no br_netfilter there is only one way.
        let path = format!("/proc/sys/net/bridge/bridge-nf-call-{file}");
        if Path::new(&path).exists() {
            fs::write(path, bridge_netfilter).unwrap();
        }
    }
    let world = make_world();
    let network = dual();
    let client = Pod::new("client");
    setup(&network, &client);
    let server = Pod::new("server")
        .port(Protocol::Tcp, None, 8080, 80)
        .port(Protocol::Tcp, Some("127.0.0.1"), 8081, 81)
        .port(Protocol::Tcp, Some(NODE6), 8082, 82)
        .port(Protocol::Sctp, None, 8080, 80);
    setup(&network, &server);
    let from_world = |to| namespace::enter(&world, || ask(to)).unwrap();
    let from_client = |to| client.inside(|| ask(to));
    let from_itself = |to| server.inside(|| ask(to));
    // No pod is told of a way past the node.
    for (address, gateway) in [("10.88.0.3", "via 10.88.0.1"), ("fd00:88::3", "via fd00:88::1")] {
        run("ip", &["netns", "exec", "client", "ping", "-c", "3", "-i", "0.01", "-W", "5", address]);
        let route = ip(&format!("-n client route get {address}"));
        assert!(route.contains(gateway), "{route}");
    }
    // From outside and from another pod the client's address is kept.
    assert_eq!(asked_through(&server, "0.0.0.0:80", from_world, "198.51.100.1:8080"), WORLD);
    assert_eq!(asked_through(&server, "[::]:80", from_world, "[2001:db8::1]:8080"), WORLD6);
    assert_eq!(asked_through(&server, "[::]:82", from_world, "[2001:db8::1]:8082"), WORLD6);
    assert_eq!(asked_through(&server, "0.0.0.0:80", from_client, "198.51.100.1:8080"), "10.88.0.2");
    assert_eq!(asked_through(&server, "[::]:80", from_client, "[2001:db8::1]:8080"), "fd00:88::2");
    // From the node.
    assert_eq!(asked_through(&server, "0.0.0.0:80", ask, "127.0.0.1:8080"), "10.88.0.1");
    assert_eq!(asked_through(&server, "0.0.0.0:81", ask, "127.0.0.1:8081"), "10.88.0.1");
    assert_eq!(asked_through(&server, "0.0.0.0:80", ask, "198.51.100.1:8080"), NODE);
    assert_eq!(asked_through(&server, "[::]:80", ask, "[2001:db8::1]:8080"), NODE6);
    // Refused at once, not lost: a client that asks for "localhost" goes on to 127.0.0.1.
    assert_eq!(ask("[::1]:8080".parse().unwrap()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    // From the pod itself.
    assert_eq!(asked_through(&server, "0.0.0.0:80", from_itself, "198.51.100.1:8080"), "10.88.0.1");
    assert_eq!(asked_through(&server, "[::]:80", from_itself, "[2001:db8::1]:8080"), "fd00:88::1");
    // What is bound to one address is not on others.
    assert_eq!(
        from_world("198.51.100.1:8081".parse().unwrap()).unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
    assert_eq!(ask("127.0.0.1:8082".parse().unwrap()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    // A restart of the daemon keeps them.
    drop(network);
    let network = dual();
    assert_eq!(asked_through(&server, "0.0.0.0:80", from_world, "198.51.100.1:8080"), WORLD);
    assert_eq!(asked_through(&server, "0.0.0.0:80", from_itself, "198.51.100.1:8080"), "10.88.0.1");

    teardown(&network, &server);
    assert_eq!(
        from_world("198.51.100.1:8080".parse().unwrap()).unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
    teardown(&network, &client);
    assert_bare();
}

#[test]
fn udp_clients_follow_the_host_port() {
    isolated(|| {
        let world = make_world();
        let network = dual();
        let client = namespace::enter(&world, || UdpSocket::bind("0.0.0.0:5000")).unwrap().unwrap();
        client.connect((NODE, 53)).unwrap();
        // Sent before anybody is there: tracked as a connection of the node's own.
        client.send(b"early").unwrap();
        for id in ["first", "second"] {
            let pod = Pod::new(id).port(Protocol::Udp, None, 53, 5353);
            setup(&network, &pod);
            let server = pod.inside(|| UdpSocket::bind("0.0.0.0:5353")).unwrap();
            server.set_read_timeout(Some(PATIENCE)).unwrap();
            // The first send may report the refusal of an earlier one.
            let _ = client.send(id.as_bytes()).or_else(|_| client.send(id.as_bytes())).unwrap();
            let mut text = [0; 64];
            let (length, from) = server.recv_from(&mut text).unwrap();
            assert_eq!((&text[..length], from.to_string()), (id.as_bytes(), "198.51.100.2:5000".into()));
            teardown(&network, &pod);
        }
        assert_bare();
    });
}

#[test]
fn a_taken_host_port_is_refused_and_leaves_nothing() {
    isolated(|| {
        let network = dual();
        let first = Pod::new("first").port(Protocol::Tcp, None, 8080, 80);
        setup(&network, &first);
        let before = (ip("link show"), names("/run/state/leases"), names("/run/state/ports"));
        let second = Pod::new("second").port(Protocol::Udp, None, 53, 53).port(
            Protocol::Tcp,
            Some("127.0.0.1"),
            8080,
            80,
        );
        let error = wait(network.setup(&second.sandbox)).unwrap_err();
        assert_eq!(error.to_string(), "host port 127.0.0.1:8080 tcp is taken by sandbox first");
        assert_eq!((ip("link show"), names("/run/state/leases"), names("/run/state/ports")), before);
        // Tearing down the one that lost does not touch the one that has it.
        teardown(&network, &second);
        assert_eq!(asked_through(&first, "0.0.0.0:80", ask, "127.0.0.1:8080"), "10.88.0.1");
        // The same sandbox twice is an error that disturbs nothing.
        let error = wait(network.setup(&first.sandbox)).unwrap_err();
        assert_eq!(error.to_string(), "sandbox first is connected already");
        assert_eq!(asked_through(&first, "0.0.0.0:80", ask, "127.0.0.1:8080"), "10.88.0.1");
        teardown(&network, &first);
        assert_bare();
    });
}

#[test]
fn an_exhausted_range_says_so() {
    isolated(|| {
        let network = open(&["10.9.0.0/29", "fd00:9::/64"]);
        let pods: Vec<_> = (0..5).map(|number| Pod::new(&format!("p{number}"))).collect();
        for pod in &pods {
            setup(&network, pod);
        }
        let late = Pod::new("late");
        let error = wait(network.setup(&late.sandbox)).unwrap_err();
        assert!(matches!(error, NetworkError::Builtin(BuiltinError::Exhausted { .. })));
        assert_eq!(error.to_string(), "all addresses of 10.9.0.0/29 are in use");
        assert!(!ip("link show").contains("pvlate"));
        teardown(&network, &pods[3]);
        assert_eq!(setup(&network, &late)[0].to_string(), "10.9.0.5");
        for pod in pods.iter().chain([&late]) {
            teardown(&network, pod);
        }
        assert_bare();
    });
}

#[test]
fn leftovers_of_a_crash_go_and_the_rest_stays() {
    isolated(|| {
        make_world();
        let kept = Pod::new("kept").port(Protocol::Tcp, None, 8080, 80);
        let lost = Pod::new("lost").port(Protocol::Tcp, None, 8081, 80);
        {
            let network = dual();
            setup(&network, &kept);
            setup(&network, &lost);
        }
        // A crash between making a lease and filling it, and between moving a port record into place.
        fs::write("/run/state/leases/10.88.0.99", "").unwrap();
        fs::write("/run/state/ports/.torn", "[").unwrap();
        let network = dual();
        wait(network.retain(std::slice::from_ref(&kept.sandbox))).unwrap();
        assert_eq!(names("/run/state/ports"), ["kept"]);
        let leases = names("/run/state/leases");
        assert_eq!(leases, ["10.88.0.2", "fd00:88::2", "last.ipv4", "last.ipv6"]);
        assert!(!ip("link show").contains("pvlost"));
        assert_eq!(asked_through(&kept, "0.0.0.0:80", ask, "127.0.0.1:8080"), "10.88.0.1");
        assert_eq!(ask("127.0.0.1:8081".parse().unwrap()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        // The port is free again.
        let next = Pod::new("next").port(Protocol::Tcp, None, 8081, 80);
        setup(&network, &next);
        for pod in [&next, &kept, &lost] {
            teardown(&network, pod);
        }
        wait(network.retain(&[])).unwrap();
        assert_bare();
    });
}

#[test]
fn teardown_is_idempotent_and_needs_no_namespace() {
    isolated(|| {
        let network = dual();
        let pod = Pod::new("pod").port(Protocol::Udp, None, 53, 53);
        // Never set up.
        wait(network.teardown(Kind::Builtin, &pod.sandbox)).unwrap();
        setup(&network, &pod);
        namespace::release(&pod.namespaces).unwrap();
        wait(network.teardown(Kind::Builtin, &pod.sandbox)).unwrap();
        wait(network.teardown(Kind::Builtin, &pod.sandbox)).unwrap();
        assert_bare();

        // By a daemon that is set to CNI by now.
        let pod = Pod::new("pod").port(Protocol::Tcp, None, 80, 80);
        setup(&network, &pod);
        let mut options = options(Path::new("/run/state"), &["10.88.0.0/16"]);
        options.mode = Kind::Cni;
        drop(network);
        let network = wait(Network::open(options)).unwrap();
        assert_eq!(network.kind(), Kind::Cni);
        assert_eq!(network.ready(), Err("no CNI configuration in /run/nowhere".into()));
        wait(network.teardown(Kind::Builtin, &pod.sandbox)).unwrap();
        namespace::release(&pod.namespaces).unwrap();
        assert_bare();
        // The table and the bridge may be gone too.
        run("nft", &["delete", "table", "inet", "podvisor"]);
        ip("link delete podvisor0");
        wait(network.teardown(Kind::Builtin, &pod.sandbox)).unwrap();
        wait(network.retain(&[])).unwrap();
    });
}

#[test]
fn a_failed_setup_leaves_nothing() {
    isolated(|| {
        let network = dual();
        let pod = Pod::new("pod").port(Protocol::Tcp, None, 80, 80);
        namespace::release(&pod.namespaces).unwrap();
        let error = wait(network.setup(&pod.sandbox)).unwrap_err();
        assert_eq!(error.to_string(), "opening network namespace /run/netns/pod");
        assert_bare();
        // Something that is not a namespace.
        fs::write("/run/netns/pod", "").unwrap();
        let error = wait(network.setup(&pod.sandbox)).unwrap_err();
        assert!(error.to_string().starts_with("creating interface pvpod"), "{error}");
        fs::remove_file("/run/netns/pod").unwrap();
        // An eth0 that is there already.
        let taken = Pod::new("taken");
        ip("-n taken link add eth0 type veth peer name other");
        let error = wait(network.setup(&taken.sandbox)).unwrap_err();
        assert!(error.to_string().starts_with("creating interface pvtaken"), "{error}");
        namespace::release(&taken.namespaces).unwrap();
        assert_bare();
        for id in ["", "../x", "a/b", ".hidden"] {
            let mut sandbox = pod.sandbox.clone();
            sandbox.id = id.into();
            let error = wait(network.setup(&sandbox)).unwrap_err().to_string();
            assert!(error.contains("cannot be a file name"), "{error}");
        }
    });
}

#[test]
fn a_new_pod_cidr_is_for_new_pods() {
    isolated(|| {
        let world = make_world();
        let network = open(&[]);
        let none = "no range for pods: none is configured and kubelet has not sent a PodCIDR";
        assert_eq!(network.ready(), Err(none.into()));
        let pod = Pod::new("early");
        assert_eq!(wait(network.setup(&pod.sandbox)).unwrap_err().to_string(), none);
        namespace::release(&pod.namespaces).unwrap();

        wait(network.set_pod_cidr("10.1.0.0/24,fd00:1::/64")).unwrap();
        assert_eq!(network.ready(), Ok(()));
        let old = Pod::new("old");
        setup(&network, &old);
        for nonsense in ["", "10.2.0.0", "10.2.0.0/24,10.3.0.0/24", "10.2.0.1/24"] {
            wait(network.set_pod_cidr(nonsense)).unwrap_err();
        }
        wait(network.set_pod_cidr("10.2.0.0/24")).unwrap();
        let new = Pod::new("new");
        assert_eq!(setup(&network, &new), ["10.2.0.2".parse::<IpAddr>().unwrap()]);
        let reachable = |network: &Network| {
            assert_eq!(
                asked_through(&old, "0.0.0.0:80", |to| new.inside(|| ask(to)), "10.1.0.2:80"),
                "10.2.0.2"
            );
            assert_eq!(asked_through(&old, "[::]:80", ask, "[fd00:1::2]:80"), "fd00:1::1");
            let server = serve(namespace::enter(&world, || listen("0.0.0.0:81")).unwrap());
            assert_eq!(old.inside(|| ask(SocketAddr::new(WORLD.parse().unwrap(), 81))).unwrap(), NODE);
            server.join().unwrap();
            assert_eq!(network.ready(), Ok(()));
        };
        reachable(&network);
        // kubelet does not send it again when only the daemon starts anew.
        drop(network);
        let network = open(&["10.7.0.0/24"]);
        reachable(&network);
        let third = Pod::new("third");
        assert_eq!(setup(&network, &third), ["10.2.0.3".parse::<IpAddr>().unwrap()]);
        // The old range goes when its last pod has gone.
        teardown(&network, &old);
        wait(network.set_pod_cidr("10.2.0.0/23,fd00:1::/56")).unwrap();
        let addresses = ip("address show dev podvisor0");
        assert!(!addresses.contains("10.1.0.1/"), "{addresses}");
        assert!(addresses.contains("10.2.0.1/23") && addresses.contains("fd00:1::1/56"), "{addresses}");
        assert!(!addresses.contains("10.2.0.1/24") && !addresses.contains("fd00:1::1/64"), "{addresses}");
        assert_eq!(
            asked_through(&new, "0.0.0.0:80", |to| third.inside(|| ask(to)), "10.2.0.2:80"),
            "10.2.0.3"
        );
        teardown(&network, &new);
        teardown(&network, &third);
        assert_bare();
    });
}

#[test]
fn flushed_rules_and_a_deleted_bridge_come_back() {
    isolated(|| {
        let network = dual();
        let pod = Pod::new("pod").port(Protocol::Tcp, None, 8080, 80);
        setup(&network, &pod);
        run("nft", &["flush", "ruleset"]);
        assert_eq!(network.ready(), Ok(()));
        eventually("the rules are written again", || {
            wait(tokio::task::yield_now());
            std::process::Command::new("nft")
                .args(["list", "table", "inet", "podvisor"])
                .stderr(std::process::Stdio::null())
                .output()
                .unwrap()
                .status
                .success()
        });
        assert_eq!(asked_through(&pod, "0.0.0.0:80", ask, "127.0.0.1:8080"), "10.88.0.1");
        ip("link delete podvisor0");
        let next = Pod::new("next");
        setup(&network, &next);
        assert_eq!(asked_through(&next, "0.0.0.0:80", ask, "10.88.0.3:80"), "10.88.0.1");
        teardown(&network, &pod);
        teardown(&network, &next);
        assert_bare();
    });
}

#[test]
fn a_pod_that_turned_ipv6_off_gets_none() {
    isolated(|| {
        let network = dual();
        let pod = Pod::with_sysctls(
            "four",
            &[("net.ipv6.conf.all.disable_ipv6", "1"), ("net.ipv6.conf.default.disable_ipv6", "1")],
        )
        .port(Protocol::Tcp, None, 8080, 80);
        assert_eq!(setup(&network, &pod), ["10.88.0.2".parse::<IpAddr>().unwrap()]);
        assert!(!Path::new("/run/state/leases/fd00:88::2").exists());
        assert_eq!(asked_through(&pod, "0.0.0.0:80", ask, "127.0.0.1:8080"), "10.88.0.1");
        teardown(&network, &pod);
        assert_bare();
    });
}

#[test]
fn a_node_without_ipv6_gives_ipv4() {
    isolated(|| {
        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        let network = dual();
        let pod = Pod::new("pod");
        assert_eq!(setup(&network, &pod), ["10.88.0.2".parse::<IpAddr>().unwrap()]);
        teardown(&network, &pod);
        assert_bare();
    });
}

#[test]
fn many_at_once() {
    isolated(|| {
        let network = dual();
        let pods: Vec<_> = (0..20)
            .map(|number| Pod::new(&format!("p{number}")).port(Protocol::Tcp, None, 9000 + number, 80))
            .collect();
        let addresses: Vec<_> =
            wait(futures_util::future::join_all(pods.iter().map(|pod| network.setup(&pod.sandbox))))
                .into_iter()
                .flat_map(|outcome| outcome.unwrap().addresses)
                .collect();
        let distinct: std::collections::HashSet<_> = addresses.iter().collect();
        assert_eq!(distinct.len(), 40);
        for (number, pod) in pods.iter().enumerate() {
            asked_through(pod, "0.0.0.0:80", ask, &format!("127.0.0.1:{}", 9000 + number));
        }
        for outcome in wait(futures_util::future::join_all(
            pods.iter().map(|pod| network.teardown(Kind::Builtin, &pod.sandbox)),
        )) {
            outcome.unwrap();
        }
        assert_bare();
    });
}

#[test]
fn unusable_options_are_named() {
    isolated(|| {
        let error = |change: &dyn Fn(&mut BuiltinOptions)| {
            let mut options = options(Path::new("/run/state"), &["10.88.0.0/16"]);
            change(&mut options.builtin);
            wait(Network::open(options)).unwrap_err().to_string()
        };
        assert!(error(&|options| options.bridge = "sixteen-letters-".into()).contains("bridge name"));
        assert!(error(&|options| options.bridge = "a\"; drop".into()).contains("bridge name"));
        assert!(error(&|options| options.subnets[0].1 = 32).contains("8 to 30"));
        assert!(
            error(&|options| options.subnets[0].0 = "10.88.0.1".parse().unwrap())
                .contains("10.88.0.0/16 is meant")
        );
        ip("link add podvisor0 type veth peer name other");
        assert!(error(&|_| ()).contains("creating bridge podvisor0"));
        assert!(
            error(&|options| options.state_dir = "/proc/version".into()).contains("reading /proc/version")
        );
    });
}

/// `cargo test --release -p podvisor-network --test builtin measure -- --ignored --nocapture`
#[test]
#[ignore = "prints times"]
fn measure() {
    isolated(|| {
        make_world();
        let network = dual();
        for ports in [0, 2] {
            let mut times: [Vec<Duration>; 5] = Default::default();
            for number in 0..100 {
                let started = Instant::now();
                let mut pod = Pod::new(&format!("p{number}"));
                times[0].push(started.elapsed());
                for port in 0..ports {
                    pod = pod.port(Protocol::Tcp, None, 8000 + port, 80);
                }
                let mut address = None;
                let mut step = |index: usize, step: &mut dyn FnMut()| {
                    let started = Instant::now();
                    step();
                    times[index].push(started.elapsed());
                };
                step(1, &mut || {
                    address = wait(network.setup(&pod.sandbox)).unwrap().addresses.first().copied();
                });
                // Whether the first packet gets through, or its repetition after a second.
                let server = serve(pod.inside(|| listen("0.0.0.0:80")));
                step(2, &mut || drop(ask(SocketAddr::new(address.unwrap(), 80)).unwrap()));
                server.join().unwrap();
                step(3, &mut || wait(network.teardown(Kind::Builtin, &pod.sandbox)).unwrap());
                step(4, &mut || namespace::release(&pod.namespaces).unwrap());
            }
            for (name, times) in
                ["namespace", "setup", "first connection", "teardown", "release"].iter().zip(&mut times)
            {
                times.sort();
                println!("{ports} host ports: {name}: median {:?}, 95 % {:?}", times[50], times[95]);
            }
        }
    });
}
