//! The control server against clients that do not behave.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use netkernel_control::*;

const WATCHDOG: Duration = Duration::from_secs(30);

/// An engine of descriptors without meaning.
#[derive(Default)]
struct Fake {
    stops: AtomicUsize,
}

fn guest(id: u32, uid: u32) -> GuestInfo {
    GuestInfo {
        id,
        name: format!("guest-{id}"),
        stack: "kernel".into(),
        pid: 1,
        uid,
        processes: 1,
        sockets: 0,
        details: serde_json::Map::new(),
    }
}

impl EngineApi for Fake {
    fn version(&self) -> VersionInfo {
        VersionInfo {
            program: "0".into(),
            protocol_version: PROTOCOL_VERSION,
            abi_version: 1,
            pid: 1,
            uid: 0,
        }
    }

    fn create_guest(&self, _: Option<String>, stack: Option<String>, _: Peer) -> Result<Grant, ApiError> {
        if stack.as_deref() == Some("none") {
            return Err(ApiError::new(ErrorCode::UnknownStack, "no such stack"));
        }
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        Ok(Grant { id: 1, token: [7; 16], region: null(), channel: null(), doorbell: null() })
    }

    fn attach(&self, token: [u8; 16]) -> Result<Grant, ApiError> {
        if token != [7; 16] {
            return Err(ApiError::new(ErrorCode::BadToken, "bad token"));
        }
        self.create_guest(None, None, Peer { pid: 1, uid: 0, gid: 0 })
    }

    fn status(&self) -> Status {
        Status {
            engine: self.version(),
            socket: String::new(),
            private: false,
            uptime_seconds: 0,
            // A reply that is larger than any socket buffer.
            guests: (1..20_000).map(|id| guest(id, 0)).collect(),
            details: serde_json::Map::new(),
        }
    }

    fn stacks(&self) -> Vec<NsmInfo> {
        Vec::new()
    }

    fn sockets(&self, guest: u32) -> Result<Vec<SocketInfo>, ApiError> {
        Ok(vec![SocketInfo { guest, id: 1, details: serde_json::Map::new() }])
    }

    fn end_guest(&self, _: u32) -> Result<(), ApiError> {
        Ok(())
    }

    fn stop(&self) {
        self.stops.fetch_add(1, Ordering::Relaxed);
    }
}

struct Place {
    dir: PathBuf,
    socket: PathBuf,
    fake: Arc<Fake>,
    server: Option<Server>,
}

impl Place {
    fn new(name: &str) -> Place {
        let dir = PathBuf::from(format!("/tmp/netkernel-control-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let socket = dir.join("e.sock");
        let fake = Arc::new(Fake::default());
        let owner = std::fs::metadata(&dir).map(|m| std::os::unix::fs::MetadataExt::uid(&m)).unwrap();
        let access = Access { owner, ..Access::default() };
        let server = Server::start(Endpoint::bind(&socket).unwrap(), fake.clone(), access).unwrap();
        Place { dir, socket, fake, server: Some(server) }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(WATCHDOG)).unwrap();
        stream.set_write_timeout(Some(WATCHDOG)).unwrap();
        stream
    }

    fn is_well(&self) {
        let mut client = Client::connect(&self.socket).unwrap();
        assert_eq!(client.version().unwrap().protocol_version, PROTOCOL_VERSION);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.server.take());
        assert!(!self.socket.exists(), "the socket file goes with the server");
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn requests_are_answered_one_after_the_other_on_one_connection() {
    let place = Place::new("requests");
    let mut client = Client::connect(&place.socket).unwrap();
    let (made, fds) = client.create_guest(Some("a".into()), None).unwrap();
    assert_eq!((made.id, fds.len()), (1, 3));
    assert_eq!(parse_token(&made.token), Some([7; 16]));
    client.attach(&[7; 16]).unwrap();
    assert!(matches!(client.attach(&[8; 16]), Err(ClientError::Refused(e)) if e.code == ErrorCode::BadToken));
    match client.create_guest(None, Some("none".into())) {
        Err(ClientError::Refused(e)) => assert_eq!(e.code, ErrorCode::UnknownStack),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.status().unwrap().guests.len(), 19_999, "a long reply arrives whole");
    assert_eq!(client.sockets(Some(5)).unwrap().len(), 1);
    match client.sockets(Some(50_000)) {
        Err(ClientError::Refused(e)) => assert_eq!(e.code, ErrorCode::UnknownGuest),
        other => panic!("{other:?}"),
    }
    client.end_guest(5).unwrap();
    client.stop().unwrap();
    assert_eq!(place.fake.stops.load(Ordering::Relaxed), 1);
}

#[test]
fn nonsense_is_refused_with_a_reason() {
    let place = Place::new("nonsense");
    for (line, code) in [
        (&b"hello"[..], "bad_request"),
        (b"", "bad_request"),
        (b"{}", "version"),
        (b"[1]", "version"),
        (b"\xff\xfe\x00", "bad_request"),
        (br#"{"version":2,"request":"status"}"#, "version"),
        (br#"{"version":1}"#, "bad_request"),
        (br#"{"version":1,"request":"reboot"}"#, "bad_request"),
        (br#"{"version":1,"request":"attach"}"#, "bad_request"),
        (br#"{"version":1,"request":"attach","token":"xyz"}"#, "bad_token"),
        (br#"{"version":1,"request":"end_guest","guest":-1}"#, "bad_request"),
    ] {
        let mut stream = place.connect();
        stream.write_all(line).unwrap();
        stream.write_all(b"\n").unwrap();
        let mut reply = String::new();
        BufReader::new(&stream).read_line(&mut reply).unwrap();
        assert!(reply.contains(&format!(r#""code":"{code}""#)), "{line:?} gave {reply}");
    }
    place.is_well();
}

#[test]
fn a_request_without_an_end_is_cut_off() {
    let place = Place::new("endless");
    let mut stream = place.connect();
    let chunk = vec![b'x'; 4096];
    // The server answers and closes; then writes fail.
    while stream.write_all(&chunk).is_ok() {}
    let mut reply = String::new();
    let _ = stream.read_to_string(&mut reply);
    assert!(reply.is_empty() || reply.contains("bad_request"), "{reply}");
    place.is_well();
}

#[test]
fn a_client_that_says_nothing_is_sent_away() {
    let place = Place::new("silent");
    let mut stream = place.connect();
    stream.write_all(br#"{"version":1"#).unwrap();
    let mut reply = Vec::new();
    assert_eq!(stream.read_to_end(&mut reply).unwrap(), 0, "closed within the watchdog's time");
    place.is_well();
}

#[test]
fn clients_that_go_away_in_the_middle_do_no_harm() {
    let place = Place::new("gone");
    for _ in 0..50 {
        place.connect().write_all(br#"{"version":1,"request":"status"}"#).unwrap();
        let mut stream = place.connect();
        stream.write_all(b"{\"version\":1,\"request\":\"status\"}\n").unwrap();
    }
    place.is_well();
}

#[test]
fn too_many_connections_are_refused_and_the_rest_goes_on() {
    let place = Place::new("many");
    let mut first = Client::connect(&place.socket).unwrap();
    first.version().unwrap();
    let crowd: Vec<UnixStream> = (0..300).map(|_| place.connect()).collect();
    let mut refused = 0;
    for stream in &crowd {
        stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let mut reply = String::new();
        if BufReader::new(stream).read_line(&mut reply).is_ok() && reply.contains(r#""code":"limit""#) {
            refused += 1;
        }
    }
    assert!(refused > 0, "there is a limit");
    first.version().expect("who was there is still served");
    drop(crowd);
    let deadline = std::time::Instant::now() + WATCHDOG;
    while Client::connect(&place.socket).unwrap().version().is_err() {
        assert!(std::time::Instant::now() < deadline, "places are given back");
    }
}

#[test]
fn random_bytes_never_stop_the_server() {
    let seed =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    println!("seed {seed}");
    let mut state = seed;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let place = Place::new("random");
    let good = br#"{"version":1,"request":"attach","token":"07070707070707070707070707070707"}"#;
    for _ in 0..300 {
        let mut line = good.to_vec();
        for _ in 0..next() % 8 {
            let at = (next() % line.len() as u64) as usize;
            line[at] = next() as u8;
        }
        line.push(b'\n');
        let mut stream = place.connect();
        let _ = stream.write_all(&line);
        let mut byte = [0];
        let _ = stream.read(&mut byte);
    }
    place.is_well();
}
