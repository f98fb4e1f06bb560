use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::Wake;
use crate::driver::{Driver, MEMORY, Part};
use crate::state::DeviceState;

const REPORT: usize = 2;
const WRITE: u16 = 2;

fn is_filled(driver: &Driver, at: u64) -> bool {
    driver.memory.read_obj::<u8>(GuestAddress(at)).unwrap() == 7
}

fn lab() -> Driver {
    let driver = Driver::new(Box::new(Balloon::default()));
    driver.memory.write_slice(&vec![7; 1 << 20], GuestAddress(8 << 20)).unwrap();
    driver
}

#[test]
fn what_is_told_of_is_the_hosts() {
    let mut driver = lab();
    let at = 8 << 20;
    driver.put(REPORT, &[Part::Raw(at, 8192, WRITE), Part::Raw(at + (64 << 10), 4096, WRITE)]);
    driver.serve(Wake::Queue(REPORT));
    assert_eq!((driver.used(REPORT).len(), driver.endpoint.negotiated().misuses), (1, 0));
    let filled = [0, 4096, 8191, 8192, 65535, 65536, 69632].map(|offset| is_filled(&driver, at + offset));
    assert_eq!(filled, [false, false, false, true, true, false, true]);
    // Parts of pages stay.
    driver.put(
        REPORT,
        &[Part::Raw(at + (128 << 10) + 1, 8192, WRITE), Part::Raw(at + (192 << 10), 4095, WRITE)],
    );
    driver.serve(Wake::Queue(REPORT));
    let filled =
        [128 << 10, (132 << 10), (136 << 10), 192 << 10].map(|offset| is_filled(&driver, at + offset));
    assert_eq!(filled, [true, false, true, true]);
}

#[test]
fn pages_that_nobody_has_asked_for() {
    let mut driver = lab();
    let numbers = [8u32 << 8, u32::MAX, (8 << 8) + 2];
    driver.put(0, &[Part::Out(numbers.iter().flat_map(|number| number.to_le_bytes()).collect())]);
    driver.serve(Wake::Queue(0));
    let filled = [0, 4096, 8192].map(|offset| is_filled(&driver, (8 << 20) + offset));
    assert_eq!(filled, [false, true, false]);
    driver.put(1, &[Part::Out(vec![0; 16])]);
    driver.serve(Wake::Queue(1));
    assert_eq!((driver.used(1).len(), driver.endpoint.negotiated().misuses), (1, 0));
}

#[test]
fn nonsense_stops_the_device() {
    for (queue, part) in [
        (REPORT, Part::Raw(1 << 40, 4096, WRITE)),
        (REPORT, Part::Raw((MEMORY as u64) - 4096, 8192, WRITE)),
        (REPORT, Part::Raw(0, u32::MAX, WRITE)),
        (0, Part::Out(vec![0; 1028])),
        (1, Part::Out(vec![0; 1028])),
    ] {
        let mut driver = lab();
        driver.put(queue, std::slice::from_ref(&part));
        driver.serve(Wake::Queue(queue));
        assert!(driver.is_broken(), "{queue} {part:?}");
    }
}

#[test]
fn a_driver_goes_on() {
    let mut driver = lab();
    driver.put(REPORT, &[Part::Raw(8 << 20, 8192, WRITE)]);
    driver.serve(Wake::Queue(REPORT));
    driver.put(REPORT, &[Part::Raw((8 << 20) + (64 << 10), 4096, WRITE)]);
    let mut driver = driver.moved(Box::new(Balloon::default()));
    assert_eq!((driver.used(REPORT).len(), is_filled(&driver, (8 << 20) + (64 << 10))), (2, false));
    assert_eq!(driver.endpoint.state().device, DeviceState::Balloon(State { reported: 8192 + 4096 }));
}
