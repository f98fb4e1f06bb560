//! Network interfaces as the agent configures them, in a network namespace in place of a guest.

mod guest;

use std::process::Command;
use std::time::{Duration, Instant};

use guest::{Guest, code};
use podvisor_proto::agent::request::Verb;
use podvisor_proto::agent::{
    AddInterface, Connect, CreateContainer, ErrorCode, List, Neighbour, Open, RemoveInterface, Route,
    StandardStream, StartInit, Stats, open::Stream, reply,
};
use serde_json::Value;

const FIRST: &str = "02:00:00:00:00:01";
const SECOND: &str = "02:00:00:00:00:02";

fn run(program: &str, line: &str) -> String {
    let output = Command::new(program).args(line.split_whitespace()).output().expect("it runs");
    assert!(output.status.success(), "{program} {line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn ip(line: &str) -> String {
    run("ip", line)
}

/// The network namespace of an agent, by its pid. It goes with the agent.
struct Net(u32);

impl Net {
    fn of(guest: &Guest) -> Self {
        Self(guest.pid())
    }

    /// A pair with one end, of this hardware address, inside.
    fn plug(&self, outside: &str, inside: &str, address: &str) {
        let pid = self.0;
        ip(&format!("link add {outside} type veth peer name {inside} address {address} netns {pid}"));
        ip(&format!("link set {outside} up"));
    }

    fn ip(&self, line: &str) -> Vec<Value> {
        let text = run("nsenter", &format!("-t {} -n ip -d -j {line}", self.0));
        serde_json::from_str(if text.trim().is_empty() { "[]" } else { &text }).expect("JSON")
    }

    /// Destination, gateway and more of the routes of an interface.
    fn routes(&self, family: &str, name: &str) -> Vec<String> {
        let words = |route: &Value| {
            let via = route["via"]["host"].as_str().or(route["gateway"].as_str());
            let via = via.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
            let flags = route["flags"].to_string();
            let more = ["scope", "prefsrc", "metric"]
                .map(|key| route[key].to_string().trim_matches('"').to_owned())
                .join(" ");
            format!("{}{via} {more} {flags}", route["dst"].as_str().unwrap())
        };
        self.ip(&format!("{family} route show dev {name}")).iter().map(words).collect()
    }
}

fn route(destination: &str, gateway: &str) -> Route {
    Route { destination: destination.into(), gateway: gateway.into(), ..Default::default() }
}

fn eth0(hardware_address: &str) -> AddInterface {
    AddInterface {
        hardware_address: hardware_address.into(),
        name: "eth0".into(),
        mtu: 1440,
        addresses: vec!["10.7.0.9/24".into(), "fd00:7::9/64".into()],
        ..Default::default()
    }
}

fn is_up(link: &Value) -> bool {
    link["flags"].as_array().unwrap().contains(&"UP".into())
}

#[test]
fn an_interface_becomes_what_the_network_made() {
    let mut guest = Guest::with_network();
    let net = Net::of(&guest);
    net.plug("whole0", "eth0", SECOND);
    net.plug("whole1", "eth1", FIRST);
    // The kernel's eth0 is the other one: it has to give way.
    guest.done(Verb::AddInterface(AddInterface {
        routes: vec![
            Route { scope: 253, source: "10.7.0.9".into(), ..route("10.7.0.0/24", "") },
            Route { metric: 256, ..route("fd00:7::/64", "") },
            Route { metric: 7, mtu: 1400, advertised_mss: 1300, ..route("10.8.0.0/16", "10.7.0.1") },
            route("10.9.0.0/16", "fd00:7::1"),
            // On no network that it is on: calico's.
            route("", "169.254.1.1"),
            route("", "fd00:7::1"),
        ],
        neighbours: vec![Neighbour {
            address: "169.254.1.1".into(),
            hardware_address: "ee:ee:ee:ee:ee:ee".into(),
        }],
        ..eth0(FIRST)
    }));
    guest.done(Verb::AddInterface(AddInterface {
        hardware_address: SECOND.into(),
        name: "net1".into(),
        addresses: vec!["10.99.0.2/31".into()],
        ..Default::default()
    }));

    let links = net.ip("link show");
    let link =
        |name: &str| links.iter().find(|link| link["ifname"] == name).unwrap_or_else(|| panic!("{name}"));
    assert!(is_up(link("lo")) && is_up(link("eth0")) && is_up(link("net1")));
    assert_eq!(
        (link("eth0")["address"].as_str(), link("net1")["address"].as_str()),
        (Some(FIRST), Some(SECOND))
    );
    assert_eq!((link("eth0")["mtu"].as_u64(), link("net1")["mtu"].as_u64()), (Some(1440), Some(1500)));
    assert_eq!(
        net.routes("-4", "eth0"),
        [
            "default via 169.254.1.1 global null null [\"onlink\"]",
            "10.7.0.0/24 link 10.7.0.9 null []",
            "10.8.0.0/16 via 10.7.0.1 global null 7 []",
            "10.9.0.0/16 via fd00:7::1 global null null []",
        ]
    );
    let default = "default via fd00:7::1 global null 1024 []";
    let routes = net.routes("-6", "eth0");
    let ours: Vec<_> = routes.iter().filter(|route| !route.starts_with("fe80::")).collect();
    assert_eq!(ours, ["fd00:7::/64 global null 256 []", default]);
    assert_eq!(net.routes("-4", "net1"), [""; 0], "an address brings no route with it");
    let addresses = net.ip("address show dev eth0");
    let of = |text: &str| {
        let all = addresses[0]["addr_info"].as_array().unwrap();
        all.iter().find(|address| address["local"] == text).unwrap_or_else(|| panic!("{text}: {all:?}"))
    };
    assert_eq!(of("10.7.0.9")["broadcast"], "10.7.0.255");
    assert!(of("fd00:7::9").get("tentative").is_none(), "usable at once");
    let neighbours = net.ip("neigh show dev eth0 nud permanent");
    assert_eq!(neighbours[0]["lladdr"], "ee:ee:ee:ee:ee:ee");

    // It is reached from outside.
    ip("address add 10.7.0.1/24 dev whole1");
    run("ping", "-n -c 1 -W 5 10.7.0.9");
    let reply::Result::Stats(stats) = guest.ask(Verb::Stats(Stats::default())).unwrap() else { panic!() };
    let counted = stats.interfaces.iter().find(|interface| interface.name == "eth0").expect("it is counted");
    assert!(counted.rx_bytes > 0 && counted.tx_packets > 0, "{counted:?}");

    assert_eq!(code(guest.ask(Verb::AddInterface(eth0(FIRST)))), ErrorCode::AlreadyExists);
    let taken = Verb::AddInterface(AddInterface { name: "net1".into(), ..eth0("02:00:00:00:00:03") });
    net.plug("whole3", "other", "02:00:00:00:00:03");
    assert_eq!(code(guest.ask(taken)), ErrorCode::AlreadyExists);

    let remove = || Verb::RemoveInterface(RemoveInterface { hardware_address: FIRST.into() });
    guest.done(remove());
    guest.done(remove());
    let links = net.ip("address show");
    let gone = links.iter().find(|link| link["address"] == FIRST).unwrap();
    assert!(!is_up(gone) && gone["addr_info"].as_array().unwrap().is_empty(), "{gone}");
    guest.done(Verb::AddInterface(eth0(FIRST)));
}

/// An RTM_NEWRULE (linux/fib_rules.h): packets from an address look into a table.
fn rule_from(source: [u8; 4], table: u32, priority: u32) -> Vec<u8> {
    let mut rule = vec![2, 0, 32, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    let attribute =
        |kind: u16, value: [u8; 4]| [&8_u16.to_ne_bytes()[..], &kind.to_ne_bytes(), &value].concat();
    rule.extend(attribute(2, source));
    rule.extend(attribute(6, priority.to_ne_bytes()));
    rule.extend(attribute(15, table.to_ne_bytes()));
    rule
}

#[test]
fn routes_go_into_their_tables_and_rules_lead_there() {
    let mut guest = Guest::with_network();
    let net = Net::of(&guest);
    net.plug("rules0", "eth0", FIRST);
    net.plug("rules1", "eth1", SECOND);
    let own = Route { scope: 253, ..route("10.7.0.0/24", "") };
    let rules = vec![rule_from([10, 7, 0, 9], 100, 1000), rule_from([10, 7, 0, 9], 4711, 1001)];
    guest.done(Verb::AddInterface(AddInterface {
        routes: vec![
            own.clone(),
            Route { table: 100, ..own },
            Route { table: 100, ..route("", "10.7.0.1") },
            Route { table: 4711, ..route("10.8.0.0/16", "10.7.0.1") },
            Route { table: 100, ..route("", "fd00:7::1") },
        ],
        rules: rules.clone(),
        ..eth0(FIRST)
    }));
    // The rules are the pod's: that they come again with another interface changes nothing.
    guest.done(Verb::AddInterface(AddInterface { name: "eth1".into(), rules, ..eth0(SECOND) }));
    let in_table = |family: &str, table: &str| -> Vec<String> {
        let routes = net.ip(&format!("{family} route show table {table}"));
        routes.iter().map(|route| route["dst"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(in_table("-4", "100"), ["default", "10.7.0.0/24"]);
    assert_eq!(in_table("-4", "4711"), ["10.8.0.0/16"]);
    assert_eq!(in_table("-6", "100"), ["default"]);
    assert_eq!(in_table("-4", "main"), ["10.7.0.0/24"]);
    let rules = net.ip("-4 rule show");
    let shown: Vec<String> = rules
        .iter()
        .map(|rule| format!("{} {} {}", rule["priority"], rule["src"], rule["table"]).replace('"', ""))
        .collect();
    assert_eq!(
        shown,
        ["0 all local", "1000 10.7.0.9 100", "1001 10.7.0.9 4711", "32766 all main", "32767 all default"]
    );
    let nonsense = AddInterface { rules: vec![vec![2; 11]], ..eth0("02:00:00:00:00:03") };
    assert_eq!(code(guest.ask(Verb::AddInterface(nonsense))), ErrorCode::Invalid);
}

#[test]
fn an_interface_is_waited_for() {
    let mut guest = Guest::with_network();
    let net = Net::of(&guest);
    let waiting = guest.send(Verb::AddInterface(eth0(FIRST)));
    let given_up = guest.send(Verb::AddInterface(AddInterface { name: "net1".into(), ..eth0(SECOND) }));
    // Others are served meanwhile.
    guest.ask(Verb::List(List {})).unwrap();
    net.plug("late0", "eth0", FIRST);
    assert!(matches!(guest.answer(waiting), Ok(reply::Result::Done(_))));
    assert!(is_up(&net.ip("link show eth0")[0]));
    guest.done(Verb::RemoveInterface(RemoveInterface { hardware_address: SECOND.into() }));
    assert_eq!(code(guest.answer(given_up)), ErrorCode::WrongState);
}

#[test]
fn what_waits_when_the_connection_breaks_is_done_and_not_told_to_the_next() {
    let mut guest = Guest::with_network();
    let net = Net::of(&guest);
    guest.send(Verb::AddInterface(eth0(FIRST)));
    guest.ask(Verb::List(List {})).unwrap();
    guest.reconnect();
    net.plug("break0", "eth0", FIRST);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_up(&net.ip("link show eth0")[0]) {
        assert!(Instant::now() < deadline, "the interface is not configured");
        // An answer of the old connection's request would be taken for this one's.
        guest.ask(Verb::List(List {})).unwrap();
    }
    guest.ask(Verb::List(List {})).unwrap();
}

#[test]
fn a_failure_leaves_nothing() {
    let mut guest = Guest::with_network();
    let net = Net::of(&guest);
    net.plug("fail0", "eth0", FIRST);
    let foreign = Route { source: "10.1.2.3".into(), ..route("10.8.0.0/16", "") };
    let error =
        guest.ask(Verb::AddInterface(AddInterface { routes: vec![foreign], ..eth0(FIRST) })).unwrap_err();
    assert_eq!(error.code, ErrorCode::System as i32);
    assert!(error.detail.starts_with("cannot add the route to 10.8.0.0/16 on eth0: "), "{}", error.detail);
    let link = &net.ip("address show eth0")[0];
    assert!(!is_up(link) && link["addr_info"].as_array().unwrap().is_empty(), "{link}");
    guest.done(Verb::AddInterface(eth0(FIRST)));
}

#[test]
fn a_pod_with_a_user_namespace_has_a_network_in_it() {
    let mut guest = Guest::with_user_namespace();
    let outside = Net::of(&guest);
    outside.plug("user0", "eth0", FIRST);
    guest.done(Verb::AddInterface(eth0(FIRST)));
    assert_eq!(outside.ip("link show type veth").len(), 0, "it is the pod's now");
    let Ok(reply::Result::Started(init)) = guest.ask(Verb::StartInit(StartInit {})) else { panic!() };
    guest.give_root_to(300_000);
    let mut spec = guest.spec(&guest::shell(
        "cat /proc/self/uid_map /proc/1/comm; hostname; cat /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/shmmni; \
         ip -4 address show dev eth0; nc -l -p 7777 -e echo hello; sleep 1000",
    ));
    let pin = |kind: &str, name: &str| serde_json::json!({"type": kind, "path": format!("/run/podvisor/namespaces/{name}")});
    let plain = |kind: &str| serde_json::json!({"type": kind});
    spec["linux"]["namespaces"] = serde_json::json!([
        plain("mount"),
        plain("cgroup"),
        pin("user", "user"),
        pin("network", "net"),
        pin("ipc", "ipc"),
        pin("uts", "uts"),
    ]);
    let create = CreateContainer {
        container_id: "c1".into(),
        spec: spec.to_string().into_bytes(),
        share_pid: true,
        ..Default::default()
    };
    guest.ask(Verb::CreateContainer(create)).unwrap();
    let stdout = guest.stream("c1", StandardStream::Stdout);
    guest.start("c1");
    for wanted in ["         0     300000      65536", "podvisor-init", "the-pod", "77", "33"] {
        assert_eq!(stdout.read_line().trim_end(), wanted);
    }
    assert!(stdout.read_line().contains("eth0"));
    assert!(stdout.read_line().contains("10.7.0.9/24"));
    // Its ports are those of its network.
    let deadline = Instant::now() + Duration::from_secs(30);
    let connection = loop {
        match guest.open(&Open { stream: Some(Stream::Connect(Connect { port: 7777 })) }) {
            Ok(connection) => break connection,
            Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
        }
    };
    assert_eq!(connection.read_all(), "hello\n");
    let reply::Result::Stats(stats) = guest.ask(Verb::Stats(Stats::default())).unwrap() else { panic!() };
    assert_eq!(
        stats.interfaces.iter().map(|interface| interface.name.as_str()).collect::<Vec<_>>(),
        ["eth0"]
    );
    Guest::kill(init.pid);
    assert_eq!(guest.exit_of("c1").code, 137);
}
