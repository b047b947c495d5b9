//! A thousand tenants with a guest each, mostly idle: all of them work, and what the engine holds for each is bounded.

mod common;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use common::{Guest, Socket, open_descriptors, until};
use netkernel_engine::{
    Capacity, Engine, EngineConfig, GuestSpec, NsmConfig, Rates, Recognise, TenantConfig,
};

/// Beyond its region, in the engine and here. It is about 20 KiB; bounded is what must not grow with the number of guests.
const MOST_BYTES: u64 = 1 << 20;
/// Descriptors of one guest with a connection, of the engine, of the guest and of the peer, all in this process.
const DESCRIPTORS: u64 = 16;

fn name(i: usize) -> String {
    format!("tenant-{i}")
}

/// Anonymous memory of this process: regions are none of it.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// A thousand, or as many as this process may have descriptors for.
fn count() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit is valid for writes.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) }, 0);
    let count = usize::try_from(limit.rlim_max / DESCRIPTORS).unwrap().min(1000);
    println!("{count} guests: the limit of descriptors is {}", limit.rlim_max);
    count
}

/// A byte there and back.
fn exchange(guest: &Guest, socket: &Socket, peer: &mut TcpStream, byte: u8) {
    guest.send_all(socket.id, &[byte]);
    let mut back = [0];
    peer.read_exact(&mut back).unwrap();
    assert_eq!(back, [byte]);
    peer.write_all(&[!byte]).unwrap();
    guest.recv_exact(socket.id, &mut back);
    assert_eq!(back, [!byte]);
}

#[test]
fn a_thousand_tenants_with_a_guest_each_work_in_bounded_memory() {
    let count = count();
    let tenant = |i: usize| TenantConfig {
        recognise: Recognise { token: Some(format!("token-{i:032}")), ..Recognise::default() },
        send: Rates { guaranteed: 1_000_000, most: Some(1_000_000_000) },
        guaranteed_operations: 100,
        guaranteed_connections: 10,
        ..TenantConfig::new(&name(i))
    };
    let capacity =
        Capacity { rate: Some(1_250_000_000), operations: Some(1_000_000), connections: Some(20_000) };
    let config = EngineConfig {
        nsms: vec![NsmConfig { capacity, ..NsmConfig::kernel("kernel", None) }],
        tenants: (0..1000).map(tenant).collect(),
        strict_tenants: true,
        switch_threads: 2,
        ..EngineConfig::default()
    };
    let engine = Engine::start(config).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let mut guests = Vec::new();
    let connect = |i: usize| {
        let token = Some(format!("token-{i:032}"));
        let spec = GuestSpec { name: name(i), tenant_token: token, ..GuestSpec::default() };
        let guest = Guest::from_fds(engine.create_guest(spec).unwrap(), 0);
        let socket = guest.connect(at);
        let mut peer = listener.accept().unwrap().0;
        exchange(&guest, &socket, &mut peer, i as u8);
        (guest, socket, peer)
    };
    // The first ones make what all use.
    guests.extend((0..10).map(connect));
    let (before, descriptors, threads_before) = (memory(), open_descriptors(), threads());
    guests.extend((10..count).map(connect));
    let more = (count - 10) as u64;
    let each = memory().saturating_sub(before) / more;
    println!("{each} bytes beyond its region for each guest");
    assert!(each <= MOST_BYTES, "{each} bytes for each guest");
    let each = (open_descriptors() - descriptors) as u64 / more;
    assert!(each < DESCRIPTORS, "{each} descriptors for each guest");
    assert_eq!(threads(), threads_before, "a thread for each guest");

    // After they were idle all of them are served, in another order.
    for (i, (guest, socket, peer)) in guests.iter_mut().enumerate().rev() {
        exchange(guest, socket, peer, !i as u8);
    }
    let (status, totals) = engine.overview();
    assert_eq!((status.guests.len(), totals.len()), (count, count));
    for total in &totals {
        assert_eq!((total.guests, total.usage.connections), (1, 1), "{total:?}");
        assert_eq!((total.usage.bytes_in, total.usage.bytes_out), (2, 2), "{total:?}");
    }
    let tenants = engine.tenants();
    assert_eq!(tenants.len(), 1001);
    assert!(tenants.iter().take(count).all(|tenant| (tenant.guests, tenant.connections) == (1, 1)));
    // What is promised to each is kept while nobody wants more: a second must have been watched for that.
    until("a second was watched for each tenant", || engine.attainment().len() == count);
    assert!(engine.attainment().iter().all(|attained| attained.met == attained.seconds));

    let used: Vec<u32> = engine.usage().iter().map(|usage| usage.guest).collect();
    assert_eq!(used.len(), count);
    drop(guests);
    until("all guests are over", || engine.guest_count() == 0);
    engine.shutdown();
}
