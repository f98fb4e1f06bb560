//! From a request to what is to be made: checked, with the kind of machine decided. Nothing is touched here.

use podvisor_hypervisor::failure::Failure;
use podvisor_hypervisor::request;
use podvisor_proto::hypervisor::Start;

/// Virtio devices that microvm has places for.
const MICROVM_SLOTS: usize = 24;
/// Devices that every machine has: entropy and vsock.
const OWN_DEVICES: usize = 2;

/// Which machine of QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No PCI, nothing can be plugged; starts fastest.
    Microvm,
    /// PCI Express with ports that devices can be plugged into; memory can be added.
    Q35,
}

/// How the kind of machine is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Microvm where that can do what is asked for.
    ByNeed,
    Always(Kind),
}

impl Choice {
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "auto" => Self::ByNeed,
            "microvm" => Self::Always(Kind::Microvm),
            "q35" => Self::Always(Kind::Q35),
            _ => return None,
        })
    }
}

/// What is to be made.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    /// The request, with the zeros that stand for other fields replaced by those.
    pub(crate) start: Start,
}

impl Plan {
    pub(crate) fn new(mut start: Start, choice: Choice) -> Result<Self, Failure> {
        request::complete(&mut start)?;
        let devices = OWN_DEVICES + start.shares.len() + start.disks.len() + start.networks.len();
        let changes = start.plugs || start.memory_limit > start.memory;
        let kind = match choice {
            Choice::ByNeed if changes || devices > MICROVM_SLOTS => Kind::Q35,
            Choice::ByNeed => Kind::Microvm,
            Choice::Always(kind) => kind,
        };
        if kind == Kind::Microvm && devices > MICROVM_SLOTS {
            return Err(Failure::unsupported(format!(
                "a microvm has places for {} devices of a pod, this one has {}",
                MICROVM_SLOTS - OWN_DEVICES,
                devices - OWN_DEVICES
            )));
        }
        if kind == Kind::Microvm {
            // It is started all the same, and says in its answer that it cannot grow.
            start.memory_limit = start.memory;
        }
        Ok(Self { kind, start })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use podvisor_proto::hypervisor::{Disk, Network, Share};

    use super::*;

    pub(crate) fn start() -> Start {
        Start {
            kernel: "/guest/kernel".into(),
            initramfs: "/guest/initramfs".into(),
            memory: 256 << 20,
            cpus: 1,
            vsock_path: "/run/pod/vsock".into(),
            run_dir: "/run/pod/machine".into(),
            emulate: true,
            ..Start::default()
        }
    }

    fn kind(start: Start) -> Kind {
        Plan::new(start, Choice::ByNeed).unwrap().kind
    }

    #[test]
    fn the_machine_is_the_smallest_that_will_do() {
        assert_eq!(kind(start()), Kind::Microvm);
        assert_eq!(kind(Start { memory_limit: 256 << 20, cpus_limit: 1, ..start() }), Kind::Microvm);
        assert_eq!(kind(Start { memory_limit: 258 << 20, ..start() }), Kind::Q35);
        assert_eq!(kind(Start { plugs: true, ..start() }), Kind::Q35);
        assert_eq!(kind(Start { cpus_limit: 2, ..start() }), Kind::Microvm);
        let disk = |number| Disk { serial: format!("disk{number}"), path: "/disk".into(), read_only: false };
        assert_eq!(kind(Start { disks: (0..22).map(disk).collect(), ..start() }), Kind::Microvm);
        let many = Start { disks: (0..23).map(disk).collect(), ..start() };
        assert_eq!(kind(many.clone()), Kind::Q35);
        assert!(Plan::new(many, Choice::Always(Kind::Microvm)).is_err());
        let grows = Start { cpus_limit: 2, memory_limit: 512 << 20, ..start() };
        let plan = Plan::new(grows, Choice::Always(Kind::Microvm)).unwrap();
        assert_eq!((plan.start.cpus_limit, plan.start.memory_limit), (2, 256 << 20));
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let share = |tag: &str| Share { tag: tag.into(), socket_path: "/fs".into() };
        let disk = |serial: &str| Disk { serial: serial.into(), path: "/disk".into(), read_only: false };
        let network = |address: &str| Network {
            namespace: "/run/netns/pod".into(),
            tap: "tap0".into(),
            hardware_address: address.into(),
            mtu: 1500,
        };
        assert!(
            Plan::new(Start { networks: vec![network("02:00:00:00:00:aF")], ..start() }, Choice::ByNeed)
                .is_ok()
        );
        let wrong = [
            Start { kernel: "kernel".into(), ..start() },
            Start { initramfs: String::new(), ..start() },
            Start { memory: 0, ..start() },
            Start { memory: (256 << 20) + 4096, ..start() },
            Start { memory_limit: 128 << 20, ..start() },
            Start { cpus: 0, ..start() },
            Start { cpus: 4, cpus_limit: 2, ..start() },
            Start { cpus_limit: 256, ..start() },
            Start { command_line: "a\nb".into(), ..start() },
            Start { console_path: "console".into(), ..start() },
            Start { shares: vec![share("")], ..start() },
            Start { shares: vec![share("a,b")], ..start() },
            Start { shares: vec![share(&"a".repeat(37))], ..start() },
            Start { shares: vec![share("a"), share("a")], ..start() },
            Start { disks: vec![disk(&"a".repeat(21))], ..start() },
            Start { disks: vec![disk("a"), disk("a")], ..start() },
            Start { networks: vec![network("02:00:00:00:00")], ..start() },
            Start { networks: vec![network("02:00:00:00:00:0g")], ..start() },
            Start { networks: vec![Network { mtu: 20, ..network("02:00:00:00:00:01") }], ..start() },
            Start {
                networks: vec![Network { tap: "a-very-long-name".into(), ..network("02:00:00:00:00:01") }],
                ..start()
            },
        ];
        for start in wrong {
            let failure = Plan::new(start.clone(), Choice::ByNeed).unwrap_err();
            assert_eq!(failure.code, podvisor_proto::hypervisor::ErrorCode::Invalid, "{start:?}");
        }
    }
}
