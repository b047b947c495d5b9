use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use libc::*;
use netkernel_service::{
    Close, Connect, Errno, Handle, Readiness, Received, Segments, SendFlags, Shutdown, SocketAddress,
};

use crate::rig::{Guest, segments};
use crate::{Rig, Subject};

macro_rules! cases {
    ($($name:ident)*) => {
        /// Every case with its name.
        pub const CASES: &[(&str, fn(&mut Rig))] = &[$((stringify!($name), $name)),*];
    };
}

cases! {
    connecting_names_both_ends connecting_to_nobody_is_refused bytes_arrive_in_order_through_full_buffers
    readiness_is_told_again_after_would_block one_direction_ends_before_the_other an_abort_is_a_reset
    a_graceful_close_delivers data_for_a_closed_socket_is_a_reset a_full_backlog_holds_connects_back
    a_listener_that_closes_resets_what_waits ports_are_taken_once addresses_must_be_ones_own
    a_port_is_found_for_who_has_none what_a_socket_cannot_do streams_can_be_disconnected
    options_are_kept_and_unknown_ones_refused datagrams_keep_their_bounds_and_senders
    a_connected_datagram_socket_hears_its_peer_only datagrams_to_nobody_are_refused
    datagrams_have_a_largest_size an_ipv6_socket_serves_both_families a_closed_handle_is_nothing
    datagrams_are_cut_to_what_there_is_room_for a_receiver_that_does_not_read_holds_nobody_up
    runs_of_memory_of_any_shape memory_that_changes_under_ones_feet addresses_of_any_bytes calls_in_any_order nothing_to_do_lets_the_engine_sleep one_who_stops_reading_sees_the_end
    less_may_be_offered_than_before
}

/// Runs one case against a stack.
pub fn run(name: &str, make: impl FnOnce() -> Subject) {
    let case = CASES.iter().find(|case| case.0 == name).expect("a case of this name");
    (case.1)(&mut Rig::new(make()));
}

fn connecting_names_both_ends(rig: &mut Rig) {
    let (listener, address) = rig.listener(8);
    assert_ne!(address.port(), 0);
    assert!(!rig.stack.acceptable(listener));
    let client = rig.stream();
    assert_eq!(rig.stack.peer_name(client), Err(Errno(ENOTCONN)));
    rig.connect(client, address).unwrap();
    let (server, peer) = rig.accept(listener);
    assert_eq!(peer, rig.local(client));
    assert_eq!(rig.peer(client), address);
    assert_eq!(rig.peer(server), peer);
    assert_eq!(rig.local(server), address);
    assert_eq!(rig.option(listener, SOL_SOCKET, SO_ACCEPTCONN), Ok(1));
    assert_eq!(rig.option(server, SOL_SOCKET, SO_ACCEPTCONN), Ok(0));
}

fn connecting_to_nobody_is_refused(rig: &mut Rig) {
    let (listener, address) = rig.listener(8);
    rig.stack.close(listener, Close::Graceful);
    let client = rig.stream();
    assert_eq!(rig.connect(client, address), Err(Errno(ECONNREFUSED)));
    // The error is told once, and the socket can be used again.
    assert_eq!(rig.stack.take_error(client), Ok(()));
    assert_eq!(rig.stack.peer_name(client), Err(Errno(ENOTCONN)));
    let (listener, address) = rig.listener(8);
    rig.forget(client);
    // Linux may say once more that the first attempt ended.
    match rig.connect(client, address) {
        Err(Errno(ECONNABORTED)) => rig.connect(client, address).unwrap(),
        result => result.unwrap(),
    }
    rig.accept(listener);
}

fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|n| (n % 251) as u8).collect()
}

fn bytes_arrive_in_order_through_full_buffers(rig: &mut Rig) {
    let (client, server) = rig.pair();
    // Nobody reads: a send falls short at last, or would block.
    let (mut sent, chunk) = (0, 100_000);
    loop {
        rig.forget(client);
        match rig.send(client, &pattern(sent, chunk)) {
            Ok(n) => {
                sent += n;
                if n < chunk {
                    break;
                }
            }
            Err(errno) => {
                assert!(errno.would_block(), "{errno:?}");
                break;
            }
        }
        assert!(sent < 1 << 28, "a stack must not keep everything");
    }
    // There was no room; when there is, that is told, and not before: what was not taken is offered again only then.
    let (end, mut got, mut offers) = (sent + chunk, 0, 0);
    let mut some = vec![0; 30_000];
    rig.until("all bytes arrive", |rig| {
        if sent < end && rig.was_told(client, Readiness::WRITE) {
            offers += 1;
            match rig.send(client, &pattern(sent, end - sent)) {
                Ok(n) => sent += n,
                Err(errno) => assert!(errno.would_block(), "{errno:?}"),
            }
        }
        match rig.recv(server, &mut some) {
            Ok(Received { bytes, .. }) => {
                assert_ne!(bytes, 0, "an end before the end, at {got}");
                assert_eq!(some[..bytes], pattern(got, bytes), "at {got}");
                got += bytes;
            }
            Err(errno) => assert!(errno.would_block(), "{errno:?}"),
        }
        (got == end && sent == end).then_some(())
    });
    assert!(offers > 0);
    assert!(rig.recv(server, &mut some).is_err_and(Errno::would_block), "more than was sent");
}

/// A guest's turn or its tenant's rate may allow less than what the last call offered, and than what was taken of that since.
fn less_may_be_offered_than_before(rig: &mut Rig) {
    let (client, server) = rig.pair();
    let (end, mut sent, mut got) = (1_500_000, 0, 0);
    let mut some = vec![0; 70_000];
    let mut sizes = [400_000, 1_000, 30_000, 400_000, 5].into_iter().cycle();
    rig.until("all bytes arrive", |rig| {
        let size = sizes.next()?.min(end - sent);
        if size > 0 {
            match rig.send(client, &pattern(sent, size)) {
                Ok(n) => {
                    assert!(n <= size, "{n} taken of {size}");
                    sent += n;
                }
                Err(errno) => assert!(errno.would_block(), "{errno:?}"),
            }
        }
        match rig.recv(server, &mut some) {
            Ok(Received { bytes, .. }) => {
                assert!(some[..bytes] == pattern(got, bytes), "not what was sent, at {got}");
                got += bytes;
            }
            Err(errno) => assert!(errno.would_block(), "{errno:?}"),
        }
        (got == end && sent == end).then_some(())
    });
    assert!(rig.recv(server, &mut some).is_err_and(Errno::would_block), "more than was sent");
}

fn readiness_is_told_again_after_would_block(rig: &mut Rig) {
    let (client, server) = rig.pair();
    let mut some = [0; 64];
    for round in 0..5u8 {
        // Everything is read: only new bytes are worth a report, and they are.
        match rig.recv(server, &mut some) {
            Ok(received) => panic!("{received:?}"),
            Err(errno) => assert!(errno.would_block(), "{errno:?}"),
        }
        rig.forget(server);
        rig.send_all(client, &[round; 10]);
        rig.told(server, Readiness::READ);
        let received = rig.recv(server, &mut some).unwrap();
        assert_eq!((&some[..received.bytes], received.bytes), (&[round; 10][..], 10));
    }
    // A listener as well.
    let (listener, address) = rig.listener(8);
    for _ in 0..2 {
        assert!(rig.stack.accept(listener, 1).is_err_and(Errno::would_block));
        rig.forget(listener);
        let client = rig.stream();
        rig.connect(client, address).unwrap();
        rig.told(listener, Readiness::READ);
        assert!(rig.stack.acceptable(listener));
        rig.accept(listener);
    }
}

fn one_direction_ends_before_the_other(rig: &mut Rig) {
    let (client, server) = rig.pair();
    rig.send_all(client, b"question");
    rig.stack.shutdown(client, Shutdown::Write).unwrap();
    assert_eq!(rig.send(client, b"more"), Err(Errno(EPIPE)));
    assert_eq!(rig.recv_all(server), b"question");
    // The end is told again and again.
    assert_eq!(rig.wait_recv(server, &mut [0; 8]), Ok(0));
    rig.send_all(server, b"answer");
    rig.stack.shutdown(server, Shutdown::Write).unwrap();
    assert_eq!(rig.recv_all(client), b"answer");
    let lonely = rig.stream();
    assert_eq!(rig.stack.shutdown(lonely, Shutdown::Both), Err(Errno(ENOTCONN)));
}

fn an_abort_is_a_reset(rig: &mut Rig) {
    let (client, server) = rig.pair();
    rig.forget(client);
    rig.stack.close(server, Close::Abort);
    let seen = rig.told(client, Readiness::ERROR);
    assert!(seen.has(Readiness::READ), "{seen:?}: a reader must be told");
    assert_eq!(rig.wait_recv(client, &mut [0; 8]), Err(Errno(ECONNRESET)));
    // Once; then it is over.
    assert_eq!(rig.stack.take_error(client), Ok(()));
    assert_eq!(rig.wait_recv(client, &mut [0; 8]), Ok(0));
    assert_eq!(rig.send(client, b"x"), Err(Errno(EPIPE)));
}

fn a_graceful_close_delivers(rig: &mut Rig) {
    let (client, server) = rig.pair();
    // Nothing is read before the close, as far as the stack takes it; of a small piece that is all.
    let data = pattern(0, 3_000);
    rig.send_all(client, &data);
    rig.stack.close(client, Close::Graceful);
    rig.settle();
    assert_eq!(rig.recv_all(server), data);
    rig.stack.close(server, Close::Graceful);
}

fn data_for_a_closed_socket_is_a_reset(rig: &mut Rig) {
    let (client, server) = rig.pair();
    rig.stack.close(server, Close::Graceful);
    assert_eq!(rig.wait_recv(client, &mut [0; 8]), Ok(0));
    rig.forget(client);
    rig.send_all(client, b"is anybody there?");
    rig.told(client, Readiness::ERROR);
    // The peer had ended its direction in order: Linux says EPIPE then, but not to who reads.
    assert_eq!(rig.recv(client, &mut [0; 8]).map(|received| received.bytes), Ok(0));
    assert_eq!(rig.stack.take_error(client), Err(Errno(EPIPE)));
}

fn a_full_backlog_holds_connects_back(rig: &mut Rig) {
    let (listener, address) = rig.listener(1);
    let mut clients = Vec::new();
    for _ in 0..4 {
        let client = rig.stream();
        assert_eq!(rig.stack.connect(client, &address.into()), Ok(Connect::Begun));
        clients.push(client);
    }
    // Two find room; the others wait until somebody accepts, and are not refused.
    for _ in 0..4 {
        rig.accept(listener);
    }
    for client in clients {
        rig.until("a connection", |rig| rig.stack.peer_name(client).is_ok().then_some(()));
        assert_eq!(rig.stack.take_error(client), Ok(()));
    }
}

fn a_listener_that_closes_resets_what_waits(rig: &mut Rig) {
    let (listener, address) = rig.listener(8);
    let client = rig.stream();
    rig.connect(client, address).unwrap();
    rig.until("a connection waits", |rig| rig.stack.acceptable(listener).then_some(()));
    rig.stack.close(listener, Close::Graceful);
    rig.told(client, Readiness::ERROR);
    assert_eq!(rig.stack.take_error(client), Err(Errno(ECONNRESET)));
}

fn ports_are_taken_once(rig: &mut Rig) {
    for kind in [SOCK_STREAM, SOCK_DGRAM] {
        let first = rig.open(AF_INET, kind);
        rig.bind(first, rig.v4).unwrap();
        let taken = rig.local(first);
        let second = rig.open(AF_INET, kind);
        assert_eq!(rig.bind(second, taken), Err(Errno(EADDRINUSE)));
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, taken.port()));
        assert_eq!(rig.bind(second, any), Err(Errno(EADDRINUSE)));
        // A refused bind leaves the socket as it was.
        rig.bind(second, rig.v4).unwrap();
        assert_ne!(rig.local(second), taken);
        assert_eq!(rig.bind(second, rig.v4), Err(Errno(EINVAL)), "bound twice");
        rig.stack.close(first, Close::Graceful);
        let third = rig.open(AF_INET, kind);
        assert_eq!(rig.bind(third, taken), Ok(()), "the port of a closed socket");
    }
    // Streams and datagrams have ports of their own.
    let stream = rig.stream();
    rig.bind(stream, rig.v4).unwrap();
    let (datagram, same) = (rig.datagram(), rig.local(stream));
    assert_eq!(rig.bind(datagram, same), Ok(()));
    // With SO_REUSEADDR two may be bound, but one listens only.
    let (a, b) = (rig.stream(), rig.stream());
    rig.set_option(a, SOL_SOCKET, SO_REUSEADDR, 1).unwrap();
    rig.set_option(b, SOL_SOCKET, SO_REUSEADDR, 1).unwrap();
    rig.bind(a, rig.v4).unwrap();
    let same = rig.local(a);
    assert_eq!(rig.bind(b, same), Ok(()));
    rig.stack.listen(a, 1).unwrap();
    assert_eq!(rig.stack.listen(b, 1), Err(Errno(EADDRINUSE)));
}

fn addresses_must_be_ones_own(rig: &mut Rig) {
    // A network that is reserved for documents (RFC 5737).
    let foreign: SocketAddr = ([203, 0, 113, 7], 0).into();
    for kind in [SOCK_STREAM, SOCK_DGRAM] {
        let socket = rig.open(AF_INET, kind);
        assert_eq!(rig.bind(socket, foreign), Err(Errno(EADDRNOTAVAIL)));
        let short = netkernel_service::SocketAddress::from_bytes(&[2, 0, 0, 0, 1, 2, 3, 4]);
        assert_eq!(rig.stack.bind(socket, &short), Err(Errno(EINVAL)));
        let v6: SocketAddr = "[::1]:0".parse().unwrap();
        assert_eq!(rig.bind(socket, v6), Err(Errno(EAFNOSUPPORT)));
        assert_eq!(rig.stack.connect(socket, &v6.into()), Err(Errno(EAFNOSUPPORT)));
    }
}

fn a_port_is_found_for_who_has_none(rig: &mut Rig) {
    let listener = rig.stream();
    assert_eq!(rig.local(listener).port(), 0);
    rig.stack.listen(listener, 4).unwrap();
    let port = rig.local(listener).port();
    assert_ne!(port, 0, "a listener without a bind gets one");
    let client = rig.stream();
    rig.connect(client, (rig.v4.ip(), port).into()).unwrap();
    rig.accept(listener);
    let local = rig.local(client);
    assert!(local.port() >= 1024 && local.port() != port, "{local}");
    // A client that is bound connects from there.
    let client = rig.stream();
    rig.bind(client, rig.v4).unwrap();
    let bound = rig.local(client);
    rig.connect(client, (rig.v4.ip(), port).into()).unwrap();
    assert_eq!(rig.accept(listener).1, bound);
}

fn what_a_socket_cannot_do(rig: &mut Rig) {
    let (stream, datagram) = (rig.stream(), rig.datagram());
    assert_eq!(rig.stack.listen(datagram, 1), Err(Errno(EOPNOTSUPP)));
    assert_eq!(rig.recv(stream, &mut [0; 8]), Err(Errno(ENOTCONN)));
    assert_eq!(rig.send(stream, b"x"), Err(Errno(EPIPE)));
    assert_eq!(rig.stack.peer_name(stream), Err(Errno(ENOTCONN)));
    let Err(errno) = rig.stack.accept(stream, 1) else { panic!("a connection from nowhere") };
    assert_eq!(errno, Errno(EINVAL));
    let (client, _) = rig.pair();
    let peer = rig.peer(client);
    // The first one may only tell that the connection stands, as on Linux.
    let again = rig.stack.connect(client, &peer.into());
    assert!(matches!(again, Ok(Connect::Done) | Err(Errno(EISCONN))), "{again:?}");
    assert_eq!(rig.stack.connect(client, &peer.into()), Err(Errno(EISCONN)));
    assert_eq!(rig.stack.listen(client, 1), Err(Errno(EINVAL)));
    assert_eq!(rig.stack.open(1, AF_UNIX, SOCK_STREAM, 0), Err(Errno(EAFNOSUPPORT)));
    assert_eq!(rig.stack.open(1, AF_INET, SOCK_STREAM, IPPROTO_UDP), Err(Errno(EPROTONOSUPPORT)));
    assert_eq!(rig.stack.open(1, AF_INET, SOCK_SEQPACKET, 0), Err(Errno(ESOCKTNOSUPPORT)));
    assert_eq!(rig.stack.ioctl(client, 0x1234), Err(Errno(ENOTTY)));
    assert_eq!(rig.stack.ioctl(client, FIONREAD), Ok(0));
}

fn streams_can_be_disconnected(rig: &mut Rig) {
    let (client, server) = rig.pair();
    rig.forget(server);
    rig.stack.disconnect(client).unwrap();
    assert_eq!(rig.stack.peer_name(client), Err(Errno(ENOTCONN)));
    rig.told(server, Readiness::ERROR);
    assert_eq!(rig.stack.take_error(server), Err(Errno(ECONNRESET)));
    let (listener, address) = rig.listener(1);
    rig.forget(client);
    rig.connect(client, address).unwrap();
    rig.accept(listener);
}

fn options_are_kept_and_unknown_ones_refused(rig: &mut Rig) {
    for (kind, protocol) in [(SOCK_STREAM, IPPROTO_TCP), (SOCK_DGRAM, IPPROTO_UDP)] {
        let socket = rig.open(AF_INET, kind);
        assert_eq!(rig.option(socket, SOL_SOCKET, SO_TYPE), Ok(kind));
        assert_eq!(rig.option(socket, SOL_SOCKET, SO_DOMAIN), Ok(AF_INET));
        assert_eq!(rig.option(socket, SOL_SOCKET, SO_PROTOCOL), Ok(protocol));
        assert_eq!(rig.option(socket, SOL_SOCKET, SO_ERROR), Ok(0));
        assert!(rig.option(socket, SOL_SOCKET, SO_SNDBUF).unwrap() >= 2048);
        for name in [SO_REUSEADDR, SO_BROADCAST, SO_KEEPALIVE] {
            assert_eq!(rig.option(socket, SOL_SOCKET, name), Ok(0));
            assert_eq!(rig.set_option(socket, SOL_SOCKET, name, 1), Ok(()));
            assert_eq!(rig.option(socket, SOL_SOCKET, name), Ok(1), "option {name}");
        }
        assert_eq!(rig.set_option(socket, IPPROTO_IP, IP_TTL, 33), Ok(()));
        assert_eq!(rig.option(socket, IPPROTO_IP, IP_TTL), Ok(33));
        assert_eq!(rig.set_option(socket, IPPROTO_IP, IP_TTL, 256), Err(Errno(EINVAL)));
        assert_eq!(rig.option(socket, SOL_SOCKET, 9999), Err(Errno(ENOPROTOOPT)));
        assert_eq!(rig.set_option(socket, 250, 1, 1), Err(Errno(ENOPROTOOPT)));
        assert_eq!(rig.stack.set_option(socket, SOL_SOCKET, SO_REUSEADDR, &[1]), Err(Errno(EINVAL)));
    }
    let (client, _) = rig.pair();
    assert_eq!(rig.set_option(client, IPPROTO_TCP, TCP_NODELAY, 1), Ok(()));
    assert_eq!(rig.option(client, IPPROTO_TCP, TCP_NODELAY), Ok(1));
    assert!(rig.option(client, IPPROTO_TCP, TCP_MAXSEG).unwrap() >= 536);
    let linger = [1i32.to_ne_bytes(), 5i32.to_ne_bytes()].concat();
    rig.stack.set_option(client, SOL_SOCKET, SO_LINGER, &linger).unwrap();
    let mut out = [0; 8];
    assert_eq!(rig.stack.option(client, SOL_SOCKET, SO_LINGER, &mut out), Ok(8));
    assert_eq!(out[..], linger);
}

fn datagrams_keep_their_bounds_and_senders(rig: &mut Rig) {
    let (a, b) = (rig.datagram(), rig.datagram());
    rig.bind(a, rig.v4).unwrap();
    let to = rig.local(a);
    assert_eq!(rig.send_to(b, b"x", None), Err(Errno(EDESTADDRREQ)));
    for data in [&b"one"[..], b"", &[7; 1200]] {
        rig.send_to(b, data, Some(to)).unwrap();
    }
    let from = rig.local(b).port();
    assert_ne!(from, 0, "who sends has a port");
    for data in [&b"one"[..], b"", &[7; 1200]] {
        let (got, sender) = rig.recv_from(a).unwrap();
        assert_eq!((&got[..], sender), (data, SocketAddr::new(to.ip(), from)));
    }
    assert_eq!(rig.stack.next_datagram(a), Ok(0));
    rig.send_to(b, &[3; 77], Some(to)).unwrap();
    rig.until("a datagram waits", |rig| (rig.stack.next_datagram(a) == Ok(77)).then_some(()));
    // Several at once, and a hint when there are no more.
    rig.send_to(b, &[4; 5], Some(to)).unwrap();
    let mut got = Vec::new();
    while got.len() < 2 {
        rig.turn();
        match rig.stack.recv_datagrams(a, 8, &mut |data, from, _| got.push((data.to_vec(), from))) {
            Ok(n) => assert!(n > 0 && n <= 8),
            Err(errno) => assert!(errno.would_block(), "{errno:?}"),
        }
    }
    assert_eq!((got[0].0.len(), got[1].0.len()), (77, 5));
    assert_eq!(got[1].1.to_std(), Some(SocketAddr::new(to.ip(), from)));
}

fn a_connected_datagram_socket_hears_its_peer_only(rig: &mut Rig) {
    let (a, b, stranger) = (rig.datagram(), rig.datagram(), rig.datagram());
    for socket in [b, stranger] {
        rig.bind(socket, rig.v4).unwrap();
    }
    // A port of one's own choice outlives the association.
    let scout = rig.datagram();
    rig.bind(scout, rig.v4).unwrap();
    let free = rig.local(scout);
    rig.stack.close(scout, Close::Graceful);
    rig.bind(a, free).unwrap();
    let (at_a, at_b) = (rig.local(a), rig.local(b));
    assert_eq!(rig.stack.connect(a, &at_b.into()), Ok(Connect::Done));
    assert_eq!(rig.peer(a), at_b);
    rig.send_to(stranger, b"hush", Some(at_a)).unwrap();
    rig.send_to(b, b"hello", Some(at_a)).unwrap();
    assert_eq!(rig.recv_from(a), Ok((b"hello".to_vec(), at_b)));
    rig.send_to(a, b"back", None).unwrap();
    assert_eq!(rig.recv_from(b), Ok((b"back".to_vec(), at_a)));
    rig.stack.disconnect(a).unwrap();
    assert_eq!(rig.stack.peer_name(a), Err(Errno(ENOTCONN)));
    rig.send_to(stranger, b"now", Some(at_a)).unwrap();
    assert_eq!(rig.recv_from(a).unwrap().0, b"now");
}

fn datagrams_to_nobody_are_refused(rig: &mut Rig) {
    let (a, gone) = (rig.datagram(), rig.datagram());
    rig.bind(gone, rig.v4).unwrap();
    let nobody = rig.local(gone);
    rig.stack.close(gone, Close::Graceful);
    rig.stack.connect(a, &nobody.into()).unwrap();
    rig.send_to(a, b"x", None).unwrap();
    rig.told(a, Readiness::ERROR);
    assert_eq!(rig.stack.take_error(a), Err(Errno(ECONNREFUSED)));
    assert_eq!(rig.stack.take_error(a), Ok(()));
}

fn datagrams_have_a_largest_size(rig: &mut Rig) {
    let (a, b) = (rig.datagram(), rig.datagram());
    rig.bind(a, rig.v4).unwrap();
    let to = rig.local(a);
    assert_eq!(rig.send_to(b, &[0; 65508], Some(to)), Err(Errno(EMSGSIZE)));
    // The socket is none the worse for it.
    rig.send_to(b, b"small", Some(to)).unwrap();
    assert_eq!(rig.recv_from(a).unwrap().0, b"small");
}

fn an_ipv6_socket_serves_both_families(rig: &mut Rig) {
    let Some(v6) = rig.v6 else {
        eprintln!("NOT RUN: this stack has no IPv6 address here");
        return;
    };
    let listener = rig.open(AF_INET6, SOCK_STREAM);
    rig.bind(listener, "[::]:0".parse().unwrap()).unwrap();
    rig.stack.listen(listener, 8).unwrap();
    let port = rig.local(listener).port();
    let (four, six) = (rig.stream(), rig.open(AF_INET6, SOCK_STREAM));
    rig.connect(four, (rig.v4.ip(), port).into()).unwrap();
    let IpAddr::V4(v4) = rig.v4.ip() else { panic!("an IPv4 address") };
    let peer = rig.accept(listener).1;
    assert_eq!(peer.ip(), IpAddr::V6(v4.to_ipv6_mapped()), "IPv4 peers are seen mapped");
    rig.connect(six, (v6.ip(), port).into()).unwrap();
    assert_eq!(rig.accept(listener).1.ip(), v6.ip());
    // The other way round: an IPv6 socket reaches an IPv4 listener by the mapped address.
    let (listener, address) = rig.listener(8);
    let mapped = rig.open(AF_INET6, SOCK_STREAM);
    rig.connect(mapped, (v4.to_ipv6_mapped(), address.port()).into()).unwrap();
    assert_eq!(rig.accept(listener).1.ip(), IpAddr::V4(v4));
    assert_eq!(rig.peer(mapped).ip(), IpAddr::V6(v4.to_ipv6_mapped()));
    // One for IPv6 only leaves the port to IPv4, where somebody else on this host may have it.
    let mut bind_beside = || {
        let only = rig.open(AF_INET6, SOCK_STREAM);
        rig.set_option(only, IPPROTO_IPV6, IPV6_V6ONLY, 1).unwrap();
        rig.bind(only, "[::]:0".parse().unwrap()).unwrap();
        let (other, port) = (rig.stream(), rig.local(only).port());
        rig.bind(other, (Ipv4Addr::UNSPECIFIED, port).into())
    };
    let tries: Vec<_> = (0..8).map(|_| bind_beside()).collect();
    assert!(tries.contains(&Ok(())), "{tries:?}");
}

fn a_closed_handle_is_nothing(rig: &mut Rig) {
    for kind in [SOCK_STREAM, SOCK_DGRAM] {
        let socket = rig.open(AF_INET, kind);
        rig.stack.close(socket, Close::Graceful);
        assert_eq!(rig.stack.local_name(socket), Err(Errno(EBADF)));
        assert_eq!(rig.bind(socket, rig.v4), Err(Errno(EBADF)));
        assert_eq!(rig.stack.take_error(socket), Err(Errno(EBADF)));
        rig.stack.close(socket, Close::Abort);
    }
}

fn datagrams_are_cut_to_what_there_is_room_for(rig: &mut Rig) {
    let (a, b) = (rig.datagram(), rig.datagram());
    rig.bind(a, rig.v4).unwrap();
    let to = rig.local(a);
    for data in [&[1; 100][..], &[2; 100], &[3; 100]] {
        rig.send_to(b, data, Some(to)).unwrap();
    }
    rig.until("a datagram waits", |rig| (rig.stack.next_datagram(a) == Ok(100)).then_some(()));
    let mut into = [9; 60];
    let got = rig.stack.recv_datagram(a, &segments(&mut into[..40]), &mut []).unwrap();
    assert_eq!((got.bytes, got.from.to_std().map(|from| from.ip())), (40, Some(to.ip())));
    assert_eq!((&into[..40], &into[40..]), (&[1; 40][..], &[9; 20][..]));
    // The rest is lost, and the next one is whole. No room at all takes one too.
    rig.until("the second", |rig| (rig.stack.next_datagram(a) == Ok(100)).then_some(()));
    let got = rig.stack.recv_datagram(a, &Segments::EMPTY, &mut []).unwrap();
    assert_eq!(got.bytes, 0);
    assert_eq!(rig.recv_from(a).unwrap().0, [3; 100]);
    assert_eq!(rig.stack.next_datagram(a), Ok(0));
}

/// Nothing outside of the runs is read or written, and their order is kept.
fn a_receiver_that_does_not_read_holds_nobody_up(rig: &mut Rig) {
    let (full, reader, sender) = (rig.datagram(), rig.datagram(), rig.datagram());
    for socket in [full, reader] {
        rig.bind(socket, rig.v4).unwrap();
    }
    let (to_full, to_reader) = (rig.local(full), rig.local(reader));
    let send = |rig: &mut Rig, n: u32, to: SocketAddr| {
        let data = [&n.to_ne_bytes()[..], &[0; 996]].concat();
        while let Err(errno) = rig.send_to(sender, &data, Some(to)) {
            assert!(errno.would_block(), "{errno:?}");
            rig.told(sender, Readiness::WRITE);
        }
    };
    (0..2000).for_each(|n| send(rig, n, to_full));
    send(rig, 7, to_reader);
    assert_eq!(rig.recv_from(reader).unwrap().0[..4], 7u32.to_ne_bytes());
    // What came is the beginning of it, or what there was room for in between, in order.
    let mut numbers = Vec::new();
    rig.settle();
    let mut take = |data: &[u8], _: netkernel_service::SocketAddress, _: &[u8]| {
        assert_eq!(data.len(), 1000);
        numbers.push(u32::from_ne_bytes([data[0], data[1], data[2], data[3]]));
    };
    while rig.stack.recv_datagrams(full, 8, &mut take).is_ok() {}
    assert!(numbers.is_sorted_by(|a, b| a < b) && numbers.first() == Some(&0), "{numbers:?}");
    assert!(numbers.len() < 2000, "all of them waited: nothing bounds what waits");
    send(rig, 2000, to_full);
    assert_eq!(rig.recv_from(full).unwrap().0[..4], 2000u32.to_ne_bytes());
}

fn runs_of_memory_of_any_shape(rig: &mut Rig) {
    let (client, server) = rig.pair();
    let shapes = [(0, 7), (7, 0), (1, 1), (1, 900), (900, 1), (333, 334), (0, 1)];
    for (first, second) in shapes {
        let data = pattern(first, first + second);
        let from = Guest::new(first, second, 0xee);
        from.fill(&data);
        assert_eq!(rig.stack.send(client, &from.segments(), SendFlags::default()), Ok(data.len()));
        let (mut got, into) = (Vec::new(), Guest::new(second.max(1), first, 0xdd));
        while got.len() < data.len() {
            match rig.stack.recv(server, &into.segments()) {
                Ok(Received { bytes, .. }) => got.extend_from_slice(&into.bytes()[..bytes]),
                Err(errno) => {
                    assert!(errno.would_block(), "{errno:?}");
                    rig.told(server, Readiness::READ);
                }
            }
        }
        assert_eq!(got, data, "{first} and {second} bytes");
        assert!(from.is_unharmed() && into.is_unharmed(), "bytes beside the runs: {first}, {second}");
    }
    assert_eq!(rig.stack.send(client, &Segments::EMPTY, SendFlags::default()), Ok(0));
}

/// A guest that writes into its rings all the time gets arbitrary bytes, as many as it sent.
fn memory_that_changes_under_ones_feet(rig: &mut Rig) {
    let (client, server) = rig.pair();
    let (from, into) = (Guest::new(700, 800, 0), Guest::new(600, 900, 0));
    let scribbler = from.scribble(&into);
    let (total, mut sent, mut got) = (300_000, 0, 0);
    rig.until("as many bytes as were sent", |rig| {
        if sent < total {
            match rig.stack.send(client, &from.segments(), SendFlags::default()) {
                Ok(n) => {
                    assert!(n <= 1500, "{n}");
                    sent += n;
                }
                Err(errno) => assert!(errno.would_block(), "{errno:?}"),
            }
        }
        match rig.stack.recv(server, &into.segments()) {
            Ok(Received { bytes, .. }) => {
                assert!((1..=1500).contains(&bytes), "{bytes}");
                got += bytes;
            }
            Err(errno) => assert!(errno.would_block(), "{errno:?}"),
        }
        (sent >= total && got == sent).then_some(())
    });
    scribbler.end();
    assert!(from.is_unharmed() && into.is_unharmed());
    assert!(rig.recv(server, &mut [0; 8]).is_err_and(Errno::would_block), "more than was sent");
}

fn addresses_of_any_bytes(rig: &mut Rig) {
    let (stream, datagram) = (rig.stream(), rig.datagram());
    // Who connects may get a port by that, even where it fails.
    let (client, talker) = (rig.stream(), rig.datagram());
    for family in [AF_UNIX, AF_NETLINK, 0x7777, 0xffff] {
        for len in 0..=64 {
            let mut bytes = [0xa5; 64];
            bytes[..2].copy_from_slice(&(family as u16).to_ne_bytes());
            let address = SocketAddress::from_bytes(&bytes[..len]);
            for (bound, connected) in [(stream, client), (datagram, talker)] {
                assert!(rig.stack.bind(bound, &address).is_err(), "bind: {len} bytes, family {family}");
                assert!(rig.stack.connect(connected, &address).is_err(), "connect: {len} bytes, {family}");
            }
        }
    }
    // They are as good as before.
    rig.bind(stream, rig.v4).unwrap();
    rig.bind(datagram, rig.v4).unwrap();
    let to = rig.local(datagram);
    rig.send_to(talker, b"x", Some(to)).unwrap();
    let (listener, address) = rig.listener(1);
    rig.forget(client);
    rig.connect(client, address).unwrap();
    rig.accept(listener);
}

/// Calls that no program would make, in no order: nothing breaks, and afterwards everything works.
fn calls_in_any_order(rig: &mut Rig) {
    let seed: u64 =
        std::env::var("NETKERNEL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20261123);
    println!("NETKERNEL_SEED={seed}");
    let mut random = Random(seed);
    let (listener, address) = rig.listener(4);
    let mut sockets: Vec<Handle> = vec![listener];
    let mut known: Vec<SocketAddr> = vec![address];
    for _ in 0..20_000 {
        let socket = match random.below(20) {
            // Nobody has this one.
            0 => Handle(random.below(1 << 30) as u32 + (1 << 20)),
            1 => Handle::NONE,
            _ => sockets[random.below(sockets.len())],
        };
        let to = known[random.below(known.len())];
        let mut bytes = vec![random.below(256) as u8; 1 + random.below(3000)];
        let key = 1000 + random.below(50) as u64;
        match random.below(22) {
            0 | 1 if sockets.len() < 40 => {
                let kind = if random.below(3) == 0 { SOCK_DGRAM } else { SOCK_STREAM };
                sockets.push(rig.open(AF_INET, kind));
            }
            2 if sockets.len() > 1 => {
                let at = 1 + random.below(sockets.len() - 1);
                let how = if random.below(2) == 0 { Close::Graceful } else { Close::Abort };
                rig.stack.close(sockets.swap_remove(at), how);
            }
            3 => _ = rig.stack.bind(socket, &rig.v4.into()),
            4 => _ = rig.stack.listen(socket, random.below(6) as i32 - 1),
            5 | 6 => _ = rig.stack.connect(socket, &to.into()),
            7 if socket != listener => _ = rig.stack.disconnect(socket),
            8 | 9 if sockets.len() < 40 => {
                if let Ok(accepted) = rig.stack.accept(socket, key) {
                    sockets.push(accepted.handle);
                }
            }
            10 | 11 => _ = rig.send(socket, &bytes),
            12 | 13 => _ = rig.stack.recv(socket, &segments(&mut bytes)),
            14 => _ = rig.send_to(socket, &bytes, Some(to)),
            15 => _ = rig.stack.recv_datagram(socket, &segments(&mut bytes), &mut [0; 64]),
            16 if socket != listener => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][random.below(3)];
                let _ = rig.stack.shutdown(socket, how);
            }
            17 => {
                let (level, name) =
                    ([SOL_SOCKET, IPPROTO_IP, IPPROTO_TCP, 77][random.below(4)], random.below(60));
                bytes.truncate(random.below(20));
                // Not what waits (SO_LINGER, SO_RCVLOWAT), nor what changes how the socket is called.
                if level != SOL_SOCKET {
                    let _ = rig.stack.set_option(socket, level, name as i32, &bytes);
                }
                let _ = rig.stack.option(socket, level, name as i32, &mut bytes);
            }
            18 => _ = (rig.stack.at_mark(socket), rig.stack.recv_urgent(socket)),
            19 => _ = (rig.stack.take_error(socket), rig.stack.acceptable(socket)),
            20 => {
                if let Some(name) = rig.stack.local_name(socket).ok().and_then(|name| name.to_std())
                    && name.port() != 0
                    && known.len() < 30
                {
                    known.push(name);
                }
                let _ = rig.stack.peer_name(socket);
            }
            _ => rig.turn(),
        }
    }
    for socket in sockets {
        rig.stack.close(socket, Close::Abort);
    }
    rig.turn();
    let (client, server) = rig.pair();
    rig.send_all(client, b"still there");
    rig.stack.close(client, Close::Graceful);
    assert_eq!(rig.recv_all(server), b"still there");
}

fn nothing_to_do_lets_the_engine_sleep(rig: &mut Rig) {
    rig.settle();
    let (client, server) = rig.pair();
    rig.settle();
    rig.send_all(client, b"hello");
    assert_eq!(rig.wait_recv(server, &mut [0; 8]), Ok(5));
    rig.settle();
    // One end closed, the other open; then nothing at all.
    rig.stack.close(client, Close::Graceful);
    rig.settle();
    rig.stack.close(server, Close::Graceful);
    rig.settle();
    let stream = rig.stream();
    rig.settle();
    rig.stack.close(stream, Close::Graceful);
}

fn one_who_stops_reading_sees_the_end(rig: &mut Rig) {
    let (client, server) = rig.pair();
    assert!(rig.recv(server, &mut [0; 8]).is_err_and(Errno::would_block));
    rig.forget(server);
    rig.stack.shutdown(server, Shutdown::Read).unwrap();
    rig.told(server, Readiness::READ);
    assert_eq!(rig.wait_recv(server, &mut [0; 8]), Ok(0));
    // It may still speak.
    rig.send_all(server, b"bye");
    let mut some = [0; 8];
    assert_eq!(rig.wait_recv(client, &mut some), Ok(3));
}

/// Repeatable.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}
