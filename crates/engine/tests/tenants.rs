//! Tenants against each other: what one of them tries, another does not notice.

mod common;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use common::{Guest, Socket, WATCHDOG, config, until};
use netkernel_abi::{Nqe, Op};
use netkernel_engine::{
    Engine, EngineConfig, EngineError, GuestFds, GuestSpec, Limits, Recognise, TenantConfig,
};

const GOOD: &str = "good-good-good-good-good-good-go";
const BAD: &str = "bad-bad-bad-bad-bad-bad-bad-bad-";

/// Two tenants on one switch thread, and nobody else.
fn engine(bad: TenantConfig) -> Arc<Engine> {
    let token = |token: &str| Recognise { token: Some(token.into()), ..Recognise::default() };
    let good = TenantConfig { recognise: token(GOOD), ..TenantConfig::new("good") };
    let tenants = vec![good, TenantConfig { recognise: token(BAD), ..bad }];
    Engine::start(EngineConfig { tenants, strict_tenants: true, ..config() }).unwrap()
}

fn create(engine: &Engine, token: &str, limits: Option<Limits>) -> Result<GuestFds, EngineError> {
    let tenant_token = Some(token.to_owned());
    engine.create_guest(GuestSpec { name: "test".into(), tenant_token, limits, ..GuestSpec::default() })
}

fn guest(engine: &Engine, token: &str) -> Guest {
    Guest::from_fds(create(engine, token, None).unwrap(), 0)
}

fn connected(guest: &Guest) -> (Socket, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = guest.connect(listener.local_addr().unwrap());
    let peer = listener.accept().unwrap().0;
    peer.set_read_timeout(Some(WATCHDOG)).unwrap();
    peer.set_write_timeout(Some(WATCHDOG)).unwrap();
    (socket, peer)
}

#[track_caller]
fn echoes(guest: &Guest, socket: &Socket, peer: &mut TcpStream) {
    let mut got = [0; 4];
    guest.send_all(socket.id, b"ping");
    peer.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"ping");
    peer.write_all(b"pong").unwrap();
    guest.recv_exact(socket.id, &mut got);
    assert_eq!(&got, b"pong");
}

fn named(engine: &Engine, name: &str) -> netkernel_engine::TenantStatus {
    engine.tenants().into_iter().find(|tenant| tenant.name == name).unwrap()
}

#[test]
fn tokens_of_others_and_tokens_that_are_nearly_right_open_nothing() {
    let engine = engine(TenantConfig::new("bad"));
    let good = guest(&engine, GOOD);
    let (socket, mut peer) = connected(&good);
    for bit in 0..128 {
        let mut token = good.token;
        token[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(engine.attach(&token), Err(EngineError::BadToken)), "bit {bit}");
    }
    assert!(matches!(engine.attach(&[0; 16]), Err(EngineError::BadToken)));
    for wrong in ["", "good", &GOOD[1..], &GOOD.to_uppercase(), "others"] {
        assert!(matches!(create(&engine, wrong, None), Err(EngineError::Refused(_))), "{wrong:?}");
    }
    let bad = guest(&engine, BAD);
    assert_ne!(bad.token, good.token);
    assert_eq!((named(&engine, "good").guests, named(&engine, "bad").guests), (1, 1));
    let (token, id) = (bad.token, bad.id);
    assert_eq!(engine.attach(&token).unwrap().id, id);
    drop(bad);
    until("the guest is over", || engine.guest_count() == 1);
    assert!(matches!(engine.attach(&token), Err(EngineError::BadToken)), "of a guest that is over");
    echoes(&good, &socket, &mut peer);
}

#[test]
fn ids_of_another_guests_sockets_mean_nothing_in_elements() {
    let engine = engine(TenantConfig::new("bad"));
    let good = guest(&engine, GOOD);
    let mut sockets: Vec<_> = (0..16).map(|_| connected(&good)).collect();
    let bad = guest(&engine, BAD);
    let (own, mut own_peer) = connected(&bad);
    for (socket, _) in &sockets {
        // Ids are numbers of each guest's own table; this one is in use in the other's.
        if socket.id == own.id {
            continue;
        }
        for op in [Op::LocalName, Op::Shutdown, Op::PeerName] {
            assert_eq!(bad.job(op, socket.id, 2, &[], 0).0, -libc::EBADF, "{op:?}");
        }
        for op in [Op::Send, Op::Credit] {
            bad.push(true, Nqe::new(op, 0, socket.id));
        }
    }
    echoes(&bad, &own, &mut own_peer);
    for (socket, peer) in &mut sockets {
        echoes(&good, socket, peer);
    }
    assert_eq!((engine.guest_count(), engine.status().counters.violations), (2, 0));
}

#[test]
fn regions_whose_sizes_overflow_are_refused_and_take_no_place() {
    let engine = engine(TenantConfig { guests: Some(1), ..TenantConfig::new("bad") });
    let good = guest(&engine, GOOD);
    let (socket, mut peer) = connected(&good);
    let sane = config().limits;
    for limits in [
        Limits { region_bytes: u64::MAX, ..sane },
        Limits { region_bytes: u64::MAX / 2 + 1, ..sane },
        Limits { region_bytes: 0, ..sane },
        Limits { sockets: u32::MAX, ..sane },
        Limits { sockets: 0, ..sane },
        Limits { queue_sets: u32::MAX, ..sane },
        Limits { queue_sets: 0, ..sane },
        Limits { region_bytes: u64::MAX, sockets: u32::MAX, queue_sets: u32::MAX },
    ] {
        assert!(create(&engine, BAD, Some(limits)).is_err(), "{limits:?}");
        assert_eq!(named(&engine, "bad").guests, 0, "{limits:?}");
    }
    echoes(&good, &socket, &mut peer);
    let one = create(&engine, BAD, None).unwrap();
    assert!(matches!(create(&engine, BAD, None), Err(EngineError::Refused(_))));
    drop(one);
    until("its place is free again", || named(&engine, "bad").guests == 0);
    create(&engine, BAD, None).unwrap();
}

/// Also when an assertion fails: the scope waits for the flood.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Both are on one switch thread; that the other one is served at all is the point, not how fast.
#[test]
fn a_flood_beyond_a_limit_waits_in_the_guests_own_rings() {
    const RATE: u64 = 1000;
    // What a bucket of operations holds, and what one turn may overdraw it by.
    const BURST: u64 = 256 + 512;
    let engine = engine(TenantConfig { operations: Some(RATE), ..TenantConfig::new("bad") });
    let begin = Instant::now();
    let good = guest(&engine, GOOD);
    let (socket, mut peer) = connected(&good);
    let bad = guest(&engine, BAD);
    let (own, mut own_peer) = connected(&bad);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let ring = bad.region.send(0).unwrap();
            while !stop.load(Relaxed) {
                let mut tail = ring.tail();
                let mut nqe = Nqe::new(Op::Credit, 0, own.id);
                nqe.status = bad.entry(own.id).generation.load(Relaxed) as i32;
                if !ring.push(&mut tail, nqe.to_words()).unwrap() {
                    std::thread::yield_now();
                }
                bad.region.header().active[0].fetch_or(1, std::sync::atomic::Ordering::SeqCst);
                bad.ring_doorbell();
            }
        });
        let _stop = Stop(&stop);
        until("the flood meets its limit", || named(&engine, "bad").operations >= BURST - 512);
        for _ in 0..100 {
            echoes(&good, &socket, &mut peer);
        }
        let passed = named(&engine, "bad").operations;
        let allowed = BURST + begin.elapsed().as_millis() as u64 * RATE / 1000;
        assert!(passed <= allowed, "{passed} operations, {allowed} allowed");
    });
    engine.change_tenant("bad", |tenant| tenant.operations = None).unwrap();
    echoes(&bad, &own, &mut own_peer);
    assert_eq!(engine.status().counters.violations, 0);
}

/// Bulk of many sockets beside one that asks for little, through one switch thread whose turns are limited: all arrives.
#[test]
fn nothing_is_lost_or_forgotten_when_turns_end_early() {
    const BYTES: usize = 4 << 20;
    let engine = engine(TenantConfig { weight: 100, ..TenantConfig::new("bad") });
    let good = guest(&engine, GOOD);
    let (socket, mut peer) = connected(&good);
    let bad = guest(&engine, BAD);
    let bulk: Vec<_> = (0..8).map(|_| connected(&bad)).collect();
    let received: Vec<_> = bulk
        .iter()
        .map(|(_, peer)| {
            let mut peer = peer.try_clone().unwrap();
            std::thread::spawn(move || {
                let mut got = vec![0; BYTES];
                peer.read_exact(&mut got).unwrap();
                let mut answer = got.clone();
                answer.reverse();
                peer.write_all(&answer).unwrap();
                got
            })
        })
        .collect();
    let data: Vec<u8> = (0..BYTES).map(|i| (i * 31 + i / 4096) as u8).collect();
    let mut sent = vec![0; bulk.len()];
    let mut back = vec![Vec::with_capacity(BYTES); bulk.len()];
    let mut rounds = 0;
    until("all bytes went there and back", || {
        for (i, (socket, _)) in bulk.iter().enumerate() {
            if sent[i] < BYTES {
                sent[i] += bad.try_send(socket.id, &data[sent[i]..]);
            }
            let mut some = [0; 65536];
            let n = bad.try_recv(socket.id, &mut some);
            back[i].extend_from_slice(&some[..n]);
        }
        rounds += 1;
        if rounds % 64 == 1 {
            echoes(&good, &socket, &mut peer);
        }
        back.iter().all(|back| back.len() >= BYTES)
    });
    let mut reversed = data.clone();
    reversed.reverse();
    assert!(back.iter().all(|back| *back == reversed));
    assert!(received.into_iter().all(|thread| thread.join().unwrap() == data));
}
