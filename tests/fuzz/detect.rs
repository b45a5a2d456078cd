//! First bytes of a connection: never a panic, and what they show does not change with what comes after them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_node::detect::{Detected, detect};

fuzz_target!(|data: &[u8]| {
    let mut decided: Option<Detected> = None;
    for end in 0..=data.len().min(4096) {
        let now = detect(&data[..end]);
        match &decided {
            Some(before) => assert_eq!(*before, now, "more bytes changed it"),
            None if now != Detected::More => decided = Some(now),
            None => {}
        }
    }
});
