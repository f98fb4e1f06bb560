//! Plays a guest at a tap: answers ARP, neighbour solicitations and echo requests for its addresses, and can ask for others'. It writes
//! its packets by hand, so the kernel's stack has no part in them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use podvisor_network::tap::GuestInterface;

use super::Pod;

const PATIENCE: Duration = Duration::from_secs(60);
const ETHERNET: usize = 14;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;

type Mac = [u8; 6];

/// A guest with one interface.
pub(crate) struct Guest {
    tap: File,
    interface: GuestInterface,
    seen: Receiver<Vec<u8>>,
    answers: Arc<Mutex<bool>>,
}

impl Guest {
    /// Opens the tap as the user `uid`, who has no capability.
    pub(crate) fn start(pod: &Pod, interface: &GuestInterface, uid: u32) -> Self {
        let tap = pod.inside(|| open(&interface.tap, uid));
        let answers = Arc::new(Mutex::new(true));
        let (sender, seen) = channel();
        let mut reader = tap.try_clone().unwrap();
        let (mut writer, config, answering) =
            (tap.try_clone().unwrap(), interface.clone(), Arc::clone(&answers));
        // It ends with the tap, when the pod's namespace goes.
        std::thread::spawn(move || {
            let mut frame = vec![0; 65_536];
            while let Ok(length) = reader.read(&mut frame) {
                if *answering.lock().unwrap()
                    && let Some(answer) = answer(&config, &frame[..length])
                {
                    writer.write_all(&answer).unwrap();
                }
                if sender.send(frame[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { tap, interface: interface.clone(), seen, answers }
    }

    /// Stops answering, or starts again.
    pub(crate) fn answer(&self, answers: bool) {
        *self.answers.lock().unwrap() = answers;
    }

    /// Frames that it has got so far.
    pub(crate) fn seen(&self) -> usize {
        self.seen.try_iter().count()
    }

    /// Resolves `gateway` and sends an echo request through it to `to`; panics when no answer comes.
    pub(crate) fn ping(&mut self, gateway: IpAddr, to: IpAddr) {
        let mac = mac(&self.interface.hardware_address);
        let own = own(&self.interface, to.is_ipv4());
        self.tap.write_all(&solicitation(mac, own, gateway)).unwrap();
        let next = self.wait(|frame| advertised(frame, gateway));
        self.tap.write_all(&echo(mac, next, own, to, 8)).unwrap();
        self.wait(|frame| (echo_of(frame)? == (to, own, 0)).then_some(()));
    }

    fn wait<T>(&self, wanted: impl Fn(&[u8]) -> Option<T>) -> T {
        loop {
            let frame = self.seen.recv_timeout(PATIENCE).expect("an answer comes in time");
            if let Some(found) = wanted(&frame) {
                return found;
            }
        }
    }
}

/// The guest's address of a family.
fn own(interface: &GuestInterface, v4: bool) -> IpAddr {
    interface.addresses.iter().map(|prefix| prefix.address).find(|address| address.is_ipv4() == v4).unwrap()
}

#[allow(unsafe_code)]
fn open(name: &str, uid: u32) -> File {
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }
    // The device file is not everybody's on every machine; who may have the tap is asked later.
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let user = rustix::process::Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(user, user, user).unwrap();
    let mut request = Request { name: [0; 16], flags: 0, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    request.flags = u16::try_from(libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
    // SAFETY: the struct is as large as `struct ifreq` and outlives the call.
    let outcome = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(outcome, 0, "open {name} as {uid}: {}", std::io::Error::last_os_error());
    file
}

fn mac(text: &str) -> Mac {
    let bytes: Vec<u8> = text.split(':').map(|part| u8::from_str_radix(part, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from[..], &kind.to_be_bytes()[..], payload].concat()
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

/// A packet of ICMP or ICMPv6 in its frame.
fn packet(macs: (Mac, Mac), from: IpAddr, to: IpAddr, mut message: Vec<u8>) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap();
    if from.is_ipv4() {
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum);
        let mut header = vec![0x45, 0];
        header.extend((20 + length).to_be_bytes());
        header.extend([0, 0, 0, 0, 64, ICMP, 0, 0]);
        header.extend([octets(from), octets(to)].concat());
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum);
        return ethernet(macs.1, macs.0, 0x0800, &[header, message].concat());
    }
    let mut pseudo = [octets(from), octets(to)].concat();
    pseudo.extend(u32::from(length).to_be_bytes());
    pseudo.extend([0, 0, 0, ICMP6]);
    let sum = checksum(&[&pseudo[..], &message[..]].concat());
    message[2..4].copy_from_slice(&sum);
    let mut header = vec![0x60, 0, 0, 0];
    header.extend(length.to_be_bytes());
    header.extend([ICMP6, 255]);
    header.extend([octets(from), octets(to)].concat());
    ethernet(macs.1, macs.0, 0x86dd, &[header, message].concat())
}

/// An echo request (8) or answer (0), by ICMP's numbers.
fn echo(from_mac: Mac, to_mac: Mac, from: IpAddr, to: IpAddr, kind: u8) -> Vec<u8> {
    let number = if from.is_ipv4() { kind } else { 129 - u8::from(kind == 8) };
    let message = [&[number, 0, 0, 0, 0x12, 0x34, 0, 1][..], b"payload!"].concat();
    packet((from_mac, to_mac), from, to, message)
}

/// ARP request (RFC 826) or neighbour solicitation (RFC 4861).
fn solicitation(mac: Mac, own: IpAddr, wanted: IpAddr) -> Vec<u8> {
    match wanted {
        IpAddr::V4(_) => ethernet([0xff; 6], mac, 0x0806, &arp(1, mac, own, [0; 6], wanted)),
        IpAddr::V6(address) => {
            let tail: [u8; 3] = address.octets()[13..].try_into().unwrap();
            let mut group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0).octets();
            group[13..].copy_from_slice(&tail);
            let to_mac = [0x33, 0x33, group[12], tail[0], tail[1], tail[2]];
            let message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &octets(wanted), &[1, 1][..], &mac[..]].concat();
            packet((mac, to_mac), own, IpAddr::from(group), message)
        }
    }
}

fn arp(operation: u8, mac: Mac, own: IpAddr, other_mac: Mac, other: IpAddr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    [&head[..], &mac[..], &octets(own), &other_mac[..], &octets(other)].concat()
}

/// The hardware address that a frame gives for an address.
fn advertised(frame: &[u8], wanted: IpAddr) -> Option<Mac> {
    let kind = frame.get(12..14)?;
    let body = frame.get(ETHERNET..)?;
    let found = if kind == [8, 6] && body.get(7) == Some(&2) && wanted.is_ipv4() {
        body.get(14..18)? == octets(wanted)
    } else if kind == [0x86, 0xdd] && body.get(40) == Some(&136) && !wanted.is_ipv4() {
        body.get(48..64)? == octets(wanted)
    } else {
        false
    };
    found.then(|| frame[6..12].try_into().unwrap())
}

/// Source, destination and ICMP's number of an echo request or answer.
fn echo_of(frame: &[u8]) -> Option<(IpAddr, IpAddr, u8)> {
    let body = frame.get(ETHERNET..)?;
    match frame.get(12..14)? {
        [8, 0] if body.get(9) == Some(&ICMP) => {
            let at = |at: usize| <[u8; 4]>::try_from(&body[at..at + 4]).unwrap();
            Some((Ipv4Addr::from(at(12)).into(), Ipv4Addr::from(at(16)).into(), *body.get(20)?))
        }
        [0x86, 0xdd] if body.get(6) == Some(&ICMP6) => {
            let at = |at: usize| <[u8; 16]>::try_from(&body[at..at + 16]).unwrap();
            let kind = match body.get(40)? {
                128 => 8,
                129 => 0,
                _ => return None,
            };
            Some((Ipv6Addr::from(at(8)).into(), Ipv6Addr::from(at(24)).into(), kind))
        }
        _ => None,
    }
}

/// What a guest with this interface answers.
fn answer(interface: &GuestInterface, frame: &[u8]) -> Option<Vec<u8>> {
    let mac = mac(&interface.hardware_address);
    let from_mac: Mac = frame.get(6..12)?.try_into().ok()?;
    let is_ours = |address: IpAddr| interface.addresses.iter().any(|prefix| prefix.address == address);
    let body = frame.get(ETHERNET..)?;
    if frame.get(12..14)? == [8, 6] && body.get(7) == Some(&1) {
        let at = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&body[at..at + 4]).unwrap());
        return is_ours(at(24))
            .then(|| ethernet(from_mac, mac, 0x0806, &arp(2, mac, at(24), from_mac, at(14))));
    }
    if frame.get(12..14)? == [0x86, 0xdd] && body.get(40) == Some(&135) {
        let at = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&body[at..at + 16]).unwrap());
        let (asker, wanted) = (at(8), at(48));
        // Solicited, override, with the target's hardware address.
        let message = [&[136, 0, 0, 0, 0x60, 0, 0, 0][..], &octets(wanted), &[2, 1][..], &mac[..]].concat();
        return is_ours(wanted).then(|| packet((mac, from_mac), wanted, asker, message));
    }
    let (from, to, kind) = echo_of(frame)?;
    if !is_ours(to) || kind != 8 {
        return None;
    }
    // The same message with the other number and the ends exchanged.
    let start = if to.is_ipv4() { 20 } else { 40 };
    let mut message = body[start..].to_vec();
    message[0] = if to.is_ipv4() { 0 } else { 129 };
    message[2..4].fill(0);
    Some(packet((mac, from_mac), to, from, message))
}
