//! The control server against clients that do not behave.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{Place, WATCHDOG};
use netkernel_control::*;

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

    fn create_guest(&self, guest: NewGuest, _: Peer) -> Result<Grant, ApiError> {
        if guest.stack.as_deref() == Some("none") {
            return Err(ApiError::new(ErrorCode::UnknownStack, "no such stack"));
        }
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        Ok(Grant {
            id: 1,
            token: [7; 16],
            attach: "auto".into(),
            direct: true,
            region: null(),
            channel: null(),
            doorbell: null(),
        })
    }

    fn attach(&self, token: [u8; 16]) -> Result<Grant, ApiError> {
        if token != [7; 16] {
            return Err(ApiError::new(ErrorCode::BadToken, "bad token"));
        }
        self.create_guest(NewGuest::default(), Peer { pid: 1, uid: 0, gid: 0 })
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

    fn sockets(&self, guests: &[u32]) -> Result<Vec<SocketInfo>, ApiError> {
        let one = |&guest: &u32| {
            let local = format!("[::1]:{guest}");
            let details = [("local".to_owned(), local.into())].into_iter().collect();
            SocketInfo { guest, id: 1, details }
        };
        Ok(guests.iter().map(one).collect())
    }

    fn end_guest(&self, _: u32) -> Result<(), ApiError> {
        Ok(())
    }

    fn stop(&self) {
        self.stops.fetch_add(1, Ordering::Relaxed);
    }

    fn tenant_of(&self, _: i32, _: Option<u32>) -> Option<String> {
        None
    }

    fn by_token(&self, token: &str) -> Option<Caller> {
        match token {
            "of the provider" => Some(Caller::Provider),
            "of blue" => Some(Caller::Tenant("blue".into())),
            _ => None,
        }
    }

    fn nsms_of(&self, _: &str) -> Option<Vec<String>> {
        None
    }

    fn usage(&self, query: &UsageQuery, caller: &Caller) -> Result<Vec<netkernel_meter::Row>, ApiError> {
        assert_eq!((query.from, caller), (Some(60), &Caller::Provider), "the owner sees all");
        Ok(Vec::new())
    }

    fn capture(
        &self,
        capture: NewCapture,
        of: Option<u32>,
    ) -> Result<(std::os::fd::OwnedFd, CaptureInfo), ApiError> {
        assert_eq!((capture.tenant.as_deref(), of), (Some("blue"), None));
        Ok((std::fs::File::open("/dev/null").unwrap().into(), CaptureInfo::default()))
    }

    fn tenants(&self) -> Vec<TenantInfo> {
        Vec::new()
    }

    fn change_tenant(&self, name: &str, change: TenantChange) -> Result<(), ApiError> {
        assert_eq!((name, change.weight, change.max_send), ("a b", Some(3), None));
        Ok(())
    }

    fn reload(&self) -> Result<(), ApiError> {
        Err(ApiError::new(ErrorCode::BadRequest, "the file is bad"))
    }

    fn metrics(&self) -> String {
        "# EOF\n".into()
    }
}

impl Place<Fake> {
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

#[test]
fn requests_are_answered_one_after_the_other_on_one_connection() {
    let place = Place::<Fake>::new("requests");
    let mut client = Client::connect(&place.socket).unwrap();
    let (made, fds) =
        client.create_guest(NewGuest { name: Some("a".into()), ..NewGuest::default() }).unwrap();
    assert_eq!((made.id, fds.len()), (1, 3));
    assert_eq!(parse_token(&made.token), Some([7; 16]));
    client.attach(&[7; 16]).unwrap();
    assert!(matches!(client.attach(&[8; 16]), Err(ClientError::Refused(e)) if e.code == ErrorCode::BadToken));
    match client.create_guest(NewGuest { stack: Some("none".into()), ..NewGuest::default() }) {
        Err(ClientError::Refused(e)) => assert_eq!(e.code, ErrorCode::UnknownStack),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.status().unwrap().guests.len(), 19_999, "a long reply arrives whole");
    assert_eq!(client.sockets(Some(5)).unwrap().len(), 1);
    let port = |port| SocketQuery { port: Some(port), ..SocketQuery::default() };
    assert_eq!(client.find_sockets(port(77)).unwrap().iter().map(|s| s.guest).collect::<Vec<_>>(), [77]);
    let nobody = SocketQuery { tenant: Some("nobody".into()), ..port(77) };
    assert!(client.find_sockets(nobody).unwrap().is_empty());
    match client.sockets(Some(50_000)) {
        Err(ClientError::Refused(e)) => assert_eq!(e.code, ErrorCode::UnknownGuest),
        other => panic!("{other:?}"),
    }
    assert!(client.usage(UsageQuery { from: Some(60), ..UsageQuery::default() }).unwrap().is_empty());
    client.change_tenant("a b", TenantChange { weight: Some(3), ..TenantChange::default() }).unwrap();
    assert!(matches!(client.reload(), Err(ClientError::Refused(e)) if e.message == "the file is bad"));
    client.capture(NewCapture { tenant: Some("blue".into()), ..NewCapture::default() }).unwrap();
    let nobodys = client.capture(NewCapture { guest: Some(50_000), ..NewCapture::default() });
    assert!(matches!(nobodys, Err(ClientError::Refused(e)) if e.code == ErrorCode::UnknownGuest));
    let nothing = client.capture(NewCapture::default());
    assert!(matches!(nothing, Err(ClientError::Refused(e)) if e.code == ErrorCode::BadRequest));
    client.end_guest(5).unwrap();
    client.stop().unwrap();
    // It is done after the answer.
    let deadline = std::time::Instant::now() + WATCHDOG;
    while place.fake.stops.load(Ordering::Relaxed) == 0 {
        assert!(std::time::Instant::now() < deadline, "it was not asked to stop");
        std::thread::yield_now();
    }
    assert_eq!(place.fake.stops.load(Ordering::Relaxed), 1);
}

/// Sends bytes, and returns the whole reply to a request that is the connection's last.
fn exchange(place: &Place<Fake>, bytes: &[u8]) -> String {
    let mut stream = place.connect();
    stream.write_all(bytes).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

fn request(method: &str, target: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("{method} {target} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

#[test]
fn nonsense_is_refused_with_a_reason() {
    let place = Place::<Fake>::new("nonsense");
    for (bytes, status, code) in [
        (b"{\"version\":1,\"request\":\"status\"}\n".to_vec(), 400, "bad_request"),
        (b"\xff\xfe\x00\r\n\r\n".to_vec(), 400, "bad_request"),
        (request("GET", "/v2/status", ""), 404, "version"),
        (request("GET", "/v1/reboot", ""), 404, "not_found"),
        (request("DELETE", "/v1/status", ""), 405, "method"),
        (request("POST", "/v1/attach", ""), 400, "bad_request"),
        (request("POST", "/v1/attach", "{\"token\":"), 400, "bad_request"),
        (request("POST", "/v1/attach", r#"{"token":"xyz"}"#), 401, "bad_token"),
        (request("POST", "/v1/attach", r#"{"token":"00000000000000000000000000000000"}"#), 401, "bad_token"),
        (request("DELETE", "/v1/guests/-1", ""), 400, "bad_request"),
        (request("GET", "/v1/guests/999999/sockets", ""), 404, "unknown_guest"),
        (request("POST", "/v1/guests", r#"{"stack":"none"}"#), 422, "unknown_stack"),
    ] {
        let reply = exchange(&place, &bytes);
        assert!(reply.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes:?} gave {reply}");
        assert!(reply.contains(&format!(r#""code":"{code}""#)), "{bytes:?} gave {reply}");
    }
    place.is_well();
}

/// `curl --unix-socket` and Prometheus speak to it.
#[test]
fn other_programs_can_ask() {
    let place = Place::<Fake>::new("plain");
    let reply = exchange(&place, b"GET /v1/stacks HTTP/1.0\r\nHost: x\r\nAccept: */*\r\n\r\n");
    assert!(reply.starts_with("HTTP/1.1 200 OK\r\n") && reply.ends_with("\r\n\r\n[]"), "{reply}");
    let reply = exchange(&place, &request("GET", "/metrics", ""));
    assert!(reply.contains("openmetrics-text") && reply.ends_with("# EOF\n"), "{reply}");
    let reply = exchange(&place, &request("GET", "/v1/openapi.json", ""));
    let document: serde_json::Value = serde_json::from_str(reply.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(document, openapi());
}

#[test]
fn several_requests_may_arrive_at_once() {
    let place = Place::<Fake>::new("pipelined");
    let mut bytes = b"GET /v1/stacks HTTP/1.1\r\n\r\n".repeat(3);
    bytes.extend(request("GET", "/v1/version", ""));
    let reply = exchange(&place, &bytes);
    assert_eq!(reply.matches("HTTP/1.1 200 OK").count(), 4, "{reply}");
}

#[test]
fn a_request_without_an_end_is_cut_off() {
    let place = Place::<Fake>::new("endless");
    let mut stream = place.connect();
    let chunk = vec![b'x'; 4096];
    // The server answers and closes; then writes fail.
    while stream.write_all(&chunk).is_ok() {}
    let mut reply = String::new();
    let _ = stream.read_to_string(&mut reply);
    assert!(reply.is_empty() || reply.contains("HTTP/1.1 4"), "{reply}");
    place.is_well();
}

#[test]
fn a_client_that_says_nothing_is_sent_away() {
    let place = Place::<Fake>::new("silent");
    let mut stream = place.connect();
    stream.write_all(b"GET /v1/sta").unwrap();
    let mut reply = Vec::new();
    assert_eq!(stream.read_to_end(&mut reply).unwrap(), 0, "closed within the watchdog's time");
    place.is_well();
}

#[test]
fn clients_that_go_away_in_the_middle_do_no_harm() {
    let place = Place::<Fake>::new("gone");
    for _ in 0..50 {
        place.connect().write_all(b"GET /v1/status HTTP/1.1\r\n").unwrap();
        let mut stream = place.connect();
        stream.write_all(b"GET /v1/status HTTP/1.1\r\n\r\n").unwrap();
    }
    place.is_well();
}

#[test]
fn too_many_connections_are_refused_and_the_rest_goes_on() {
    let place = Place::<Fake>::new("many");
    let mut first = Client::connect(&place.socket).unwrap();
    first.version().unwrap();
    let crowd: Vec<UnixStream> = (0..300).map(|_| place.connect()).collect();
    let mut refused = 0;
    for stream in &crowd {
        stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let mut line = String::new();
        if BufReader::new(stream).read_line(&mut line).is_ok() && line.contains(" 429 ") {
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
    let place = Place::<Fake>::new("random");
    let good = request("POST", "/v1/attach", r#"{"token":"07070707070707070707070707070707"}"#);
    for _ in 0..300 {
        let mut line = good.clone();
        for _ in 0..next() % 8 {
            let at = (next() % line.len() as u64) as usize;
            line[at] = next() as u8;
        }
        let mut stream = place.connect();
        let _ = stream.write_all(&line);
        // What lacks its end is not waited for.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut byte = [0];
        let _ = stream.read(&mut byte);
    }
    place.is_well();
}
