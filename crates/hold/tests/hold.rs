//! The real kernel, in the namespace of the test. Needs CAP_NET_ADMIN.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use netkernel_hold::{Hold, Packet};

const TCP: u8 = 6;
const UDP: u8 = 17;
const WATCHDOG: Duration = Duration::from_secs(20);

/// Lets all go until `enough`, and says what was of interest.
fn let_go(
    hold: &mut Hold,
    interesting: impl Fn(&Packet) -> bool,
    mut enough: impl FnMut(&[Packet]) -> bool,
) -> Vec<Packet> {
    let began = Instant::now();
    let mut all = Vec::new();
    while !enough(&all) {
        assert!(began.elapsed() < WATCHDOG, "{all:?}");
        let mut new = Vec::new();
        hold.receive(64, |packet| new.push(packet));
        for packet in new {
            hold.release(packet.id);
            if interesting(&packet) {
                all.push(packet);
            }
        }
        hold.flush();
        std::thread::sleep(Duration::from_millis(1));
    }
    all
}

#[test]
fn packets_wait_until_they_are_let_go_and_say_what_they_are() {
    let mut hold = Hold::open().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = listener.local_addr().unwrap();
    // A connection's first packet waits whatever ports are watched.
    let connecting = std::thread::spawn(move || TcpStream::connect(name).unwrap());
    let first = let_go(&mut hold, |packet| packet.flow.peer == name, |all| !all.is_empty());
    assert!(first[0].begins && first[0].payload == 0 && first[0].acknowledges.is_none());
    let mut client = connecting.join().unwrap();
    let own = client.local_addr().unwrap();
    let (mut server, _) = listener.accept().unwrap();

    hold.watch(&BTreeSet::from([(TCP, own.port())])).unwrap();
    client.write_all(&[7; 100_000]).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut bytes = vec![0; 100_000];
    assert!(server.read(&mut bytes).is_err(), "it waits");
    let from_client = |packet: &Packet| packet.flow.local == own && packet.flow.peer == name;
    let sent =
        let_go(&mut hold, from_client, |all| all.iter().map(|packet| packet.payload).sum::<u32>() >= 100_000);
    assert_eq!(sent.iter().map(|packet| packet.payload).sum::<u32>(), 100_000, "{sent:?}");
    server.set_read_timeout(Some(WATCHDOG)).unwrap();
    server.read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 7));

    // The other way: what is acknowledged.
    let acknowledged = sent[0].acknowledges.unwrap();
    server.write_all(&[9; 5000]).unwrap();
    client.read_exact(&mut bytes[..5000]).unwrap();
    let upto = |all: &[Packet]| {
        all.last().and_then(|packet| packet.acknowledges) == Some(acknowledged.wrapping_add(5000))
    };
    let_go(&mut hold, from_client, upto);

    // Datagrams, and what is not watched any more.
    let (one, other) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    hold.watch(&BTreeSet::from([(UDP, one.local_addr().unwrap().port())])).unwrap();
    client.write_all(&[1; 10]).unwrap();
    server.read_exact(&mut bytes[..10]).unwrap();
    one.send_to(&[5; 333], other.local_addr().unwrap()).unwrap();
    let sent = let_go(&mut hold, |packet| packet.flow.protocol == UDP, |all| !all.is_empty());
    assert_eq!(sent[0].payload, 333);
    other.set_read_timeout(Some(WATCHDOG)).unwrap();
    assert_eq!(other.recv(&mut bytes).unwrap(), 333);

    // Without it, nothing waits.
    one.send_to(&[5; 1], other.local_addr().unwrap()).unwrap();
    let_go(&mut hold, |packet| packet.flow.protocol == UDP, |all| !all.is_empty());
    drop(hold);
    assert_eq!(other.recv(&mut bytes).unwrap(), 1);
    one.send_to(&[5; 2], other.local_addr().unwrap()).unwrap();
    assert_eq!(other.recv(&mut bytes).unwrap(), 2);
}
