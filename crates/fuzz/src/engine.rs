//! The engine's side: ServiceLib over a region that the input writes to at will.

use std::os::fd::{BorrowedFd, IntoRawFd as _};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};

use netkernel_abi::nqe::flag;
use netkernel_abi::{Limits, Nqe, Op};
use netkernel_service::{Host, Readiness, Service, Stack as _, Violation, key};
use netkernel_shm::{HugePages, Journal, Region};

use crate::input::Input;
use crate::stack::Scripted;

const GUEST: u32 = 3;
const SOCKETS: u32 = 32;
const QUEUE_SETS: u32 = 2;
/// Turns after the input's last act.
const LAST_TURNS: usize = 8;

/// What became of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It went on to the end.
    Served,
    /// It broke the protocol and was ended.
    Ended,
}

#[derive(Default)]
struct Wakes {
    sockets: Vec<(u32, u32)>,
    rings: Vec<u32>,
}

impl Host for Wakes {
    fn wake(&mut self, socket: u32, count: u32) {
        self.sockets.push((socket, count));
    }

    fn ring(&mut self, queue_set: u32) {
        self.rings.push(queue_set);
    }
}

/// Acts of a guest, of its peers and of time, in any order: elements, messages, words anywhere in the region, reports of the
/// stack, closes, sweeps. In the end the guest is ended. Panics if ServiceLib forgot or invented a socket of the stack, woke
/// what does not exist, or asked a stack for what its trait forbids.
pub fn engine(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let script: [u8; 64] = input.take();
    let limits = Limits { region_bytes: 8 << 20, sockets: SOCKETS, queue_sets: QUEUE_SETS };
    let Ok(region) = Region::create(limits, GUEST, 0, HugePages::Off) else { return Verdict::Served };
    // SAFETY: the region owns its descriptor and lives during this statement.
    let fd = unsafe { BorrowedFd::borrow_raw(region.fd()) }.try_clone_to_owned();
    let Some(guest) = fd.ok().and_then(|fd| Region::attach(fd).ok()) else { return Verdict::Served };
    let mut rig = Rig {
        service: Service::new(region, GUEST, input.u8() & 1 == 1),
        guest,
        stack: Scripted::new(&script),
        wakes: Wakes::default(),
    };
    let mut outcome = Ok(());
    while !input.is_empty() && outcome.is_ok() {
        outcome = rig.act(&mut input);
    }
    for _ in 0..LAST_TURNS {
        outcome = outcome.and_then(|()| rig.turn());
    }
    if outcome.is_ok() {
        outcome = rig.service.close_all(&mut rig.stack);
    }
    rig.service.end(&mut rig.stack);
    assert_eq!(rig.stack.open_sockets(), 0, "the stack's sockets outlive the guest");
    assert!(rig.wakes.sockets.iter().all(|&(id, count)| id > 0 && id < SOCKETS && count > 0));
    assert!(rig.wakes.rings.iter().all(|&q| q < QUEUE_SETS));
    if outcome.is_ok() { Verdict::Served } else { Verdict::Ended }
}

/// What a process of an NSM left of a guest, spoiled anywhere, and gone on with by another process: as when a guest is moved out of a
/// process that was taken over. Panics are not excused by it.
pub fn journal(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let script: [u8; 64] = input.take();
    let limits = Limits { region_bytes: 8 << 20, sockets: SOCKETS, queue_sets: QUEUE_SETS };
    let bytes = Service::journal_bytes(limits);
    let Ok(region) = Region::create(limits, GUEST, 0, HugePages::Off) else { return Verdict::Served };
    // SAFETY: the region owns its descriptor and lives during this statement.
    let fd = unsafe { BorrowedFd::borrow_raw(region.fd()) };
    let copies = (fd.try_clone_to_owned(), fd.try_clone_to_owned());
    let (Ok(first), Ok(second)) = copies else { return Verdict::Served };
    let (Ok(guest), Ok(again)) = (Region::attach(first), Region::open(second, limits)) else {
        return Verdict::Served;
    };
    let Ok(journal) = Journal::create(c"netkernel-fuzz", bytes) else { return Verdict::Served };
    let journal = Arc::new(journal);
    let mut service = Service::new(region, GUEST, true);
    if service.keep_in(&journal).is_none() {
        return Verdict::Served;
    }
    let mut rig = Rig { service, guest, stack: Scripted::new(&script), wakes: Wakes::default() };
    for _ in 0..input.below(64) {
        if rig.act(&mut input).is_err() {
            break;
        }
    }
    // Its process is gone.
    rig.service.depart(&mut rig.stack);
    for _ in 0..input.below(32) {
        let (at, value) = (input.below(bytes as u32 / 4) as usize * 4, input.u32());
        if let Some(place) = journal.array::<u32>(at, 1) {
            // SAFETY: inside the journal, as `array` checked; nobody else uses it meanwhile.
            unsafe { place.write(value) };
        }
    }
    let any = |_| Some(std::fs::File::open("/dev/null").ok()?.into_raw_fd());
    if !Service::journal_is_sound(&journal, limits) || !Service::renumber_journal(&journal, limits, &any) {
        return Verdict::Ended;
    }
    let _ = Service::journal_sockets(&journal, limits);
    let (mut stack, unlimited) = (Scripted::after_spoiling(&script), netkernel_service::Limits::default());
    let recovered =
        Service::recover(again, GUEST, true, &journal, &mut stack, &|id| id & 1 == 0, true, unlimited);
    let Ok(service) = recovered else { return Verdict::Ended };
    rig = Rig { service, stack, ..rig };
    let mut outcome = Ok(());
    while !input.is_empty() && outcome.is_ok() {
        outcome = rig.act(&mut input);
    }
    for _ in 0..LAST_TURNS {
        outcome = outcome.and_then(|()| rig.turn());
    }
    rig.service.end(&mut rig.stack);
    if outcome.is_ok() { Verdict::Served } else { Verdict::Ended }
}

struct Rig {
    service: Service,
    guest: Region,
    stack: Scripted,
    wakes: Wakes,
}

impl Rig {
    fn act(&mut self, input: &mut Input) -> Result<(), Violation> {
        match input.below(16) {
            0 | 1 => self.message(input),
            2..=5 => {
                self.element(input);
                self.turn()
            }
            6 => {
                self.element(input);
                Ok(())
            }
            7 => self.turn(),
            8 | 9 => {
                self.write(input);
                Ok(())
            }
            10 => {
                let (id, bits) = (input.below(SOCKETS), input.u8());
                let readiness = [
                    Readiness::READ,
                    Readiness::WRITE,
                    Readiness::END | Readiness::READ,
                    Readiness::ERROR,
                    Readiness::URGENT,
                ];
                let readiness = readiness[usize::from(bits) % readiness.len()];
                self.service.ready(&mut self.stack, id, readiness)
            }
            11 => self.service.close(&mut self.stack, input.below(SOCKETS)),
            12 => self.service.sweep(&mut self.stack),
            13 => {
                self.service.retry();
                Ok(())
            }
            14 => self.service.end_process(&mut self.stack, u32::from(input.u8() & 3)),
            _ => {
                // An honest step of the data path: bytes written, or read, and the engine told.
                let id = input.below(SOCKETS);
                let Some(entry) = self.guest.socket(id) else { return Ok(()) };
                let by = input.below(1 << 12);
                let (position, op) = if input.u8() & 1 == 1 {
                    (&entry.tx_tail, Op::Send)
                } else {
                    (&entry.rx_head, Op::Credit)
                };
                position.fetch_add(by, SeqCst);
                self.push(true, 0, Nqe::new(op, 0, id));
                self.turn()
            }
        }
    }

    fn message(&mut self, input: &mut Input) -> Result<(), Violation> {
        match input.below(4) {
            0 => self.service.doorbell(input.below(QUEUE_SETS + 1)),
            1 => {
                let id = input.below(SOCKETS);
                let generation = self.guest.socket(id).map_or(0, |e| e.generation.load(Acquire));
                self.service.adopted(id, generation.wrapping_add(u32::from(input.u8() & 1)));
                Ok(())
            }
            2 if input.u8() & 7 == 0 => self.service.refuse(&mut self.stack, input.below(SOCKETS)),
            _ => {
                let id = input.below(SOCKETS / 2 + 2);
                let domain = if input.u8() & 1 == 1 { 10 } else { 2 };
                let kind = 1 + u32::from(input.u8() & 1);
                self.service.open(&mut self.stack, id, domain, kind, 0)
            }
        }
    }

    fn element(&mut self, input: &mut Input) {
        let (send, q) = (input.u8() & 3 == 0, input.below(QUEUE_SETS));
        if input.u8() & 7 == 0 {
            // Any bytes.
            let words = [input.u64(), input.u64(), input.u64(), input.u64()];
            return self.push_words(send, q, words);
        }
        // Operations 0..40 are more than there are.
        let mut words = Nqe::new(Op::Send, q as u16, input.below(SOCKETS)).to_words();
        words[0] = words[0] & !0xff | u64::from(input.below(40));
        let mut nqe = Nqe::from_words(words);
        nqe.flags = if input.u8() & 3 == 0 { input.u8() } else { flag::SYNC };
        nqe.op_data = if input.u8() & 1 == 0 { u64::from(input.u8()) } else { input.u64() };
        nqe.size = if input.u8() & 3 == 0 { input.u32() } else { u32::from(input.u8() & 63) };
        nqe.position = input.u32();
        if input.u8() & 1 == 1 {
            let argument: [u8; 32] = input.take();
            self.guest.write_argument(q, &argument);
        }
        self.push(send, q, nqe);
    }

    fn push(&mut self, send: bool, q: u32, mut nqe: Nqe) {
        nqe.status = self.guest.socket(nqe.socket).map_or(0, |e| e.generation.load(Acquire)) as i32;
        self.push_words(send, q, nqe.to_words());
    }

    fn push_words(&mut self, send: bool, q: u32, words: [u64; 4]) {
        let Some(ring) = (if send { self.guest.send(q) } else { self.guest.job(q) }) else { return };
        let mut tail = ring.tail();
        let _ = ring.push(&mut tail, words);
        self.guest.header().active[q as usize / 64].fetch_or(1 << (q % 64), SeqCst);
    }

    /// A word anywhere in the region, most often where it matters.
    fn write(&mut self, input: &mut Input) {
        let layout = *self.guest.layout();
        let (start, bytes) = match input.below(4) {
            0 => (64, 4096 - 64),
            1 | 2 => (layout.sockets_offset, u64::from(SOCKETS) * 256),
            _ => (layout.queue_sets_offset, layout.limits.region_bytes - layout.queue_sets_offset),
        };
        let at = start + u64::from(input.u32()) % bytes / 8 * 8;
        let value = if input.u8() & 1 == 0 { u64::from(input.u8()) } else { input.u64() };
        let base = std::ptr::from_ref(self.guest.header()).cast::<u8>();
        // SAFETY: `at` is 8 byte aligned and inside the mapping, which the region keeps; atomics may be shared.
        unsafe { &*base.add(at as usize).cast::<AtomicU64>() }.store(value, Relaxed);
    }

    /// A turn of the switch thread.
    fn turn(&mut self) -> Result<(), Violation> {
        let mut ready = Vec::new();
        self.stack.poll(&mut ready, 64);
        for report in &ready {
            assert_eq!(report.key, key(GUEST, report.key as u32), "the key of another guest");
            self.service.ready(&mut self.stack, report.key as u32, report.readiness)?;
        }
        self.service.drain(&mut self.stack, 256)?;
        self.service.run(&mut self.stack, 16)?;
        self.service.flush(&mut self.wakes);
        self.service.take_released();
        Ok(())
    }
}
