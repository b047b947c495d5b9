//! Queue elements: pushed, switched from one queue set to another, popped.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use netkernel_abi::layout::SEND_SLOTS;
use netkernel_abi::{Limits as RegionLimits, Nqe, Op};
use netkernel_ring::Corrupt;
use netkernel_ring::bell::must_ring;
use netkernel_ring::queue::Queue;
use netkernel_shm::{HugePages, Region};

use super::{Case, Limits, Row};
use crate::sys;

pub const BATCHES: [u32; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// Millions a second on one core, by batch: twice what is told of another system.
const TARGETS: [(u32, f64); 4] = [(1, 16.0), (4, 82.8), (8, 131.8), (256, 396.0)];
const SOCKETS: u32 = 1024;
/// The queue sets that elements come from and go to.
const FROM: u32 = 0;
const TO: u32 = 1;

/// Where elements of a socket go. Private memory: the guest cannot write it.
#[derive(Clone, Copy)]
struct Route {
    /// The queue set, and below it SOCKET_BITS of the socket.
    to: u32,
    generation: i32,
}

/// A region has at most 2^20 sockets, and 1024 queue sets.
const SOCKET_BITS: u32 = 20;

/// The switch: takes what queue set FROM has sent, finds for each element where it goes, and hands it on.
struct Switch<'a> {
    region: &'a Region,
    routes: &'a [Route],
    from: Queue<'a>,
    to: Queue<'a>,
    head: u32,
    tail: u32,
    pending: bool,
    /// Elements that no socket was found for.
    dropped: u64,
}

impl<'a> Switch<'a> {
    fn new(region: &'a Region, routes: &'a [Route]) -> Option<Switch<'a>> {
        let (from, to) = (region.send(FROM)?, region.send(TO)?);
        let (head, tail) = (from.head(), to.tail());
        Some(Switch { region, routes, from, to, head, tail, pending: false, dropped: 0 })
    }

    /// One turn: sees whether the guest is active, moves at most `most` elements, and rings if the other side sleeps.
    #[inline]
    fn turn(&mut self, most: u32) -> Result<u32, Corrupt> {
        let active = &self.region.header().active[0];
        if active.load(Relaxed) != 0 {
            self.pending |= active.swap(0, SeqCst) & 1 << FROM != 0;
        }
        if !self.pending {
            return Ok(0);
        }
        let (routes, dropped) = (self.routes, &mut self.dropped);
        let moved = self.from.transfer(&mut self.head, &self.to, &mut self.tail, most, |words| {
            let element = Nqe::from_words(words);
            let known = routes
                .get(element.socket as usize)
                .filter(|route| route.generation == element.status && Op::from_u8(element.op).is_some());
            let Some(route) = known else {
                *dropped += 1;
                return None;
            };
            let (queue_set, socket) = ((route.to >> SOCKET_BITS) as u16, route.to & ((1 << SOCKET_BITS) - 1));
            Some(Nqe { queue_set, socket, ..element }.to_words())
        })?;
        // Pending until nothing more is found.
        self.pending = moved > 0;
        if moved > 0
            && let Some(set) = self.region.queue_set(TO)
            && must_ring(&set.armed)
        {
            // Never armed here: what ringing costs stands among the doorbells.
            black_box(set);
        }
        Ok(moved)
    }
}

fn corrupt(_: Corrupt) -> anyhow::Error {
    anyhow!("positions of a ring are not what they must be")
}

fn region() -> Result<Region> {
    let limits = RegionLimits { region_bytes: 16 << 20, sockets: SOCKETS, queue_sets: 4 };
    Ok(Region::create(limits, 1, 0, HugePages::Off)?)
}

fn routes() -> Vec<Route> {
    let to = |socket: u32| TO << SOCKET_BITS | (SOCKETS - 1 - socket);
    (0..SOCKETS).map(|socket| Route { to: to(socket), generation: 3 }).collect()
}

fn element(n: u32) -> [u64; 4] {
    // Sockets in no order, as many connections would send.
    let socket = n.wrapping_mul(0x9e37_79b1) >> 22;
    Nqe { status: 3, position: n, ..Nqe::new(Op::Send, FROM as u16, socket) }.to_words()
}

/// All on one core.
pub struct Elements {
    region: Region,
    routes: Vec<Route>,
    rows: Vec<Row>,
    /// Ring fulls of one measurement.
    fills: u32,
}

impl Elements {
    pub fn new(quick: bool) -> Result<Elements> {
        let mut rows = vec![
            Row::new("nqe-push", "push an element", "ns", Limits::default()),
            Row::new("nqe-pop", "pop an element", "ns", Limits::default()),
            Row::new("nqe-push-256", "push an element, 256 at once", "ns", Limits::default()),
            Row::new("nqe-pop-256", "pop an element, 256 at once", "ns", Limits::default()),
        ];
        for batch in BATCHES {
            let target = TARGETS.iter().find(|target| target.0 == batch).map(|target| target.1);
            rows.push(Row::new(
                format!("switch-{batch}"),
                format!("switch, batches of {batch}"),
                "M/s",
                Limits { at_least: target, ..Limits::default() },
            ));
        }
        for batch in [1, 8, 256] {
            rows.push(Row::new(
                format!("way-{batch}"),
                format!("push, switch and pop on one core, batches of {batch}"),
                "M/s",
                Limits::default(),
            ));
        }
        Ok(Elements { region: region()?, routes: routes(), rows, fills: if quick { 500 } else { 2000 } })
    }

    /// Nanoseconds for each element: push and pop, one by one; push and pop, 256 at once.
    fn copies(&self) -> Option<Result<[f64; 4], Corrupt>> {
        let ring = self.region.send(FROM)?;
        let mut spent = [0u128; 4];
        let mut run = || {
            let (mut tail, mut head) = (ring.tail(), ring.head());
            for _ in 0..self.fills {
                let began = Instant::now();
                for n in 0..SEND_SLOTS {
                    ring.push(&mut tail, element(n))?;
                }
                spent[0] += began.elapsed().as_nanos();
                let began = Instant::now();
                while let Some(element) = ring.pop(&mut head)? {
                    black_box(element);
                }
                spent[1] += began.elapsed().as_nanos();
                let mut elements = (0..SEND_SLOTS).map(element);
                let began = Instant::now();
                ring.push_all(&mut tail, &mut elements.by_ref().take(256))?;
                ring.push_all(&mut tail, &mut elements)?;
                spent[2] += began.elapsed().as_nanos();
                let began = Instant::now();
                for _ in 0..SEND_SLOTS / 256 {
                    let mut batch = ring.batch(head, 256)?;
                    for element in batch.by_ref() {
                        black_box(element);
                    }
                    head = batch.finish();
                }
                spent[3] += began.elapsed().as_nanos();
            }
            Ok(())
        };
        let done: Result<(), Corrupt> = run();
        let each = |spent: u128| spent as f64 / f64::from(self.fills * SEND_SLOTS);
        Some(done.map(|()| spent.map(each)))
    }

    /// Millions of elements a second that the switch moves from a ring that is full to one that is empty.
    fn switched(&self, most: u32) -> Result<f64> {
        let mut switch = Switch::new(&self.region, &self.routes).context("there are no such queue sets")?;
        let (from, to) = (switch.from, switch.to);
        let (mut tail, mut head) = (from.tail(), to.head());
        let mut spent = Duration::ZERO;
        for _ in 0..self.fills {
            from.push_all(&mut tail, &mut (0..SEND_SLOTS).map(element)).map_err(corrupt)?;
            self.region.header().active[0].fetch_or(1 << FROM, SeqCst);
            let began = Instant::now();
            while switch.turn(most).map_err(corrupt)? > 0 {}
            spent += began.elapsed();
            let mut batch = to.batch(head, u32::MAX).map_err(corrupt)?;
            let mut arrived = 0;
            for words in batch.by_ref() {
                let want = SOCKETS - 1 - Nqe::from_words(element(arrived)).socket;
                ensure!(Nqe::from_words(words).socket == want, "an element went astray");
                arrived += 1;
            }
            ensure!(
                arrived == SEND_SLOTS && switch.dropped == 0,
                "{arrived} elements arrived of {SEND_SLOTS}"
            );
            head = batch.finish();
        }
        Ok(f64::from(self.fills * SEND_SLOTS) / spent.as_secs_f64() / 1e6)
    }

    /// The same with what the two ends do, all of it timed.
    fn whole_way(&self, most: u32) -> Result<f64> {
        let mut switch = Switch::new(&self.region, &self.routes).context("there are no such queue sets")?;
        let (from, to) = (switch.from, switch.to);
        let (mut tail, mut head) = (from.tail(), to.head());
        let turns = self.fills * SEND_SLOTS / most / 2;
        let began = Instant::now();
        for _ in 0..turns {
            from.push_all(&mut tail, &mut (0..most).map(element)).map_err(corrupt)?;
            self.region.header().active[0].fetch_or(1 << FROM, SeqCst);
            must_ring(&self.region.header().engine_waiting);
            while switch.turn(most).map_err(corrupt)? > 0 {}
            let mut batch = to.batch(head, most).map_err(corrupt)?;
            for element in batch.by_ref() {
                black_box(element);
            }
            head = batch.finish();
        }
        ensure!(head == to.tail(), "elements stayed behind");
        Ok(f64::from(turns * most) / began.elapsed().as_secs_f64() / 1e6)
    }
}

impl Case for Elements {
    fn about(&self) -> &'static str {
        "elements"
    }

    fn rows(&mut self) -> &mut [Row] {
        &mut self.rows
    }

    fn measure(&mut self, _round: u32) -> Result<()> {
        let mut values = self.copies().context("there is no such queue set")?.map_err(corrupt)?.to_vec();
        for batch in BATCHES {
            values.push(self.switched(batch)?);
        }
        for batch in [1, 8, 256] {
            values.push(self.whole_way(batch)?);
        }
        for (row, value) in self.rows.iter_mut().zip(values) {
            row.ours.push(value);
        }
        Ok(())
    }
}

/// The switch on this core, both ends on another.
pub struct Across {
    rows: Vec<Row>,
    core: usize,
    window: Duration,
}

const ACROSS: [u32; 3] = [1, 8, 256];

impl Across {
    pub fn new(core: usize, quick: bool) -> Result<Across> {
        let row = |batch: u32| {
            let title = format!("switch, guest and module on another core, batches of {batch}");
            Row::new(format!("across-{batch}"), title, "M/s", Limits::default())
        };
        let window = Duration::from_millis(if quick { 10 } else { 40 });
        Ok(Across { rows: ACROSS.map(row).into(), core, window })
    }

    fn rate(&self, most: u32) -> Result<f64> {
        let region = Arc::new(region()?);
        let stop = Arc::new(AtomicBool::new(false));
        let ends = both_ends(region.clone(), stop.clone(), self.core, most);
        let routes = routes();
        let mut switch = Switch::new(&region, &routes).context("there are no such queue sets")?;
        let began = Instant::now();
        let (mut moved, mut turns) = (0u64, 0u32);
        let outcome = loop {
            match switch.turn(most) {
                Ok(0) => std::hint::spin_loop(),
                Ok(n) => moved += u64::from(n),
                Err(error) => break Err(corrupt(error)),
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(256) && began.elapsed() > self.window {
                break Ok(moved as f64 / began.elapsed().as_secs_f64() / 1e6);
            }
        };
        stop.store(true, Relaxed);
        ends.join().map_err(|_| anyhow!("the other core's thread died"))??;
        outcome
    }
}

/// Pushes batches, and takes what was switched, until it is told to stop.
fn both_ends(region: Arc<Region>, stop: Arc<AtomicBool>, core: usize, most: u32) -> JoinHandle<Result<()>> {
    std::thread::spawn(move || {
        sys::stay_on(core)?;
        let (from, to) = region.send(FROM).zip(region.send(TO)).context("there are no such queue sets")?;
        let (mut tail, mut head, mut n) = (0, 0, 0);
        while !stop.load(Relaxed) {
            let mut elements = (n..n + most).map(element);
            n += from.push_all(&mut tail, &mut elements).map_err(corrupt)?;
            n %= 1 << 20;
            region.header().active[0].fetch_or(1 << FROM, SeqCst);
            must_ring(&region.header().engine_waiting);
            let mut batch = to.batch(head, u32::MAX).map_err(corrupt)?;
            for element in batch.by_ref() {
                black_box(element);
            }
            head = batch.finish();
        }
        Ok(())
    })
}

impl Case for Across {
    fn about(&self) -> &'static str {
        "across cores"
    }

    fn rows(&mut self) -> &mut [Row] {
        &mut self.rows
    }

    fn measure(&mut self, _round: u32) -> Result<()> {
        for (at, batch) in ACROSS.into_iter().enumerate() {
            let rate = self.rate(batch)?;
            self.rows[at].ours.push(rate);
        }
        Ok(())
    }
}
