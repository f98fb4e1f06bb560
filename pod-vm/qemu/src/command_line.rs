//! A plan as QEMU's arguments. Pure: what is opened for it is known by its numbers.
//!
//! QEMU opens nothing by name but its own parts: all else is handed over (`/proc/self/fd/N`, `fd=N`, `-add-fd`).

use podvisor_hypervisor::files::DiskFile;

use crate::device::{self, Place, SLOTS, bridge_id, descriptor_set};
use crate::plan::{Kind, Plan};

/// Slots of a q35 that are left at least for what is added later.
const SPARE_SLOTS: usize = 8;

/// Words for the kernel, before those of the request. A guest that reboots or panics ends its machine (`-no-reboot`).
const KERNEL_WORDS: &str =
    "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on no5lvl cryptomgr.notests=1";

/// What a guest does with memory that is added: uses it at once, so that it can be given back as far as possible, and keeps the
/// administration of it in it. Where there can be memory beyond 4 GiB the kernel sets 64 MiB aside for devices that reach no further: there
/// are none.
const MEMORY_WORDS: &str = "memhp_default_state=online memory_hotplug.online_policy=auto-movable \
                            memory_hotplug.memmap_on_memory=1 swiotlb=noforce";

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

/// Bridges of a q35 with slots for the devices of the request and for more.
fn bridges(plan: &Plan) -> usize {
    let taken = plan.start.shares.len() + plan.start.disks.len() + plan.start.networks.len();
    (taken + SPARE_SLOTS).div_ceil(SLOTS)
}

/// How many devices a q35 can have at the same time.
pub(crate) fn slots(plan: &Plan) -> usize {
    bridges(plan) * SLOTS
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
    line.option("-smp", &format!("cpus={}", start.cpus_limit));
    line.option("-kernel", &format!("/proc/self/fd/{}", numbers.kernel));
    line.option("-initrd", &format!("/proc/self/fd/{}", numbers.initramfs));
    let mut words = KERNEL_WORDS.to_owned();
    if let Some(kilohertz) = kilohertz {
        // What would watch over it is the tick, which comes late on a busy machine: the guest would take its own counter for the one that is
        // wrong, and from then on never sleep longer than a tick.
        words = format!("{words} tsc_early_khz={kilohertz} tsc=reliable");
    }
    if start.emulate {
        // A kernel with one processor takes the lock prefix from its instructions as it boots. What changes code is slow where code is
        // translated: that takes longer than the prefixes ever would.
        words.push_str(" noreplace-smp");
    }
    if start.cpus_limit > start.cpus {
        // The others are there and not used until the agent says so.
        words = format!("{words} maxcpus={}", start.cpus);
    }
    if start.memory_limit > start.memory {
        words = format!("{words} {MEMORY_WORDS}");
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
    line.device(&own.device("virtio-rng"));
    line.option("-chardev", &format!("socket,id=vsock,fd={}", numbers.vsock));
    let mut vsock = own.device("vhost-user-vsock");
    vsock["chardev"] = "vsock".into();
    line.device(&vsock);
    if plan.kind == Kind::Q35 {
        for number in 0..bridges(plan) {
            line.option("-device", &format!("pcie-pci-bridge,id={},bus=pcie.0", bridge_id(number)));
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
    // Linux adds memory in blocks of 128 MiB, and leaves what is less than one. More than the limit is never asked for.
    let more = (start.memory_limit - start.memory).next_multiple_of(128 << 20);
    line.option("-m", &format!("size={}B,maxmem={}B", start.memory, start.memory + more));
    line.option("-object", &format!("memory-backend-memfd,id=more,size={more},share=on,reserve=off"));
    line.option("-device", "virtio-mem-pci,id=grow,memdev=more,requested-size=0,bus=pcie.0");
}

fn pod_devices(line: &mut Line, plan: &Plan, numbers: &Numbers) {
    let start = &plan.start;
    let mut slots = 0..;
    let mut place = || match (plan.kind, slots.next()) {
        (Kind::Q35, Some(slot)) => Place::Slot(slot),
        _ => Place::Mmio,
    };
    for (number, (share, descriptor)) in start.shares.iter().zip(&numbers.shares).enumerate() {
        let backend = device::Kind::Share.backend(number);
        line.option("-chardev", &format!("socket,id={backend},fd={descriptor}"));
        line.device(&device::share(number, share, place()));
    }
    for (number, (disk, file)) in start.disks.iter().zip(&numbers.disks).enumerate() {
        line.option("-add-fd", &format!("fd={},set={}", file.number, descriptor_set(number)));
        line.option("-blockdev", &device::block_node(number, disk, file.block_device).to_string());
        line.device(&device::disk(number, disk, file.block_device, place()));
    }
    for (number, (network, descriptor)) in start.networks.iter().zip(&numbers.networks).enumerate() {
        let backend = device::Kind::Network.backend(number);
        line.option("-netdev", &format!("tap,id={backend},fd={descriptor},vhost=off"));
        line.device(&device::network(number, network, place()));
    }
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

    fn device(&mut self, device: &serde_json::Value) {
        self.option("-device", &device.to_string());
    }
}

#[cfg(test)]
mod tests {
    use podvisor_proto::hypervisor::{Disk, Network, Share, Start};

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
            disks: (30..62).map(file).collect(),
            networks: (70..80).collect(),
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
            "tsc_early_khz=2000000 tsc=reliable noreplace-smp podvisor.debug=1",
            "-chardev socket,id=share0-backend,fd=20",
            r#"{"chardev":"share0-backend","driver":"vhost-user-fs-device","id":"share0","tag":"pod"}"#,
            "-add-fd fd=30,set=1",
            r#"{"drive":"disk0-backend","driver":"virtio-blk-device","id":"disk0","serial":"one"}"#,
            r#"{"drive":"disk1-backend","driver":"virtio-blk-device","id":"disk1","serial":"two","share-rw":true}"#,
            "-netdev tap,id=network0-backend,fd=70,vhost=off",
            r#""host_mtu":1400,"id":"network0","mac":"02:00:00:00:00:01""#,
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        assert!(!line.contains("-pci") && !line.contains("/one"), "{line}");
    }

    #[test]
    fn q35() {
        let line =
            line(Start { memory_limit: 512 << 20, cpus_limit: 4, emulate: false, ..with_devices(start()) });
        for part in [
            "-machine q35,",
            "-accel kvm -cpu host",
            "-smp cpus=4 ",
            " maxcpus=1 ",
            "-m size=268435456B,maxmem=536870912B",
            "virtio-mem-pci,id=grow",
            "pcie-pci-bridge,id=bridge0,bus=pcie.0",
            r#"{"addr":"1","bus":"bridge0","chardev":"share0-backend","driver":"vhost-user-fs-pci""#,
            r#"{"addr":"3","bus":"bridge0","disable-legacy":"on","drive":"disk1-backend","driver":"virtio-blk-pci""#,
            r#"{"addr":"4","bus":"bridge0","disable-legacy":"on","driver":"virtio-net-pci""#,
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        assert!(!line.contains("bridge1"), "{line}");
    }

    #[test]
    fn devices_without_end() {
        let disk = |number| Disk { serial: format!("disk{number}"), path: "/disk".into(), read_only: true };
        let line = |disks| line(Start { disks: (0..disks).map(disk).collect(), ..start() });
        assert!(line(23).contains("bridge0") && !line(23).contains("bridge1"));
        let many = line(32);
        assert!(many.contains("id=bridge1") && !many.contains("id=bridge2"), "{many}");
        for part in [r#"{"addr":"1f","bus":"bridge0""#, r#"{"addr":"1","bus":"bridge1""#] {
            assert!(many.contains(part), "{part} is not in {many}");
        }
    }
}
