use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::request::ANSWER;
use super::*;
use crate::device::Wake;
use crate::driver::{Driver, Part};

/// The region is the second half of the tests' driver's memory, as far as there is one: a block of it can be reached.
const BEGIN: u64 = 8 << 20;

fn parts() -> (Reserve, Arc<Size>, EventFd) {
    let told = EventFd::new(crate::transport::flags()).unwrap();
    let size = Arc::new(Size::new(told.try_clone().unwrap()).unwrap());
    (Reserve::new(BEGIN, LARGE_BLOCK * 2, Arc::clone(&size)), size, told)
}

fn lab() -> (Driver, Arc<Size>, EventFd) {
    let (device, size, told) = parts();
    (Driver::new(Box::new(device)), size, told)
}

fn want(driver: &mut Driver, size: &Size, bytes: u64) {
    size.want(bytes);
    driver.serve(Wake::Source(0));
}

/// Kind and state of the answer.
fn ask(driver: &mut Driver, kind: u16, block: u64, count: u16) -> (u8, u8) {
    ask_at(driver, kind, BEGIN + block * BLOCK, count)
}

fn ask_at(driver: &mut Driver, kind: u16, address: u64, count: u16) -> (u8, u8) {
    let mut bytes = vec![0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    driver.put(0, &[Part::Out(bytes), Part::In(ANSWER)]);
    driver.serve(Wake::Queue(0));
    let (_, length, answer) = driver.used(0).remove(0);
    assert_eq!(length as usize, ANSWER);
    (answer[0], answer[8])
}

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const DONE: (u8, u8) = (0, 0);
const REFUSED: (u8, u8) = (1, 0);
const WRONG: (u8, u8) = (3, 0);

#[test]
fn blocks_come_and_go() {
    let (mut driver, size, told) = lab();
    let field = |driver: &Driver, at: usize| {
        let bytes = driver.endpoint.device().configuration()[at..at + 8].try_into().unwrap();
        u64::from_le_bytes(bytes)
    };
    assert_eq!(
        [0, 16, 24, 32, 40, 48].map(|at| field(&driver, at)),
        [BLOCK, BEGIN, LARGE_BLOCK * 2, 0, 0, 0]
    );
    // Nothing is usable before something is wanted.
    assert_eq!(ask(&mut driver, PLUG, 0, 1), WRONG);
    let before = driver.endpoint.device().generation();
    want(&mut driver, &size, 4 * BLOCK);
    assert_ne!(driver.endpoint.device().generation(), before);
    assert_eq!(driver.interrupt.configuration.load(std::sync::atomic::Ordering::SeqCst), 1);
    assert_eq!([32, 48].map(|at| field(&driver, at)), [LARGE_BLOCK, 4 * BLOCK]);

    assert_eq!(ask(&mut driver, PLUG, 0, 3), DONE);
    assert_eq!((size.has(), told.read().unwrap(), field(&driver, 40)), (3 * BLOCK, 1, 3 * BLOCK));
    assert_eq!(ask(&mut driver, PLUG, 10, 2), REFUSED);
    assert_eq!(ask(&mut driver, PLUG, 2, 1), WRONG);
    assert_eq!(ask(&mut driver, PLUG, 10, 1), DONE);
    assert_eq!(ask(&mut driver, STATE, 0, 3), DONE);
    assert_eq!(ask(&mut driver, STATE, 4, 3), (0, 1));
    assert_eq!(ask(&mut driver, STATE, 9, 3), (0, 2));

    // What was in a block is gone with it.
    driver.memory.write_slice(b"secret", GuestAddress(BEGIN)).unwrap();
    want(&mut driver, &size, BLOCK);
    assert_eq!(ask(&mut driver, UNPLUG, 9, 2), WRONG);
    assert_eq!(ask(&mut driver, UNPLUG, 0, 2), DONE);
    let mut bytes = [1; 6];
    driver.memory.read_slice(&mut bytes, GuestAddress(BEGIN)).unwrap();
    assert_eq!((bytes, size.has()), ([0; 6], 2 * BLOCK));
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), DONE);
    assert_eq!((size.has(), driver.endpoint.negotiated().misuses), (0, 0));
}

#[test]
fn what_is_not_in_the_region_is_wrong() {
    let (mut driver, size, _told) = lab();
    want(&mut driver, &size, LARGE_BLOCK * 4);
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, count) in [
            (BEGIN - BLOCK, 2),
            (0, 1),
            (BEGIN + 4096, 1),
            (BEGIN, 0),
            (BEGIN + 2 * LARGE_BLOCK, 1),
            (BEGIN + LARGE_BLOCK, 65),
            (u64::MAX - BLOCK + 1, u16::MAX),
            (BEGIN, u16::MAX),
        ] {
            assert_eq!(ask_at(&mut driver, kind, address, count), WRONG, "{kind} {address:#x} {count}");
        }
    }
    assert_eq!(ask(&mut driver, 4, 0, 1), WRONG);
}

#[test]
fn nonsense_stops_the_device() {
    for parts in [
        vec![Part::Out(vec![0; 23]), Part::In(ANSWER)],
        vec![Part::Out(vec![0; 24]), Part::In(ANSWER - 1)],
        vec![Part::Out(vec![0; 24])],
        vec![Part::Raw(1 << 40, 24, 0), Part::In(ANSWER)],
    ] {
        let (mut driver, _size, _told) = lab();
        driver.put(0, &parts);
        driver.serve(Wake::Queue(0));
        assert!(driver.is_broken(), "{parts:?}");
    }
}

#[test]
fn a_driver_goes_on() {
    let (mut driver, size, _) = lab();
    want(&mut driver, &size, 4 * BLOCK);
    assert_eq!(ask(&mut driver, PLUG, 1, 2), DONE);
    let before = driver.endpoint.device().configuration().to_vec();
    let (other, size, told) = parts();
    let mut driver = driver.moved(Box::new(other));
    assert_eq!((size.has(), told.read().unwrap()), (2 * BLOCK, 1));
    assert_eq!(driver.endpoint.device().configuration(), before);
    assert_eq!(ask(&mut driver, UNPLUG, 0, 1), WRONG);
    assert_eq!(ask(&mut driver, UNPLUG, 1, 1), DONE);
    assert_eq!(ask(&mut driver, PLUG, 3, 3), DONE);
    assert_eq!(ask(&mut driver, PLUG, 6, 1), REFUSED);
    // What is wanted can be asked for anew, and is the same.
    want(&mut driver, &size, 5 * BLOCK);
    assert_eq!(ask(&mut driver, PLUG, 6, 1), DONE);
    assert_eq!(size.has(), 5 * BLOCK);
}
