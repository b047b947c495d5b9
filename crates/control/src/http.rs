//! As much of HTTP/1.1 (RFC 9112) as one API on a Unix socket needs: requests and replies with a Content-Length, one after the
//! other on a connection.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::time::Duration;

use crate::wire::Wire;

/// Longest head of a message.
const MAX_HEAD_BYTES: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
/// Longest body of a request.
pub const MAX_BODY_BYTES: usize = 64 * 1024;
/// Longest body of a reply: the socket list of an engine with a million sockets stays below.
pub const MAX_REPLY_BYTES: usize = 512 << 20;

#[derive(Debug)]
pub(crate) struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub body: Vec<u8>,
    /// What it shows: `Authorization: Bearer`.
    pub token: Option<String>,
    /// The connection ends with this request.
    pub last: bool,
}

#[derive(Debug)]
pub(crate) enum ReadError {
    /// Not HTTP, or not what is understood here: the status and a sentence. The connection cannot go on.
    Refused(u16, String),
    Io(io::Error),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        ReadError::Io(error)
    }
}

fn refused<T>(status: u16, text: impl Into<String>) -> Result<T, ReadError> {
    Err(ReadError::Refused(status, text.into()))
}

/// The next request, or `None` at the end of the stream. `buffer` keeps what came too early. Descriptors that a client sends
/// are dropped by the kernel. It must be complete within `timeout`.
pub(crate) fn read_request(
    wire: &mut dyn Wire,
    buffer: &mut Vec<u8>,
    timeout: Duration,
) -> Result<Option<Request>, ReadError> {
    wire.allow(timeout);
    loop {
        if let Some((request, used)) = parse_request(buffer)? {
            buffer.drain(..used);
            return Ok(Some(request));
        }
        let mut chunk = [0; 4096];
        match wire.read(&mut chunk) {
            Ok(0) => return Ok(None),
            Ok(n) => buffer.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// A request at the beginning of `bytes` and its length; `None`: it is not complete.
pub(crate) fn parse_request(bytes: &[u8]) -> Result<Option<(Request, usize)>, ReadError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let head_bytes = match head.parse(bytes) {
        Ok(httparse::Status::Complete(n)) => n,
        Ok(httparse::Status::Partial) if bytes.len() >= MAX_HEAD_BYTES => {
            return refused(431, format!("the head of a request is at most {MAX_HEAD_BYTES} bytes long"));
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(e) => return refused(400, format!("this is a socket for HTTP/1.1: {e}")),
    };
    let mut length = None;
    let mut last = head.version == Some(0);
    let mut token = None;
    for header in head.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let parsed = std::str::from_utf8(header.value).ok().and_then(|text| text.trim().parse().ok());
            // Two lengths are how requests are smuggled (RFC 9112, 6.3).
            if parsed.is_none() || (length.is_some() && length != parsed) {
                return refused(400, "Content-Length must be one number");
            }
            length = parsed;
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return refused(501, "send the body with a Content-Length; no transfer encodings are understood");
        } else if header.name.eq_ignore_ascii_case("authorization") {
            let shown = bearer(header.value);
            if shown.is_none() || token.is_some() {
                return refused(401, "Authorization is \"Bearer TOKEN\", once");
            }
            token = shown;
        } else if header.name.eq_ignore_ascii_case("connection") {
            last |= header.value.eq_ignore_ascii_case(b"close");
        }
    }
    let length: usize = length.unwrap_or(0);
    if length > MAX_BODY_BYTES {
        return refused(413, format!("the body of a request is at most {MAX_BODY_BYTES} bytes long"));
    }
    let Some(body) = bytes.get(head_bytes..head_bytes + length) else { return Ok(None) };
    let request = Request {
        method: head.method.unwrap_or_default().into(),
        target: head.path.unwrap_or_default().into(),
        body: body.to_vec(),
        token,
        last,
    };
    Ok(Some((request, head_bytes + length)))
}

/// The token of RFC 6750, 2.1.
fn bearer(value: &[u8]) -> Option<String> {
    let (scheme, token) = std::str::from_utf8(value).ok()?.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then(|| token.to_owned())
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub status: u16,
    pub content_type: &'static str,
    pub body: Vec<u8>,
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        413 => "Content Too Large",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Error",
    }
}

/// Sends a reply; descriptors go with its first byte. All of it must be taken within `timeout`.
pub(crate) fn write_reply(
    wire: &mut dyn Wire,
    reply: &Reply,
    last: bool,
    descriptors: &[RawFd],
    timeout: Duration,
) -> io::Result<()> {
    wire.allow(timeout);
    let mut message = format!(
        "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n{}\r\n",
        reply.status,
        reason(reply.status),
        reply.content_type,
        reply.body.len(),
        if last { "Connection: close\r\n" } else { "" },
    )
    .into_bytes();
    message.extend_from_slice(&reply.body);
    let mut sent = 0;
    if !descriptors.is_empty() {
        sent = wire.send_descriptors(&message, descriptors)?;
    }
    wire.write_all(&message[sent..])?;
    wire.flush()
}

pub(crate) fn write_request(
    wire: &mut dyn Wire,
    method: &str,
    target: &str,
    body: Option<&[u8]>,
    token: Option<&str>,
) -> io::Result<()> {
    let mut message = format!("{method} {target} HTTP/1.1\r\nHost: netkernel\r\n").into_bytes();
    if let Some(body) = body {
        message.extend_from_slice(
            format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()).as_bytes(),
        );
    }
    if let Some(token) = token {
        message.extend_from_slice(format!("Authorization: Bearer {token}\r\n").as_bytes());
    }
    message.extend_from_slice(b"\r\n");
    message.extend_from_slice(body.unwrap_or_default());
    wire.write_all(&message)?;
    wire.flush()
}

/// What came back.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

/// Reads one reply, of which something must come every `timeout`. Errors of kind InvalidData: what came is no such reply.
pub(crate) fn read_reply(wire: &mut dyn Wire, timeout: Duration) -> io::Result<Answer> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let mut bytes: Vec<u8> = Vec::new();
    let mut answer = Answer::default();
    let mut chunk = vec![0; 64 * 1024];
    // Where the body begins, and how long it is.
    let mut body: Option<(usize, usize)> = None;
    loop {
        if body.is_none() {
            let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
            let mut head = httparse::Response::new(&mut headers);
            if let httparse::Status::Complete(n) = head.parse(&bytes).map_err(|e| invalid(e.to_string()))? {
                let length = head
                    .headers
                    .iter()
                    .find(|h| h.name.eq_ignore_ascii_case("content-length"))
                    .and_then(|h| std::str::from_utf8(h.value).ok()?.trim().parse().ok())
                    .filter(|&length| length <= MAX_REPLY_BYTES)
                    .ok_or_else(|| invalid("it has no usable Content-Length".into()))?;
                answer.status = head.code.unwrap_or_default();
                body = Some((n, length));
            } else if bytes.len() > MAX_HEAD_BYTES {
                return Err(invalid("its head is too long".into()));
            }
        }
        if let Some((at, length)) = body
            && bytes.len() >= at + length
        {
            answer.body = bytes.split_off(at);
            answer.body.truncate(length);
            return Ok(answer);
        }
        wire.allow(timeout);
        match wire.receive(&mut chunk) {
            Ok((0, _)) if bytes.is_empty() => {
                return Err(io::Error::new(io::ErrorKind::ConnectionReset, "it closed the connection"));
            }
            Ok((0, _)) => return Err(invalid("it ends in the middle".into())),
            Ok((n, more)) => {
                bytes.extend_from_slice(&chunk[..n]);
                answer.descriptors.extend(more);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Option<(Request, usize)>, ReadError> {
        parse_request(text.as_bytes())
    }

    #[test]
    fn a_request_is_taken_with_its_body_and_no_more() {
        let text = "POST /v1/guests HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbodyGET / HTTP/1.1\r\n";
        let (request, used) = parse(text).unwrap().unwrap();
        assert_eq!((request.method.as_str(), request.target.as_str()), ("POST", "/v1/guests"));
        assert_eq!((&request.body[..], request.last), (&b"body"[..], false));
        assert_eq!(&text[used..], "GET / HTTP/1.1\r\n");
        for end in 0..used {
            assert!(parse(&text[..end]).unwrap().is_none(), "complete after {end} bytes");
        }
        let shown = parse("GET / HTTP/1.1\r\nauthorization: bearer  abc \r\n\r\n").unwrap().unwrap().0.token;
        assert_eq!(shown.as_deref(), Some("abc"));
        assert!(parse("GET / HTTP/1.0\r\n\r\n").unwrap().unwrap().0.last);
        assert!(parse("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n").unwrap().unwrap().0.last);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (text, wanted) in [
            ("{\"version\":1}\n", 400),
            ("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nAuthorization: Basic eDp5\r\n\r\n", 401),
            ("GET / HTTP/1.1\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n", 401),
            ("GET / HTTP/1.1\r\nAuthorization: Bearer \r\n\r\n", 401),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
            ("GET / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
        ] {
            match parse(text) {
                Err(ReadError::Refused(status, _)) => assert_eq!(status, wanted, "{text:?}"),
                other => panic!("{text:?} gave {other:?}"),
            }
        }
        let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(MAX_HEAD_BYTES));
        assert!(matches!(parse(&long), Err(ReadError::Refused(431, _))));
    }
}
