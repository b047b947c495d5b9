//! Both sides of a queue as processes of their own over shared memory, one of which is killed at a random moment, again
//! and again. What must hold: a consumer sees only whole elements that were published, in order, each once; a producer
//! never overwrites what was not taken; whoever comes next goes on where the positions stand.
//!
//! `NETKERNEL_RING_SEED` repeats a run's random choices.
#![cfg(not(loom))]

use std::os::fd::AsRawFd as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

use netkernel_ring::queue::Queue;

const SLOTS: usize = 16;
const ROUNDS: u32 = 200;
const WATCHDOG: Duration = Duration::from_secs(30);
/// The environment of the processes that this test starts from its own program: `producer` or `consumer`.
const ROLE: &str = "NETKERNEL_RING_TEST_ROLE";

#[repr(C, align(64))]
struct Shared {
    head: AtomicU32,
    _line: [u32; 15],
    tail: AtomicU32,
    _line2: [u32; 15],
    slots: [[AtomicU64; 4]; SLOTS],
    /// What the consumer found wrong: 1 + the position, and the kind of fault.
    fault: AtomicU64,
    /// Elements that consumers took and checked; written before the position that says so is used any further.
    checked: AtomicU64,
    /// Not 0: the side that survives may end.
    stop: AtomicU32,
}

/// The element at position `n`. All words depend on it, so that a torn one shows.
fn element(n: u32) -> [u64; 4] {
    let n = n as u64;
    [n, !n, n.wrapping_mul(0x9e37_79b9_7f4a_7c15), n << 32 | 7]
}

fn map(file: &std::fs::File) -> &'static Shared {
    // SAFETY: a fresh mapping of a file that is large enough, never unmapped; zeroes are valid atomics.
    unsafe {
        let len = size_of::<Shared>();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED);
        &*at.cast::<Shared>()
    }
}

#[test]
#[ignore = "what the processes of the other test run"]
fn role() {
    let role = std::env::var(ROLE).unwrap();
    // SAFETY: no memory is involved; whatever ends the test ends this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let shared = map(&std::fs::File::options().read(true).write(true).open("/proc/self/fd/0").unwrap());
    let queue = Queue::new(&shared.head, &shared.tail, &shared.slots);
    match &*role {
        "producer" => {
            // As after a restart: the position is where the memory says.
            let mut tail = queue.tail();
            loop {
                // Single elements and batches by turns.
                let next = element(tail);
                let pushed = match tail % 64 {
                    0..32 => u32::from(queue.push(&mut tail, next).unwrap()),
                    _ => {
                        let from = tail;
                        let mut some = (0..7).map(|n| element(from.wrapping_add(n)));
                        queue.push_all(&mut tail, &mut some).unwrap()
                    }
                };
                if pushed == 0 {
                    std::thread::yield_now();
                }
            }
        }
        "consumer" => {
            let mut head = queue.head();
            while shared.stop.load(Relaxed) == 0 {
                let at = head;
                if at % 128 >= 64 {
                    let Ok(mut batch) = queue.batch(head, 5) else {
                        return shared.fault.store(u64::from(at) << 8 | 3, Release);
                    };
                    for (n, got) in (0u32..).zip(batch.by_ref()) {
                        if got != element(at.wrapping_add(n)) {
                            return shared.fault.store(u64::from(at) << 8 | 4, Release);
                        }
                    }
                    head = batch.finish();
                    shared.checked.fetch_add(u64::from(head.wrapping_sub(at)), Relaxed);
                    if head == at {
                        std::thread::yield_now();
                    }
                    continue;
                }
                match queue.pop(&mut head) {
                    Ok(None) => std::thread::yield_now(),
                    Ok(Some(got)) if got == element(at) => _ = shared.checked.fetch_add(1, Relaxed),
                    Ok(Some(_)) => return shared.fault.store(u64::from(at) << 8 | 1, Release),
                    Err(_) => return shared.fault.store(u64::from(at) << 8 | 2, Release),
                }
            }
        }
        other => panic!("{other}"),
    }
}

struct Process(Child);

impl Process {
    fn start(role: &str, file: &std::fs::File) -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "role", "--ignored"]).env(ROLE, role);
        command.stdin(file.try_clone().unwrap()).stdout(Stdio::null());
        Process(command.spawn().unwrap())
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + WATCHDOG;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn the_survivor_of_a_kill_goes_on() {
    let mut seed = std::env::var("NETKERNEL_RING_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1);
    println!("NETKERNEL_RING_SEED={seed}");
    let mut random = move |n: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % n
    };
    // SAFETY: a valid C string; the result is checked and owned by nobody else.
    let file: std::fs::File = unsafe {
        use std::os::fd::FromRawFd as _;
        let fd = libc::memfd_create(c"ring".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        std::fs::File::from_raw_fd(fd)
    };
    file.set_len(size_of::<Shared>() as u64).unwrap();
    let shared = map(&file);
    // Positions wrap around in the middle of it.
    let start = 0u32.wrapping_sub(5000);
    shared.head.store(start, Relaxed);
    shared.tail.store(start, Relaxed);
    let positions = || {
        let tail = shared.tail.load(Acquire);
        (shared.head.load(Acquire), tail)
    };
    let sound = || {
        let fault = shared.fault.load(Acquire);
        assert_eq!(fault & 0xff, 0, "fault {} at position {}", fault & 0xff, fault >> 8);
    };

    let mut producer = Process::start("producer", &file);
    let mut consumer = Process::start("consumer", &file);
    for round in 0..ROUNDS {
        let before = positions();
        // Both are at work.
        until("elements flow", || {
            sound();
            positions().0.wrapping_sub(before.0) > 2 * SLOTS as u32
        });
        std::thread::sleep(Duration::from_micros(random(1500)));
        let (dead, role) = match random(2) {
            0 => (&mut producer, "producer"),
            _ => (&mut consumer, "consumer"),
        };
        dead.kill();
        let frozen = positions();
        if role == "producer" {
            // All that was published is taken, and nothing beyond.
            until("the ring is drained", || {
                sound();
                positions().0 == frozen.1
            });
            assert_eq!(positions().1, frozen.1, "round {round}");
            assert!(consumer.runs(), "round {round}");
        } else {
            until("the ring is full", || positions().1.wrapping_sub(frozen.0) == SLOTS as u32);
            // The producer waits; what was not taken stands there whole.
            for n in 0..SLOTS as u32 {
                let at = frozen.0.wrapping_add(n);
                let words = &shared.slots[at as usize % SLOTS];
                let got = [0, 1, 2, 3].map(|i| words[i].load(Relaxed));
                assert_eq!(got, element(at), "round {round}, position {at}");
            }
            assert_eq!(positions(), (frozen.0, frozen.0.wrapping_add(SLOTS as u32)), "round {round}");
            assert!(producer.runs(), "round {round}");
        }
        let next = Process::start(role, &file);
        *(if role == "producer" { &mut producer } else { &mut consumer }) = next;
    }
    producer.kill();
    until("the ring is drained", || {
        let (head, tail) = positions();
        head == tail
    });
    shared.stop.store(1, Release);
    assert!(consumer.0.wait().unwrap().success());
    sound();
    // A consumer may die between taking elements and counting them: one batch for each that was killed, at most.
    let (published, checked) = (positions().1.wrapping_sub(start) as u64, shared.checked.load(Relaxed));
    println!("{published} elements, {checked} checked");
    assert!(checked <= published && published - checked <= 5 * ROUNDS as u64, "{published} {checked}");
}
