//! The fuzz targets with generated inputs, on every toolchain. `NETKERNEL_FUZZ_SEED` repeats a run, `NETKERNEL_FUZZ_ROUNDS`
//! makes it longer.

use netkernel_fuzz::{TARGETS, Verdict, engine};

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

struct Random(u64);

impl Random {
    /// splitmix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        // Of small numbers there are more than of large ones: they are ids, counts and flags.
        let small = self.next() & 1 == 0;
        (0..self.next() % most).map(|_| if small { self.next() & 15 } else { self.next() } as u8).collect()
    }
}

#[test]
fn no_input_breaks_a_target() {
    let seed = variable("NETKERNEL_FUZZ_SEED", 1);
    for (name, target) in TARGETS {
        let mut random = Random(seed);
        for round in 0..variable("NETKERNEL_FUZZ_ROUNDS", 10_000) {
            let input = random.bytes(if *name == "region" { 4096 } else { 2000 });
            let outcome = std::panic::catch_unwind(|| target(&input));
            assert!(outcome.is_ok(), "target {name}, seed {seed}, round {round}: {input:?}");
        }
    }
}

/// Otherwise the inputs would end every guest at once and show little.
#[test]
fn some_guests_are_ended_and_some_are_served() {
    let mut random = Random(variable("NETKERNEL_FUZZ_SEED", 1));
    let verdicts: Vec<Verdict> = (0..300).map(|_| engine(&random.bytes(2000))).collect();
    for wanted in [Verdict::Served, Verdict::Ended] {
        let count = verdicts.iter().filter(|&&v| v == wanted).count();
        assert!(count >= 10, "{count} of 300 were {wanted:?}");
    }
}
