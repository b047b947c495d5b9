//! server PORT: an echo, a thread for each connection. client PORT: std's sockets against it.
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let port: u16 = arguments[2].parse().unwrap();
    if arguments[1] == "server" {
        for stream in TcpListener::bind(("127.0.0.1", port)).unwrap().incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut copy = stream.try_clone().unwrap();
                std::io::copy(&mut stream, &mut copy).unwrap();
                copy.shutdown(Shutdown::Write).unwrap();
            });
        }
    }
    let clients: Vec<_> = (0..8u8)
        .map(|n| {
            std::thread::spawn(move || {
                let data: Vec<u8> = (0..1_000_000u32).map(|i| (i.wrapping_mul(2654435761) >> 11) as u8 ^ n).collect();
                let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
                assert_eq!(stream.peer_addr().unwrap().port(), port);
                stream.set_nodelay(true).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
                let mut writer = stream.try_clone().unwrap();
                let sent = data.clone();
                let writer = std::thread::spawn(move || {
                    writer.write_all(&sent).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                let mut got = Vec::new();
                stream.read_to_end(&mut got).unwrap();
                writer.join().unwrap();
                assert!(got == data);
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    let refused = TcpStream::connect("127.0.0.1:1").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let (one, two) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    one.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    two.send_to(b"ping", one.local_addr().unwrap()).unwrap();
    let mut bytes = [0; 16];
    assert_eq!(one.recv_from(&mut bytes).unwrap(), (4, two.local_addr().unwrap()));
    println!("ok");
}
