//! From parts to a machine that can run.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use podvisor_proto::hypervisor::Start;
use podvisor_virtio::balloon::Balloon;
use podvisor_virtio::device::Memory;
use podvisor_virtio::entropy::Entropy;
use podvisor_virtio::mem::{LARGE_BLOCK, Reserve, Size};
use podvisor_virtio::vsock::{Muxer, Vsock};
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::MachineError;
use super::bus::Bus;
use super::console::Console;
use super::devices::Devices;
use super::ending::Ending;
use super::growth::{Growth, Region};
use super::images::Area;
use super::parts::Parts;
use super::slots::Slots;
use super::transport::{Mmio, Transport};
use crate::boot::{self, acpi, elf, pvh};
use crate::layout::{self, IDENTITY_MAP, SERIAL_INTERRUPT, TASK_STATE};
use crate::{cpu, sys};

/// Words for the kernel, before those of the request. A guest that begins anew or panics ends its machine, by a triple fault.
const KERNEL_WORDS: &str = "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on no5lvl cryptomgr.notests=1 8250.nr_uarts=1 pci=off";

/// What a guest does with memory that is added: uses it at once, so that it can be given back as far as possible, and keeps the administration of it
/// in it. Memory beyond 4 GiB is no reason to set some aside for devices that reach no further: there are none.
const MEMORY_WORDS: &str = "memhp_default_state=online memory_hotplug.online_policy=auto-movable memory_hotplug.memmap_on_memory=1 swiotlb=noforce";

/// What KVM has to be able to do: each with what it is for.
const NEEDED: [Cap; 7] = [
    Cap::Irqchip,
    Cap::Irqfd,
    Cap::Ioeventfd,
    Cap::UserMemory,
    Cap::ReadonlyMem,
    Cap::ExtCpuid,
    Cap::TscDeadlineTimer,
];

/// Devices that every machine has: entropy, vsock and balloon.
const OWN_DEVICES: usize = 3;
/// Threads that serve disks which come later. None can be started when the machine runs.
const SPARE_DISK_THREADS: usize = 4;

/// A machine that does not run yet.
pub(crate) struct Machine {
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) bus: Bus,
    pub(crate) ending: Arc<Ending>,
    pub(crate) devices: Devices,
    /// `None`: the memory stays as it is.
    pub(crate) growth: Option<Growth>,
    /// A driver has said how far it is, or has taken memory.
    pub(crate) news: EventFd,
    /// Bytes.
    pub(crate) memory_limit: u64,
    /// Devices can be added.
    pub(crate) plugs: bool,
}

pub(crate) fn build(start: &Start, parts: Parts, link: OwnedFd) -> Result<Machine, MachineError> {
    let Parts { kvm, kernel, initramfs, console, vsock, shares, disks, networks } = parts;
    let (vm, supported) = open(kvm)?;
    let interrupt = event()?;
    vm.register_irqfd(&interrupt, SERIAL_INTERRUPT).map_err(kvm_failed("connect the console's interrupt"))?;
    let console = Console::new(console, interrupt);

    // Disks wait for the host's: each is served by a thread of its own, all else by one.
    let spare_disks = if start.plugs { SPARE_DISK_THREADS } else { 0 };
    let grows = start.memory_limit > start.memory;
    let own = OWN_DEVICES + usize::from(grows) + shares.len() + disks.len() + networks.len();
    let places = if start.plugs { own.max(Mmio::PLACES) } else { own };
    let news = event()?;
    let told = news.try_clone().map_err(MachineError::Descriptors)?;
    let transport: Arc<dyn Transport> = Arc::new(Mmio::new(&vm, places, told)?);
    // At most 32, which was checked.
    let processors = u8::try_from(start.cpus_limit).unwrap_or(u8::MAX);
    let vcpus = (0..processors).map(|number| vm.create_vcpu(number.into()));
    let mut vcpus = vcpus.collect::<Result<Vec<_>, _>>().map_err(kvm_failed("make a processor"))?;
    let mut slots = Slots::new(vm);
    let memory = memory(&mut slots, start.memory)?;
    let area = Area::new(layout::images(start.memory, reserved(start)), cpu::address_end(&supported));
    let threads = disks.len() + spare_disks;
    let mut devices = Devices::new(memory.clone(), slots, area, Arc::clone(&transport), threads)?;
    devices.add_own(Entropy)?;
    let muxer = Muxer::new(vsock)
        .map_err(|error| MachineError::Device("vsock".to_owned(), std::io::Error::other(error)))?;
    devices.add_own(Vsock::new(muxer))?;
    devices.add_own(Balloon::default())?;
    let growth = if grows { Some(growth(start, &news, &mut devices)?) } else { None };
    for (share, socket) in shares {
        devices.add_share(&share, socket)?;
    }
    for (network, tap) in networks {
        devices.add_network(&network, tap)?;
    }
    for (disk, file) in disks {
        devices.add_disk(&disk, file)?;
    }

    let entry = load(start, &memory, &kernel, &initramfs, processors, &transport.describe())?;
    set_up(&mut vcpus, &memory, &supported, entry)?;
    let ending = Arc::new(Ending::new(link, console.clone()));
    let bus = Bus::new(transport, console, Arc::clone(&ending));
    let limit = start.memory_limit;
    Ok(Machine { vcpus, bus, ending, devices, growth, news, memory_limit: limit, plugs: start.plugs })
}

fn kvm_failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |error| MachineError::Kvm(what, error.into())
}

fn event() -> Result<EventFd, MachineError> {
    EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(MachineError::Descriptors)
}

/// A machine of KVM's without memory and processors, and what its processors can do.
fn open(kvm: OwnedFd) -> Result<(VmFd, CpuId), MachineError> {
    /// Of leaf 1, `ecx`: what every processor with virtualization has, and PVM does not give to guests.
    const SSE3: u32 = 1;
    let kvm: Kvm = sys::kvm(kvm);
    if NEEDED.iter().any(|needed| !kvm.check_extension(*needed)) {
        return Err(MachineError::Unusable("this kernel's has not what is needed; use Linux 5.10 or newer"));
    }
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm_failed("tell what processors can do"))?;
    let features = supported.as_slice().iter().find(|entry| entry.function == 1).map_or(0, |entry| entry.ecx);
    if features & SSE3 == 0 {
        return Err(MachineError::Unusable(
            "it gives guests a processor that no distribution's kernel runs on (PVM does); use a machine with VT-x or AMD-V",
        ));
    }
    let vm = kvm.create_vm().map_err(kvm_failed("make a machine"))?;
    // Intel's processors need both before there are processors; AMD's do not mind.
    vm.set_identity_map_address(IDENTITY_MAP).map_err(kvm_failed("place the identity map"))?;
    vm.set_tss_address(TASK_STATE).map_err(kvm_failed("place the task state segment"))?;
    vm.create_irq_chip().map_err(kvm_failed("make interrupt controllers"))?;
    Ok((vm, supported))
}

/// The guest's memory, private to this process.
fn memory(slots: &mut Slots, size: u64) -> Result<Memory, MachineError> {
    let ranges = layout::memory(size);
    let memory =
        Memory::from_ranges(&ranges).map_err(|error| MachineError::Memory(std::io::Error::other(error)))?;
    for region in memory.iter() {
        // For as long as the machine lives.
        slots.add(region).map_err(kvm_failed("map the guest's memory"))?;
    }
    Ok(memory)
}

/// Bytes of the region for memory that comes later.
fn reserved(start: &Start) -> u64 {
    (start.memory_limit - start.memory).next_multiple_of(LARGE_BLOCK)
}

/// With the device for memory that comes later.
fn growth(start: &Start, news: &EventFd, devices: &mut Devices) -> Result<Growth, MachineError> {
    let told = news.try_clone().map_err(MachineError::Descriptors)?;
    let size = Arc::new(Size::new(told).map_err(MachineError::Descriptors)?);
    let region = Region { begin: layout::growth(start.memory), length: reserved(start) };
    devices.add_own(Reserve::new(region.begin, region.length, Arc::clone(&size)))?;
    Ok(Growth::new(region, size, start.memory))
}

/// Puts everything that the first processor finds into memory; gives its entry.
fn load(
    start: &Start,
    memory: &Memory,
    kernel: &std::fs::File,
    initramfs: &std::fs::File,
    processors: u8,
    devices: &[u8],
) -> Result<u32, MachineError> {
    let kernel = elf::load_kernel(memory, kernel)?;
    let length = initramfs.metadata().map_err(|error| boot::BootError::Read("initramfs", error))?.len();
    let place = layout::initramfs(start.memory, length, kernel.end);
    let place = place.ok_or(boot::BootError::Room("initramfs"))?;
    boot::load(memory, "initramfs", initramfs, 0, place.begin, length)?;
    let rsdp = acpi::write(memory, &acpi::Tables { processors, devices })?;
    let mut words = KERNEL_WORDS.to_owned();
    if start.memory_limit > start.memory {
        words = format!("{words} {MEMORY_WORDS}");
    }
    if start.cpus_limit > start.cpus {
        // The others are there and not used until the agent says so.
        words = format!("{words} maxcpus={}", start.cpus);
    }
    if !start.command_line.is_empty() {
        words = format!("{words} {}", start.command_line);
    }
    let map = layout::map(start.memory);
    pvh::write(memory, &pvh::StartInfo { command_line: &words, initramfs: place, rsdp, map: &map })?;
    Ok(kernel.entry)
}

/// The first one begins at `entry`.
fn set_up(vcpus: &mut [VcpuFd], memory: &Memory, supported: &CpuId, entry: u32) -> Result<(), MachineError> {
    let count = u8::try_from(vcpus.len()).unwrap_or(u8::MAX);
    for (number, vcpu) in (0..count).zip(vcpus) {
        let identity = CpuId::from_entries(&cpu::identity(supported, number, count))
            .map_err(|_| MachineError::Unusable("its processors have more properties than can be told"))?;
        vcpu.set_cpuid2(&identity).map_err(kvm_failed("say what a processor can do"))?;
        cpu::set_up(vcpu, memory, (number == 0).then_some(entry))?;
    }
    Ok(())
}
