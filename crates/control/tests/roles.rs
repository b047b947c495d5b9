//! What each route of the API tells a tenant: itself, and nothing of others, not even that they are there.

mod common;

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use common::{Place, WATCHDOG};
use netkernel_control::*;
use serde_json::{Value, json};

/// Tenant, guest and user.
type Capture = (Option<String>, Option<u32>, Option<u32>);

/// Two tenants: guest 1 is blue's, guests 2 and 3 are red's, guest 4 is of a user that made it as nobody's.
#[derive(Default)]
struct Fake {
    /// Which tenant the kernel says that callers belong to.
    confined: Mutex<Option<String>>,
    ended: Mutex<Vec<u32>>,
    made: Mutex<Vec<NewGuest>>,
    captured: Mutex<Vec<Capture>>,
}

fn guest(id: u32, tenant: &str, uid: u32, nsm: &str) -> GuestInfo {
    let details = [("tenant".to_owned(), tenant.into())].into_iter().collect();
    let name = format!("{tenant}-secret");
    GuestInfo { id, name, stack: nsm.into(), pid: 1, uid, processes: 1, sockets: 1, details }
}

fn nsm(name: &str) -> NsmInfo {
    NsmInfo {
        name: name.into(),
        stack: "kernel".into(),
        congestion_control: None,
        netns: None,
        available: true,
        reason: None,
        guests: 77,
        details: serde_json::Map::new(),
    }
}

fn row(tenant: &str) -> netkernel_meter::Row {
    let entry = netkernel_meter::Entry {
        minute: 1,
        tenant: tenant.into(),
        nsm: "first".into(),
        guest: "g".into(),
        amount: netkernel_meter::Amount { bytes_in: 1, ..Default::default() },
    };
    let by = netkernel_meter::Grouping::parse("tenant").unwrap();
    netkernel_meter::report([entry], [], by, |_| None).remove(0)
}

impl EngineApi for Fake {
    fn version(&self) -> VersionInfo {
        VersionInfo { program: "0".into(), protocol_version: 1, abi_version: 1, pid: 1, uid: 0 }
    }

    fn create_guest(&self, guest: NewGuest, _: Peer) -> Result<Grant, ApiError> {
        self.made.lock().unwrap().push(guest);
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        let (region, channel, doorbell) = (null(), null(), null());
        Ok(Grant { id: 9, token: [7; 16], attach: "auto".into(), direct: true, region, channel, doorbell })
    }

    fn attach(&self, token: [u8; 16]) -> Result<Grant, ApiError> {
        assert_eq!(token, [8; 16]);
        Err(ApiError::new(ErrorCode::BadToken, "bad token"))
    }

    fn status(&self) -> Status {
        Status {
            engine: self.version(),
            socket: "/s".into(),
            private: false,
            uptime_seconds: 0,
            guests: vec![
                guest(1, "blue", 1000, "first"),
                guest(2, "red", 1000, "first"),
                guest(3, "red", 1000, "second"),
                guest(4, "others", 1000, "first"),
            ],
            details: [("counters".to_owned(), json!({ "guests_created": 4242 }))].into_iter().collect(),
        }
    }

    fn stacks(&self) -> Vec<NsmInfo> {
        vec![nsm("first"), nsm("second"), nsm("red-only")]
    }

    fn tenant_of(&self, _: i32, _: Option<u32>) -> Option<String> {
        self.confined.lock().unwrap().clone()
    }

    fn by_token(&self, token: &str) -> Option<Caller> {
        match token {
            "token-of-the-provider" => Some(Caller::Provider),
            "token-of-blue" => Some(Caller::Tenant("blue".into())),
            "token-of-a-user" => Some(Caller::User(1000)),
            _ => None,
        }
    }

    fn nsms_of(&self, tenant: &str) -> Option<Vec<String>> {
        (tenant == "blue").then(|| vec!["first".into(), "second".into()])
    }

    fn sockets(&self, guests: &[u32]) -> Result<Vec<SocketInfo>, ApiError> {
        let one = |&guest: &u32| SocketInfo { guest, id: 1, details: serde_json::Map::new() };
        Ok(guests.iter().map(one).collect())
    }

    fn end_guest(&self, guest: u32) -> Result<(), ApiError> {
        self.ended.lock().unwrap().push(guest);
        Ok(())
    }

    fn stop(&self) {
        panic!("nobody may stop it here");
    }

    fn usage(&self, _: &UsageQuery, caller: &Caller) -> Result<Vec<netkernel_meter::Row>, ApiError> {
        Ok(match caller {
            Caller::Provider => vec![row("blue"), row("red")],
            Caller::Tenant(name) => vec![row(name)],
            Caller::User(_) => Vec::new(),
        })
    }

    fn capture(
        &self,
        capture: NewCapture,
        of: Option<u32>,
    ) -> Result<(std::os::fd::OwnedFd, CaptureInfo), ApiError> {
        assert_ne!(capture.tenant.as_deref(), Some("red"), "nobody but the provider may");
        self.captured.lock().unwrap().push((capture.tenant, capture.guest, of));
        Ok((std::fs::File::open("/dev/null").unwrap().into(), CaptureInfo::default()))
    }

    fn tenants(&self) -> Vec<TenantInfo> {
        let one = |name: &str| TenantInfo {
            name: name.into(),
            weight: 1,
            guests: 1,
            connections: 1,
            details: serde_json::Map::new(),
        };
        vec![one("blue"), one("red"), one("others")]
    }

    fn change_tenant(&self, _: &str, _: TenantChange) -> Result<(), ApiError> {
        panic!("no tenant may change limits")
    }

    fn reload(&self) -> Result<(), ApiError> {
        panic!("no tenant may reload")
    }

    fn metrics(&self) -> String {
        panic!("metrics are of all tenants")
    }
}

impl Place<Fake> {
    /// Status and body of the reply. `token` is what stands in the header; empty: none does.
    fn ask(&self, token: &str, method: &str, target: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(WATCHDOG)).unwrap();
        let shown =
            if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") };
        let length = body.len();
        let head = format!(
            "{method} {target} HTTP/1.1\r\nConnection: close\r\n{shown}Content-Length: {length}\r\n\r\n"
        );
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).unwrap();
        let reply = String::from_utf8(reply).unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").expect("a whole reply");
        (head[9..12].parse().unwrap(), body.to_owned())
    }
}

/// Each route, as one of another tenant would try it, with the status that it gets.
const ROUTES: &[(&str, &str, &str, &str, u16)] = &[
    ("GET", "/v1/version", "/v1/version", "", 200),
    ("GET", "/v1/status", "/v1/status", "", 200),
    ("GET", "/v1/stacks", "/v1/stacks", "", 200),
    ("GET", "/v1/sockets", "/v1/sockets?tenant=red", "", 200),
    ("GET", "/v1/sockets", "/v1/sockets", "", 200),
    ("GET", "/v1/guests/{guest}/sockets", "/v1/guests/2/sockets", "", 404),
    ("POST", "/v1/guests", "/v1/guests", "{}", 200),
    ("POST", "/v1/attach", "/v1/attach", r#"{"token":"08080808080808080808080808080808"}"#, 401),
    ("DELETE", "/v1/guests/{guest}", "/v1/guests/2", "", 404),
    ("POST", "/v1/guests/{guest}/move", "/v1/guests/2/move", r#"{"stack":"kernel"}"#, 404),
    ("POST", "/v1/stacks/{stack}/restart", "/v1/stacks/kernel/restart", "", 403),
    ("POST", "/v1/stacks/{stack}/swap", "/v1/stacks/kernel/swap", "{}", 403),
    ("POST", "/v1/stop", "/v1/stop", "", 403),
    ("POST", "/v1/captures", "/v1/captures", r#"{"guest":2}"#, 404),
    ("GET", "/v1/usage", "/v1/usage?by=tenant", "", 200),
    ("GET", "/v1/tenants", "/v1/tenants", "", 200),
    ("PATCH", "/v1/tenants/{tenant}", "/v1/tenants/red", r#"{"weight":2}"#, 403),
    ("PATCH", "/v1/tenants/{tenant}", "/v1/tenants/blue", r#"{"weight":2}"#, 403),
    ("POST", "/v1/reload", "/v1/reload", "", 403),
    ("POST", "/v1/restart", "/v1/restart", "{}", 403),
    ("GET", "/metrics", "/metrics", "", 403),
    ("GET", "/v1/openapi.json", "/v1/openapi.json", "", 200),
];

#[test]
fn no_route_tells_a_tenant_of_others() {
    let place = Place::<Fake>::new("routes");
    for (method, _, target, body, status) in ROUTES {
        let (got, reply) = place.ask("token-of-blue", method, target, body);
        assert_eq!(got, *status, "{method} {target}: {reply}");
        if *target == "/v1/openapi.json" {
            continue;
        }
        for leak in ["red", "others", "4242", "77", "secret-"] {
            assert!(!reply.contains(leak), "{method} {target} tells of '{leak}': {reply}");
        }
    }
    assert!(place.fake.ended.lock().unwrap().is_empty());
    // The guest is blue's, whoever the kernel says that asks.
    let made = std::mem::take(&mut *place.fake.made.lock().unwrap());
    assert_eq!(made.len(), 1);
    assert_eq!(made[0].tenant_token.as_deref(), Some("token-of-blue"));
    // The table is whole.
    let document = openapi();
    let all: BTreeSet<(String, String)> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone()))
        })
        .collect();
    let tried: BTreeSet<(String, String)> =
        ROUTES.iter().map(|(method, path, ..)| ((*method).into(), (*path).into())).collect();
    assert_eq!(all, tried, "each route has its try");
}

#[test]
fn what_is_not_there_and_what_is_anothers_look_the_same() {
    let place = Place::<Fake>::new("same");
    for (method, target) in [("GET", "/v1/guests/N/sockets"), ("DELETE", "/v1/guests/N")] {
        let of = |id: &str| {
            let (status, reply) = place.ask("token-of-blue", method, &target.replace('N', id), "");
            (status, reply.replace(id, "N"))
        };
        assert_eq!(of("2"), of("5000"), "{method} {target}");
        assert_eq!(of("2").0, 404);
    }
    let change =
        |name: &str| place.ask("token-of-blue", "PATCH", &format!("/v1/tenants/{name}"), r#"{"max_send":0}"#);
    assert_eq!(change("red"), change("nobody"));
    let of = |query: &str| place.ask("token-of-blue", "GET", &format!("/v1/sockets?{query}"), "");
    assert_eq!(of("tenant=red"), of("tenant=nobody"));
    assert_eq!(of("nsm=red-only"), of("nsm=nothing"));
}

#[test]
fn a_tenant_sees_and_ends_its_own() {
    let place = Place::<Fake>::new("own");
    let json = |token: &str, target: &str| -> Value {
        let (status, reply) = place.ask(token, "GET", target, "");
        assert_eq!(status, 200, "{target}: {reply}");
        serde_json::from_str(&reply).unwrap()
    };
    let ids = |value: &Value, key: &str| -> Vec<u64> {
        value.as_array().unwrap().iter().map(|one| one[key].as_u64().unwrap()).collect()
    };
    let names = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().into()).collect()
    };
    for (token, guests, tenants, stacks, counts) in [
        ("token-of-blue", vec![1], vec!["blue"], vec!["first", "second"], vec![1, 0]),
        // The same user made guests for tenants too: those are the tenants'.
        ("token-of-a-user", vec![4], vec![], vec!["first", "second", "red-only"], vec![1, 0, 0]),
        (
            "token-of-the-provider",
            vec![1, 2, 3, 4],
            vec!["blue", "red", "others"],
            vec!["first", "second", "red-only"],
            vec![77, 77, 77],
        ),
    ] {
        let status = json(token, "/v1/status");
        assert_eq!(ids(&status["guests"], "id"), guests, "{token}");
        assert_eq!(status.get("counters").is_some(), token == "token-of-the-provider");
        assert_eq!(ids(&json(token, "/v1/sockets"), "guest"), guests, "{token}");
        assert_eq!(names(&json(token, "/v1/tenants")), tenants, "{token}");
        assert_eq!(names(&json(token, "/v1/stacks")), stacks, "{token}");
        assert_eq!(ids(&json(token, "/v1/stacks"), "guests"), counts, "{token}");
    }
    assert_eq!(json("token-of-blue", "/v1/usage?by=tenant")[0]["tenant"], "blue");
    assert_eq!(ids(&json("token-of-blue", "/v1/guests/1/sockets"), "guest"), [1]);
    assert_eq!(place.ask("token-of-blue", "DELETE", "/v1/guests/1", "").0, 200);
    assert_eq!(*place.fake.ended.lock().unwrap(), [1]);
}

#[test]
fn a_wrong_token_is_refused_everywhere_whoever_shows_it() {
    let place = Place::<Fake>::new("wrong");
    for (method, _, target, body, _) in ROUTES {
        for token in ["token-of-blu", "token-of-blue2", "x", "token-of-red"] {
            let (status, reply) = place.ask(token, method, target, body);
            assert_eq!(status, 401, "{method} {target}: {reply}");
            assert!(!reply.contains("blue") && !reply.contains("red"), "{reply}");
        }
    }
    assert_eq!(
        place.ask("token-of-blu", "GET", "/v1/nothing", "").0,
        401,
        "which paths there are is told to nobody"
    );
}

/// Also where one user is several tenants.
#[test]
fn captures_are_of_the_callers_own_guests() {
    let place = Place::<Fake>::new("captures");
    let ask = |token: &str, body: &str| place.ask(token, "POST", "/v1/captures", body);
    for token in ["token-of-blue", "token-of-a-user"] {
        let of = |name: &str| {
            let (status, reply) = ask(token, &format!(r#"{{"tenant":"{name}"}}"#));
            (status, reply.replace(name, "N"))
        };
        assert_eq!(of("red"), of("nobody"), "{token}");
        assert_eq!(of("red").0, 400);
        assert_eq!(ask(token, r#"{"guest":2}"#).0, 404);
        assert_eq!(
            ask(token, r#"{"guest":1,"tenant":"red"}"#).0,
            if token == "token-of-blue" { 400 } else { 404 }
        );
        assert_eq!(ask(token, "{}").0, 400);
    }
    assert!(place.fake.captured.lock().unwrap().is_empty());
    assert_eq!(ask("token-of-blue", r#"{"guest":1}"#).0, 200);
    assert_eq!(ask("token-of-a-user", r#"{"guest":4}"#).0, 200);
    let own = |tenant: &str, guest, uid| (Some(tenant.to_owned()), Some(guest), uid);
    assert_eq!(
        *place.fake.captured.lock().unwrap(),
        [own("blue", 1, None), own("others", 4, Some(1000))],
        "later guests of the number cannot be another's either"
    );
}

/// Containers run as root: what confines them counts.
#[test]
fn the_engines_user_in_a_tenants_place_is_that_tenant() {
    let place = Place::<Fake>::new("confined");
    assert_eq!(place.ask("", "GET", "/v1/tenants", "").1.matches("name").count(), 3);
    *place.fake.confined.lock().unwrap() = Some("red".into());
    let (_, tenants) = place.ask("", "GET", "/v1/tenants", "");
    assert!(tenants.contains("red") && !tenants.contains("blue"), "{tenants}");
    assert_eq!(place.ask("", "POST", "/v1/stop", "").0, 403);
    let (_, status) = place.ask("", "GET", "/v1/status", "");
    assert!(status.contains("\"id\":3") && !status.contains("\"id\":1"), "{status}");
    assert_eq!(place.ask("token-of-the-provider", "GET", "/v1/stacks", "").0, 200, "a token is a way back");
}

/// Each connection is kept open and silent; the one that comes from elsewhere is served all the same.
#[test]
fn a_tenants_flood_takes_no_places_of_others() {
    let place = Place::<Fake>::new("flood");
    *place.fake.confined.lock().unwrap() = Some("red".into());
    let crowd: Vec<UnixStream> = (0..200)
        .map(|_| {
            let mut stream = UnixStream::connect(&place.socket).unwrap();
            // A part of a request, as slow as it gets.
            stream.write_all(b"GET /v1/ver").unwrap();
            stream
        })
        .collect();
    // Accepted in order: when this one is refused, the crowd is in.
    let mut refused = UnixStream::connect(&place.socket).unwrap();
    refused.set_read_timeout(Some(WATCHDOG)).unwrap();
    let mut reply = String::new();
    refused.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 429 "), "its own limit: {reply}");
    *place.fake.confined.lock().unwrap() = Some("blue".into());
    for _ in 0..20 {
        assert_eq!(place.ask("", "GET", "/v1/version", "").0, 200, "others go on");
    }
    drop(crowd);
}
