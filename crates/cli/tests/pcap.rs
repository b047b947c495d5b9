//! `netkernel pcap`: what a tenant's guests send and receive, whole and in order, and nobody else's bytes.

mod common;

use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;

use common::{Engine, Place, echo, finish, until};

/// Says its word to a TCP and a UDP server, which say it again, and a lot of bytes to the first.
const CLIENT: &str = "import socket, sys
port, udp, word, n = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode(), int(sys.argv[4])
s = socket.create_connection(('127.0.0.1', port))
s.sendall(word + b'x' * n)
s.shutdown(socket.SHUT_WR)
got = b''
while data := s.recv(65536):
    got += data
assert got == word + b'x' * n, len(got)
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.connect(('127.0.0.1', udp))
u.send(word)
assert u.recv(100) == word
";

fn servers() -> (String, String) {
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = udp.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut bytes = [0; 100];
        while let Ok((n, from)) = udp.recv_from(&mut bytes) {
            udp.send_to(&bytes[..n], from).unwrap();
        }
    });
    (echo().to_string(), port.to_string())
}

/// The packets of a pcapng file, from their IP headers on.
fn packets(file: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(file).unwrap();
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let (mut at, mut found) = (0, Vec::new());
    while at < bytes.len() {
        let length = number(at + 4);
        assert_eq!(number(at + length - 4), length, "both ends of a block say how long it is");
        if number(at) == 6 {
            found.push(bytes[at + 28..at + 28 + number(at + 20)].to_vec());
        }
        at += length;
    }
    found
}

fn contains(bytes: &[u8], word: &str) -> bool {
    bytes.windows(word.len()).any(|window| window == word.as_bytes())
}

struct Setting {
    place: Place,
    socket: String,
    token: String,
    client: String,
    ports: (String, String),
}

impl Setting {
    fn new(name: &str) -> (Setting, Engine) {
        let place = Place::new(name);
        let token = place.file("token", "blue-token-of-thirty-two-characters\n").display().to_string();
        let config = format!(
            "[[nsm]]\nname = \"plain\"\n[[nsm]]\nname = \"memory\"\nstack = \"shm\"\n[[nsm]]\nname = \"own\"\nform = \"process\"\n[[tenant]]\nname = \"blue\"\ntoken_file = \"{token}\"\n"
        );
        let config = place.file("engine.toml", &config);
        let socket = place.socket().display().to_string();
        let engine = place.up(&["--socket", &socket, "--config", config.to_str().unwrap()]);
        let client = place.file("client.py", CLIENT).display().to_string();
        (Setting { place, socket, token, client, ports: servers() }, engine)
    }

    /// Begins to capture; returns when the engine knows.
    fn capture(&self, target: &str, file: &Path) -> Engine {
        let args = ["pcap", "--socket", &self.socket, target, "-w", file.to_str().unwrap()];
        let capture = Engine::of(self.place.netkernel(&args).spawn().unwrap());
        until("the capture began", || std::fs::metadata(file).is_ok_and(|file| file.len() > 0));
        capture
    }

    fn guest(&self, blue: bool, how: &[&str], word: &str, bytes: &str) {
        let mut args = vec!["run", "--socket", &self.socket];
        if blue {
            args.extend(["--tenant-token", &self.token]);
        }
        args.extend(how);
        args.extend(["--", "python3", &self.client, &self.ports.0, &self.ports.1, word, bytes]);
        self.place.run(&args).succeeds();
    }
}

#[test]
fn a_tenants_packets_are_whole_and_nobody_elses_are_among_them() {
    let (setting, engine) = Setting::new("pcap");
    let file = setting.place.dir.join("blue.pcapng");
    let capture = setting.capture("blue", &file);
    let ways = [["--stack", "plain"], ["--attach", "relay"], ["--stack", "memory"], ["--stack", "own"]];
    for (i, how) in ways.iter().enumerate() {
        setting.guest(false, how, &format!("foreign-{i}"), "70000");
        setting.guest(true, how, &format!("own-word-{i}"), "70000");
        setting.guest(false, how, &format!("foreign-{i}"), "70000");
    }
    until("all was written", || {
        packets(&file).iter().filter(|packet| packet[9] == 17 && contains(packet, "own-word-3")).count() == 2
    });
    capture.end();

    let found = packets(&file);
    assert!(!found.iter().any(|packet| contains(packet, "foreign")), "another's bytes");
    let server: u16 = setting.ports.0.parse().unwrap();
    let port = |packet: &[u8], at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    let tcp: Vec<&Vec<u8>> = found.iter().filter(|packet| packet[9] == 6).collect();
    for i in 0..ways.len() {
        let word = format!("own-word-{i}");
        let first = tcp.iter().find(|packet| contains(packet, &word)).unwrap();
        let own = port(first, 20);
        assert_eq!(port(first, 22), server, "the first one is sent");
        // Both directions, put together by their sequence numbers.
        for (at, what) in [(20, "sent"), (22, "received")] {
            let mut stream = vec![0; 70_000 + word.len()];
            let mut flags = 0;
            for packet in tcp.iter().filter(|packet| port(packet, at) == own) {
                flags |= packet[33];
                let sequence = u32::from_be_bytes(packet[24..28].try_into().unwrap()) as usize;
                if let payload @ [_, ..] = &packet[40..] {
                    stream[sequence - 1..sequence - 1 + payload.len()].copy_from_slice(payload);
                }
            }
            let wanted = [word.as_bytes(), &vec![b'x'; 70_000]].concat();
            assert!(stream == wanted, "{what} by {word}");
            assert_eq!(flags & 3, 3, "SYN and FIN, {what} by {word}");
        }
        let udp = found.iter().filter(|packet| packet[9] == 17 && packet[28..] == *word.as_bytes());
        assert_eq!(udp.count(), 2, "datagrams of {word}");
    }

    // Others can read it.
    if Command::new("tcpdump").arg("--version").output().is_ok() {
        let mut tcpdump = Command::new("tcpdump");
        tcpdump.args(["-nvr", file.to_str().unwrap()]);
        let done = finish(tcpdump);
        let text = &done.succeeds().out;
        assert!(text.contains("Flags [S]") && text.contains("UDP") && !text.contains("incorrect"), "{text}");
    }
    engine.end();
}

#[test]
fn a_guest_is_captured_from_the_middle_of_a_connection_until_the_end() {
    let (setting, engine) = Setting::new("pcap-guest");
    let program = "import socket, sys
s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
s.sendall(b'before')
print('ready', flush=True)
sys.stdin.readline()
s.sendall(b'after')
s.shutdown(socket.SHUT_WR)
assert s.recv(100) == b'beforeafter'
";
    let program = setting.place.file("middle.py", program);
    let mut guest = setting.place.netkernel(&["run", "--socket", &setting.socket, "--", "python3"]);
    guest.arg(&program).arg(&setting.ports.0);
    guest.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut guest = guest.spawn().unwrap();
    let mut line = [0; 6];
    guest.stdout.take().unwrap().read_exact(&mut line).unwrap();
    let file = setting.place.dir.join("guest.pcapng");
    let capture = setting.capture("1", &file);
    guest.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert!(common::wait(&mut guest, "the guest").success());
    until("all was written", || packets(&file).iter().any(|packet| contains(packet, "beforeafter")));
    let found = packets(&file);
    assert!(contains(&found[0], "after") && !contains(&found[0], "before"), "{found:?}");
    // The engine ends, and so does the capture.
    engine.end();
    let status = capture.wait();
    assert_eq!(status.code(), Some(0));
    let place = &setting.place;
    place
        .run(&["pcap", "--socket", &setting.socket, "1", "-w", "/dev/null"])
        .fails(125, &["no engine answers"]);
}

#[test]
fn whom_nobody_knows_is_not_captured() {
    let (setting, engine) = Setting::new("pcap-nobody");
    let run =
        |target: &str| setting.place.run(&["pcap", "--socket", &setting.socket, target, "-w", "/dev/null"]);
    run("red").fails(125, &["no tenant 'red'"]);
    run("77").fails(125, &["no guest 77"]);
    // Captures are few.
    let files: Vec<_> = (0..9).map(|i| setting.place.dir.join(format!("{i}.pcapng"))).collect();
    let captures: Vec<Engine> = files[..8].iter().map(|file| setting.capture("blue", file)).collect();
    run("blue").fails(125, &["8 captures are under way"]);
    captures.into_iter().for_each(Engine::end);
    until("a place is free again", || {
        let mut one = setting.place.netkernel(&["pcap", "--socket", &setting.socket, "blue", "-w"]);
        let mut child = one.arg(&files[8]).stderr(std::process::Stdio::null()).spawn().unwrap();
        let began = loop {
            if std::fs::metadata(&files[8]).is_ok_and(|file| file.len() > 0) {
                break true;
            }
            if child.try_wait().unwrap().is_some() {
                break false;
            }
        };
        let _ = child.kill();
        let _ = child.wait();
        began
    });
    engine.end();
}
