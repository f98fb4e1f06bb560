use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::device::{Device, Memory, Wake};
use crate::driver::{Driver, Part};
use crate::endpoint::Endpoint;
use crate::state::DeviceState;

fn disk(sectors: usize, read_only: bool) -> (Driver, File) {
    let mut file = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..sectors * 512).map(|at| u8::try_from(at / 512 % 251).unwrap()).collect();
    file.write_all(&content).unwrap();
    let device = Disk::new(file.try_clone().unwrap(), "serial", read_only).unwrap();
    (Driver::new(Box::new(device)), file)
}

fn header(kind: u32, sector: u64) -> Part {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    Part::Out(bytes)
}

/// A request's status and what it has read.
fn ask(driver: &mut Driver, parts: &[Part]) -> (u8, Vec<u8>, u32) {
    driver.put(0, parts);
    driver.serve(Wake::Queue(0));
    let (_, length, mut bytes) = driver.used(0).pop().expect("an answer");
    (bytes.pop().unwrap(), bytes, length)
}

fn content(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const NAME: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

#[test]
fn what_is_written_is_read() {
    let (mut driver, mut file) = disk(400, false);
    let (status, bytes, length) =
        ask(&mut driver, &[header(READ, 3), Part::In(512), Part::In(1024), Part::In(1)]);
    assert_eq!((status, length, bytes.len()), (0, 1537, 1536));
    assert_eq!([bytes[0], bytes[512], bytes[1535]], [3, 4, 5]);
    // More than is moved at once, in parts that are no sectors.
    let data = vec![7; 100 * 1024];
    let request =
        [header(WRITE, 8), Part::Out(data[..100].to_vec()), Part::Out(data[100..].to_vec()), Part::In(1)];
    assert_eq!(ask(&mut driver, &request), (0, vec![], 1));
    assert_eq!(ask(&mut driver, &[header(FLUSH, 0), Part::In(1)]).0, 0);
    let there = content(&mut file);
    assert!(there[8 * 512..][..data.len()] == data && there[7 * 512] == 7 && there[208 * 512] == 208);
    let (status, name, length) = ask(&mut driver, &[header(NAME, 0), Part::In(20), Part::In(1)]);
    assert_eq!((status, length), (0, 21));
    assert_eq!(&name[..7], b"serial\0");
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn ranges_become_zeros() {
    let (mut driver, mut file) = disk(64, false);
    let mut two = range(8, 8, 0);
    two.extend(range(32, 1, 1));
    assert_eq!(ask(&mut driver, &[header(ZEROES, 0), Part::Out(two), Part::In(1)]).0, 0);
    assert_eq!(ask(&mut driver, &[header(DISCARD, 0), Part::Out(range(16, 8, 0)), Part::In(1)]).0, 0);
    let there = content(&mut file);
    let zero = |sector: usize| there[sector * 512..][..512].iter().all(|byte| *byte == 0);
    assert!(zero(8) && zero(15) && zero(32) && !zero(7) && !zero(31) && !zero(33));
    assert_eq!(there.len(), 64 * 512);
    // Flags that are none; beyond the end.
    assert_eq!(ask(&mut driver, &[header(DISCARD, 0), Part::Out(range(0, 1, 1)), Part::In(1)]).0, 2);
    assert_eq!(ask(&mut driver, &[header(ZEROES, 0), Part::Out(range(0, 1, 2)), Part::In(1)]).0, 2);
    assert_eq!(ask(&mut driver, &[header(ZEROES, 0), Part::Out(range(64, 1, 0)), Part::In(1)]).0, 1);
    assert_eq!(ask(&mut driver, &[header(ZEROES, 0), Part::Out(range(u64::MAX, 1, 0)), Part::In(1)]).0, 1);
}

#[test]
fn what_cannot_be_done_is_told() {
    let (mut driver, mut file) = disk(16, true);
    let before = content(&mut file);
    let data = || Part::Out(vec![9; 512]);
    assert_eq!(ask(&mut driver, &[header(WRITE, 0), data(), Part::In(1)]).0, 1);
    assert_eq!(ask(&mut driver, &[header(DISCARD, 0), Part::Out(range(0, 1, 0)), Part::In(1)]).0, 1);
    assert_eq!(ask(&mut driver, &[header(READ, 16), Part::In(512), Part::In(1)]).0, 1);
    assert_eq!(ask(&mut driver, &[header(READ, u64::MAX / 512), Part::In(512), Part::In(1)]).0, 1);
    assert_eq!(ask(&mut driver, &[header(99, 0), Part::In(1)]).0, 2);
    assert!(content(&mut file) == before);
    // A file system without room, and a file that has become shorter.
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let mut device = Disk::new(full, "full", false).unwrap();
    assert_eq!(device.configuration()[..8], [0; 8]);
    device.reset();
    let (mut driver, file) = disk(16, false);
    file.set_len(512).unwrap();
    assert_eq!(ask(&mut driver, &[header(READ, 8), Part::In(512), Part::In(1)]).0, 1);
}

#[test]
fn nonsense_stops_the_disk() {
    let nonsense: [&[Part]; 6] = [
        &[Part::Out(vec![0; 15]), Part::In(1)],
        &[header(READ, 0)],
        &[header(READ, 0), Part::In(1), Part::Out(vec![1])],
        &[header(DISCARD, 0), Part::Out(vec![0; 17]), Part::In(1)],
        &[header(READ, 0), Part::Raw(u64::MAX - 100, 512, 2), Part::In(1)],
        &[header(READ, 0), Part::Raw(0x10_0000, 8 << 20, 2), Part::In(1)],
    ];
    for parts in nonsense {
        let (mut driver, _) = disk(16, false);
        driver.put(0, parts);
        driver.serve(Wake::Queue(0));
        assert!(driver.is_broken(), "{parts:?}");
        assert_eq!(driver.used(0), []);
    }
    let (mut driver, _) = disk(16, false);
    driver.announce(0, 1000);
    driver.serve(Wake::Queue(0));
    assert!(driver.is_broken());
}

proptest! {
    /// Whatever is in the rings, nothing panics, and nothing is written beyond the disk.
    #[test]
    fn nothing_gets_out_of_bounds(
        requests in prop::collection::vec(
            prop::collection::vec(
                prop_oneof![
                    (any::<u32>(), any::<u64>()).prop_map(|(kind, sector)| header(kind % 16, sector % 20)),
                    prop::collection::vec(any::<u8>(), 0..600).prop_map(Part::Out),
                    (0usize..2000).prop_map(Part::In),
                    (any::<u64>(), any::<u32>(), any::<u16>()).prop_map(|(at, length, flags)| Part::Raw(at, length, flags & !4)),
                ],
                1..4,
            ),
            1..4,
        )
    ) {
        let (mut driver, file) = disk(16, false);
        for parts in requests {
            driver.put(0, &parts);
            driver.serve(Wake::Queue(0));
        }
        prop_assert_eq!(file.metadata().unwrap().len(), 16 * 512);
    }
}

#[test]
fn a_driver_goes_on() {
    let (mut driver, file) = disk(16, false);
    assert_eq!(ask(&mut driver, &[header(READ, 16), Part::In(512), Part::In(1)]).0, 1);
    let kept = driver.endpoint.state();
    driver.put(0, &[header(READ, 3), Part::In(512), Part::In(1)]);
    let mut driver = driver.moved(Box::new(Disk::new(file.try_clone().unwrap(), "serial", false).unwrap()));
    assert_eq!(driver.used(0).pop().unwrap().2[510..], [3, 3, 0]);
    let data = Part::Out(vec![9; 512]);
    assert_eq!(ask(&mut driver, &[header(WRITE, 5), data, Part::In(1)]).0, 0);
    assert_eq!(ask(&mut driver, &[header(READ, 5), Part::In(512), Part::In(1)]).1, [9; 512]);
    let DeviceState::Block(state) = driver.endpoint.state().device else { panic!("it is a disk's") };
    assert_eq!((state.failed, state.sectors), (1, 16));
    // Another disk, a shorter one, one of another kind.
    let others: [Box<dyn Device>; 4] = [
        Box::new(Disk::new(file.try_clone().unwrap(), "other", false).unwrap()),
        Box::new(Disk::new(file.try_clone().unwrap(), "serial", true).unwrap()),
        Box::new(Disk::new(tempfile::tempfile().unwrap(), "serial", false).unwrap()),
        Box::new(crate::entropy::Entropy),
    ];
    for other in others {
        let mut endpoint = Endpoint::new(other, driver.memory.clone()).unwrap();
        assert!(endpoint.restore(kept.clone()).is_err());
    }
    // Queues that are not in the guest's memory.
    let device = Box::new(Disk::new(file, "serial", false).unwrap());
    let small = Memory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    assert!(Endpoint::new(device, small).unwrap().restore(kept).is_err());
}

/// Requests go over the ends of files; what is not whole sectors long is none of a disk's.
#[test]
fn files_are_joined() {
    let file = |length: usize, content: u8| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![content; length]).unwrap();
        file
    };
    let files = || vec![file(1024, 1), file(0, 2), file(512, 3), file(1536, 4)];
    let mut driver = Driver::new(Box::new(Disk::joined(files(), "joined").unwrap()));
    let (status, bytes, _) = ask(&mut driver, &[header(READ, 0), Part::In(6 * 512), Part::In(1)]);
    assert_eq!((status, bytes), (0, [vec![1; 1024], vec![3; 512], vec![4; 1536]].concat()));
    for (sector, first, last) in [(1, 1, 3), (2, 3, 4), (4, 4, 4)] {
        let (status, bytes, _) = ask(&mut driver, &[header(READ, sector), Part::In(1024), Part::In(1)]);
        assert_eq!((status, bytes[0], bytes[1023]), (0, first, last));
    }
    assert_eq!(ask(&mut driver, &[header(READ, 5), Part::In(1024), Part::In(1)]).0, 1);
    assert_eq!(ask(&mut driver, &[header(WRITE, 0), Part::Out(vec![9; 512]), Part::In(1)]).0, 1);
    assert_eq!(ask(&mut driver, &[header(FLUSH, 0), Part::In(1)]).0, 0);
    assert!(Disk::joined(vec![file(1000, 1), file(512, 1)], "odd").is_err());
}
