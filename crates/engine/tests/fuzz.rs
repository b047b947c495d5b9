//! Hostile guests: random bytes over the region, random elements and messages, while a good guest works on.
//!
//! `NETKERNEL_FUZZ_SEED` repeats a run, `NETKERNEL_FUZZ_SECONDS` makes it longer.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use common::{Guest, Random, WATCHDOG, engine, open_descriptors, until};
use netkernel_abi::control::Message;
use netkernel_abi::{Nqe, Op};

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// The word at `offset` of the region, as a guest may write it.
fn word(guest: &Guest, offset: u64) -> &AtomicU64 {
    let base = (&raw const *guest.region.header()).cast::<u8>();
    assert!(offset.is_multiple_of(8) && offset + 8 <= guest.region.bytes());
    // SAFETY: the offset was just checked against the mapping, which lives as long as the guest; atomics may be shared.
    unsafe { &*base.add(offset as usize).cast::<AtomicU64>() }
}

fn interesting(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => 0,
        1 => u64::MAX,
        2 => random.below(64),
        3 => random.below(1 << 16),
        4 => 1 << random.below(64),
        5 => random.below(1 << 32) << 32 | 1,
        _ => random.next(),
    }
}

/// One act of vandalism.
fn vandalise(guest: &Guest, random: &mut Random, ends: &mut Vec<OwnedFd>) {
    let layout = *guest.region.layout();
    match random.below(16) {
        // Anywhere in the header but for its constants.
        0 => word(guest, 64 + 8 * random.below((4096 - 64) / 8)).store(interesting(random), Relaxed),
        // A socket entry of those that are likely to be in use.
        1..=6 => {
            let id = if random.below(2) == 0 {
                1 + random.below(12)
            } else {
                layout.guest_sockets as u64 + random.below(12)
            };
            word(guest, layout.sockets_offset + id * 256 + 8 * random.below(32))
                .store(interesting(random), Relaxed);
        }
        // A queue set: positions and slots.
        7 => {
            let q = random.below(4);
            let at = layout.queue_sets_offset + q * 65536 + 8 * random.below(65536 / 8);
            word(guest, at).store(interesting(random), Relaxed);
        }
        8 => word(guest, layout.queue_sets_offset + 8 * random.below(24)).store(interesting(random), Relaxed),
        // Payload, where datagram headers and accept records stand.
        9 => {
            let at = layout.payload_offset + 8 * random.below(1 << 18);
            word(guest, at).store(interesting(random), Relaxed);
        }
        // Messages.
        10 => {
            let (ours, theirs) = common::pair();
            let message = Message {
                kind: random.below(6) as u32,
                a: random.below(40) as u32,
                b: 2 + 8 * random.below(2) as u32,
                c: 1 + random.below(2) as u32,
                d: 0,
                ..Message::default()
            };
            let flags = libc::MSG_DONTWAIT;
            use std::os::fd::AsRawFd;
            let _ = netkernel_shm::fds::send(
                guest.channel.as_raw_fd(),
                &message.to_bytes(),
                &[theirs.as_raw_fd()],
                flags,
            );
            ends.push(ours);
            if ends.len() > 40 {
                ends.swap_remove(random.below(40) as usize);
            }
        }
        // Elements, well-formed ones too.
        _ => {
            let ops = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 32, 33];
            let op = ops[random.below(ops.len() as u64) as usize];
            let Some(op) = Op::from_u8(op) else { return };
            let mut nqe = Nqe::new(op, 0, 1 + random.below(12) as u32);
            nqe.flags = random.below(8) as u8;
            nqe.size = random.below(64) as u32;
            nqe.op_data = if random.below(2) == 0 { random.below(4) } else { interesting(random) };
            nqe.position = interesting(random) as u32;
            if let Some(entry) = guest.region.socket(nqe.socket) {
                nqe.status = entry.generation.load(Relaxed) as i32;
            }
            nqe.status = random.below(3) as i32;
            let send = random.below(2) == 0;
            let ring = if send { guest.region.send(0) } else { guest.region.job(0) }.unwrap();
            let mut tail = ring.tail();
            let _ = ring.push(&mut tail, nqe.to_words());
            guest.region.header().active[0].fetch_or(1, SeqCst);
        }
    }
    guest.ring_doorbell();
}

#[test]
fn vandals_lose_their_own_sockets_and_nobody_elses() {
    let _ = env_logger();
    let seed =
        variable("NETKERNEL_FUZZ_SEED", std::time::UNIX_EPOCH.elapsed().map_or(1, |t| t.as_nanos() as u64));
    let seconds = variable("NETKERNEL_FUZZ_SECONDS", 4);
    println!("NETKERNEL_FUZZ_SEED={seed}");
    let engine = engine();
    let echo = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = echo.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in echo.incoming() {
            let Ok(mut stream) = stream else { continue };
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    // The stacks of both modules exist from now on.
    drop((Guest::new(&engine, "kernel"), Guest::new(&engine, "cubic")));
    assert!(engine.wait_idle_timeout(WATCHDOG));
    let before = open_descriptors();
    let end = Instant::now() + Duration::from_secs(seconds);
    let stop = AtomicBool::new(false);
    let (mut victims, mut acts) = (0u64, 0u64);
    let (slowest, rounds) = std::thread::scope(|scope| {
        let good = scope.spawn(|| {
            let guest = Guest::new(&engine, "kernel");
            let socket = guest.connect(to);
            let (mut slowest, mut rounds) = (Duration::ZERO, 0u64);
            while !stop.load(Relaxed) {
                let data = common::pattern(600, rounds + 1);
                let begin = Instant::now();
                guest.send_all(socket.id, &data);
                let mut got = vec![0; data.len()];
                guest.recv_exact(socket.id, &mut got);
                assert!(got == data);
                slowest = slowest.max(begin.elapsed());
                rounds += 1;
            }
            (slowest, rounds)
        });
        let mut random = Random(seed | 1);
        while Instant::now() < end {
            victims += 1;
            let guest = Guest::new(&engine, "cubic");
            let (listener, address) = guest.listen("127.0.0.1:0", 16);
            let clients: Vec<_> = (0..4).filter_map(|_| TcpStream::connect(address).ok()).collect();
            let accepted = guest.accept(listener.id);
            let connected = [guest.connect(to), guest.connect(to)];
            let udp = guest.socket(libc::SOCK_DGRAM);
            let native = UdpSocket::bind("127.0.0.1:0").unwrap();
            guest.send_to(udp.id, native.local_addr().ok(), b"x");
            let mut ends = Vec::new();
            for _ in 0..1 + random.below(3000) {
                vandalise(&guest, &mut random, &mut ends);
                acts += 1;
                if guest.region.header().engine_gone.load(Relaxed) == 1 {
                    break;
                }
            }
            drop((listener, accepted, connected, clients, udp));
        }
        stop.store(true, Relaxed);
        good.join().unwrap()
    });
    let violations = engine.status().counters.violations;
    println!(
        "{victims} vandals, {acts} acts, {violations} ended; good guest: {rounds} echoes, slowest {slowest:?}"
    );
    assert!(rounds > 10);
    // Their lingering sockets may be flushing to peers that read; in the end everything is gone.
    until("all guests are over", || engine.guest_count() == 0);
    until("descriptors are back", || open_descriptors() <= before);
}

fn env_logger() -> Result<(), log::SetLoggerError> {
    struct Stderr;
    impl log::Log for Stderr {
        fn enabled(&self, _: &log::Metadata) -> bool {
            true
        }
        fn log(&self, record: &log::Record) {
            if std::env::var_os("NETKERNEL_FUZZ_LOG").is_some() {
                eprintln!("{}", record.args());
            }
        }
        fn flush(&self) {}
    }
    log::set_logger(&Stderr).map(|()| log::set_max_level(log::LevelFilter::Warn))
}
