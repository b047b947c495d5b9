//! The engine with real kernel sockets and guests played by hand.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::Ordering::{Acquire, SeqCst};
use std::time::Duration;

use common::{Guest, WATCHDOG, engine, pattern, until};
use netkernel_abi::control::{Message, kind};
use netkernel_abi::socket::state;
use netkernel_abi::{Nqe, Op};

fn timed(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(WATCHDOG)).unwrap();
    stream.set_write_timeout(Some(WATCHDOG)).unwrap();
    stream
}

#[test]
fn a_guest_connects_echoes_and_closes() {
    let engine = engine();
    let guest = Guest::new(&engine, "kernel");
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address).unwrap();
        let socket = guest.connect(listener.local_addr().unwrap());
        let mut peer = timed(listener.accept().unwrap().0);
        guest.send_all(socket.id, b"hello");
        let mut got = [0; 5];
        peer.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        peer.write_all(b"world!").unwrap();
        let mut got = [0; 6];
        guest.recv_exact(socket.id, &mut got);
        assert_eq!(&got, b"world!");
        let (status, _, name) = guest.job(Op::PeerName, socket.id, 0, &[], 0);
        assert_eq!(status, 0);
        let name = netkernel_service::SocketAddress::from_bytes(&name).to_std();
        assert_eq!(name, listener.local_addr().ok());
        let id = socket.id;
        drop(socket);
        assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0, "FIN after close");
        until("the id is given back", || guest.state(id) == 0);
    }
    assert_eq!(guest.region.header().free_head.load(Acquire) as u32, 1);
}

#[test]
fn a_guest_listens_and_accepts_what_came_early() {
    let engine = engine();
    let guest = Guest::new(&engine, "cubic");
    let (listener, address) = guest.listen("127.0.0.1:0", 64);
    let mut early: Vec<_> = (0..20).map(|_| timed(TcpStream::connect(address).unwrap())).collect();
    for (i, stream) in early.iter_mut().enumerate() {
        stream.write_all(&[i as u8; 3]).unwrap();
    }
    for _ in 0..20 {
        let socket = guest.accept(listener.id);
        let mut got = [0; 3];
        guest.recv_exact(socket.id, &mut got);
        assert_eq!(got, [got[0]; 3]);
        guest.send_all(socket.id, &[got[0] + 100]);
        let mut reply = [0];
        early[got[0] as usize].read_exact(&mut reply).unwrap();
        assert_eq!(reply, [got[0] + 100]);
        let cc = Nqe::option_data(libc::IPPROTO_TCP, libc::TCP_CONGESTION, 0);
        let (status, _, name) = guest.job(Op::GetOption, socket.id, cc, &[], 16);
        assert_eq!((status, &name[..5]), (0, &b"cubic"[..]));
    }
}

#[test]
fn megabytes_flow_both_ways_and_rings_grow() {
    let engine = engine();
    let guest = Guest::new(&engine, "kernel");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = guest.connect(listener.local_addr().unwrap());
    let mut peer = timed(listener.accept().unwrap().0);
    let data = pattern(24 << 20, 5);
    let expected = data.clone();
    let mut reader = peer.try_clone().unwrap();
    let echo = std::thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        reader.read_exact(&mut got).unwrap();
        assert!(got == expected);
    });
    guest.send_all(socket.id, &data);
    echo.join().unwrap();
    assert!(guest.entry(socket.id).tx_size.load(Acquire) > 16384);
    let expected = data.clone();
    let writer = std::thread::spawn(move || {
        peer.write_all(&data).unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        peer
    });
    let mut got = vec![0; expected.len()];
    guest.recv_exact(socket.id, &mut got);
    assert!(got == expected);
    assert!(guest.recv_to_end(socket.id).is_empty());
    assert!(guest.entry(socket.id).rx_size.load(Acquire) > 16384);
    // Half-closed: this direction still works; then our end, flushed first.
    guest.send_all(socket.id, b"bye");
    assert_eq!(guest.job(Op::Shutdown, socket.id, 1, &[], 0).0, 0);
    let mut rest = Vec::new();
    writer.join().unwrap().read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"bye");
    until("TX_END", || guest.state(socket.id) & state::TX_END != 0);
}

#[test]
fn what_was_written_before_close_is_delivered() {
    let engine = engine();
    let mut guest = Guest::new(&engine, "kernel");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = guest.connect(listener.local_addr().unwrap());
    let peer = timed(listener.accept().unwrap().0);
    // More than the kernel takes at once; the process is gone before the peer reads anything.
    let data = pattern(12 << 20, 9);
    let mut sent = 0;
    let full = std::time::Instant::now();
    while sent < data.len() && full.elapsed() < Duration::from_millis(500) {
        sent += guest.try_send(socket.id, &data[sent..]);
    }
    guest.end_process();
    drop(socket);
    drop(guest);
    let mut got = Vec::new();
    (&peer).read_to_end(&mut got).unwrap();
    assert!(got == data[..sent], "{} of {sent}", got.len());
    assert!(engine.wait_idle_timeout(WATCHDOG));
}

#[test]
fn refused_unread_and_reset() {
    let engine = engine();
    let guest = Guest::new(&engine, "kernel");
    // Refused.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let socket = guest.socket(libc::SOCK_STREAM);
    let (status, ..) =
        guest.job(Op::Connect, socket.id, 0, netkernel_service::SocketAddress::from(closed).as_bytes(), 0);
    assert_eq!(status, -libc::EINPROGRESS);
    until("refused", || guest.state(socket.id) & state::CONNECT_FAILED != 0);
    assert_eq!(guest.entry(socket.id).error.load(Acquire), libc::ECONNREFUSED as u32);
    // Unread data: RST at close.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = guest.connect(listener.local_addr().unwrap());
    let mut peer = timed(listener.accept().unwrap().0);
    peer.write_all(b"unread").unwrap();
    until("bytes", || guest.entry(socket.id).rx_tail.load(Acquire) == 6);
    drop(socket);
    assert_eq!(peer.read(&mut [0; 8]).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    // A peer's RST.
    let socket = guest.connect(listener.local_addr().unwrap());
    let peer = timed(listener.accept().unwrap().0);
    guest.send_all(socket.id, b"unread");
    until("bytes", || peer.peek(&mut [0; 8]).unwrap() == 6);
    drop(peer);
    until("dead", || guest.state(socket.id) & state::DEAD != 0);
    assert_eq!(guest.entry(socket.id).error.load(Acquire), libc::ECONNRESET as u32);
}

#[test]
fn datagrams_with_and_without_a_peer() {
    let engine = engine();
    let guest = Guest::new(&engine, "kernel");
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let native = UdpSocket::bind(address).unwrap();
        native.set_read_timeout(Some(WATCHDOG)).unwrap();
        let to = native.local_addr().unwrap();
        let domain = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let socket = guest.socket_of(domain, libc::SOCK_DGRAM);
        for len in [0usize, 1, 7, 8, 1400, 65507] {
            let data = pattern(len, len as u64);
            guest.send_to(socket.id, Some(to), &data);
            let mut got = vec![0; 70000];
            let (n, from) = native.recv_from(&mut got).unwrap();
            assert!(got[..n] == data);
            assert_eq!(from.port(), guest.local(socket.id).port());
            let reply = pattern(len, 3);
            native.send_to(&reply, from).unwrap();
            assert!(guest.recv_from(socket.id) == (reply, to), "{len}");
        }
        let to_bytes = netkernel_service::SocketAddress::from(to);
        assert_eq!(guest.job(Op::Connect, socket.id, 0, to_bytes.as_bytes(), 0).0, 0);
        for i in 0..2000u32 {
            guest.send_to(socket.id, None, &i.to_le_bytes());
            let mut got = [0; 8];
            assert_eq!(native.recv(&mut got).unwrap(), 4);
            assert_eq!(got[..4], i.to_le_bytes());
        }
        assert_eq!(guest.job(Op::Disconnect, socket.id, 0, &[], 0).0, 0);
    }
}

#[test]
fn urgent_bytes() {
    let engine = engine();
    let guest = Guest::new(&engine, "kernel");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = guest.connect(listener.local_addr().unwrap());
    let mut peer = timed(listener.accept().unwrap().0);
    peer.write_all(b"abc").unwrap();
    use std::os::fd::AsRawFd;
    // SAFETY: one byte, valid for reads.
    assert_eq!(unsafe { libc::send(peer.as_raw_fd(), b"!".as_ptr().cast(), 1, libc::MSG_OOB) }, 1);
    peer.write_all(b"def").unwrap();
    let mut got = [0; 6];
    guest.recv_exact(socket.id, &mut got);
    assert_eq!(&got, b"abcdef");
    until("the urgent byte", || guest.state(socket.id) & state::OOB != 0);
    assert_eq!(guest.entry(socket.id).oob.load(Acquire), 256 | b'!' as u32);
    until("the mark", || guest.state(socket.id) & state::OOB_MARK != 0);
    assert_eq!(guest.entry(socket.id).oob_position.load(Acquire), 3);
    // And out.
    let behind = guest.entry(socket.id).tx_tail.load(Acquire) + 3;
    assert_eq!(guest.job(Op::Urgent, socket.id, behind as u64, &[], 0).0, 0);
    assert_eq!(guest.try_send(socket.id, b"xy?"), 3);
    let mut byte = [0u8];
    until("urgent byte at the peer", || {
        // SAFETY: one byte, valid for writes.
        unsafe {
            libc::recv(peer.as_raw_fd(), byte.as_mut_ptr().cast(), 1, libc::MSG_OOB | libc::MSG_DONTWAIT) == 1
        }
    });
    assert_eq!(byte, [b'?']);
}

#[test]
fn options_and_names_are_the_kernels() {
    let engine = engine();
    let guest = Guest::new(&engine, "cubic");
    let socket = guest.socket(libc::SOCK_STREAM);
    let option = |level, name, value| Nqe::option_data(level, name, value);
    let nodelay = option(libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
    assert_eq!(guest.job(Op::SetOption, socket.id, nodelay, &[], 0).0, 0);
    let (status, _, value) = guest.job(Op::GetOption, socket.id, nodelay, &[], 4);
    assert_eq!((status, value), (0, 1i32.to_ne_bytes().to_vec()));
    for (level, name, errno) in [
        (libc::SOL_SOCKET, libc::SO_MARK, libc::EPERM),
        (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, libc::EPERM),
        (libc::IPPROTO_TCP, 9999, libc::ENOPROTOOPT),
    ] {
        assert_eq!(guest.job(Op::SetOption, socket.id, option(level, name, 1), &[], 0).0, -errno);
    }
    let cc = option(libc::IPPROTO_TCP, libc::TCP_CONGESTION, 0);
    assert_eq!(guest.job(Op::SetOption, socket.id, cc, b"reno", 0).0, -libc::EPERM);
    assert_eq!(guest.job(Op::SetOption, socket.id, cc, b"cubic", 0).0, 0);
    assert_eq!(guest.job(Op::PeerName, socket.id, 0, &[], 0).0, -libc::ENOTCONN);
    // Bound twice; free again as soon as the first is closed.
    let (listener, address) = guest.listen("127.0.0.1:0", 4);
    let bytes = netkernel_service::SocketAddress::from(address);
    assert_eq!(guest.job(Op::Bind, socket.id, 0, bytes.as_bytes(), 0).0, -libc::EADDRINUSE);
    drop(listener);
    assert_eq!(guest.job(Op::Bind, socket.id, 0, bytes.as_bytes(), 0).0, 0);
    // What the engine does not know.
    assert_eq!(guest.job(Op::LocalName, 99, 0, &[], 0).0, -libc::EBADF);
    assert_eq!(guest.job(Op::Fence, 0, 0, &[], 0).0, 0);
    let raw = guest.socket_of(libc::AF_INET, libc::SOCK_RAW);
    assert_eq!(guest.job(Op::LocalName, raw.id, 0, &[], 0).0, -libc::ESOCKTNOSUPPORT);
}

#[test]
fn events_reach_watchers_once_until_taken_and_sleepers_are_woken() {
    use std::os::fd::AsRawFd;
    let engine = engine();
    let guest = Guest::new(&engine, "kernel");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = guest.connect(listener.local_addr().unwrap());
    let mut peer = timed(listener.accept().unwrap().0);
    // An epoll instance's queue set, with a doorbell.
    let bell = netkernel_shm::fds::eventfd().unwrap();
    let set = guest.region.queue_set(5).unwrap();
    set.owner.store(1, SeqCst);
    set.process.store(77, SeqCst);
    guest.tell(Message { kind: kind::DOORBELL, a: 5, ..Message::default() }, &bell);
    let e = guest.entry(socket.id);
    e.watchers[2].store(6, SeqCst);
    set.armed.store(1, SeqCst);
    // Messages before this one were read.
    assert_eq!(guest.job(Op::Fence, 0, 0, &[], 0).0, 0);
    let probe = guest.socket(libc::SOCK_STREAM);
    assert_eq!(guest.job(Op::LocalName, probe.id, 0, &[], 0).0, 0);
    e.waiters.store(2, SeqCst);
    peer.write_all(b"x").unwrap();
    let mut value = [0u8; 8];
    until("the doorbell", || {
        // SAFETY: eight bytes, valid for writes; the eventfd is non-blocking.
        unsafe { libc::read(bell.as_raw_fd(), value.as_mut_ptr().cast(), 8) == 8 }
    });
    let ring = guest.region.receive(5).unwrap();
    let mut head = ring.head();
    let event = Nqe::from_words(ring.pop(&mut head).unwrap().unwrap());
    assert_eq!((event.op, event.socket, event.op_data), (Op::Event as u8, socket.id, libc::EPOLLIN as u64));
    let mut bytes = [1u8; 8];
    until("wake-up bytes", || {
        // SAFETY: eight bytes, valid for writes.
        unsafe {
            libc::recv(
                socket.placeholder.as_raw_fd(),
                bytes.as_mut_ptr().cast(),
                8,
                libc::MSG_DONTWAIT | libc::MSG_PEEK,
            ) == 2
        }
    });
    // The bit was not cleared: no further event.
    peer.write_all(b"y").unwrap();
    until("second byte", || e.rx_tail.load(Acquire) == 2);
    assert!(ring.pop(&mut head).unwrap().is_none());
    e.event_pending.fetch_and(!(1 << 2), SeqCst);
    peer.write_all(b"z").unwrap();
    let mut again = None;
    until("an event again", || {
        again = ring.pop(&mut head).unwrap();
        again.is_some()
    });
}

#[test]
fn a_dead_process_gives_its_queue_sets_and_taken_connections_back() {
    let engine = engine();
    let guest = Guest::new(&engine, "kernel");
    let (listener, address) = guest.listen("127.0.0.1:0", 64);
    let mut stream = timed(TcpStream::connect(address).unwrap());
    let second = Guest::from_fds(engine.attach(&guest.token).unwrap(), 9);
    // The process that owns queue set 9 takes a connection and dies.
    second.take_accepted(listener.id);
    assert_eq!(second.job(Op::Fence, 0, 0, &[], 0).0, 0);
    drop(second);
    let set = guest.region.queue_set(9).unwrap();
    until("queue set 9 is free", || set.owner.load(Acquire) == 0);
    assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
    assert_eq!(engine.status().guests[0].processes, 1);
    // Release by hand.
    guest.push(false, Nqe::new(Op::Release, guest.q as u16, 0));
    let set = guest.region.queue_set(0).unwrap();
    until("queue set 0 is free", || set.owner.load(Acquire) == 0);
}

#[test]
fn idle_sockets_give_their_rings_back_and_get_new_ones() {
    let engine = engine();
    let guest = Guest::new(&engine, "kernel");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = guest.connect(listener.local_addr().unwrap());
    let mut peer = timed(listener.accept().unwrap().0);
    for _ in 0..2 {
        guest.send_all(socket.id, b"ping");
        let mut got = [0; 4];
        peer.read_exact(&mut got).unwrap();
        peer.write_all(b"pong").unwrap();
        guest.recv_exact(socket.id, &mut got);
        let e = guest.entry(socket.id);
        until("rings are taken back", || e.rx_size.load(Acquire) == 0 && e.tx_size.load(Acquire) == 0);
    }
    let sleeps = engine.status().counters.sleeps;
    std::thread::sleep(Duration::from_millis(2500));
    let slept = engine.status().counters.sleeps - sleeps;
    assert!(slept < 20, "an idle guest woke the engine {slept} times in 2.5 s");
}

#[test]
fn a_violation_ends_its_guest_and_nobody_else() {
    let engine = engine();
    let good = Guest::new(&engine, "kernel");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = good.connect(listener.local_addr().unwrap());
    let mut peer = timed(listener.accept().unwrap().0);
    type Crime = fn(&Guest);
    let crimes: [Crime; 7] = [
        |g| g.region.queue_set(0).unwrap().job_tail.store(1 << 20, SeqCst),
        |g| g.push(false, Nqe { op: 250, ..Nqe::ZERO }),
        |g| g.push(false, Nqe::new(Op::Bind, 0, 1 << 30)),
        |g| {
            let socket = g.socket(libc::SOCK_STREAM);
            let (_, theirs) = common::pair();
            g.tell(Message { kind: kind::SOCKET, a: socket.id, b: 2, c: 1, ..Message::default() }, &theirs);
        },
        |g| {
            let (_, theirs) = common::pair();
            g.tell(Message { kind: 99, ..Message::default() }, &theirs);
        },
        |g| g.tell(Message { kind: kind::DOORBELL, a: 0, ..Message::default() }, &common::pair().0),
        |g| g.region.header().active[15].store(u64::MAX, SeqCst),
    ];
    for (i, crime) in crimes.iter().enumerate() {
        let bad = Guest::new(&engine, "kernel");
        let bad_socket = bad.connect(listener.local_addr().unwrap());
        let mut bad_peer = timed(listener.accept().unwrap().0);
        crime(&bad);
        bad.region.header().active[0].fetch_or(1, SeqCst);
        bad.ring_doorbell();
        until(&format!("crime {i} ends the guest"), || engine.guest_count() == 1);
        assert_eq!(bad.region.header().engine_gone.load(Acquire), 1);
        assert!(matches!(bad_peer.read(&mut [0]), Ok(0) | Err(_)));
        drop(bad_socket);
        good.send_all(socket.id, b"still");
        let mut got = [0; 5];
        peer.read_exact(&mut got).unwrap();
    }
    assert_eq!(engine.status().counters.violations, crimes.len() as u64);
}

#[test]
fn an_engine_that_ends_in_order_tells_everybody() {
    use std::os::fd::AsRawFd;
    let engine = engine();
    let guest = Guest::new(&engine, "kernel");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = guest.connect(listener.local_addr().unwrap());
    let mut peer = timed(listener.accept().unwrap().0);
    guest.send_all(socket.id, b"last words");
    engine.shutdown();
    assert_eq!(guest.region.header().engine_gone.load(Acquire), 1);
    let mut byte = 0u8;
    // SAFETY: one byte, valid for writes.
    let n = unsafe { libc::recv(socket.placeholder.as_raw_fd(), (&raw mut byte).cast(), 1, 0) };
    assert_eq!(n, 0, "a sleeper wakes");
    let mut got = Vec::new();
    peer.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"last words");
    assert!(engine.create_guest(netkernel_engine::GuestSpec::default()).is_err());
}

#[test]
fn clear_errors() {
    let engine = engine();
    let spec = |stack: &str| netkernel_engine::GuestSpec { stack: stack.into(), ..Default::default() };
    let error = engine.create_guest(spec("nonsense")).unwrap_err().to_string();
    assert!(error.contains("no stack `nonsense`") && error.contains("kernel"), "{error}");
    assert!(engine.attach(&[0; 16]).is_err());
    assert!(engine.end_guest(7).is_err());
    let mut config = common::config();
    config.nsms = vec![
        netkernel_engine::NsmConfig::kernel("odd", Some("no-such-cc")),
        netkernel_engine::NsmConfig {
            netns: Some("no-such-namespace".into()),
            ..netkernel_engine::NsmConfig::kernel("far", None)
        },
    ];
    let engine = netkernel_engine::Engine::start(config).unwrap();
    let error = engine.create_guest(spec("odd")).unwrap_err().to_string();
    assert!(error.contains("no congestion control `no-such-cc`"), "{error}");
    let error = engine.create_guest(spec("far")).unwrap_err().to_string();
    assert!(error.contains("no network namespace `no-such-namespace`"), "{error}");
    assert!(engine.stacks().iter().all(|stack| !stack.available));
}

#[test]
fn a_doorbell_that_blocks_ends_its_guest() {
    use std::os::fd::AsRawFd;
    let engine = engine();
    let good = Guest::new(&engine, "kernel");
    let bad = Guest::new(&engine, "kernel");
    let (listener, address) = bad.listen("127.0.0.1:0", 4);
    let bell = netkernel_shm::fds::eventfd().unwrap();
    let full = u64::MAX - 1;
    // SAFETY: plain system calls on an own descriptor; eight bytes, valid for reads.
    unsafe {
        assert_eq!(libc::write(bell.as_raw_fd(), (&raw const full).cast(), 8), 8);
        assert_eq!(libc::fcntl(bell.as_raw_fd(), libc::F_SETFL, 0), 0);
    }
    bad.tell(Message { kind: kind::DOORBELL, a: 1, ..Message::default() }, &bell);
    let probe = bad.socket(libc::SOCK_STREAM);
    assert_eq!(bad.job(Op::LocalName, probe.id, 0, &[], 0).0, 0);
    bad.entry(listener.id).watchers[0].store(2, SeqCst);
    bad.region.queue_set(1).unwrap().armed.store(1, SeqCst);
    let _client = TcpStream::connect(address).unwrap();
    until("the guest is ended", || engine.guest_count() == 1);
    let echo = TcpListener::bind("127.0.0.1:0").unwrap();
    good.connect(echo.local_addr().unwrap());
}

/// A TCP socket whose last close takes ten minutes, and its peer.
fn lingering() -> (TcpStream, TcpStream) {
    use std::os::fd::AsRawFd;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 65536]).is_ok() {}
    let linger = libc::linger { l_onoff: 1, l_linger: 600 };
    let size = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: linger is valid for reads of its size.
    let r = unsafe {
        let pointer = (&raw const linger).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, pointer, size)
    };
    assert_eq!(r, 0);
    (socket, peer)
}

#[test]
fn a_descriptor_whose_close_waits_stops_nobody() {
    let engine = engine();
    let good = Guest::new(&engine, "kernel");
    let echo = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut peers = Vec::new();
    for kind in [kind::SOCKET, kind::DOORBELL, kind::AGENT, 77] {
        let bad = Guest::new(&engine, "kernel");
        let (socket, peer) = lingering();
        let socket = socket.into();
        bad.tell(Message { kind, a: 1, b: 2, c: 1, ..Message::default() }, &socket);
        // If the engine closed its copy before, this one waits.
        std::thread::spawn(move || drop(socket));
        until("the guest is ended", || engine.guest_count() == 1);
        good.connect(echo.local_addr().unwrap());
        peers.push(peer);
    }
    // On its way through a placeholder: it is there before the engine has the other end, or it cannot get there.
    for before in [true, false] {
        let bad = Guest::new(&engine, "kernel");
        let (socket, peer) = lingering();
        let (ours, theirs) = netkernel_shm::fds::pair(libc::SOCK_STREAM).unwrap();
        let hide = |socket: &TcpStream| {
            use std::os::fd::AsRawFd;
            netkernel_shm::fds::send(ours.as_raw_fd(), b"x", &[socket.as_raw_fd()], 0).is_ok()
        };
        if before {
            assert!(hide(&socket));
        }
        bad.tell(Message { kind: kind::SOCKET, a: 1, b: 2, c: 1, ..Message::default() }, &theirs);
        if before {
            until("the guest is ended", || engine.guest_count() == 1);
        } else {
            until("the end is shut", || {
                netkernel_shm::fds::send(
                    std::os::fd::AsRawFd::as_raw_fd(&ours),
                    b"x",
                    &[],
                    libc::MSG_DONTWAIT,
                )
                .is_err()
            });
            assert!(!hide(&socket));
        }
        // The engine's copy of `theirs` is the last one but ours.
        drop((theirs, ours));
        good.connect(echo.local_addr().unwrap());
        drop(bad);
        until("the guest is over", || engine.guest_count() == 1);
        std::mem::forget(socket);
        peers.push(peer);
    }
}

#[test]
fn low_ports_are_for_roots_guests() {
    let engine = engine();
    let spec = netkernel_engine::GuestSpec { uid: 1000, ..Default::default() };
    let guest = Guest::from_fds(engine.create_guest(spec).unwrap(), 0);
    let socket = guest.socket(libc::SOCK_STREAM);
    let low = netkernel_service::SocketAddress::from("127.0.0.1:81".parse::<std::net::SocketAddr>().unwrap());
    assert_eq!(guest.job(Op::Bind, socket.id, 0, low.as_bytes(), 0).0, -libc::EACCES);
}
