//! The API over TLS: for who shows a token, and trusts the certificate.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use netkernel_control::*;

const WATCHDOG: Duration = Duration::from_secs(30);

/// Knows one tenant, and has nothing.
struct Fake;

fn nothing<T>() -> Result<T, ApiError> {
    Err(ApiError::new(ErrorCode::Engine, "nothing"))
}

impl EngineApi for Fake {
    fn version(&self) -> VersionInfo {
        VersionInfo { program: "0".into(), protocol_version: 1, abi_version: 1, pid: 1, uid: 0 }
    }

    fn create_guest(&self, _: NewGuest, _: Peer) -> Result<Grant, ApiError> {
        panic!("descriptors do not go over TCP")
    }

    fn attach(&self, _: [u8; 16]) -> Result<Grant, ApiError> {
        panic!("descriptors do not go over TCP")
    }

    fn status(&self) -> Status {
        // More than a TLS record, and than any buffer.
        let guests = (0..5000).map(|id| GuestInfo {
            id,
            name: "g".into(),
            stack: "s".into(),
            pid: 1,
            uid: 0,
            processes: 1,
            sockets: 0,
            details: [("tenant".to_owned(), "blue".into())].into_iter().collect(),
        });
        Status {
            engine: self.version(),
            socket: String::new(),
            private: false,
            uptime_seconds: 0,
            guests: guests.collect(),
            details: serde_json::Map::new(),
        }
    }

    fn stacks(&self) -> Vec<NsmInfo> {
        Vec::new()
    }

    fn tenant_of(&self, _: i32, _: Option<u32>) -> Option<String> {
        panic!("nobody is known by a process over TCP")
    }

    fn by_token(&self, token: &str) -> Option<Caller> {
        (token == "token-of-blue").then(|| Caller::Tenant("blue".into()))
    }

    fn nsms_of(&self, _: &str) -> Option<Vec<String>> {
        None
    }

    fn sockets(&self, _: &[u32]) -> Result<Vec<SocketInfo>, ApiError> {
        nothing()
    }

    fn end_guest(&self, _: u32) -> Result<(), ApiError> {
        nothing()
    }

    fn stop(&self) {
        panic!("nobody may stop it here");
    }

    fn usage(&self, _: &UsageQuery, _: &Caller) -> Result<Vec<netkernel_meter::Row>, ApiError> {
        nothing()
    }

    fn capture(
        &self,
        _: NewCapture,
        _: Option<u32>,
    ) -> Result<(std::os::fd::OwnedFd, CaptureInfo), ApiError> {
        panic!("descriptors do not go over TCP")
    }

    fn tenants(&self) -> Vec<TenantInfo> {
        Vec::new()
    }

    fn change_tenant(&self, _: &str, _: TenantChange) -> Result<(), ApiError> {
        nothing()
    }

    fn reload(&self) -> Result<(), ApiError> {
        nothing()
    }

    fn metrics(&self) -> String {
        String::new()
    }
}

struct Place {
    dir: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Place {
    fn new(name: &str) -> Place {
        let dir = PathBuf::from(format!("/tmp/netkernel-tls-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let made =
            rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        let (certificate, key) = (dir.join("c.pem"), dir.join("k.pem"));
        std::fs::write(&certificate, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        Place { dir, certificate, key }
    }

    fn serve(&self) -> (Server, SocketAddr) {
        let any = "127.0.0.1:0".parse().unwrap();
        let listener = TlsListener::bind(any, &self.certificate, &self.key).unwrap();
        let address = listener.address().unwrap();
        // Who would be allowed everything over the Unix socket is nobody here.
        let access = Access { everybody: true, ..Access::default() };
        (Server::start_tls(listener, Arc::new(Fake), access).unwrap(), address)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    match result {
        Err(ClientError::Refused(error)) => error.code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_shows_a_token_is_served_and_nobody_else() {
    let place = Place::new("token");
    let (server, address) = place.serve();
    for host in [format!("localhost:{}", address.port()), address.to_string()] {
        let url = format!("https://{host}");
        let mut client = Client::connect_tls(&url, Some(&place.certificate)).unwrap();
        assert_eq!(
            code(client.version()),
            ErrorCode::BadToken,
            "without a token not even the version is told"
        );
        assert_eq!(code(client.stop()), ErrorCode::BadToken);
        client.show_token("token-of-red".into());
        assert_eq!(code(client.version()), ErrorCode::BadToken);
        client.show_token("token-of-blue".into());
        assert_eq!(client.version().unwrap().protocol_version, 1);
        assert_eq!(client.status().unwrap().guests.len(), 5000, "a long reply arrives whole");
        assert_eq!(code(client.stop()), ErrorCode::Permission);
        assert_eq!(code(client.create_guest(NewGuest::default())), ErrorCode::Permission);
        assert_eq!(code(client.attach(&[7; 16])), ErrorCode::Permission);
        let capture = NewCapture { tenant: Some("blue".into()), ..NewCapture::default() };
        assert_eq!(code(client.capture(capture)), ErrorCode::Permission);
    }
    drop(server);
    TcpStream::connect(address).expect_err("it listens no more");
}

#[test]
fn a_certificate_that_is_not_trusted_is_refused_by_the_client() {
    let (place, other) = (Place::new("trust"), Place::new("other"));
    let (_server, address) = place.serve();
    let url = format!("https://{address}");
    let error = Client::connect_tls(&url, Some(&other.certificate)).unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    for (url, words) in [
        ("http://x", "does not begin with https://"),
        ("https://x:y", "port is no number"),
        ("https://x/y", "more than a host"),
        ("https://", "more than a host"),
    ] {
        let error = Client::connect_tls(url, Some(&place.certificate)).unwrap_err().to_string();
        assert!(error.contains(words), "{url}: {error}");
    }
}

#[test]
fn files_that_are_no_certificate_or_key_are_told_by_name() {
    let place = Place::new("files");
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let other = Place::new("files-other");
    let missing = place.dir.join("missing.pem");
    for (certificate, key, words) in [
        (&missing, &place.key, "missing.pem"),
        (&place.key, &place.key, "no certificate (PEM) in"),
        (&place.certificate, &missing, "missing.pem"),
        (&place.certificate, &place.certificate, "private key"),
        (&place.certificate, &other.key, "the key in"),
    ] {
        let error = TlsListener::bind(any, certificate, key).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// Silent, babbling, and half-way through a handshake: they are sent away, and others are served meanwhile.
#[test]
fn strangers_hold_nobody_up() {
    let place = Place::new("strangers");
    let (_server, address) = place.serve();
    let mut crowd: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(address).unwrap()).collect();
    // Those of one address that are too many are closed at once; that is a part of the test's own address, so they must go
    // before others of it are served.
    for (i, stream) in crowd.iter_mut().enumerate() {
        stream.set_read_timeout(Some(WATCHDOG)).unwrap();
        // The beginning of a ClientHello, nothing, or no TLS.
        let _ = stream.write_all([&b"\x16\x03\x01\x02\x00\x01"[..], b"", b"GET / HTTP/1.1\r\n\r\n"][i % 3]);
    }
    for stream in &mut crowd {
        // An alert may come first; a reset is an end too.
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let mut client = Client::connect_tls(&format!("https://{address}"), Some(&place.certificate)).unwrap();
    client.show_token("token-of-blue".into());
    client.version().unwrap();
    // Plain HTTP gets no answer that a browser would show.
    let mut plain = TcpStream::connect(address).unwrap();
    plain.set_read_timeout(Some(WATCHDOG)).unwrap();
    plain.write_all(b"GET /v1/version HTTP/1.1\r\nAuthorization: Bearer token-of-blue\r\n\r\n").unwrap();
    let mut reply = Vec::new();
    let _ = plain.read_to_end(&mut reply);
    assert!(!String::from_utf8_lossy(&reply).contains("HTTP/1.1 200"));
}
