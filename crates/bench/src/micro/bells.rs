//! Doorbells: suppressed, rung for nobody, and rung for a sleeper on another core.

use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use netkernel_abi::Limits as RegionLimits;
use netkernel_ring::bell::must_ring;
use netkernel_shm::{HugePages, Region};

use super::{Case, Limits, Row};
use crate::report::{Outcome, Summary};
use crate::sys;

pub struct Bells {
    region: Region,
    bell: Arc<File>,
    rows: Vec<Row>,
    other_core: Option<usize>,
    count: u32,
}

/// How long a sleeper has slept before it is rung for.
const ASLEEP: Duration = Duration::from_micros(300);
const WATCHDOG: Duration = Duration::from_secs(10);

impl Bells {
    pub fn new(other_core: Option<usize>, quick: bool) -> Result<Bells> {
        let limits = RegionLimits { region_bytes: 16 << 20, sockets: 64, queue_sets: 4 };
        let row = |id, title| Row::new(id, title, "ns", Limits::default());
        let mut rows = vec![
            row("bell-suppressed", "doorbell, suppressed"),
            row("bell-rung", "doorbell, rung, nobody sleeps on it"),
            row("bell-wakes", "doorbell, rung, wakes a sleeper on another core"),
            row("bell-woken", "from ringing until the sleeper runs"),
        ];
        if other_core.is_none() {
            for row in &mut rows[2..] {
                row.outcome = Outcome::NotRun("not run: one core only".into());
            }
        }
        Ok(Bells {
            region: Region::create(limits, 1, 0, HugePages::Off)?,
            bell: Arc::new(sys::doorbell()?),
            rows,
            other_core,
            count: if quick { 20_000 } else { 100_000 },
        })
    }

    fn waiting(&self) -> &AtomicU32 {
        &self.region.header().engine_waiting
    }

    /// As GuestLib rings.
    #[inline]
    fn ring(&self) -> std::io::Result<()> {
        if must_ring(self.waiting()) { (&*self.bell).write_all(&1u64.to_ne_bytes()) } else { Ok(()) }
    }

    /// Nanoseconds of one call when nobody sleeps on it; `rung`: the word says that somebody does.
    fn alone(&self, rung: bool) -> Result<f64> {
        self.waiting().store(0, SeqCst);
        let began = Instant::now();
        for _ in 0..self.count {
            if rung {
                self.waiting().store(1, SeqCst);
            }
            self.ring()?;
            black_box(self);
        }
        let spent = began.elapsed();
        if rung {
            (&*self.bell).read_exact(&mut [0; 8])?;
        }
        Ok(spent.as_nanos() as f64 / f64::from(self.count))
    }

    /// Medians of a few dozen: what ringing costs, and how long the sleeper takes to run.
    fn wakes(&self, core: usize) -> Result<[f64; 2]> {
        const TIMES: usize = 40;
        let woken_ns = Arc::new(AtomicU64::new(0));
        let rounds = Arc::new(AtomicU32::new(0));
        let began = Instant::now();
        let sleeper = {
            let (bell, woken_ns, rounds) = (self.bell.clone(), woken_ns.clone(), rounds.clone());
            std::thread::spawn(move || -> Result<()> {
                sys::stay_on(core)?;
                for _ in 0..TIMES {
                    rounds.fetch_add(1, SeqCst);
                    (&*bell).read_exact(&mut [0; 8])?;
                    woken_ns.store(began.elapsed().as_nanos() as u64, SeqCst);
                }
                Ok(())
            })
        };
        let (mut ringing, mut waking) = (Vec::new(), Vec::new());
        for time in 1..=TIMES as u32 {
            let patience = Instant::now();
            while rounds.load(SeqCst) < time {
                if patience.elapsed() > WATCHDOG {
                    bail!("the sleeper does not run");
                }
                std::hint::spin_loop();
            }
            std::thread::sleep(ASLEEP);
            self.waiting().store(1, SeqCst);
            woken_ns.store(0, SeqCst);
            let from = began.elapsed();
            self.ring()?;
            ringing.push((began.elapsed() - from).as_nanos() as f64);
            let woken = loop {
                match woken_ns.load(SeqCst) {
                    0 if patience.elapsed() > WATCHDOG => bail!("the sleeper does not wake"),
                    0 => std::hint::spin_loop(),
                    woken => break woken,
                }
            };
            waking.push(woken as f64 - from.as_nanos() as f64);
        }
        sleeper.join().map_err(|_| anyhow!("the sleeper died"))??;
        let median = |values: &[f64]| Summary::of(values).map(|summary| summary.median);
        median(&ringing).zip(median(&waking)).map(|(a, b)| [a, b]).context("nothing was measured")
    }
}

impl Case for Bells {
    fn about(&self) -> &'static str {
        "doorbells"
    }

    fn rows(&mut self) -> &mut [Row] {
        &mut self.rows
    }

    fn measure(&mut self, _round: u32) -> Result<()> {
        let mut values = vec![self.alone(false)?, self.alone(true)?];
        if let Some(core) = self.other_core {
            values.extend(self.wakes(core)?);
        }
        for (row, value) in self.rows.iter_mut().zip(values) {
            row.ours.push(value);
        }
        Ok(())
    }
}
