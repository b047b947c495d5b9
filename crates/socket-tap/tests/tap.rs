//! Marked sockets of this process, beside others. Only root may look.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use netkernel_socket_tap::{Packet, Ring, SocketTap};

const WATCHDOG: Duration = Duration::from_secs(20);

fn contains(packet: &Packet, word: &str) -> bool {
    packet.data.windows(word.len()).any(|window| window == word.as_bytes())
}

/// Takes packets until one has the word.
fn until(ring: &mut Ring, seen: &mut Vec<Packet>, mark: u32, word: &str) {
    let deadline = Instant::now() + WATCHDOG;
    while !seen.iter().any(|packet| packet.mark == mark && contains(packet, word)) {
        assert!(Instant::now() < deadline, "no {word} of {mark} in {} packets", seen.len());
        match ring.take() {
            Some(packet) => seen.push(packet),
            None => ring.wait(Duration::from_millis(50)),
        }
    }
}

#[test]
fn packets_of_marked_sockets_come_and_no_others() {
    let (tap, mut ring) = match SocketTap::start() {
        Ok(started) => started,
        // SAFETY: cannot fail and touches no memory.
        Err(error) if unsafe { libc::geteuid() } != 0 => return eprintln!("NOT RUN: only root may: {error}"),
        Err(error) => panic!("{error}"),
    };
    let mut seen = Vec::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let talk = |word: &str| {
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(word.as_bytes()).unwrap();
        let mut got = vec![0; word.len()];
        server.read_exact(&mut got).unwrap();
        server.write_all(b"answer-to-").unwrap();
        server.write_all(&got).unwrap();
        let mut got = vec![0; 10 + word.len()];
        client.read_exact(&mut got).unwrap();
    };
    talk("before-anything");
    // Connections have the mark of their listener.
    tap.mark(listener.as_fd(), 7).unwrap();
    talk("to-the-listener");
    until(&mut ring, &mut seen, 7, "to-the-listener");
    until(&mut ring, &mut seen, 7, "answer-to-");
    // SYN: from the first packet on.
    assert!(seen.iter().any(|packet| packet.data[0] == 0x45 && packet.data[33] == 2), "{seen:?}");

    // A socket that connects, of IPv6, among others.
    let six = TcpListener::bind("[::1]:0").unwrap();
    let mut marked = TcpStream::connect(six.local_addr().unwrap()).unwrap();
    let mut other = TcpStream::connect(six.local_addr().unwrap()).unwrap();
    tap.mark(marked.as_fd(), 8).unwrap();
    other.write_all(b"of-the-other-one").unwrap();
    // More than a page, and than what one packet takes.
    let large = vec![b'x'; 300_000];
    let reader = std::thread::spawn(move || {
        let (mut server, _) = six.accept().unwrap();
        let mut bytes = Vec::new();
        server.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    marked.write_all(&large).unwrap();
    marked.write_all(b"end-of-the-large-one").unwrap();
    drop(marked);
    assert_eq!(reader.join().unwrap(), 300_020);
    until(&mut ring, &mut seen, 8, "end-of-the-large-one");
    let payload: usize = seen
        .iter()
        .filter(|packet| packet.mark == 8 && packet.data[0] >> 4 == 6)
        .map(|packet| packet.data.iter().filter(|byte| **byte == b'x').count())
        .sum();
    assert!((300_000..302_000).contains(&payload), "{payload}");
    assert!(seen.iter().all(|packet| packet.length == packet.data.len()));

    // Datagrams. What a socket was marked with last holds.
    let [a, b] = [0, 1].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
    tap.mark(a.as_fd(), 1).unwrap();
    tap.mark(a.as_fd(), 9).unwrap();
    a.send_to(b"datagram-out", b.local_addr().unwrap()).unwrap();
    b.send_to(b"datagram-in", a.local_addr().unwrap()).unwrap();
    until(&mut ring, &mut seen, 9, "datagram-out");
    until(&mut ring, &mut seen, 9, "datagram-in");
    assert!(!seen.iter().any(|packet| packet.mark == 1));
    assert!(!seen.iter().any(|packet| contains(packet, "of-the-other-one")), "an unmarked socket's");
    assert!(!seen.iter().any(|packet| contains(packet, "before-anything")));
    assert_eq!(tap.lost(), 0);

    // Nobody reads: what finds no room is counted, and nothing waits.
    for _ in 0..20_000 {
        a.send_to(&[b'l'; 1000], b.local_addr().unwrap()).unwrap();
    }
    assert!(tap.lost() > 0);
    drop(tap);
    while ring.take().is_some() {}
    a.send_to(b"after-the-end", b.local_addr().unwrap()).unwrap();
    assert_eq!(ring.take(), None);
}
