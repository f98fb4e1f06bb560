//! Streams that were cut, and streams that were altered at random.

use std::panic::{AssertUnwindSafe, catch_unwind};

use podvisor_unpack::{Compression, Limits, UnpackErrorKind};

use crate::scratch::{Ground, LIMITS, Scratch};
use crate::tarball::{
    BLOCK, Item, device, directory, file, hard_link, item, long, number, pax, seal, symlink, tar,
};

/// One of everything, in groups that stand for themselves.
fn sample() -> Vec<Vec<Item>> {
    let map = |bytes: &[u8]| {
        let mut map = bytes.to_vec();
        map.resize(BLOCK, 0);
        map
    };
    let old_sparse = item(b'S', "sparse")
        .gnu()
        .patch(386, [number(512, 12), number(100, 12)].concat())
        .patch(483, number(1000, 12))
        .content([1; 100]);
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    vec![
        vec![directory("./"), directory("d").mode(0o1777)],
        vec![file("d/f", [b'x'; 700]).mode(0o4755), hard_link("h", "d/f")],
        vec![symlink("l", "d"), file("l/through", "y")],
        vec![item(b'6', "p"), device(b'3', "c", 1, 3), device(b'4', "b", 7, 0)],
        vec![long(b'L', "long/".repeat(30)), directory("x").gnu()],
        vec![
            pax(&[
                ("path", b"pax/name"),
                ("mtime", b"12.5"),
                ("SCHILY.xattr.user.a", b"b"),
                ("SCHILY.xattr.security.capability", &capability),
            ]),
            file("x", "content"),
        ],
        vec![item(b'g', "g").content(crate::tarball::pax_record("comment", b"x"))],
        vec![old_sparse],
        vec![
            pax(&[("GNU.sparse.map", b"0,3,9,4"), ("GNU.sparse.size", b"20"), ("GNU.sparse.name", b"s01")]),
            file("x", "abcdefg"),
        ],
        vec![
            pax(&[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"s10"),
                ("GNU.sparse.realsize", b"20"),
            ]),
            file("x", [map(b"1\n4\n3\n"), b"xyz".to_vec()].concat()),
        ],
        vec![file("d/.wh.gone", ""), file("d/.wh..wh..opq", "")],
        vec![file("d", "instead of the directory")],
    ]
}

#[test]
fn every_truncation_is_an_error_or_another_digest() {
    let ground = Ground::new();
    for group in sample() {
        let whole = tar(&group);
        let expected = ground.unpack(&whole, Compression::None, LIMITS).expect("whole");
        // Where a cut leaves whole entries: writers without an end mark exist, so that much is a tar too.
        let mut boundaries = vec![0];
        let mut offset = 0;
        for item in &group {
            offset += item.bytes().len();
            if !matches!(item.flag, b'x' | b'L') {
                boundaries.push(offset);
            }
        }
        boundaries.push(offset + BLOCK);
        for length in 0..whole.len() {
            let what = format!("{} cut at {length}", String::from_utf8_lossy(&group[0].name));
            match ground.unpack(&whole[..length], Compression::None, LIMITS) {
                Ok(unpacked) => {
                    assert!(boundaries.contains(&length), "{what} was accepted");
                    assert_ne!(unpacked.diff_id, expected.diff_id, "{what}");
                }
                Err(error) => {
                    assert!(!boundaries.contains(&length), "{what}: {error:?}");
                    assert_eq!(error.kind(), UnpackErrorKind::Corrupt, "{what}: {error:?}");
                }
            }
        }
    }
}

#[test]
fn every_truncation_of_a_compressed_stream_is_an_error() {
    let whole = tar(&sample().concat());
    let gzip = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        std::io::Write::write_all(&mut encoder, &whole).expect("compress");
        encoder.finish().expect("compress")
    };
    let zstd = zstd::encode_all(&whole[..], 3).expect("compress");
    let ground = Ground::new();
    for (compression, layer) in [(Compression::Gzip, gzip), (Compression::Zstd, zstd)] {
        for length in 1..layer.len() {
            let result = ground.unpack(&layer[..length], compression, LIMITS);
            let error = result.expect_err("a cut stream");
            assert_eq!(error.kind(), UnpackErrorKind::Corrupt, "{compression:?} {length}");
        }
    }
}

/// A linear congruential generator: the same cases in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % bound
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

#[test]
fn random_changes_never_panic_nor_escape() {
    let items = sample().concat();
    let whole = tar(&items);
    let mut headers = vec![0];
    for item in &items {
        headers.push(headers[headers.len() - 1] + item.bytes().len());
    }
    headers.pop();
    let interesting =
        [0, 1, b' ', b'/', b'.', b'0', b'1', b'2', b'5', b'7', b'L', b'S', b'x', 0x7f, 0x80, 0xff];
    let (ground, scratch) = (Ground::new(), Scratch::new());
    let mut random = Random(20_240_229);
    let (mut accepted, mut refused) = (0, 0);
    for case in 0..6000 {
        let mut layer = whole.clone();
        for _ in 0..=random.below(6) {
            match random.below(10) {
                // Within a header: names, numbers, types.
                0..=6 => {
                    let header = random.pick(&headers);
                    layer[header + random.below(BLOCK)] = random.pick(&interesting);
                }
                7 => {
                    let index = random.below(layer.len());
                    layer[index] = random.pick(&interesting);
                }
                8 => {
                    let (from, to) = (random.pick(&headers), random.pick(&headers));
                    layer.copy_within(from..from + BLOCK, to);
                }
                _ => {
                    let header = random.pick(&headers);
                    let field =
                        random.pick(&[(0, 100), (157, 100), (124, 12), (136, 12), (386, 24), (345, 100)]);
                    let bytes = random.pick(&[
                        &b"../outside/canary"[..],
                        b"l/../x",
                        b"/l/l/l",
                        b"777777777777",
                        b"d/.wh...",
                        b"\xff\xff",
                    ]);
                    let length = bytes.len().min(field.1);
                    layer[header + field.0..][..length].copy_from_slice(&bytes[..length]);
                }
            }
        }
        // Mostly with good checksums, to get past them.
        if random.below(8) > 0 {
            for &header in &headers {
                seal(&mut layer[header..header + BLOCK]);
            }
        }
        let limits = Limits { bytes: 1 << 20, entries: 200 };
        let result = catch_unwind(AssertUnwindSafe(|| ground.unpack(&layer, Compression::None, limits)));
        match result.unwrap_or_else(|_| panic!("case {case} panicked")) {
            Ok(_) => accepted += 1,
            Err(_) => refused += 1,
        }
        // The same on a real file system, where there is something outside.
        if case % 10 == 0 {
            let _ = scratch.unpack_with(&layer, Compression::None, limits);
            scratch.assert_canary("a random change");
        }
    }
    assert!(accepted > 500 && refused > 500, "{accepted} accepted, {refused} refused: badly mixed");
}
