//! A plan as QEMU's arguments. Pure: what is opened for it is known by its numbers.
//!
//! QEMU opens nothing by name but its own parts: all else is handed over (`/proc/self/fd/N`, `fd=N`, `-add-fd`).

use podvisor_proto::hypervisor::{Disk, Network, Share};

use crate::plan::{Kind, Plan};

/// Ports of a q35 that are left for what is added later.
pub(crate) const SPARE_PORTS: usize = 8;

/// Words for the kernel, before those of the request. A guest that reboots or panics ends its machine (`-no-reboot`).
const KERNEL_WORDS: &str =
    "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on no5lvl cryptomgr.notests=1";

/// A disk's file as it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DiskFile {
    pub(crate) number: i32,
    pub(crate) block_device: bool,
}

/// The numbers of the descriptors that QEMU inherits.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    pub(crate) kernel: i32,
    pub(crate) initramfs: i32,
    pub(crate) console: i32,
    pub(crate) qmp: i32,
    pub(crate) vsock: i32,
    pub(crate) shares: Vec<i32>,
    pub(crate) disks: Vec<DiskFile>,
    pub(crate) networks: Vec<i32>,
}

/// Where a device is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// One of microvm's places.
    Mmio,
    /// The root bus, for what is never removed.
    Root,
    /// A port of that number.
    Port(usize),
}

impl Place {
    /// A virtio device's driver, as option text with where it goes.
    fn device(&self, name: &str) -> String {
        match self {
            Self::Mmio => format!("{name}-device"),
            Self::Root => format!("{name}-pci,bus=pcie.0,disable-legacy=on"),
            Self::Port(number) => format!("{name}-pci,bus={}", port_id(*number)),
        }
    }
}

pub(crate) fn port_id(number: usize) -> String {
    format!("port{number}")
}

/// What identifies the devices among themselves, in the order of the request and from then on.
pub(crate) fn share_id(number: usize) -> String {
    format!("share{number}")
}

pub(crate) fn disk_id(number: usize) -> String {
    format!("disk{number}")
}

pub(crate) fn network_id(number: usize) -> String {
    format!("network{number}")
}

/// Ports that devices of the request take.
pub(crate) fn ports_taken(plan: &Plan) -> usize {
    plan.start.shares.len() + plan.start.disks.len() + plan.start.networks.len()
}

/// The arguments. `kilohertz`: the time stamp counter's speed, where the guest cannot find out.
pub(crate) fn arguments(plan: &Plan, numbers: &Numbers, kilohertz: Option<u64>) -> Vec<String> {
    let start = &plan.start;
    let mut line = Line::default();
    line.words("-nodefaults -no-user-config -display none -no-reboot");
    line.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    line.option("-name", "podvisor,debug-threads=on");
    match plan.kind {
        Kind::Microvm => {
            // Without a clock (rtc) the kernel waits seconds for one.
            let parts = "acpi=on,pit=off,pic=off,rtc=on,pcie=off,usb=off,x-option-roms=off";
            line.option("-machine", &format!("microvm,{parts},memory-backend=memory,dump-guest-core=off"));
        }
        Kind::Q35 => {
            let parts = "smm=off,sata=off,usb=off,vmport=off,i8042=off,hpet=off,graphics=off";
            line.option("-machine", &format!("q35,{parts},memory-backend=memory,dump-guest-core=off"));
            // A firmware that only loads a kernel, a fifth of a second faster than the usual one.
            line.option("-bios", "qboot.rom");
        }
    }
    if start.emulate {
        // With cmpxchg16b the translator of QEMU 7.2 is unreliable under load.
        line.option("-accel", "tcg,thread=multi,tb-size=128");
        line.option("-cpu", "max,-cx16");
    } else {
        line.option("-accel", "kvm");
        line.option("-cpu", "host");
    }
    memory(&mut line, plan);
    line.option("-smp", &processors(start.cpus, start.cpus_limit));
    line.option("-kernel", &format!("/proc/self/fd/{}", numbers.kernel));
    line.option("-initrd", &format!("/proc/self/fd/{}", numbers.initramfs));
    let mut words = KERNEL_WORDS.to_owned();
    if let Some(kilohertz) = kilohertz {
        words = format!("{words} tsc_early_khz={kilohertz}");
    }
    if !start.command_line.is_empty() {
        words = format!("{words} {}", start.command_line);
    }
    line.option("-append", &words);

    line.option("-chardev", &format!("socket,id=qmp,fd={}", numbers.qmp));
    line.option("-mon", "chardev=qmp,mode=control");
    line.option("-chardev", &format!("socket,id=console,fd={}", numbers.console));
    line.option("-serial", "chardev:console");
    line.option("-device", "pvpanic");

    let own = if plan.kind == Kind::Microvm { Place::Mmio } else { Place::Root };
    line.option("-device", &own.device("virtio-rng"));
    line.option("-chardev", &format!("socket,id=vsock,fd={}", numbers.vsock));
    line.option("-device", &format!("{},chardev=vsock", own.device("vhost-user-vsock")));
    if plan.kind == Kind::Q35 {
        for number in 0..ports_taken(plan) + SPARE_PORTS {
            let slot = number + 1;
            line.option(
                "-device",
                &format!("pcie-root-port,id={},chassis={slot},slot={slot}", port_id(number)),
            );
        }
    }
    pod_devices(&mut line, plan, numbers);
    line.0
}

fn memory(line: &mut Line, plan: &Plan) {
    let start = &plan.start;
    // Shared, because servers of vhost-user devices work on it.
    line.option("-object", &format!("memory-backend-memfd,id=memory,size={},share=on", start.memory));
    if start.memory_limit == start.memory {
        line.option("-m", &format!("size={}B", start.memory));
        return;
    }
    let more = start.memory_limit - start.memory;
    line.option("-m", &format!("size={}B,maxmem={}B", start.memory, start.memory_limit));
    line.option("-object", &format!("memory-backend-memfd,id=more,size={more},share=on,reserve=off"));
    line.option("-device", "virtio-mem-pci,id=grow,memdev=more,requested-size=0,bus=pcie.0");
}

fn processors(count: u32, limit: u32) -> String {
    if limit == count {
        return format!("cpus={count}");
    }
    format!("cpus={count},maxcpus={limit},sockets={limit},cores=1,threads=1")
}

fn pod_devices(line: &mut Line, plan: &Plan, numbers: &Numbers) {
    let start = &plan.start;
    let mut ports = 0..;
    let mut place = || match (plan.kind, ports.next()) {
        (Kind::Q35, Some(port)) => Place::Port(port),
        _ => Place::Mmio,
    };
    for (number, (share, descriptor)) in start.shares.iter().zip(&numbers.shares).enumerate() {
        line.option("-chardev", &format!("socket,id={},fd={descriptor}", chardev_id(&share_id(number))));
        line.option("-device", &share_device(number, share, &place()));
    }
    for (number, (disk, file)) in start.disks.iter().zip(&numbers.disks).enumerate() {
        let set = number + 1;
        line.option("-add-fd", &format!("fd={},set={set}", file.number));
        line.option("-blockdev", &block_node(number, disk, set, file.block_device).to_string());
        line.option("-device", &disk_device(number, disk, &place()));
    }
    for (number, (network, descriptor)) in start.networks.iter().zip(&numbers.networks).enumerate() {
        let backend = backend_id(&network_id(number));
        line.option("-netdev", &format!("tap,id={backend},fd={descriptor},vhost=off"));
        line.option("-device", &network_device(number, network, &place()));
    }
}

/// What a device works with: a character device, block node or network back end.
pub(crate) fn chardev_id(device: &str) -> String {
    format!("{device}-socket")
}

pub(crate) fn backend_id(device: &str) -> String {
    format!("{device}-backend")
}

/// A share's device as option text.
pub(crate) fn share_device(number: usize, share: &Share, place: &Place) -> String {
    let id = share_id(number);
    format!("{},id={id},chardev={},tag={}", place.device("vhost-user-fs"), chardev_id(&id), share.tag)
}

/// The block node of a disk whose file is in a set of descriptors.
pub(crate) fn block_node(number: usize, disk: &Disk, set: usize, block_device: bool) -> serde_json::Value {
    serde_json::json!({
        "driver": "raw",
        "node-name": backend_id(&disk_id(number)),
        "read-only": disk.read_only,
        "discard": "unmap",
        "file": {
            "driver": if block_device { "host_device" } else { "file" },
            "filename": format!("/dev/fdset/{set}"),
            "read-only": disk.read_only,
            "discard": "unmap",
        },
    })
}

/// A disk's device as option text.
pub(crate) fn disk_device(number: usize, disk: &Disk, place: &Place) -> String {
    let id = disk_id(number);
    format!("{},id={id},drive={},serial={}", place.device("virtio-blk"), backend_id(&id), disk.serial)
}

/// A network's device as option text.
pub(crate) fn network_device(number: usize, network: &Network, place: &Place) -> String {
    let id = network_id(number);
    let mut text = format!(
        "{},id={id},netdev={},mac={}",
        place.device("virtio-net"),
        backend_id(&id),
        network.hardware_address
    );
    if network.mtu != 0 {
        text = format!("{text},host_mtu={}", network.mtu);
    }
    if !matches!(place, Place::Mmio) {
        // No program to boot from the network with.
        text = format!("{text},romfile=");
    }
    text
}

/// Arguments, in order.
#[derive(Debug, Default)]
struct Line(Vec<String>);

impl Line {
    fn words(&mut self, words: &str) {
        self.0.extend(words.split(' ').map(str::to_owned));
    }

    fn option(&mut self, name: &str, value: &str) {
        self.0.push(name.to_owned());
        self.0.push(value.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use podvisor_proto::hypervisor::Start;

    use super::*;
    use crate::plan::Choice;
    use crate::plan::tests::start;

    fn line(start: Start) -> String {
        let plan = Plan::new(start, Choice::ByNeed).unwrap();
        let file = |number| DiskFile { number, block_device: number % 2 == 1 };
        let numbers = Numbers {
            kernel: 10,
            initramfs: 11,
            console: 12,
            qmp: 13,
            vsock: 14,
            shares: (20..30).collect(),
            disks: (30..40).map(file).collect(),
            networks: (40..50).collect(),
        };
        arguments(&plan, &numbers, Some(2_000_000)).join(" ")
    }

    fn with_devices(start: Start) -> Start {
        Start {
            shares: vec![Share { tag: "pod".into(), socket_path: "/fs".into() }],
            disks: vec![
                Disk { serial: "one".into(), path: "/one".into(), read_only: true },
                Disk { serial: "two".into(), path: "/two".into(), read_only: false },
            ],
            networks: vec![Network {
                namespace: "/ns".into(),
                tap: "tap0".into(),
                hardware_address: "02:00:00:00:00:01".into(),
                mtu: 1400,
            }],
            ..start
        }
    }

    #[test]
    fn microvm() {
        let line = line(Start { command_line: "podvisor.debug=1".into(), ..with_devices(start()) });
        for part in [
            "-machine microvm,",
            "-accel tcg,thread=multi,tb-size=128 -cpu max,-cx16",
            "-kernel /proc/self/fd/10 -initrd /proc/self/fd/11",
            "tsc_early_khz=2000000 podvisor.debug=1",
            "-device vhost-user-fs-device,id=share0,chardev=share0-socket,tag=pod",
            "-add-fd fd=30,set=1",
            "-device virtio-blk-device,id=disk1,drive=disk1-backend,serial=two",
            "-netdev tap,id=network0-backend,fd=40,vhost=off",
            "mac=02:00:00:00:00:01,host_mtu=1400",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        assert!(!line.contains("pci,") && !line.contains("/one"), "{line}");
    }

    #[test]
    fn q35() {
        let line =
            line(Start { memory_limit: 512 << 20, cpus_limit: 4, emulate: false, ..with_devices(start()) });
        for part in [
            "-machine q35,",
            "-accel kvm -cpu host",
            "-smp cpus=1,maxcpus=4,",
            "-m size=268435456B,maxmem=536870912B",
            "virtio-mem-pci,id=grow",
            "pcie-root-port,id=port11,chassis=12,slot=12",
            "vhost-user-fs-pci,bus=port0,",
            "virtio-blk-pci,bus=port2,",
            "virtio-net-pci,bus=port3,",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        assert!(!line.contains("port12"), "{line}");
    }
}
