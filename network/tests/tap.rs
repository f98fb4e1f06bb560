//! Taps with the real kernel: a guest, played by the test, takes the place of the pod's network namespace, and that is silent.

mod lab;

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use lab::guest::Guest;
use lab::{Pod, eventually, ip, isolated, run, wait};
use podvisor_network::tap::{self, GuestInterface, GuestNeighbour, GuestRoute, Prefix};
use podvisor_network::{BuiltinOptions, CniOptions, Kind, Network, Options, namespace};
use serde_json::json;

/// Of the monitor of the virtual machine.
const USER: u32 = 64_321;

fn open(mode: Kind) -> Network {
    fs::create_dir_all("/run/conf").unwrap();
    let subnets = vec![("10.88.0.0".parse().unwrap(), 16), ("fd00:88::".parse().unwrap(), 64)];
    let options = Options {
        mode,
        cni: CniOptions {
            config_dir: "/run/conf".into(),
            bin_dirs: vec![PathBuf::from("/usr/lib/cni")],
            cache_dir: "/run/cache".into(),
            timeout: Duration::from_secs(60),
        },
        builtin: BuiltinOptions { bridge: "podvisor0".into(), subnets, state_dir: "/run/state".into() },
    };
    wait(Network::open(options)).unwrap()
}

fn at(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn prefix(text: &str) -> Prefix {
    let (address, length) = text.split_once('/').unwrap();
    Prefix { address: at(address), length: length.parse().unwrap() }
}

fn route(destination: &str, gateway: Option<&str>) -> GuestRoute {
    GuestRoute {
        destination: prefix(destination),
        gateway: gateway.map(at),
        source: None,
        scope: 0,
        metric: 0,
        mtu: 0,
        advertised_mss: 0,
        table: 0,
    }
}

fn link(pod: &Pod, name: &str) -> serde_json::Value {
    let text = ip(&format!("-d -j -n {} link show {name}", pod.sandbox.id));
    serde_json::from_str::<serde_json::Value>(&text).unwrap()[0].take()
}

/// Whether one echo request from where the calling thread is gets an answer within a second.
fn is_reached(to: &str) -> bool {
    let mut ping = std::process::Command::new("ping");
    ping.args(["-n", "-c", "1", "-W", "1", to]).output().unwrap().status.success()
}

/// Packets that have come out of an interface of the test's own namespace.
fn received(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_guest_takes_the_place_of_a_pod_of_the_built_in_network() {
    isolated(|| {
        let network = open(Kind::Builtin);
        let pod = Pod::new("pod");
        wait(network.setup(&pod.sandbox)).unwrap();
        assert!(is_reached("10.88.0.2"), "the namespace answers until it is joined");

        let interfaces = tap::join(&pod.sandbox.netns, USER).unwrap();
        let eth0 = link(&pod, "eth0");
        let index = eth0["ifindex"].as_u64().unwrap();
        let gateway = |text: &str| GuestRoute { scope: 253, ..route(text, None) };
        let via6 = GuestRoute { metric: 1024, ..route("::/0", Some("fd00:88::1")) };
        let expected = GuestInterface {
            tap: format!("tap{index}"),
            name: "eth0".into(),
            hardware_address: eth0["address"].as_str().unwrap().into(),
            mtu: 1500,
            addresses: vec![prefix("10.88.0.2/32"), prefix("fd00:88::2/128")],
            routes: vec![
                gateway("10.88.0.1/32"),
                GuestRoute { metric: 1024, ..route("fd00:88::1/128", None) },
                GuestRoute { metric: 256, ..route("fd00:88::2/128", None) },
                route("0.0.0.0/0", Some("10.88.0.1")),
                via6,
            ],
            neighbours: vec![],
            accepts_router_advertisements: false,
            rules: vec![],
        };
        assert_eq!(interfaces, [expected]);

        // Nobody is there yet, and the namespace says nothing: neither to whom asks it, nor by itself.
        ip("neigh flush dev podvisor0");
        let port = "pvpod";
        let before = received(port);
        assert!(!is_reached("10.88.0.2"));
        assert!(!is_reached("fd00:88::2"));
        assert!(!pod.inside(|| is_reached("10.88.0.1")));
        assert!(!pod.inside(|| is_reached("fd00:88::1")));
        assert_eq!(received(port), before, "the namespace has sent something");

        let mut guest = Guest::start(&pod, &interfaces[0], USER);
        for (own, gateway) in [("10.88.0.2", "10.88.0.1"), ("fd00:88::2", "fd00:88::1")] {
            eventually("the guest is reached", || is_reached(own));
            guest.ping(at(gateway), at(gateway));
        }
        // The guest ignores it, so nobody refuses it.
        let refused =
            TcpStream::connect_timeout(&"10.88.0.2:80".parse().unwrap(), Duration::from_millis(300));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::TimedOut);

        // Again, as after a crash, also while the guest runs.
        assert_eq!(tap::join(&pod.sandbox.netns, USER).unwrap(), interfaces);
        assert!(is_reached("10.88.0.2"));
        guest.answer(false);
        guest.seen();
        assert!(!is_reached("10.88.0.2"));
        assert!(guest.seen() > 0, "the guest is asked");

        wait(network.check(Kind::Builtin, &pod.sandbox)).unwrap();
        wait(network.teardown(Kind::Builtin, &pod.sandbox)).unwrap();
        namespace::release(&pod.namespaces).unwrap();
    });
}

#[test]
fn plugins_find_their_interface_and_pods_reach_the_guest() {
    isolated(|| {
        let list = json!({"cniVersion": "1.0.0", "name": "real", "plugins": [
            {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
             "ipam": {"type": "host-local", "dataDir": "/run/ipam",
                      "ranges": [[{"subnet": "10.7.0.0/24"}], [{"subnet": "fd00:7::/64"}]],
                      "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "tuning", "mtu": 1300},
        ]});
        let network = open(Kind::Cni);
        fs::write("/run/conf/10-real.conflist", list.to_string()).unwrap();
        let (vm, other) = (Pod::new("vm"), Pod::new("other"));
        for pod in [&vm, &other] {
            wait(network.setup(&pod.sandbox)).unwrap();
        }
        let interfaces = tap::join(&vm.sandbox.netns, USER).unwrap();
        assert_eq!(interfaces[0].mtu, 1300);
        assert_eq!(link(&vm, &interfaces[0].tap)["mtu"], 1300);
        assert_eq!(interfaces[0].addresses, [prefix("10.7.0.2/24"), prefix("fd00:7::2/64")]);
        let mut guest = Guest::start(&vm, &interfaces[0], USER);
        for (own, neighbour) in [("10.7.0.2", "10.7.0.3"), ("fd00:7::2", "fd00:7::3")] {
            eventually("the guest is reached", || other.inside(|| is_reached(own)));
            guest.ping(at(neighbour), at(neighbour));
        }
        wait(network.check(Kind::Cni, &vm.sandbox)).unwrap();
        for pod in [vm, other] {
            wait(network.teardown(Kind::Cni, &pod.sandbox)).unwrap();
            namespace::release(&pod.namespaces).unwrap();
        }
    });
}

/// As calico makes it: a host address, a gateway outside of every network with a permanent neighbour; and a second interface.
#[test]
fn everything_that_a_guest_needs_is_found() {
    isolated(|| {
        let pod = Pod::new("pod");
        for line in [
            "link add cali0 type veth peer name eth0 netns pod",
            "link add second type veth peer name net1 netns pod",
            "link add unused type veth peer name down netns pod",
            "link set cali0 up",
            "link set second up",
            "-n pod link set eth0 mtu 1440 address 02:00:00:00:00:05 up",
            "-n pod link set net1 address 02:00:00:00:00:06 up",
            "-n pod address add 10.7.0.9/32 dev eth0",
            "-n pod route add 169.254.1.1 dev eth0 scope link",
            "-n pod route add default via 169.254.1.1 dev eth0 src 10.7.0.9 mtu 1400 advmss 1300",
            "-n pod neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent",
            "-n pod address add 10.9.0.2/24 dev net1",
            "-n pod address add fd00:9::2/64 dev net1 nodad",
            "-n pod route add 10.77.0.0/16 via 10.9.0.1 dev net1 metric 7",
            "-n pod route add 10.78.0.0/16 via inet6 fd00:9::1 dev net1",
            "-n pod route add 10.79.0.0/16 via 10.9.0.1 dev net1 table 4711",
            "-n pod rule add from 10.9.0.2 table 4711 priority 1000",
            "-n pod -6 rule add not to fd00:99::/64 iif net1 table 100 priority 900",
            // No way out.
            "-n pod route add unreachable 10.80.0.0/16",
        ] {
            ip(line);
        }
        let interfaces = tap::join(&pod.sandbox.netns, USER).unwrap();
        let [eth0, net1] = &interfaces[..] else { panic!("{interfaces:?}") };
        assert_eq!(
            (eth0.name.as_str(), eth0.mtu, &*eth0.hardware_address),
            ("eth0", 1440, "02:00:00:00:00:05")
        );
        assert_eq!(eth0.addresses, [prefix("10.7.0.9/32")]);
        let to_gateway = GuestRoute { scope: 253, ..route("169.254.1.1/32", None) };
        let default = GuestRoute {
            source: Some(at("10.7.0.9")),
            mtu: 1400,
            advertised_mss: 1300,
            ..route("0.0.0.0/0", Some("169.254.1.1"))
        };
        assert_eq!(eth0.routes, [to_gateway, default]);
        let neighbour =
            GuestNeighbour { address: at("169.254.1.1"), hardware_address: "ee:ee:ee:ee:ee:ee".into() };
        assert_eq!(eth0.neighbours, [neighbour]);
        assert!(eth0.accepts_router_advertisements, "as the kernel has it by default");
        assert_eq!(net1.addresses, [prefix("10.9.0.2/24"), prefix("fd00:9::2/64")]);
        let own = GuestRoute { source: Some(at("10.9.0.2")), scope: 253, ..route("10.9.0.0/24", None) };
        let own6 = GuestRoute { metric: 256, ..route("fd00:9::/64", None) };
        let far = GuestRoute { metric: 7, ..route("10.77.0.0/16", Some("10.9.0.1")) };
        let via6 = route("10.78.0.0/16", Some("fd00:9::1"));
        let tabled = GuestRoute { table: 4711, ..route("10.79.0.0/16", Some("10.9.0.1")) };
        let (main, other): (Vec<_>, Vec<_>) = net1.routes.iter().cloned().partition(|route| route.table == 0);
        assert_eq!(main, [own, own6, far, via6]);
        assert_eq!(other, [tabled]);
        // Family, and what it is told to: the namespace's rules in their order, with the last interface.
        assert_eq!(eth0.rules, [[0; 0]; 0]);
        let heads: Vec<[u8; 3]> = net1.rules.iter().map(|rule| [rule[0], rule[1], rule[2]]).collect();
        assert_eq!(heads, [[10, 64, 0], [2, 0, 32]]);
        assert_eq!(net1.rules[0][8..12], 2_u32.to_ne_bytes(), "inverted, and nothing of how it is there");

        // What the node's end sees is the guest of that interface.
        ip("address add 10.9.0.1/24 dev second");
        let mut guest = Guest::start(&pod, net1, USER);
        eventually("the guest is reached", || is_reached("10.9.0.2"));
        guest.ping(at("10.9.0.1"), at("10.9.0.1"));

        ip("-n pod tuntap add dev tunnel mode tun");
        ip("-n pod link set tunnel up");
        let error = tap::join(&pod.sandbox.netns, USER).unwrap_err();
        assert!(error.to_string().starts_with("interface tunnel of the pod is no Ethernet"), "{error}");
        namespace::release(&pod.namespaces).unwrap();
        let error = tap::join(&pod.sandbox.netns, USER).unwrap_err();
        assert_eq!(error.to_string(), "entering the pod's network namespace");
        assert!(
            run("tc", &["qdisc", "show"]).find("clsact").is_none(),
            "the node's own interfaces are left alone"
        );
    });
}
