use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::mmio::{Line, QUEUE_NOTIFY, Registers, read_empty};
use super::{Attached, flags};
use crate::device::{Memory, Wake};
use crate::endpoint::Endpoint;
use crate::entropy::Entropy;

fn registers() -> (Registers, EventFd) {
    let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let trigger = EventFd::new(flags()).unwrap();
    let line = Arc::new(Line::new(trigger.try_clone().unwrap()));
    let endpoint = Endpoint::new(Box::new(Entropy), memory).unwrap();
    let attached = Attached::new(endpoint, line.clone()).unwrap();
    (Registers::new(attached, line), trigger)
}

fn read(registers: &mut Registers, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    registers.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn write(registers: &mut Registers, offset: u64, value: u32) {
    registers.write(offset, &value.to_le_bytes());
}

/// What Linux' driver does, register by register (drivers/virtio/virtio_mmio.c).
#[test]
fn a_driver_sets_a_device_up() {
    let (mut it, trigger) = registers();
    assert_eq!([read(&mut it, 0), read(&mut it, 4), read(&mut it, 8)], [0x7472_6976, 2, 4]);
    write(&mut it, 0x70, 0);
    for status in [1, 3] {
        write(&mut it, 0x70, status);
    }
    write(&mut it, 0x14, 1);
    assert_eq!(read(&mut it, 0x10), 1);
    write(&mut it, 0x24, 1);
    write(&mut it, 0x20, 1);
    write(&mut it, 0x70, 11);
    assert_eq!(read(&mut it, 0x70), 11);
    write(&mut it, 0x30, 0);
    assert_eq!((read(&mut it, 0x44), read(&mut it, 0x34)), (0, 64));
    write(&mut it, 0x38, 8);
    for (offset, address) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
        write(&mut it, offset, address);
        write(&mut it, offset + 4, 0);
    }
    write(&mut it, 0x44, 1);
    write(&mut it, 0x70, 15);
    assert_eq!((read(&mut it, 0x70), read(&mut it, 0x44)), (15, 1));
    // All queues are looked at when a driver begins, and when it says so.
    let attached = it.attached().clone();
    assert_eq!(attached.kicks()[0].read().unwrap(), 1);
    write(&mut it, QUEUE_NOTIFY, 0);
    attached.serve(Wake::Queue(0));
    assert!(attached.kicks()[0].read().is_err());
    assert!(trigger.read().is_err());
    attached.with(|_, interrupt| interrupt.queue(0));
    assert_eq!((trigger.read().unwrap(), read(&mut it, 0x60)), (1, 1));
    write(&mut it, 0x64, 1);
    assert_eq!(read(&mut it, 0x60), 0);
    write(&mut it, 0x70, 0);
    assert_eq!((read(&mut it, 0x70), read(&mut it, 0x44)), (0, 0));
}

#[test]
fn what_is_not_offered_is_not_accepted() {
    for features in [0, 1 | 1 << 8] {
        let (mut it, _) = registers();
        for status in [1, 3] {
            write(&mut it, 0x70, status);
        }
        write(&mut it, 0x24, 1);
        write(&mut it, 0x20, features);
        write(&mut it, 0x70, 11);
        assert_eq!(read(&mut it, 0x70), 3);
        // Ready without features, the device is no use.
        write(&mut it, 0x70, 7);
        assert_eq!(read(&mut it, 0x70) & 0x40, 0x40);
    }
}

/// A driver in the middle of setting up goes on with other registers, and an interrupt that it has not heard comes again.
#[test]
fn a_driver_goes_on() {
    let (mut it, _) = registers();
    for status in [1, 3] {
        write(&mut it, 0x70, status);
    }
    write(&mut it, 0x24, 1);
    write(&mut it, 0x20, 1);
    write(&mut it, 0x70, 11);
    write(&mut it, 0x38, 8);
    it.attached().with(|_, interrupt| interrupt.configuration());
    let kept = serde_json::to_string(&it.state()).unwrap();

    let (mut it, trigger) = registers();
    it.restore(serde_json::from_str(&kept).unwrap()).unwrap();
    assert_eq!(serde_json::to_string(&it.state()).unwrap(), kept);
    assert_eq!((trigger.read().unwrap(), read(&mut it, 0x60), read(&mut it, 0x70)), (1, 2, 11));
    for (offset, address) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
        write(&mut it, offset, address);
    }
    write(&mut it, 0x44, 1);
    write(&mut it, 0x70, 15);
    let attached = it.attached().clone();
    // Once by restoring, once by the driver.
    assert_eq!((read(&mut it, 0x70), attached.kicks()[0].read().unwrap()), (15, 2));
    attached.with(|endpoint, _| assert_eq!(endpoint.queue_limit(0), 64));
}

proptest! {
    /// Whatever is written to the registers, nothing panics.
    #[test]
    fn any_access_has_an_answer(
        accesses in prop::collection::vec((0u64..0x120, any::<u32>(), any::<bool>(), 0usize..9), 1..60)
    ) {
        let (mut it, _) = registers();
        for (offset, value, small, length) in accesses {
            let value = if small { value % 16 } else { value };
            if length == 4 || length == 8 {
                write(&mut it, offset & !3, value);
            } else {
                it.read(offset, &mut [0; 8][..length]);
                it.write(offset, &[1; 8][..length]);
            }
            it.attached().serve(Wake::Queue(0));
        }
    }
}

/// What a driver sees of a device that is to go, and of a place without one.
#[test]
fn a_device_leaves() {
    let (mut it, _) = registers();
    assert_eq!((it.is_unused(), read(&mut it, 8)), (Some(true), 4));
    for status in [1, 3] {
        write(&mut it, 0x70, status);
    }
    it.leave(true);
    assert_eq!((it.is_unused(), read(&mut it, 8), read(&mut it, 0)), (Some(false), 0, 0x7472_6976));
    let attached = it.attached().clone();
    assert_eq!(attached.with(|_, _| it.is_unused()), None);
    write(&mut it, 0x70, 0);
    // As Linux leaves a device that it has no driver for.
    write(&mut it, 0x70, 1);
    assert_eq!(it.is_unused(), Some(true));
    it.leave(false);
    assert_eq!(read(&mut it, 8), 4);

    let mut bytes = [1; 4];
    for (offset, expected) in [(0, 0x7472_6976u32), (4, 2), (8, 0), (0x70, 0), (0x100, 0), (u64::MAX, 0)] {
        read_empty(offset, &mut bytes);
        assert_eq!(u32::from_le_bytes(bytes), expected, "{offset:#x}");
    }
    let mut odd = [1; 3];
    read_empty(0, &mut odd);
    assert_eq!(odd, [0; 3]);
}
