//! What packets cost: datagrams there and back one at a time, and in a row in either direction, between the guest and this bench's program in the
//! network namespace of its tap.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use podvisor_proto::hypervisor::Network;

use super::lab::{Hypervisor, Namespace};
use super::{Count, Figures, add};

const HARDWARE_ADDRESS: &str = "02:00:00:00:00:4d";
const GUEST: &str = "10.77.0.2";
const RETURN_PORT: u16 = 7;
const DRAIN_PORT: u16 = 9;
const EXCHANGES: u32 = 300;
const IN_A_ROW: u32 = 3000;

/// The network of the guest.
pub(crate) fn network(namespace: &Namespace) -> Network {
    Network {
        namespace: namespace.path(),
        tap: "tap0".into(),
        hardware_address: HARDWARE_ADDRESS.into(),
        mtu: 1500,
    }
}

/// What this program does in the namespace. `false`: that is no word for it.
pub(crate) fn peer(what: &str) -> bool {
    match what {
        "exchange" => exchange(),
        "send" => send(),
        "drain" => drain(),
        _ => return false,
    }
    true
}

fn socket(port: u16) -> UdpSocket {
    UdpSocket::bind(("10.77.0.1", port)).unwrap()
}

fn exchange() {
    let socket = socket(0);
    socket.connect((GUEST, RETURN_PORT)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    for _ in 0..EXCHANGES {
        socket.send(&[1; 64]).unwrap();
        // One that is lost is one less.
        let _ = socket.recv(&mut [0; 2048]);
    }
}

fn send() {
    let socket = socket(0);
    for _ in 0..IN_A_ROW {
        let _ = socket.send_to(&[1; 1400], (GUEST, DRAIN_PORT));
    }
}

/// Takes what comes until its standard input ends.
fn drain() {
    let socket = socket(DRAIN_PORT);
    println!("ready");
    std::thread::spawn(move || while socket.recv(&mut [0; 2048]).is_ok() {});
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
}

fn in_namespace(namespace: &Namespace, what: &str) -> Command {
    let mut command = Command::new("ip");
    let name = namespace.path();
    let name = name.rsplit('/').next().unwrap();
    command.args(["netns", "exec", name]).arg(std::env::current_exe().unwrap()).arg(what);
    command
}

/// Packets that the guest has sent and received.
fn packets(hypervisor: &Hypervisor, interface: &str) -> f64 {
    let count = |what: &str| -> f64 {
        let text = hypervisor.tell(&format!("read /sys/class/net/{interface}/statistics/{what}_packets"));
        text.trim().parse().unwrap()
    };
    count("rx") + count("tx")
}

/// Processor time of a machine's virtual processors, and of all its other threads, in ticks.
fn threads(pid: i32) -> [f64; 2] {
    let mut times = [0.0; 2];
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        // One that has ended since counts no more.
        let Ok(text) = fs::read_to_string(thread.unwrap().path().join("stat")) else { continue };
        let (name, rest) = text.rsplit_once(')').unwrap();
        let name = name.split_once('(').unwrap().1;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let time: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
        times[usize::from(!name.to_ascii_lowercase().starts_with("cpu"))] += time;
    }
    times
}

/// Measures in a guest that has the network.
pub(crate) fn measure(hypervisor: &Hypervisor, pid: i32, namespace: &Namespace, figures: &mut Figures) {
    namespace.run("ip link set tap0 up");
    let interface = hypervisor.tell(&format!("address {HARDWARE_ADDRESS}"));
    assert_eq!(hypervisor.tell(&format!("up {interface} {GUEST}")), "ok");
    let mut returns = BufReader::new(hypervisor.guest(&format!("return {RETURN_PORT}")));
    let mut line = String::new();
    returns.read_line(&mut line).unwrap();
    assert_eq!(line, "ok\n");
    let mut drain = in_namespace(namespace, "drain");
    drain.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut drain = drain.spawn().unwrap();
    BufReader::new(drain.stdout.as_mut().unwrap()).read_line(&mut String::new()).unwrap();

    // Each finds the other's address first.
    let ways: [(&[&str; 4], &dyn Fn()); 3] = [
        (
            &[
                "packets one at a time: exits for each",
                "packets one at a time: interrupts for each",
                "packets one at a time: exits for each interrupt",
                "packets one at a time: devices' time, of the processors'",
            ],
            &|| assert!(in_namespace(namespace, "exchange").status().unwrap().success()),
        ),
        (
            &[
                "packets sent in a row: exits for each",
                "packets sent in a row: interrupts for each",
                "packets sent in a row: exits for each interrupt",
                "packets sent in a row: devices' time, of the processors'",
            ],
            &|| {
                assert_eq!(hypervisor.tell(&format!("pour 10.77.0.1 {DRAIN_PORT} {IN_A_ROW}")), "ok");
            },
        ),
        (
            &[
                "packets received in a row: exits for each",
                "packets received in a row: interrupts for each",
                "packets received in a row: exits for each interrupt",
                "packets received in a row: devices' time, of the processors'",
            ],
            &|| {
                assert!(in_namespace(namespace, "send").status().unwrap().success());
            },
        ),
    ];
    ways[0].1();
    for (names, way) in ways {
        let (before, had, times) = (packets(hypervisor, &interface), Count::now(), threads(pid));
        way();
        let (used, later) = (had.since(), threads(pid));
        let moved = packets(hypervisor, &interface) - before;
        add(figures, names[0], used.exits / moved);
        add(figures, names[1], used.interrupts / moved);
        add(figures, names[2], used.exits / used.interrupts);
        add(figures, names[3], (later[1] - times[1]) / (later[0] - times[0]));
    }
    drop(drain.stdin.take());
    drain.wait().unwrap();
}
