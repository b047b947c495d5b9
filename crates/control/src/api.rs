//! The API: one table of routes, from which requests are decoded, encoded and documented.

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    ApiError, Attached, CaptureInfo, ErrorCode, Moved, NsmInfo, Restarted, SocketInfo, Status, TenantInfo,
    VersionInfo,
};

/// Version of the API: the first part of each path. Both sides must have the same one.
pub const PROTOCOL_VERSION: u32 = 1;

/// What the engine can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Version,
    CreateGuest(NewGuest),
    /// The descriptors of a guest again, for a process that lost them.
    Attach(Token),
    /// The engine and the guests that the caller may see.
    Status,
    Stacks,
    /// Sockets of one guest, or of all that the caller may see.
    Sockets(SocketQuery),
    EndGuest {
        guest: u32,
    },
    /// Puts a guest on another NSM.
    MoveGuest {
        guest: u32,
        to: Destination,
    },
    /// Exchanges the process of an NSM under its guests.
    RestartNsm {
        nsm: String,
    },
    /// The same, with another program or configuration.
    SwapNsm {
        nsm: String,
        change: StackChange,
    },
    /// Ends the engine.
    Stop,
    Usage(UsageQuery),
    Capture(NewCapture),
    Tenants,
    ChangeTenant {
        name: String,
        change: TenantChange,
    },
    /// Reads the configuration file again; what of it can change under way, changes.
    Reload,
    /// Exchanges the engine's process for a program, under its guests.
    RestartEngine(EngineChange),
    /// Counters in the text format of OpenMetrics.
    Metrics,
    /// The description of this API.
    OpenApi,
}

/// A guest to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NewGuest {
    /// For people; need not be unique.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A name of `/v1/stacks`; without it the engine's first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stack: Option<String>,
    /// A tenant's token, for guests that nothing else tells to be its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_token: Option<String>,
}

/// New limits of a tenant; what is missing stays. Rates are in bytes per second; 0 takes a limit or a guarantee away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TenantChange {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guaranteed_send: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_send: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guaranteed_receive: Option<u64>,

    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_receive: Option<u64>,
    /// Queue elements per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guaranteed_operations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_operations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guaranteed_connections: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_guests: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
}

/// Where a guest is moved to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Destination {
    /// Name of a stack that the guest's tenant may use.
    pub stack: String,
    /// Nothing changes if an open socket would have to stay where it is.
    #[serde(default)]
    pub all_or_nothing: bool,
}

/// What the process of a stack is exchanged for; what is missing stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StackChange {
    /// Absolute path of the program that its process is started with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub congestion_control: Option<String>,
    /// What becomes of a program's own choice: `allow`, `ignore`, `refuse`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub congestion_policy: Option<String>,
    /// Most bytes per second that each TCP socket sends; 0: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pacing: Option<u64>,
    /// SO_MARK of each socket; 0: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mark: Option<u32>,
}

/// What the engine is exchanged for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EngineChange {
    /// Absolute path of the program; without it, what is now at the path that this one was started from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<String>,
    /// Goes on although some guests have sockets that cannot: these are reset.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lose: bool,
}

/// Which sockets: those for which all that is given is true.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketQuery {
    pub guest: Option<u32>,
    pub tenant: Option<String>,
    pub nsm: Option<String>,
    /// Local or the peer's.
    pub port: Option<u16>,
}

impl SocketQuery {
    /// Whether a name as it is told (`1.2.3.4:80`, `[::1]:80`) has the port.
    pub(crate) fn has_port(&self, name: Option<&Value>) -> bool {
        let port = name.and_then(Value::as_str).and_then(|name| name.rsplit(':').next()?.parse().ok());
        self.port.is_none_or(|wanted| port == Some(wanted))
    }
}

/// Which usage, and how it is summed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageQuery {
    /// Seconds since 1970, rounded down to the minute. Default: the beginning.
    pub from: Option<u64>,
    /// Not any more. Default: now.
    pub to: Option<u64>,
    /// As [`netkernel_meter::Grouping::parse`] takes it. Default: tenant and NSM.
    pub by: Option<String>,
}

/// Whose packets to capture: a tenant's or a guest's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NewCapture {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest: Option<u32>,
    /// Bytes to keep of each packet, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snap_bytes: Option<u32>,
}

/// The right to attach to a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// 32 hexadecimal digits.
    pub token: String,
}

/// Who may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Anybody,
    /// Answers tell of the caller's own tenant only, unless it is the provider.
    Tenant,
    /// The engine's user and root, or who shows the provider's token.
    Provider,
}

impl Role {
    pub fn describe(self) -> &'static str {
        match self {
            Role::Anybody => "Anybody may ask.",
            Role::Tenant => "Tells of the caller's own tenant only; the provider sees all.",
            Role::Provider => {
                "For the provider only: the engine's user and root, or who shows the provider's token."
            }
        }
    }
}

type MakeSchema = fn(&mut SchemaGenerator) -> Schema;

pub(crate) struct Route {
    pub method: &'static str,
    /// `{x}` stands for one part of a path.
    pub path: &'static str,
    pub name: &'static str,
    pub summary: &'static str,
    pub role: Role,
    pub body: Option<MakeSchema>,
    /// Names and meaning of the query's parameters.
    pub query: &'static [(&'static str, &'static str)],
    /// JSON unless there is another type.
    pub reply: Option<MakeSchema>,
    pub reply_type: &'static str,
    decode: fn(&Parts) -> Result<Request, ApiError>,
}

/// What a route's request is made of.
struct Parts<'a> {
    /// The part of the path that `{x}` stands for.
    parameter: &'a str,
    /// `x=y&z=`, as it was sent.
    query: &'a str,
    body: &'a [u8],
}

impl Parts<'_> {
    fn guest(&self) -> Result<u32, ApiError> {
        self.parameter.parse().map_err(|_| {
            bad(format!("'{}' is no guest: ids are the numbers that `netkernel ps` lists", self.parameter))
        })
    }

    /// A parameter of the query; the last one counts.
    fn query(&self, name: &str) -> Option<String> {
        let mut pairs = self.query.rsplit('&').filter_map(|pair| pair.split_once('='));
        let value = pairs.find(|(key, _)| *key == name)?.1;
        Some(percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned())
    }

    fn seconds(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let parse = |text: String| {
            text.parse().map_err(|_| bad(format!("'{text}' is no time: {name} is in seconds since 1970")))
        };
        self.query(name).map(parse).transpose()
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, ApiError> {
        let parse = |text: String| text.parse().map_err(|_| bad(format!("'{text}' is no {name}")));
        self.query(name).map(parse).transpose()
    }

    fn json<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        serde_json::from_slice(self.body).map_err(|e| bad(format!("the body of this request: {e}")))
    }
}

fn bad(text: String) -> ApiError {
    ApiError::new(ErrorCode::BadRequest, text)
}

fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

const JSON: &str = "application/json";
/// As Prometheus asks for it.
pub(crate) const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(crate) const ROUTES: &[Route] = &[
    Route {
        method: "GET",
        path: "/v1/version",
        name: "version",
        summary: "Versions and process of the engine",
        role: Role::Anybody,
        body: None,
        query: &[],
        reply: Some(schema::<VersionInfo>),
        reply_type: JSON,
        decode: |_| Ok(Request::Version),
    },
    Route {
        method: "GET",
        path: "/v1/status",
        name: "status",
        summary: "The engine and its guests",
        role: Role::Tenant,
        body: None,
        query: &[],
        reply: Some(schema::<Status>),
        reply_type: JSON,
        decode: |_| Ok(Request::Status),
    },
    Route {
        method: "GET",
        path: "/v1/stacks",
        name: "stacks",
        summary: "The network stack modules on offer",
        role: Role::Anybody,
        body: None,
        query: &[],
        reply: Some(schema::<Vec<NsmInfo>>),
        reply_type: JSON,
        decode: |_| Ok(Request::Stacks),
    },
    Route {
        method: "GET",
        path: "/v1/sockets",
        name: "sockets",
        summary: "Sockets of all guests, by whatever stack and attachment",
        role: Role::Tenant,
        body: None,
        query: &[
            ("tenant", "Only sockets of this tenant"),
            ("nsm", "Only sockets of this NSM, by its name"),
            ("port", "Only sockets with this port, local or the peer's"),
        ],
        reply: Some(schema::<Vec<SocketInfo>>),
        reply_type: JSON,
        decode: |parts| {
            Ok(Request::Sockets(SocketQuery {
                guest: None,
                tenant: parts.query("tenant"),
                nsm: parts.query("nsm"),
                port: parts.number("port")?,
            }))
        },
    },
    Route {
        method: "GET",
        path: "/v1/guests/{guest}/sockets",
        name: "guest_sockets",
        summary: "Sockets of one guest",
        role: Role::Tenant,
        body: None,
        query: &[],
        reply: Some(schema::<Vec<SocketInfo>>),
        reply_type: JSON,
        decode: |parts| {
            Ok(Request::Sockets(SocketQuery { guest: Some(parts.guest()?), ..SocketQuery::default() }))
        },
    },
    Route {
        method: "POST",
        path: "/v1/guests",
        name: "create_guest",
        summary: "Makes a guest. With the reply's first byte come three descriptors (SCM_RIGHTS): region, channel, doorbell. \
                  Who asks, and so whose guest it is, is what the kernel says (SO_PEERCRED)",
        role: Role::Tenant,
        body: Some(schema::<NewGuest>),
        query: &[],
        reply: Some(schema::<Attached>),
        reply_type: JSON,
        decode: |parts| Ok(Request::CreateGuest(parts.json()?)),
    },
    Route {
        method: "POST",
        path: "/v1/attach",
        name: "attach",
        summary: "The descriptors of a guest again, for whoever has its token",
        role: Role::Anybody,
        body: Some(schema::<Token>),
        query: &[],
        reply: Some(schema::<Attached>),
        reply_type: JSON,
        decode: |parts| Ok(Request::Attach(parts.json()?)),
    },
    Route {
        method: "DELETE",
        path: "/v1/guests/{guest}",
        name: "end_guest",
        summary: "Ends a guest: its connections are reset",
        role: Role::Tenant,
        body: None,
        query: &[],
        reply: None,
        reply_type: JSON,
        decode: |parts| Ok(Request::EndGuest { guest: parts.guest()? }),
    },
    Route {
        method: "POST",
        path: "/v1/guests/{guest}/move",
        name: "move_guest",
        summary: "Puts a guest on another stack: new sockets are opened there, open ones go over. Those that cannot stay where they are until they end",
        role: Role::Tenant,
        body: Some(schema::<Destination>),
        query: &[],
        reply: Some(schema::<Moved>),
        reply_type: JSON,
        decode: |parts| Ok(Request::MoveGuest { guest: parts.guest()?, to: parts.json()? }),
    },
    Route {
        method: "POST",
        path: "/v1/stacks/{stack}/restart",
        name: "restart_stack",
        summary: "Exchanges the process of a stack whose form is `process`; its guests' sockets go on",
        role: Role::Provider,
        body: None,
        query: &[],
        reply: Some(schema::<Restarted>),
        reply_type: JSON,
        decode: |parts| Ok(Request::RestartNsm { nsm: parts.parameter.to_owned() }),
    },
    Route {
        method: "POST",
        path: "/v1/stacks/{stack}/swap",
        name: "swap_stack",
        summary: "Exchanges the process of a stack for one of another program or configuration, under its guests. On error everything is as before",
        role: Role::Provider,
        body: Some(schema::<StackChange>),
        query: &[],
        reply: Some(schema::<Restarted>),
        reply_type: JSON,
        decode: |parts| Ok(Request::SwapNsm { nsm: parts.parameter.to_owned(), change: parts.json()? }),
    },
    Route {
        method: "POST",
        path: "/v1/stop",
        name: "stop",
        summary: "Ends the engine",
        role: Role::Provider,
        body: None,
        query: &[],
        reply: None,
        reply_type: JSON,
        decode: |_| Ok(Request::Stop),
    },
    Route {
        method: "GET",
        path: "/v1/usage",
        name: "usage",
        summary: "What was used, and what it costs by the catalogue's prices",
        role: Role::Tenant,
        body: None,
        query: &[
            ("from", "Seconds since 1970, rounded down to the minute; default: the beginning"),
            ("to", "Seconds since 1970, rounded down to the minute, not any more; default: now"),
            (
                "by",
                "What rows are told apart by: a list of tenant, nsm, guest, and one of minute, hour, day; default: tenant,nsm",
            ),
        ],
        reply: Some(schema::<Vec<netkernel_meter::Row>>),
        reply_type: JSON,
        decode: |parts| {
            Ok(Request::Usage(UsageQuery {
                from: parts.seconds("from")?,
                to: parts.seconds("to")?,
                by: parts.query("by"),
            }))
        },
    },
    Route {
        method: "POST",
        path: "/v1/captures",
        name: "capture",
        summary: "Captures what a tenant's guests, or one guest, send and receive. With the reply's first byte comes a descriptor \
                  (SCM_RIGHTS) of a pipe, from which pcapng can be read; the capture is over when it is closed",
        role: Role::Tenant,
        body: Some(schema::<NewCapture>),
        query: &[],
        reply: Some(schema::<CaptureInfo>),
        reply_type: JSON,
        decode: |parts| Ok(Request::Capture(parts.json()?)),
    },
    Route {
        method: "GET",
        path: "/v1/tenants",
        name: "tenants",
        summary: "The tenants, their limits, and what they use",
        role: Role::Tenant,
        body: None,
        query: &[],
        reply: Some(schema::<Vec<TenantInfo>>),
        reply_type: JSON,
        decode: |_| Ok(Request::Tenants),
    },
    Route {
        method: "PATCH",
        path: "/v1/tenants/{tenant}",
        name: "change_tenant",
        summary: "New limits for a tenant, at once and for the connections that there are. Refused if guarantees could not be kept",
        role: Role::Provider,
        body: Some(schema::<TenantChange>),
        query: &[],
        reply: None,
        reply_type: JSON,
        decode: |parts| {
            let name = percent_encoding::percent_decode_str(parts.parameter).decode_utf8_lossy().into_owned();
            Ok(Request::ChangeTenant { name, change: parts.json()? })
        },
    },
    Route {
        method: "POST",
        path: "/v1/reload",
        name: "reload",
        summary: "Reads the configuration again. Limits, weights and prices of tenants that there are change; with an error nothing does",
        role: Role::Provider,
        body: None,
        query: &[],
        reply: None,
        reply_type: JSON,
        decode: |_| Ok(Request::Reload),
    },
    Route {
        method: "POST",
        path: "/v1/restart",
        name: "restart",
        summary: "Exchanges the engine's program under its guests, with the configuration read again. Answers when it is known that \
                  this can be done, then does it; `restart` in /v1/status tells what came of it",
        role: Role::Provider,
        body: Some(schema::<EngineChange>),
        query: &[],
        reply: None,
        reply_type: JSON,
        decode: |parts| Ok(Request::RestartEngine(parts.json()?)),
    },
    Route {
        method: "GET",
        path: "/metrics",
        name: "metrics",
        summary: "Counters for Prometheus, in the text format of OpenMetrics",
        role: Role::Provider,
        body: None,
        query: &[],
        reply: None,
        reply_type: METRICS_TYPE,
        decode: |_| Ok(Request::Metrics),
    },
    Route {
        method: "GET",
        path: "/v1/openapi.json",
        name: "openapi",
        summary: "This document",
        role: Role::Anybody,
        body: None,
        query: &[],
        reply: None,
        reply_type: JSON,
        decode: |_| Ok(Request::OpenApi),
    },
];

/// Whether `path` is of the form `pattern`; the part that stands for the pattern's parameter.
fn matched<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    let mut parameter = "";
    let mut parts = path.split('/');
    for wanted in pattern.split('/') {
        let part = parts.next()?;
        if wanted.starts_with('{') {
            parameter = part;
        } else if wanted != part {
            return None;
        }
    }
    parts.next().is_none().then_some(parameter)
}

/// What a request asks for, and the role that it takes.
pub(crate) fn decode(method: &str, target: &str, body: &[u8]) -> Result<(Request, Role), ApiError> {
    let target = target.split('#').next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut other_methods = Vec::new();
    for route in ROUTES {
        let Some(parameter) = matched(route.path, path) else { continue };
        if route.method == method {
            let request = (route.decode)(&Parts { parameter, query, body })?;
            return Ok((request, route.role));
        }
        other_methods.push(route.method);
    }
    if !other_methods.is_empty() {
        let text = format!("{path} is for {}", other_methods.join(", "));
        return Err(ApiError::new(ErrorCode::Method, text));
    }
    let version = path.strip_prefix("/v").and_then(|rest| rest.split('/').next());
    if let Some(version) = version.filter(|v| !v.is_empty() && v.bytes().all(|b| b.is_ascii_digit()))
        && version != PROTOCOL_VERSION.to_string()
    {
        return Err(ApiError::new(
            ErrorCode::Version,
            format!(
                "the engine speaks version {PROTOCOL_VERSION} of the control API, the request is for version {version}"
            ),
        ));
    }
    let text = format!("there is no {path}: /v1/openapi.json describes what there is");
    Err(ApiError::new(ErrorCode::NotFound, text))
}

/// The request as HTTP: method, target, body.
pub(crate) fn encode(request: &Request) -> (&'static str, String, Option<Value>) {
    match request {
        Request::Version => ("GET", "/v1/version".into(), None),
        Request::CreateGuest(guest) => ("POST", "/v1/guests".into(), Some(json!(guest))),
        Request::Attach(token) => ("POST", "/v1/attach".into(), Some(json!(token))),
        Request::Status => ("GET", "/v1/status".into(), None),
        Request::Stacks => ("GET", "/v1/stacks".into(), None),
        Request::Sockets(SocketQuery { guest: Some(id), .. }) => {
            ("GET", format!("/v1/guests/{id}/sockets"), None)
        }
        Request::Sockets(query) => {
            let given = [
                parameter("tenant", query.tenant.as_deref()),
                parameter("nsm", query.nsm.as_deref()),
                query.port.map(|port| format!("port={port}")),
            ];
            ("GET", with_query("/v1/sockets", given), None)
        }
        Request::EndGuest { guest } => ("DELETE", format!("/v1/guests/{guest}"), None),
        Request::MoveGuest { guest, to } => ("POST", format!("/v1/guests/{guest}/move"), Some(json!(to))),
        // Names of stacks are letters, digits and -_. only.
        Request::RestartNsm { nsm } => ("POST", format!("/v1/stacks/{nsm}/restart"), None),
        Request::SwapNsm { nsm, change } => ("POST", format!("/v1/stacks/{nsm}/swap"), Some(json!(change))),
        Request::Stop => ("POST", "/v1/stop".into(), None),
        Request::Capture(capture) => ("POST", "/v1/captures".into(), Some(json!(capture))),
        Request::Tenants => ("GET", "/v1/tenants".into(), None),
        Request::ChangeTenant { name, change } => {
            let name = utf8_percent_encode(name, NON_ALPHANUMERIC);
            ("PATCH", format!("/v1/tenants/{name}"), Some(json!(change)))
        }
        Request::Reload => ("POST", "/v1/reload".into(), None),
        Request::Usage(query) => {
            let given = [
                query.from.map(|from| format!("from={from}")),
                query.to.map(|to| format!("to={to}")),
                parameter("by", query.by.as_deref()),
            ];
            ("GET", with_query("/v1/usage", given), None)
        }
        Request::RestartEngine(change) => ("POST", "/v1/restart".into(), Some(json!(change))),
        Request::Metrics => ("GET", "/metrics".into(), None),
        Request::OpenApi => ("GET", "/v1/openapi.json".into(), None),
    }
}

/// A parameter of a query, if there is a value.
fn parameter(name: &str, value: Option<&str>) -> Option<String> {
    value.map(|value| format!("{name}={}", utf8_percent_encode(value, NON_ALPHANUMERIC)))
}

fn with_query(path: &str, parameters: impl IntoIterator<Item = Option<String>>) -> String {
    let mut target = path.to_owned();
    for (i, parameter) in parameters.into_iter().flatten().enumerate() {
        target.push(if i == 0 { '?' } else { '&' });
        target.push_str(&parameter);
    }
    target
}

/// For fuzzing: whether these bytes are a request, and that it can be written again.
pub fn examine(bytes: &[u8]) -> Option<Request> {
    let (http, _) = crate::http::parse_request(bytes).ok()??;
    let (request, _) = decode(&http.method, &http.target, &http.body).ok()?;
    let (method, target, body) = encode(&request);
    let body = body.map(|value| value.to_string()).unwrap_or_default();
    let again = decode(method, &target, body.as_bytes()).expect("what was written can be read").0;
    assert_eq!(request, again);
    Some(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_route_is_reached_by_what_a_client_writes() {
        let requests = [
            Request::Version,
            Request::CreateGuest(NewGuest::default()),
            Request::CreateGuest(NewGuest {
                name: Some("a/b?".into()),
                stack: Some("bbr".into()),
                tenant_token: Some("t".into()),
            }),
            Request::Attach(Token { token: "00".into() }),
            Request::Status,
            Request::Stacks,
            Request::Sockets(SocketQuery::default()),
            Request::Sockets(SocketQuery { guest: Some(7), ..SocketQuery::default() }),
            Request::Sockets(SocketQuery {
                guest: None,
                tenant: Some("a b&c".into()),
                nsm: Some("bbr".into()),
                port: Some(80),
            }),
            Request::EndGuest { guest: u32::MAX },
            Request::MoveGuest { guest: 1, to: Destination { stack: "bbr".into(), all_or_nothing: false } },
            Request::RestartNsm { nsm: "bbr-2.x".into() },
            Request::SwapNsm {
                nsm: "bbr-2.x".into(),
                change: StackChange { pacing: Some(2), ..StackChange::default() },
            },
            Request::Stop,
            Request::Capture(NewCapture { guest: Some(7), snap_bytes: Some(100), tenant: Some("a".into()) }),
            Request::Tenants,
            Request::ChangeTenant {
                name: "a/ü".into(),
                change: TenantChange { weight: Some(2), ..TenantChange::default() },
            },
            Request::Reload,
            Request::RestartEngine(EngineChange { binary: Some("/bin/x".into()), lose: true }),
            Request::RestartEngine(EngineChange::default()),
            Request::Usage(UsageQuery::default()),
            Request::Usage(UsageQuery { from: Some(1), to: Some(2), by: Some("a b,&=%".into()) }),
            Request::Metrics,
            Request::OpenApi,
        ];
        let mut reached = std::collections::BTreeSet::new();
        for request in requests {
            let (method, target, body) = encode(&request);
            let body = body.map(|value| value.to_string()).unwrap_or_default();
            assert_eq!(decode(method, &target, body.as_bytes()).unwrap().0, request);
            let path = target.split('?').next().unwrap();
            reached.extend(
                ROUTES
                    .iter()
                    .filter(|r| r.method == method && matched(r.path, path).is_some())
                    .map(|r| r.name),
            );
        }
        assert_eq!(reached.len(), ROUTES.len(), "not reached: {:?}", reached);
    }

    #[test]
    fn what_is_no_request_is_refused_with_a_reason() {
        for (method, target, body, code) in [
            ("GET", "/", "", ErrorCode::NotFound),
            ("GET", "/v1", "", ErrorCode::NotFound),
            ("GET", "/v1/statuses", "", ErrorCode::NotFound),
            ("GET", "/v1/sockets?port=65536", "", ErrorCode::BadRequest),
            ("GET", "/v2/status", "", ErrorCode::Version),
            ("POST", "/v1/status", "", ErrorCode::Method),
            ("GET", "/v1/guests/x/sockets", "", ErrorCode::BadRequest),
            ("GET", "/v1/guests/-1/sockets", "", ErrorCode::BadRequest),
            ("DELETE", "/v1/guests/4294967296", "", ErrorCode::BadRequest),
            ("POST", "/v1/guests", "", ErrorCode::BadRequest),
            ("POST", "/v1/guests", r#"{"stak":"bbr"}"#, ErrorCode::BadRequest),
            ("POST", "/v1/attach", "{}", ErrorCode::BadRequest),
            ("GET", "/v1/usage?from=yesterday", "", ErrorCode::BadRequest),
        ] {
            let error = decode(method, target, body.as_bytes()).unwrap_err();
            assert_eq!(error.code, code, "{method} {target} {body}: {error}");
        }
    }
}
