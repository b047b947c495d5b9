//! Random chunks of a pool, read and copied, between GuestLib's and ServiceLib's mapping of one region.

use std::fs::OpenOptions;
use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use netkernel_abi::Limits as RegionLimits;
use netkernel_shm::{HugePages, Region};

use super::{Case, Limits, Random, Row};
use crate::report::Outcome;
use crate::sys::SharedMemory;

/// Bytes, and nanoseconds of the published system.
pub const PUBLISHED: [(usize, f64); 6] =
    [(64, 8.0), (512, 64.0), (1024, 117.0), (2048, 214.0), (4096, 425.0), (8192, 809.0)];
/// Size of a byte ring: the largest that a socket gets.
const RING: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Way {
    /// ServiceLib copies a chunk out of the region.
    Read,
    /// GuestLib copies a chunk into the region.
    Write,
}

const WAYS: [(Way, &str, &str); 2] =
    [(Way::Read, "read", "read a random chunk"), (Way::Write, "write", "write a random chunk")];

/// The pools: all of it, where most chunks come from main memory; and the ring of one busy connection, which stays in the
/// cache (blocks that were used last are handed out first).
const POOLS: [(&str, &str); 2] = [("ring", "in one ring"), ("pool", "in the pool")];

type Combination = ((&'static str, &'static str), (Way, &'static str, &'static str), (usize, f64));

/// Every pool, way and size, in the order of the rows.
fn combinations() -> impl Iterator<Item = Combination> {
    let ways = |pool| WAYS.into_iter().flat_map(move |way| PUBLISHED.map(|size| (pool, way, size)));
    POOLS.into_iter().flat_map(ways)
}

/// All chunk sizes on pages of one kind.
struct Chunks {
    memory: Option<Memory>,
    rows: Vec<Row>,
    /// Bytes copied in one measurement.
    amount: usize,
}

struct Memory {
    /// The mapping that GuestLib would have, and the one that ServiceLib would have.
    guest: Region,
    service: Region,
    plain: SharedMemory,
    pool: usize,
}

pub fn cases(pool_mib: u32, quick: bool) -> Result<Vec<Box<dyn Case>>> {
    let amount = if quick { 8 << 20 } else { 32 << 20 };
    let mut cases: Vec<Box<dyn Case>> = Vec::new();
    for (huge, id, pages) in [(true, "huge", "2 MiB pages"), (false, "small", "4 KiB pages")] {
        let mut rows = Vec::new();
        for ((pool, place), (_, way, title), (bytes, published_ns)) in combinations() {
            let limits =
                Limits { ratio_at_most: Some(1.3), published_ns: Some(published_ns), at_least: None };
            let title = format!("{title} {place}, {pages}, {bytes} B");
            rows.push(Row::new(format!("{way}-{pool}-{id}-{bytes}"), title, "ns", limits));
        }
        let memory = match Memory::new(pool_mib, huge) {
            Ok(memory) => Some(memory),
            Err(error) if huge => {
                let pages = 2 * pool_mib.div_ceil(2) + 2;
                for row in &mut rows {
                    row.outcome =
                        Outcome::NotRun(format!("not run: sysctl vm.nr_hugepages={pages} is needed"));
                }
                eprintln!("huge pages: NOT RUN: {error:#}");
                None
            }
            Err(error) => return Err(error),
        };
        cases.push(Box::new(Chunks { memory, rows, amount }));
    }
    Ok(cases)
}

impl Memory {
    fn new(pool_mib: u32, huge: bool) -> Result<Memory> {
        let pool = (pool_mib as usize) << 20;
        let limits = RegionLimits { region_bytes: (pool + (2 << 20)) as u64, sockets: 1024, queue_sets: 4 };
        let pages = if huge { HugePages::On } else { HugePages::Off };
        let service = Region::create(limits, 1, 0, pages)?;
        ensure!(
            service.layout().payload_bytes >= pool as u64,
            "the region's tables take more than was thought"
        );
        // Mapped a second time, as a guest does it.
        let file =
            OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", service.fd()))?;
        let guest = Region::attach(file.into())?;
        let mut plain = SharedMemory::new(pool, huge).context("memory to compare with")?;
        // Every page is there before anything is measured, and what is read is known.
        let line: Vec<u8> = (0..RING).map(pattern).collect();
        for at in (0..pool).step_by(RING) {
            ring(&guest, at).context("the pool lies in the payload")?.copy_in(0, &line);
            plain.bytes_mut()[at..at + RING].copy_from_slice(&line);
        }
        let memory = Memory { guest, service, plain, pool };
        memory.check()?;
        Ok(memory)
    }

    /// What GuestLib wrote is what ServiceLib reads.
    fn check(&self) -> Result<()> {
        let mut out = [0; 512];
        let ring = ring(&self.service, self.pool - RING).context("the pool lies in the payload")?;
        ring.copy_out(4096, &mut out);
        ensure!(out.iter().enumerate().all(|(n, &byte)| byte == pattern(4096 + n)), "the mappings differ");
        Ok(())
    }

    /// Nanoseconds for one chunk by way of the region: the ring is looked up and checked for each, as for each call.
    fn ours(&self, way: Way, rings: u32, chunk: usize, count: usize) -> Option<f64> {
        let (mut random, mut own) = (Random(chunk as u64), vec![7u8; chunk]);
        let places = (RING / chunk) as u32;
        let began = Instant::now();
        for _ in 0..count {
            let number = random.next();
            let at = (number >> 16) % rings;
            let position = (number & 0xffff) % places * chunk as u32;
            match way {
                Way::Read => ring(&self.service, at as usize * RING)?.copy_out(position, &mut own),
                Way::Write => ring(&self.guest, at as usize * RING)?.copy_in(position, &own),
            }
            black_box(&mut own);
        }
        Some(began.elapsed().as_nanos() as f64 / count as f64)
    }

    /// The same with slices of memory that nobody else has.
    fn plain(&mut self, way: Way, rings: u32, chunk: usize, count: usize) -> f64 {
        let (mut random, mut own) = (Random(chunk as u64), vec![7u8; chunk]);
        let places = (RING / chunk) as u32;
        let bytes = self.plain.bytes_mut();
        let began = Instant::now();
        for _ in 0..count {
            let number = random.next();
            let at = ((number >> 16) % rings) as usize * RING;
            let from = at + ((number & 0xffff) % places) as usize * chunk;
            let there = &mut bytes[from..from + chunk];
            match way {
                Way::Read => own.copy_from_slice(there),
                Way::Write => there.copy_from_slice(&own),
            }
            black_box(&mut own);
        }
        began.elapsed().as_nanos() as f64 / count as f64
    }
}

impl Case for Chunks {
    fn about(&self) -> &'static str {
        "chunks"
    }

    fn rows(&mut self) -> &mut [Row] {
        &mut self.rows
    }

    fn measure(&mut self, round: u32) -> Result<()> {
        let Some(memory) = &mut self.memory else { return Ok(()) };
        for (row, ((pool, _), (way, ..), (chunk, _))) in self.rows.iter_mut().zip(combinations()) {
            let rings = if pool == "ring" { 1 } else { (memory.pool / RING) as u32 };
            let count = (self.amount / chunk).max(4096);
            // What the cache can hold it holds when the clock starts.
            memory.plain(way, rings, chunk, count / 8);
            memory.ours(way, rings, chunk, count / 8);
            // Each comes second as often as the other.
            let even = round.is_multiple_of(2);
            for first in [even, !even] {
                if first {
                    row.plain.push(memory.plain(way, rings, chunk, count));
                } else {
                    row.ours
                        .push(memory.ours(way, rings, chunk, count).context("a ring out of the payload")?);
                }
            }
        }
        Ok(())
    }
}

/// The byte ring at byte `at` of the pool.
#[inline]
fn ring(region: &Region, at: usize) -> Option<netkernel_shm::Bytes<'_>> {
    region.bytes_at(region.layout().payload_offset + at as u64, RING as u32, 0)
}

fn pattern(n: usize) -> u8 {
    (n ^ n >> 8) as u8
}
