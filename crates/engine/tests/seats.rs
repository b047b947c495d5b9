//! Guests that change their switch thread.

mod common;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::{Guest, WATCHDOG, config, pattern, until};
use netkernel_engine::{Engine, EngineConfig};

/// Set when this is dropped.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn two_threads() -> Arc<Engine> {
    Engine::start(EngineConfig { switch_threads: 2, ..config() }).unwrap()
}

fn timed(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(WATCHDOG)).unwrap();
    stream.set_write_timeout(Some(WATCHDOG)).unwrap();
    stream
}

/// Streams both ways, an idle connection, a listener, a datagram socket and the end of each, while the guest goes to and fro.
#[test]
fn a_guest_goes_to_and_fro_and_nothing_is_lost() {
    for kept in [None, Some(0)] {
        let config = EngineConfig { switch_threads: 2, placeholders_in_main_table: kept, ..config() };
        let engine = Engine::start(config).unwrap();
        let guest = Guest::new(&engine, "kernel");
        let beside = Guest::new(&engine, "kernel");
        let own = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = guest.connect(own.local_addr().unwrap());
        let peer = timed(own.accept().unwrap().0);
        let idle = guest.connect(own.local_addr().unwrap());
        let mut idle_peer = timed(own.accept().unwrap().0);
        let (listener, address) = guest.listen("127.0.0.1:0", 16);
        let stays = beside.connect(own.local_addr().unwrap());
        let mut stays_peer = timed(own.accept().unwrap().0);
        let (over, moves) = (AtomicBool::new(false), AtomicUsize::new(0));
        let data = pattern(8 << 20, 7);
        std::thread::scope(|scope| {
            // Also when something fails.
            let _over = Over(&over);
            let echo = scope.spawn(|| {
                let (mut peer, mut buffer) = (peer, vec![0; 64 << 10]);
                loop {
                    let n = peer.read(&mut buffer).unwrap();
                    if n == 0 {
                        return;
                    }
                    peer.write_all(&buffer[..n]).unwrap();
                }
            });
            let mover = scope.spawn(|| {
                let mut thread = 0;
                while !over.load(Relaxed) {
                    moves.fetch_add(usize::from(engine.seat_guest(1, thread).unwrap()), Relaxed);
                    thread = 1 - thread;
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let (mut sent, mut got) = (0, Vec::new());
            while got.len() < data.len() {
                sent += guest.try_send(stream.id, &data[sent..data.len().min(sent + 50_000)]);
                let mut some = vec![0; 64 << 10];
                let n = guest.try_recv(stream.id, &mut some);
                got.extend_from_slice(&some[..n]);
                assert_eq!(got[got.len() - n..], data[got.len() - n..got.len()], "at {}", got.len());
            }
            // What comes while it moves, too.
            let mut i = 0u8;
            let mut connections = 0;
            while connections < 50 || moves.load(Relaxed) < 200 {
                (i, connections) = (i.wrapping_add(1), connections + 1);
                let mut caller = timed(TcpStream::connect(address).unwrap());
                let accepted = guest.accept(listener.id);
                caller.write_all(&[i; 3]).unwrap();
                let mut three = [0; 3];
                guest.recv_exact(accepted.id, &mut three);
                assert_eq!(three, [i; 3]);
                drop(accepted);
                assert_eq!(caller.read(&mut three).unwrap(), 0, "its last descriptor was closed");
            }
            over.store(true, Relaxed);
            mover.join().unwrap();
            drop(stream);
            echo.join().unwrap();
        });
        idle_peer.write_all(b"idle").unwrap();
        let mut four = [0; 4];
        guest.recv_exact(idle.id, &mut four);
        assert_eq!(&four, b"idle");
        stays_peer.write_all(b"stay").unwrap();
        beside.recv_exact(stays.id, &mut four);
        assert_eq!(&four, b"stay");
        drop((idle, listener, guest));
        until("it is over", || engine.guest_count() == 1);
        assert_eq!(idle_peer.read(&mut four).unwrap(), 0, "nothing of it is left");
        assert_eq!(engine.status().counters.violations, 0);
    }
}

#[test]
fn what_cannot_move_stays_and_says_why() {
    let engine = two_threads();
    let guest = Guest::new(&engine, "kernel");
    let says = |id, thread| engine.seat_guest(id, thread).unwrap_err().to_string();
    assert!(says(7, 0).contains('7'));
    assert!(says(1, 2).contains("2 switch threads"));
    let there = engine.seat_guest(1, 0).unwrap() as usize + engine.seat_guest(1, 1).unwrap() as usize;
    assert_eq!(there, 1 + usize::from(engine.seat_guest(1, 0).unwrap() && there == 2), "there and back");
    drop(guest);
    until("it is over", || engine.guest_count() == 0);
}

/// This thread, and those that it starts, before all others of the machine, if that is allowed: how much of a core they get does not depend on
/// what else runs then.
fn before_others() {
    let first = libc::sched_param { sched_priority: 1 };
    // SAFETY: reads the value; refused without privileges.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &first) };
}

/// How long the switch threads had a core for themselves, which is what a guest needs to be seen growing.
struct Busy<'a> {
    engine: &'a Engine,
    since: Instant,
    cpu_ns: u64,
    busy: Duration,
}

impl Busy<'_> {
    fn of(engine: &Engine) -> Busy<'_> {
        let cpu_ns = engine.status().counters.switch_cpu_ns;
        Busy { engine, since: Instant::now(), cpu_ns, busy: Duration::ZERO }
    }

    fn look(&mut self) -> Duration {
        // Told by the threads every second.
        let elapsed = self.since.elapsed();
        if elapsed > Duration::from_secs(5) {
            let cpu_ns = self.engine.status().counters.switch_cpu_ns;
            let spent = Duration::from_nanos(cpu_ns - std::mem::replace(&mut self.cpu_ns, cpu_ns));
            self.busy +=
                if spent.as_secs_f64() > 0.9 * elapsed.as_secs_f64() { elapsed } else { Duration::ZERO };
            self.since = Instant::now();
        }
        self.busy
    }
}

/// Two guests keep their switch thread busy: one of them goes to the other thread; and comes back when there is little to do.
#[test]
fn packed_guests_are_spread_when_they_grow_and_packed_again() {
    before_others();
    let config = EngineConfig { switch_threads: 2, placement: netkernel_engine::Placement::Pack, ..config() };
    let engine = Engine::start(config).unwrap();
    // Nobody reads: what does not fit is dropped, and costs the switch thread a call all the same.
    let deaf = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = deaf.local_addr().unwrap();
    let guests = [Guest::new(&engine, "kernel"), Guest::new(&engine, "kernel")];
    let sockets = guests.each_ref().map(|guest| guest.socket(libc::SOCK_DGRAM));
    let are_on = |threads: [usize; 2]| {
        let mut on: Vec<_> = engine.status().guests.iter().map(|guest| guest.switch_thread).collect();
        on.sort_unstable();
        on == threads
    };
    let send = |count: usize| {
        for _ in 0..count {
            for (guest, socket) in guests.iter().zip(&sockets) {
                guest.send_to(socket.id, Some(to), &[7; 64]);
            }
        }
    };
    for guest in [1, 2] {
        engine.seat_guest(guest, 0).unwrap();
    }
    assert!(are_on([0, 0]));
    let (since, mut busy) = (Instant::now(), Busy::of(&engine));
    while !are_on([0, 1]) {
        assert!(busy.look() < WATCHDOG, "nobody moved: {:?}", engine.status().guests);
        assert!(since.elapsed() < 20 * WATCHDOG, "the machine is too busy to tell");
        send(10_000);
    }
    let since = Instant::now();
    while !are_on([0, 0]) {
        assert!(since.elapsed() < 2 * WATCHDOG, "nobody came back: {:?}", engine.status().guests);
        send(1);
        std::thread::sleep(Duration::from_millis(2));
    }
    for (guest, socket) in guests.iter().zip(&sockets) {
        assert_ne!(guest.local(socket.id).port(), 0, "it is served");
    }
}
