//! Two stacks on a cable that the test carries frames over, and a clock that it can set.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use libc::{AF_INET, SOCK_STREAM};
use netkernel_service::GuestBytes;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Address, Ipv4Packet,
    Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, TcpTimestampRepr,
};

use super::*;

const A: Ipv4Address = Ipv4Address::new(10, 9, 0, 2);
const B: Ipv4Address = Ipv4Address::new(10, 9, 0, 3);
const STRANGER: EthernetAddress = EthernetAddress([2, 9, 9, 9, 9, 9]);
/// No wait takes longer.
const WATCHDOG: Duration = Duration::from_secs(30);

struct Side {
    stack: SmoltcpStack,
    end: UnixDatagram,
    reports: Vec<Ready>,
    /// Frames that it sent.
    sent: Vec<Vec<u8>>,
}

impl Side {
    fn new(address: Ipv4Address) -> Side {
        let (wire, end) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        end.set_nonblocking(true).unwrap();
        let addresses = vec![Cidr { address: address.into(), prefix: 24 }];
        let config = SmoltcpConfig { addresses, ..SmoltcpConfig::default() };
        let wire = File::from(OwnedFd::from(wire));
        let stack = SmoltcpStack::over(Some(wire), &config).unwrap();
        Side { stack, end, reports: Vec::new(), sent: Vec::new() }
    }

    /// Lets the stack run, and gives what it sent.
    fn turn(&mut self) -> Vec<Vec<u8>> {
        self.stack.poll(&mut self.reports, 100);
        let mut frames = Vec::new();
        let mut buffer = [0; 2000];
        while let Ok(n) = self.end.recv(&mut buffer) {
            frames.push(buffer[..n].to_vec());
        }
        self.sent.extend(frames.iter().cloned());
        frames
    }

    /// A frame of somebody on the cable.
    fn inject(&mut self, frame: &[u8]) {
        self.end.send(frame).unwrap();
        self.turn();
    }

    fn open(&mut self, key: u64) -> Handle {
        self.stack.open(key, AF_INET, SOCK_STREAM, 0).unwrap()
    }

    fn listener(&mut self, port: u16) -> Handle {
        let listener = self.open(1);
        self.stack.bind(listener, &at(Ipv4Address::UNSPECIFIED, port)).unwrap();
        self.stack.listen(listener, 8).unwrap();
        listener
    }

    fn send(&mut self, handle: Handle, data: &[u8]) -> Result<usize, Errno> {
        self.stack.send(handle, &segments(&mut data.to_vec()), SendFlags::default())
    }

    fn recv(&mut self, handle: Handle) -> Result<Vec<u8>, Errno> {
        let mut into = vec![0; 4096];
        let received = self.stack.recv(handle, &segments(&mut into))?;
        Ok(into[..received.bytes].to_vec())
    }

    /// Asserts that the engine may sleep: what is due lies ahead.
    #[track_caller]
    fn sleeps(&mut self) {
        for _ in 0..10 {
            self.turn();
        }
        let now = self.stack.now_ns();
        let due = self.stack.deadline_ns();
        assert!(due.is_none_or(|due| due > now), "due {due:?}, and it is {now}: the engine spins");
    }

    fn sockets(&self) -> usize {
        self.stack.sockets.iter().flatten().count()
    }
}

struct Cable {
    a: Side,
    b: Side,
}

impl Cable {
    fn new() -> Cable {
        Cable { a: Side::new(A), b: Side::new(B) }
    }

    fn turn(&mut self) {
        for frame in self.a.turn() {
            self.b.end.send(&frame).unwrap();
        }
        for frame in self.b.turn() {
            self.a.end.send(&frame).unwrap();
        }
    }

    #[track_caller]
    fn until<R>(&mut self, mut condition: impl FnMut(&mut Cable) -> Option<R>) -> R {
        let patience = Instant::now() + WATCHDOG;
        loop {
            self.turn();
            if let Some(result) = condition(self) {
                return result;
            }
            assert!(Instant::now() < patience, "it never happens");
            std::thread::yield_now();
        }
    }

    fn later(&mut self, time: Duration) {
        for side in [&mut self.a, &mut self.b] {
            side.stack.ahead_ns += time.as_nanos() as u64;
        }
    }

    /// A socket of A that is connected to one of B.
    fn pair(&mut self) -> (Handle, Handle) {
        let listener = self.b.listener(80);
        let client = self.a.open(2);
        assert_eq!(self.a.stack.connect(client, &at(B, 80)), Ok(Connect::Begun));
        let server = self.until(|cable| cable.b.stack.accept(listener, 3).ok()).handle;
        self.until(|cable| cable.a.stack.peer_name(client).ok());
        (client, server)
    }

    /// Bytes go both ways.
    #[track_caller]
    fn talk(&mut self, client: Handle, server: Handle) {
        assert_eq!(self.a.send(client, b"question"), Ok(8));
        assert_eq!(self.until(|cable| cable.b.recv(server).ok()), b"question");
        assert_eq!(self.b.send(server, b"answer"), Ok(6));
        assert_eq!(self.until(|cable| cable.a.recv(client).ok()), b"answer");
        // Acknowledgements may take their time.
        self.until(|cable| {
            let sides = [(&mut cable.a, client), (&mut cable.b, server)];
            let left = sides.map(|(side, handle)| side.stack.ioctl(handle, libc::TIOCOUTQ));
            (left == [Ok(0); 2]).then_some(())
        });
    }
}

fn at(address: Ipv4Address, port: u16) -> SocketAddress {
    std::net::SocketAddr::from((address, port)).into()
}

#[allow(unsafe_code)]
fn segments(bytes: &mut [u8]) -> Segments {
    // SAFETY: a stack uses the bytes during the call only, for which the caller's borrow lasts.
    let run = unsafe { GuestBytes::new(bytes.as_mut_ptr(), bytes.len()) };
    Segments { first: run, second: GuestBytes::EMPTY }
}

fn ethernet(to: EthernetAddress, kind: EthernetProtocol, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; 14 + len];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    frame.set_src_addr(STRANGER);
    frame.set_dst_addr(to);
    frame.set_ethertype(kind);
    bytes
}

/// A TCP segment as a stranger on the cable sends it.
fn segment(
    to: EthernetAddress,
    ends: [(Ipv4Address, u16); 2],
    control: TcpControl,
    seq: i32,
    ack: Option<i32>,
) -> Vec<u8> {
    let [(from, from_port), (address, port)] = ends;
    let tcp = TcpRepr {
        src_port: from_port,
        dst_port: port,
        control,
        seq_number: TcpSeqNumber(seq),
        ack_number: ack.map(TcpSeqNumber),
        window_len: 1000,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None::<TcpTimestampRepr>,
        payload: &[],
    };
    let ip = Ipv4Repr {
        src_addr: from,
        dst_addr: address,
        next_header: IpProtocol::Tcp,
        payload_len: tcp.buffer_len(),
        hop_limit: 64,
    };
    let checksums = ChecksumCapabilities::default();
    let mut bytes = ethernet(to, EthernetProtocol::Ipv4, ip.buffer_len() + tcp.buffer_len());
    let mut packet = Ipv4Packet::new_unchecked(&mut bytes[14..]);
    ip.emit(&mut packet, &checksums);
    tcp.emit(&mut TcpPacket::new_unchecked(packet.payload_mut()), &from.into(), &address.into(), &checksums);
    bytes
}

/// Somebody says that `claimed` is at the stranger's.
fn arp(to: EthernetAddress, claimed: Ipv4Address, asked: Ipv4Address) -> Vec<u8> {
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: STRANGER,
        source_protocol_addr: claimed,
        target_hardware_addr: to,
        target_protocol_addr: asked,
    };
    let mut bytes = ethernet(to, EthernetProtocol::Arp, arp.buffer_len());
    arp.emit(&mut ArpPacket::new_unchecked(&mut bytes[14..]));
    bytes
}

fn hardware(side: &Side) -> EthernetAddress {
    let smoltcp::wire::HardwareAddress::Ethernet(address) = side.stack.interface.hardware_addr();
    address
}

#[test]
fn a_handshake_that_nobody_ends_is_given_up() {
    let mut side = Side::new(A);
    let listener = side.listener(80);
    side.inject(&arp(hardware(&side), B, A));
    side.inject(&segment(hardware(&side), [(B, 4000), (A, 80)], TcpControl::Syn, 7, None));
    assert_eq!(side.sockets(), 2);
    for _ in 0..150 {
        side.stack.ahead_ns += SECOND;
        side.sleeps();
    }
    assert_eq!(side.sockets(), 1, "the half-open connection takes a place for ever");
    let Some(Socket { body: Body::Listener { half_open, .. }, .. }) =
        &side.stack.sockets[listener.0 as usize]
    else {
        panic!("it listens")
    };
    assert_eq!(*half_open, 0);
}

#[test]
fn a_forged_reset_changes_nothing() {
    let mut cable = Cable::new();
    let (client, server) = cable.pair();
    let port = cable.a.stack.local_name(client).unwrap().to_std().unwrap().port();
    let to = hardware(&cable.a);
    cable.a.inject(&segment(to, [(B, 80), (A, port)], TcpControl::Rst, 12345, None));
    cable.talk(client, server);
    // An end in order is one, whatever was tried.
    cable.b.stack.close(server, Close::Graceful);
    assert_eq!(cable.until(|cable| cable.a.recv(client).ok()), b"");
    cable.a.stack.shutdown(client, Shutdown::Both).unwrap();
    cable.until(|cable| (cable.a.stack.peer_name(client).is_err()).then_some(()));
    assert_eq!(cable.a.stack.take_error(client), Ok(()));
}

#[test]
fn silence_does_not_end_a_connection() {
    for user_timeout in [0, 2000] {
        let mut cable = Cable::new();
        let (client, server) = cable.pair();
        let value = i32::to_ne_bytes(user_timeout);
        cable.a.stack.set_option(client, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, &value).unwrap();
        for _ in 0..3 {
            cable.talk(client, server);
            cable.later(Duration::from_secs(3600));
            cable.a.sleeps();
            cable.b.sleeps();
        }
        cable.talk(client, server);
        // Nor does what follows a long silence end at once.
        cable.later(Duration::from_secs(3600));
        cable.a.stack.shutdown(client, Shutdown::Write).unwrap();
        assert_eq!(cable.until(|cable| cable.b.recv(server).ok()), b"");
        cable.later(Duration::from_secs(3600));
        assert_eq!(cable.b.send(server, b"late"), Ok(4));
        assert_eq!(cable.until(|cable| cable.a.recv(client).ok()), b"late");
    }
}

#[test]
fn who_does_not_acknowledge_is_given_up() {
    for (user_timeout, seconds) in [(0, 924), (5000, 5)] {
        for finish in [false, true] {
            let mut cable = Cable::new();
            let (client, server) = cable.pair();
            cable.talk(client, server);
            let value = i32::to_ne_bytes(user_timeout);
            cable.a.stack.set_option(client, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, &value).unwrap();
            // From here on nothing is carried.
            if finish {
                cable.a.stack.shutdown(client, Shutdown::Write).unwrap();
            } else {
                assert_eq!(cable.a.send(client, b"lost"), Ok(4));
            }
            for second in 0..seconds - 1 {
                cable.a.turn();
                assert_eq!(cable.a.recv(client), Err(Errno::AGAIN), "after {second} s");
                cable.later(Duration::from_secs(1));
            }
            cable.a.sleeps();
            cable.later(Duration::from_secs(2));
            cable.a.turn();
            assert_eq!(cable.a.recv(client), Err(Errno(libc::ETIMEDOUT)), "{user_timeout} {finish}");
            cable.a.sleeps();
        }
    }
}

#[test]
fn keep_alive_finds_out_who_is_gone() {
    let mut cable = Cable::new();
    let (client, server) = cable.pair();
    for (level, name, value) in
        [(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1), (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 10)]
    {
        cable.a.stack.set_option(client, level, name, &i32::to_ne_bytes(value)).unwrap();
    }
    cable.talk(client, server);
    // A peer that answers is there.
    for _ in 0..200 {
        cable.later(Duration::from_secs(10));
        for _ in 0..4 {
            cable.turn();
        }
    }
    cable.talk(client, server);
    // One that does not is given up after ten seconds and nine probes, 75 seconds apart.
    let mut seconds = 0;
    while cable.a.recv(client) == Err(Errno::AGAIN) {
        cable.later(Duration::from_secs(1));
        cable.a.sleeps();
        seconds += 1;
        assert!(seconds < 1000, "never");
    }
    assert!((680..=690).contains(&seconds), "{seconds}");
}

#[test]
fn own_addresses_are_nobody_elses() {
    let mut side = Side::new(A);
    let listener = side.listener(80);
    let to = hardware(&side);
    for claimed in [A, Ipv4Address::LOCALHOST] {
        // The stack finds itself first; then somebody says that it is elsewhere.
        for round in 0..2 {
            let client = side.open(10 + round);
            side.stack.connect(client, &at(claimed, 80)).unwrap();
            // smoltcp asks for one neighbour a second.
            let accepted = (0..100).any(|_| {
                side.stack.ahead_ns += SECOND / 20;
                side.turn();
                side.stack.accept(listener, 20).is_ok()
            });
            assert!(accepted, "{claimed}, round {round}");
            side.inject(&arp(to, claimed, A));
        }
    }
    let lost: Vec<&Vec<u8>> = side.sent.iter().filter(|frame| frame[..6] == STRANGER.0).collect();
    assert!(lost.is_empty(), "frames between own sockets went out: {lost:02x?}");
    // Nor do connections come from there.
    let before = side.sockets();
    side.inject(&segment(to, [(A, 4000), (A, 80)], TcpControl::Syn, 7, None));
    assert_eq!(side.sockets(), before);
}

#[test]
fn a_connection_that_waits_for_late_segments_costs_no_turns() {
    let mut cable = Cable::new();
    let (client, server) = cable.pair();
    cable.a.stack.close(client, Close::Graceful);
    cable.turn();
    cable.turn();
    // The peer ends its direction just before the place would be taken back.
    cable.later(Duration::from_secs(57));
    cable.b.stack.close(server, Close::Graceful);
    for _ in 0..10 {
        cable.turn();
    }
    cable.later(Duration::from_secs(5));
    cable.a.sleeps();
    cable.later(Duration::from_secs(10));
    cable.a.sleeps();
    assert_eq!(cable.a.sockets(), 0);
}
