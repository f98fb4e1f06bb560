use super::*;
use crate::device::{Device, Wake};
use crate::driver::{Driver, Part};
use crate::endpoint::Endpoint;

fn driver() -> Driver {
    Driver::new(Box::new(Image::new(State { begin: 5 << 30, length: 4 << 20 })))
}

fn ask(driver: &mut Driver, kind: u32) -> Vec<u8> {
    driver.put(0, &[Part::Out(kind.to_le_bytes().to_vec()), Part::In(4)]);
    driver.serve(Wake::Queue(0));
    driver.used(0).remove(0).2
}

#[test]
fn it_says_where_it_is_and_needs_no_flush() {
    let mut driver = driver();
    let image = Image::new(State { begin: 5 << 30, length: 4 << 20 });
    assert_eq!(image.configuration()[..8], (5_u64 << 30).to_le_bytes());
    assert_eq!(image.configuration()[8..], (4_u64 << 20).to_le_bytes());
    assert_eq!(ask(&mut driver, 0), [0; 4]);
    assert_eq!(ask(&mut driver, 7), [1, 0, 0, 0]);
    assert!(!driver.is_broken());
}

#[test]
fn nonsense_stops_the_device() {
    for parts in [
        vec![Part::Out(vec![0; 3]), Part::In(4)],
        vec![Part::Out(vec![0; 4]), Part::In(3)],
        vec![Part::In(4)],
        vec![Part::Out(vec![0; 4000]), Part::In(4)],
        vec![Part::Raw(1 << 40, 4, 1), Part::In(4)],
    ] {
        let mut driver = driver();
        driver.put(0, &parts);
        driver.serve(Wake::Queue(0));
        assert!(driver.is_broken(), "{parts:?}");
    }
}

#[test]
fn a_driver_goes_on() {
    let mut driver = driver();
    assert_eq!(ask(&mut driver, 0), [0; 4]);
    let kept = driver.endpoint.state();
    let mut driver = driver.moved(Box::new(Image::new(State { begin: 5 << 30, length: 4 << 20 })));
    assert_eq!(ask(&mut driver, 7), [1, 0, 0, 0]);
    // The guest has it where it was, or not at all.
    let elsewhere = Box::new(Image::new(State { begin: 6 << 30, length: 4 << 20 }));
    assert!(Endpoint::new(elsewhere, driver.memory.clone()).unwrap().restore(kept).is_err());
}
