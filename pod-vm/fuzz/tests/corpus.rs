//! What fuzzing has found to be worth keeping, run once each. `corpus/TARGET/` grows by what `make fuzz` leaves there.
#![allow(missing_docs)]

use std::fs;
use std::path::Path;

use podvisor_fuzz::{TARGETS, target};

#[test]
fn every_target_holds_on_its_corpus() {
    for (name, target) in TARGETS {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let mut files: Vec<_> = fs::read_dir(&directory)
            .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert!(!files.is_empty(), "{name} has no corpus");
        for file in files {
            println!("{}", file.display());
            target(&fs::read(&file).unwrap());
        }
    }
}

#[test]
fn nothing_holds_too() {
    for (_, target) in TARGETS {
        target(&[]);
        target(&[0xff; 300]);
    }
    assert!(target("block").is_some() && target("none").is_none());
}
