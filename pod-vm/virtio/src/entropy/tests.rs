use super::*;
use crate::device::Wake;
use crate::driver::{Driver, Part};

#[test]
fn a_request_is_filled() {
    let mut driver = Driver::new(Box::new(Entropy));
    driver.put(0, &[Part::In(64), Part::In(100)]);
    driver.put(0, &[Part::In(100_000)]);
    assert!(!driver.serve(Wake::Queue(0)));
    let used = driver.used(0);
    assert_eq!(used[0].1, 164);
    assert!(used[0].2.windows(32).all(|part| part.iter().any(|byte| *byte != 0)));
    assert_eq!(used[1].1, 4096);
    assert_eq!(driver.interrupt.queues.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[test]
fn nonsense_stops_the_device() {
    for part in [Part::Out(vec![1]), Part::Raw(1 << 40, 10, 2)] {
        let mut driver = Driver::new(Box::new(Entropy));
        driver.put(0, &[part]);
        driver.serve(Wake::Queue(0));
        assert!(driver.is_broken());
        // A driver that begins anew has a device again.
        driver.endpoint.set_status(0, &driver.interrupt);
        assert_eq!(driver.endpoint.negotiated().status, 0);
    }
}

#[test]
fn a_driver_goes_on() {
    let mut driver = Driver::new(Box::new(Entropy));
    driver.put(0, &[Part::In(8)]);
    driver.serve(Wake::Queue(0));
    driver.put(0, &[Part::In(9)]);
    let mut driver = driver.moved(Box::new(Entropy));
    driver.put(0, &[Part::In(10)]);
    driver.serve(Wake::Queue(0));
    assert_eq!(driver.used(0).iter().map(|(_, length, _)| *length).collect::<Vec<_>>(), [8, 9, 10]);
}
