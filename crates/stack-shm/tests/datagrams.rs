//! Datagrams between guests that are joined in memory: which way they go and why, their order, and what waits.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::channel;

use netkernel_service::{Close, Datagram, Errno, GuestBytes, Handle, Readiness, Segments, Stack};
use netkernel_stack_kernel::{KernelConfig, KernelStack};
use netkernel_stack_shm::{Allowed, Hub, Network, Settings, ShmStack};
use netkernel_stack_suite::{Rig, Subject};

fn rig_of(hub: &Arc<Hub>, owner: u32, settings: Settings) -> Rig {
    let kernel = Box::new(KernelStack::new(KernelConfig::default()).unwrap());
    let mut stack = ShmStack::new(kernel, Arc::clone(hub), settings).unwrap();
    stack.guest(0, owner);
    Rig::new(Subject { stack: Box::new(stack), v4: [127, 0, 0, 1].into(), v6: None })
}

fn rig() -> Rig {
    rig_of(&Arc::default(), 1, Settings::default())
}

/// What was sent, received and dropped in memory.
#[track_caller]
fn counts(rig: &mut Rig, socket: Handle) -> [u64; 3] {
    let way = rig.stack.way(socket).unwrap();
    let inner = way.split_once('(').unwrap_or_else(|| panic!("{way}")).1;
    let mut numbers = inner.split(", ").map(|part| part.split(' ').next().unwrap().parse().unwrap());
    [(); 3].map(|()| numbers.next().unwrap())
}

fn bound(rig: &mut Rig) -> (Handle, SocketAddr) {
    let socket = rig.datagram();
    rig.bind(socket, rig.v4).unwrap();
    (socket, rig.local(socket))
}

/// Everything that waits, without waiting for more.
fn drain(rig: &mut Rig, socket: Handle) -> Vec<Vec<u8>> {
    (0..32).for_each(|_| rig.turn());
    let mut got = Vec::new();
    while rig.stack.recv_datagrams(socket, 16, &mut |data, _, _| got.push(data.to_vec())).is_ok() {}
    got
}

fn control(level: i32, name: i32, value: i32) -> [u8; 24] {
    let mut message = [0; 24];
    for (at, word) in [(0, 20), (8, level), (12, name), (16, value)] {
        message[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    message
}

fn send_with_control(rig: &mut Rig, socket: Handle, data: &[u8], to: SocketAddr) {
    let mut copy = data.to_vec();
    // SAFETY: the copy lives longer than the call.
    let first = unsafe { GuestBytes::new(copy.as_mut_ptr(), copy.len()) };
    let data = Segments { first, second: GuestBytes::EMPTY };
    let control = control(libc::IPPROTO_IP, libc::IP_TTL, 9);
    let datagram = Datagram { data, to: to.into(), control: &control };
    assert_eq!(rig.stack.send_datagrams(socket, &[datagram]), Ok(1));
}

#[test]
fn guests_are_joined_and_natives_are_served_by_the_same_socket() {
    let mut rig = rig();
    let (server, at_server) = bound(&mut rig);
    let client = rig.datagram();
    rig.send_to(client, b"by memory", Some(at_server)).unwrap();
    let native = UdpSocket::bind("127.0.0.1:0").unwrap();
    native.send_to(b"by the kernel", at_server).unwrap();
    let mut got = [rig.recv_from(server).unwrap(), rig.recv_from(server).unwrap()];
    got.sort();
    let from = SocketAddr::new([127, 0, 0, 1].into(), rig.local(client).port());
    assert_eq!(
        got,
        [(b"by memory".to_vec(), from), (b"by the kernel".to_vec(), native.local_addr().unwrap())]
    );
    // Both are answered, each by its way.
    rig.send_to(server, b"one", Some(from)).unwrap();
    rig.send_to(server, b"two", Some(native.local_addr().unwrap())).unwrap();
    assert_eq!(rig.recv_from(client).unwrap(), (b"one".to_vec(), at_server));
    let mut into = [0; 9];
    assert_eq!(native.recv_from(&mut into).unwrap(), (3, at_server));
    assert_eq!(counts(&mut rig, server), [1, 1, 0]);
    assert_eq!(counts(&mut rig, client), [1, 1, 0]);
    let way = rig.stack.way(server).unwrap();
    assert!(way.ends_with("so was the last one sent: no guest of this engine receives there"), "{way}");
}

#[test]
fn who_is_not_admitted_is_served_by_the_kernel() {
    let hub = Arc::default();
    let mut server = rig_of(
        &hub,
        1,
        Settings { allowed: Allowed { users: vec![2], ..Allowed::default() }.into(), ..Settings::default() },
    );
    let (socket, address) = bound(&mut server);
    for (owner, network, why) in [
        (1, Network(0, 0), None),
        (2, Network(0, 0), None),
        (
            3,
            Network(0, 0),
            Some("the receiver's guest belongs to another user, whom neither it nor its stack allows"),
        ),
        (1, Network(0, 9), Some("no guest of this engine receives there")),
        (u32::MAX, Network(0, 0), Some("whose guest this is, is not known")),
    ] {
        let mut client = rig_of(&hub, owner, Settings { network, ..Settings::default() });
        let sender = client.datagram();
        let before = counts(&mut server, socket)[1];
        client.send_to(sender, b"hello", Some(address)).unwrap();
        let from = SocketAddr::new(address.ip(), client.local(sender).port());
        assert_eq!(server.recv_from(socket), Ok((b"hello".to_vec(), from)));
        assert_eq!(counts(&mut server, socket)[1] - before, u64::from(why.is_none()), "{owner} {network:?}");
        let way = client.stack.way(sender).unwrap();
        assert!(why.is_none_or(|why| way.ends_with(why)), "{owner}: {way}");
    }
}

#[test]
fn two_threads_hear_each_other_in_order_and_wake_each_other() {
    const ROUNDS: u32 = 3000;
    let hub = Arc::<Hub>::default();
    let (tell, told) = channel();
    let other = Arc::clone(&hub);
    let echo = std::thread::spawn(move || {
        let mut rig = rig_of(&other, 1, Settings::default());
        let (socket, address) = bound(&mut rig);
        tell.send(address).unwrap();
        loop {
            let (data, from) = rig.recv_from(socket).unwrap();
            if data.is_empty() {
                return counts(&mut rig, socket);
            }
            rig.send_to(socket, &data, Some(from)).unwrap();
        }
    });
    let address = told.recv().unwrap();
    let mut rig = rig_of(&hub, 1, Settings::default());
    let socket = rig.datagram();
    // One at a time: each wakes the other, whoever slept.
    for round in 0..ROUNDS {
        rig.send_to(socket, &round.to_ne_bytes(), Some(address)).unwrap();
        assert_eq!(rig.recv_from(socket), Ok((round.to_ne_bytes().to_vec(), address)));
    }
    // Some at a time: they stay in order, and whole.
    for round in 0..ROUNDS / 16 {
        let sizes = (0..16u32).map(|i| (1 + round * 31 % 700 + i * 57) as usize);
        let data: Vec<Vec<u8>> = sizes.map(|size| vec![size as u8; size]).collect();
        for data in &data {
            rig.send_to(socket, data, Some(address)).unwrap();
        }
        for data in data {
            assert_eq!(rig.recv_from(socket).unwrap().0, data);
        }
    }
    rig.send_to(socket, b"", Some(address)).unwrap();
    let all = u64::from(ROUNDS + ROUNDS / 16 * 16);
    assert_eq!(echo.join().unwrap(), [all, all + 1, 0]);
    assert_eq!(counts(&mut rig, socket), [all + 1, all, 0]);
}

#[test]
fn a_receiver_that_does_not_read_loses_what_does_not_fit() {
    let mut rig = rig();
    let (full, at_full) = bound(&mut rig);
    let (idle, at_idle) = bound(&mut rig);
    let sender = rig.datagram();
    rig.set_option(full, libc::SOL_SOCKET, libc::SO_RCVBUF, 20_000).unwrap();
    let room = rig.option(full, libc::SOL_SOCKET, libc::SO_RCVBUF).unwrap() as usize;
    let number = |n: u32| [&n.to_ne_bytes()[..], &[0; 996]].concat();
    for n in 0..1000 {
        rig.send_to(sender, &number(n), Some(at_full)).unwrap();
    }
    // As the kernel counts: payload and 768, and one more than there is room for.
    let fit = room.div_ceil(1000 + 768);
    let fit = if room.is_multiple_of(1768) { fit + 1 } else { fit };
    assert_eq!(counts(&mut rig, full), [0, 0, 1000 - fit as u64]);
    // Others are none the worse, and it hears again when it has read.
    rig.send_to(sender, b"x", Some(at_idle)).unwrap();
    assert_eq!(rig.recv_from(idle).unwrap().0, b"x");
    let got = drain(&mut rig, full);
    assert_eq!(got, (0..fit as u32).map(number).collect::<Vec<_>>());
    rig.send_to(sender, b"again", Some(at_full)).unwrap();
    assert_eq!(rig.recv_from(full).unwrap().0, b"again");
}

/// What its sockets may have waiting is more than a guest may.
#[test]
fn all_sockets_of_a_guest_together_have_their_bound() {
    let mut rig = rig();
    let sender = rig.datagram();
    let sockets: Vec<(Handle, SocketAddr)> = (0..120).map(|_| bound(&mut rig)).collect();
    let flood = |rig: &mut Rig| {
        for &(_, address) in &sockets {
            (0..4).for_each(|_| rig.send_to(sender, &[0; 65507], Some(address)).unwrap());
        }
    };
    flood(&mut rig);
    let waits = |rig: &mut Rig| {
        let dropped: u64 = sockets.iter().map(|&(socket, _)| counts(rig, socket)[2]).sum();
        4 * sockets.len() as u64 - dropped
    };
    assert_eq!(waits(&mut rig), (16 << 20) / (65507 + 768));
    // What is closed or read gives its room back.
    rig.stack.close(sockets[0].0, Close::Graceful);
    let (last, at_last) = sockets[119];
    rig.send_to(sender, b"room again", Some(at_last)).unwrap();
    assert_eq!(drain(&mut rig, last), [b"room again"]);
    let read: usize = sockets[1..].iter().map(|&(socket, _)| drain(&mut rig, socket).len()).sum();
    assert_eq!(read as u64, (16 << 20) / (65507 + 768) - 4, "four were in the one that was closed");
    rig.send_to(sender, &[0; 65507], Some(at_last)).unwrap();
    assert_eq!(drain(&mut rig, last).len(), 1);
}

#[test]
fn a_way_that_changes_keeps_the_order() {
    let mut rig = rig();
    let (server, address) = bound(&mut rig);
    let client = rig.datagram();
    let mut sent = Vec::new();
    let number = |sent: &mut Vec<Vec<u8>>| {
        sent.push((sent.len() as u32).to_ne_bytes().to_vec());
        sent.last().unwrap().clone()
    };
    for _ in 0..5 {
        rig.send_to(client, &number(&mut sent), Some(address)).unwrap();
    }
    for _ in 0..5 {
        send_with_control(&mut rig, client, &number(&mut sent), address);
    }
    for _ in 0..5 {
        rig.send_to(client, &number(&mut sent), Some(address)).unwrap();
    }
    assert_eq!(drain(&mut rig, server), sent);
    let way = rig.stack.way(client).unwrap();
    assert!(
        way.contains("(5 sent") && way.ends_with("so is what it sends: it sent control messages"),
        "{way}"
    );
    // Now the receiver wants to know what only the kernel does.
    let (client, mut sent) = (rig.datagram(), Vec::new());
    for _ in 0..5 {
        rig.send_to(client, &number(&mut sent), Some(address)).unwrap();
    }
    rig.set_option(server, libc::IPPROTO_IP, libc::IP_RECVTTL, 1).unwrap();
    for _ in 0..5 {
        rig.send_to(client, &number(&mut sent), Some(address)).unwrap();
    }
    (0..32).for_each(|_| rig.turn());
    let (mut got, mut controls) = (Vec::new(), Vec::new());
    while rig
        .stack
        .recv_datagrams(server, 3, &mut |data, _, control| {
            got.push(data.to_vec());
            controls.push(!control.is_empty());
        })
        .is_ok()
    {}
    assert_eq!(got, sent);
    assert_eq!(controls, [[false; 5], [true; 5]].concat());
    let way = rig.stack.way(server).unwrap();
    assert!(way.ends_with("so is what comes to it: option 12 of level 0 is set"), "{way}");
}

#[test]
fn shared_ports_are_the_kernels() {
    let mut rig = rig();
    let sockets = [rig.datagram(), rig.datagram()];
    for socket in sockets {
        rig.set_option(socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1).unwrap();
    }
    rig.bind(sockets[0], rig.v4).unwrap();
    let address = rig.local(sockets[0]);
    rig.bind(sockets[1], address).unwrap();
    let clients: Vec<Handle> = (0..32).map(|_| rig.datagram()).collect();
    for &client in &clients {
        rig.send_to(client, b"one of you", Some(address)).unwrap();
    }
    let got = sockets.map(|socket| drain(&mut rig, socket).len());
    assert_eq!(got[0] + got[1], 32);
    assert!(got[0] > 0 && got[1] > 0, "{got:?}");
    let way = rig.stack.way(sockets[0]).unwrap();
    assert!(way.contains("others may have its port too"), "{way}");
}

#[test]
fn nobody_is_left_when_a_receiver_closes() {
    let mut rig = rig();
    let (server, address) = bound(&mut rig);
    let client = rig.datagram();
    rig.connect(client, address).unwrap();
    rig.send_to(client, b"never read", None).unwrap();
    assert_eq!(counts(&mut rig, client)[0], 1);
    rig.stack.close(server, Close::Graceful);
    rig.send_to(client, b"into the void", None).unwrap();
    rig.told(client, Readiness::ERROR);
    assert_eq!(rig.stack.take_error(client), Err(Errno(libc::ECONNREFUSED)));
    // The next one at the port is another one, with nothing of the old one.
    let next = rig.datagram();
    rig.bind(next, address).unwrap();
    assert_eq!(drain(&mut rig, next), Vec::<Vec<u8>>::new());
    rig.send_to(client, b"hello", None).unwrap();
    assert_eq!(rig.recv_from(next).unwrap().0, b"hello");
    assert_eq!(counts(&mut rig, next), [0, 1, 0]);
}

/// A stack that ends, with all its sockets open, is no way any more.
#[test]
fn a_stack_that_ends_leaves_the_port() {
    let hub = Arc::default();
    let (mut client, mut server) =
        (rig_of(&hub, 1, Settings::default()), rig_of(&hub, 1, Settings::default()));
    let (_, address) = bound(&mut server);
    let sender = client.datagram();
    client.send_to(sender, b"waits", Some(address)).unwrap();
    drop(server);
    let native = UdpSocket::bind(address).unwrap();
    client.send_to(sender, b"for you", Some(address)).unwrap();
    let mut into = [0; 9];
    assert_eq!(native.recv(&mut into).unwrap(), 7);
    assert_eq!(counts(&mut client, sender)[0], 1);
}

#[test]
fn a_shadow_is_given_away_with_nothing_in_memory_only() {
    let mut rig = rig();
    let (server, address) = bound(&mut rig);
    let client = rig.datagram();
    rig.send_to(client, b"waits", Some(address)).unwrap();
    assert_eq!(rig.stack.give(server).map(drop), Err(Errno(libc::EBUSY)));
    // Nothing has changed.
    rig.send_to(client, b"too", Some(address)).unwrap();
    assert_eq!(drain(&mut rig, server), [&b"waits"[..], b"too"]);
    let socket = UdpSocket::from(rig.stack.give(server).unwrap());
    rig.send_to(client, b"to the new owner", Some(address)).unwrap();
    let mut into = [0; 99];
    socket.set_nonblocking(false).unwrap();
    assert_eq!(socket.recv(&mut into).unwrap(), 16);
}

#[test]
fn the_next_datagram_is_as_long_as_was_said() {
    let mut rig = rig();
    let (server, address) = bound(&mut rig);
    let client = rig.datagram();
    let native = UdpSocket::bind("127.0.0.1:0").unwrap();
    drain(&mut rig, server);
    for n in 1..40 {
        rig.send_to(client, &vec![1; n], Some(address)).unwrap();
        native.send_to(&vec![2; 100 + n], address).unwrap();
    }
    (0..32).for_each(|_| rig.turn());
    let mut got = [Vec::new(), Vec::new()];
    for _ in 0..78 {
        let said = rig.stack.next_datagram(server).unwrap();
        // More comes meanwhile, by the other way.
        native.send_to(&[3; 300], address).unwrap();
        let (data, _) = rig.recv_from(server).unwrap();
        if data[0] == 3 {
            assert_eq!(said, 300);
            continue;
        }
        assert_eq!(data.len(), said);
        got[usize::from(data[0] - 1)].push(data.len());
    }
    assert!(!got[0].is_empty() && !got[1].is_empty(), "both ways have their turns");
    assert_eq!(got[0], (1..=got[0].len()).collect::<Vec<_>>());
    assert_eq!(got[1], (101..=100 + got[1].len()).collect::<Vec<_>>());
}

/// Each address costs the engine two system calls and more; a guest can name many.
#[test]
fn a_guest_that_names_many_addresses_is_the_kernels_meanwhile() {
    let mut rig = rig();
    let server = rig.datagram();
    rig.bind(server, "0.0.0.0:0".parse().unwrap()).unwrap();
    rig.set_option(server, libc::SOL_SOCKET, libc::SO_RCVBUF, 1 << 20).unwrap();
    let port = rig.local(server).port();
    let client = rig.datagram();
    for n in 0..200u8 {
        rig.send_to(client, &[n], Some(SocketAddr::from(([127, 0, 1, n], port)))).unwrap();
    }
    let mut got: Vec<u8> = drain(&mut rig, server).into_iter().map(|data| data[0]).collect();
    got.sort();
    assert_eq!(got, (0..200).collect::<Vec<u8>>(), "all of them came");
    let sent = counts(&mut rig, client)[0];
    assert!((32..=160).contains(&sent), "{sent} by memory");
}

/// Sockets of two threads that come, talk to whoever is at some ports, and go.
#[test]
fn whatever_threads_do_at_once_nothing_is_left() {
    const STEPS: u32 = 20_000;
    let hub = Arc::<Hub>::default();
    let ports: Vec<u16> = {
        let free = |_| UdpSocket::bind("127.0.0.1:0").unwrap();
        let sockets: Vec<UdpSocket> = (0..4).map(free).collect();
        sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect()
    };
    let at = |n: u32| SocketAddr::from(([127, 0, 0, 1], ports[n as usize % ports.len()]));
    let work = &|seed: u32| {
        let mut rig = rig_of(&hub, 1, Settings::default());
        let mut sockets = [(); 6].map(|()| rig.datagram());
        let (mut random, mut sent, mut received, mut by_memory) = (seed, 0, 0, 0);
        for _ in 0..STEPS {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let (what, n) = (random >> 16 & 15, random >> 20);
            let slot = (random >> 24) as usize % sockets.len();
            match what {
                0 => {
                    by_memory += counts(&mut rig, sockets[slot])[0];
                    rig.stack.close(sockets[slot], Close::Graceful);
                    sockets[slot] = rig.datagram();
                }
                1 => _ = rig.bind(sockets[slot], at(n)),
                2 => _ = rig.stack.connect(sockets[slot], &at(n).into()),
                3 => _ = rig.stack.disconnect(sockets[slot]),
                4..=11 => sent += u64::from(rig.send_to(sockets[slot], &[7; 300], Some(at(n))).is_ok()),
                12 => rig.turn(),
                _ => {
                    let mut take = |data: &[u8], _, _: &[u8]| assert_eq!(data, [7; 300]);
                    received += rig.stack.recv_datagrams(sockets[slot], 4, &mut take).unwrap_or(0);
                }
            }
        }
        sockets.iter().for_each(|&socket| rig.stack.close(socket, Close::Graceful));
        // What waited for this guest counts for nothing any more: as much as ever may wait.
        let sender = rig.datagram();
        let full: Vec<(Handle, SocketAddr)> = (0..90).map(|_| bound(&mut rig)).collect();
        for &(_, address) in &full {
            (0..4).for_each(|_| rig.send_to(sender, &[0; 65507], Some(address)).unwrap());
        }
        let dropped: u64 = full.iter().map(|&(socket, _)| counts(&mut rig, socket)[2]).sum();
        assert_eq!(4 * 90 - dropped, (16 << 20) / (65507 + 768));
        (sent, received, by_memory)
    };
    let all = std::thread::scope(|scope| {
        let threads = [1, 2].map(|seed| scope.spawn(move || work(seed)));
        threads.map(|thread| thread.join().unwrap())
    });
    println!("sent, received, by memory: {all:?}");
    assert!(all.iter().all(|&(sent, received, by_memory)| sent > by_memory && received > 0 && by_memory > 0));
}
