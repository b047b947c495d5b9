//! Blocks of pcapng files (draft-ietf-opsawg-pcapng).

/// LINKTYPE_RAW: packets begin with an IP header.
const RAW: u16 = 101;
const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;

fn block(kind: u32, body: &[u8]) -> Vec<u8> {
    let length = (12 + body.len()) as u32;
    let mut out = Vec::with_capacity(length as usize);
    out.extend(kind.to_le_bytes());
    out.extend(length.to_le_bytes());
    out.extend(body);
    out.extend(length.to_le_bytes());
    out
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = &value[..value.len().min(u16::MAX as usize)];
    body.extend(code.to_le_bytes());
    body.extend((value.len() as u16).to_le_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The beginning of a file.
pub fn section(application: &str, comment: &str) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(0x1a2b_3c4d_u32.to_le_bytes());
    body.extend([1, 0, 0, 0]);
    body.extend(u64::MAX.to_le_bytes());
    option(&mut body, 1, comment.as_bytes());
    option(&mut body, 4, application.as_bytes());
    option(&mut body, 0, &[]);
    block(SECTION, &body)
}

/// An interface; its number is how many were before it. Times are in nanoseconds.
pub fn interface(name: &str, description: &str, snap: u32) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(RAW.to_le_bytes());
    body.extend([0, 0]);
    body.extend(snap.to_le_bytes());
    option(&mut body, 2, name.as_bytes());
    option(&mut body, 3, description.as_bytes());
    option(&mut body, 9, &[9]);
    option(&mut body, 0, &[]);
    block(INTERFACE, &body)
}

/// A packet of `length` bytes, of which `data` was kept; `at_ns` since 1970.
pub fn packet(interface: u32, at_ns: u64, length: usize, data: &[u8], comment: &str) -> Vec<u8> {
    let mut body = Vec::with_capacity(data.len() + 24);
    body.extend(interface.to_le_bytes());
    body.extend(((at_ns >> 32) as u32).to_le_bytes());
    body.extend((at_ns as u32).to_le_bytes());
    body.extend((data.len() as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(data);
    body.resize(body.len().next_multiple_of(4), 0);
    option(&mut body, 1, comment.as_bytes());
    option(&mut body, 0, &[]);
    block(PACKET, &body)
}

/// How many packets of an interface were seen, and lost on the way to the file.
pub fn statistics(interface: u32, at_ns: u64, seen: u64, lost: u64) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(interface.to_le_bytes());
    body.extend(((at_ns >> 32) as u32).to_le_bytes());
    body.extend((at_ns as u32).to_le_bytes());
    option(&mut body, 4, &seen.to_le_bytes());
    option(&mut body, 5, &lost.to_le_bytes());
    option(&mut body, 0, &[]);
    block(STATISTICS, &body)
}
