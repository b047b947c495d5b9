//! IP packets with TCP or UDP headers, made for captures (RFC 791, 8200, 9293, 768).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Of a TCP header; `None` in [`packet`]: UDP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
}

pub mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const PSH: u8 = 8;
    pub const ACK: u8 = 16;
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    pub from: SocketAddr,
    pub to: SocketAddr,
}

const TCP: u8 = 6;
const UDP: u8 = 17;
/// Most payload of one packet.
pub const MOST_PAYLOAD: usize = 65_000;

/// A packet from its IP header on. Payload beyond [`MOST_PAYLOAD`] is left out.
pub fn packet(way: Way, tcp: Option<Header>, payload: &[u8]) -> Vec<u8> {
    let payload = &payload[..payload.len().min(MOST_PAYLOAD)];
    let (from, to) = same_family(way.from.ip(), way.to.ip());
    let (protocol, own) = if tcp.is_some() { (TCP, 20) } else { (UDP, 8) };
    let length = own + payload.len();
    let mut out = Vec::with_capacity(40 + length);
    // What the checksum covers beside the segment.
    let mut pseudo = Vec::with_capacity(40);
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            out.extend([0x45, 0]);
            out.extend(((20 + length) as u16).to_be_bytes());
            out.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
            out.extend(from.octets());
            out.extend(to.octets());
            let sum = checksum(&[&out]);
            out[10..12].copy_from_slice(&sum.to_be_bytes());
            pseudo.extend(from.octets());
            pseudo.extend(to.octets());
            pseudo.extend([0, protocol]);
            pseudo.extend((length as u16).to_be_bytes());
        }
        (from, to) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            out.extend([0x60, 0, 0, 0]);
            out.extend((length as u16).to_be_bytes());
            out.extend([protocol, 64]);
            out.extend(octets(from));
            out.extend(octets(to));
            pseudo.extend(octets(from));
            pseudo.extend(octets(to));
            pseudo.extend((length as u32).to_be_bytes());
            pseudo.extend([0, 0, 0, protocol]);
        }
    }
    let at = out.len();
    out.extend(way.from.port().to_be_bytes());
    out.extend(way.to.port().to_be_bytes());
    match tcp {
        Some(header) => {
            out.extend(header.sequence.to_be_bytes());
            out.extend(header.acknowledged.to_be_bytes());
            out.extend([5 << 4, header.flags, 0xff, 0xff, 0, 0, 0, 0]);
        }
        None => {
            out.extend((length as u16).to_be_bytes());
            out.extend([0, 0]);
        }
    }
    out.extend(payload);
    let sum = match (checksum(&[&pseudo, &out[at..]]), tcp) {
        // No checksum, in UDP.
        (0, None) => 0xffff,
        (sum, _) => sum,
    };
    let field = at + if tcp.is_some() { 16 } else { 6 };
    out[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    out
}

/// IPv4 where both are, or one is and the other one is not bound to an address.
fn same_family(from: IpAddr, to: IpAddr) -> (IpAddr, IpAddr) {
    match (from.to_canonical(), to.to_canonical()) {
        (from @ IpAddr::V4(_), to) if to.is_unspecified() => (from, Ipv4Addr::UNSPECIFIED.into()),
        (from, to @ IpAddr::V4(_)) if from.is_unspecified() => (Ipv4Addr::UNSPECIFIED.into(), to),
        both => both,
    }
}

/// The Internet checksum (RFC 1071). Each part but the last one has an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(from: &str, to: &str) -> Way {
        Way { from: from.parse().unwrap(), to: to.parse().unwrap() }
    }

    #[test]
    fn headers_are_those_of_their_protocols_and_checksums_hold() {
        let tcp = packet(
            way("10.0.0.1:80", "10.0.0.2:4000"),
            Some(Header { sequence: 7, acknowledged: 9, flags: flag::PSH | flag::ACK }),
            b"abc",
        );
        assert_eq!((tcp.len(), tcp[0], tcp[9]), (43, 0x45, TCP));
        assert_eq!(checksum(&[&tcp[..20]]), 0);
        assert_eq!((&tcp[20..24], &tcp[24..28]), (&[0, 80, 15, 160][..], &[0, 0, 0, 7][..]));
        let pseudo = [&tcp[12..20], &[0, TCP, 0, 23]].concat();
        assert_eq!(checksum(&[&pseudo, &tcp[20..]]), 0);

        let udp = packet(way("[::1]:53", "[fe80::2]:9"), None, &[1; 70_000]);
        assert_eq!((udp[0], udp[6], udp.len()), (0x60, UDP, 48 + MOST_PAYLOAD));
        let mut pseudo = udp[8..40].to_vec();
        pseudo.extend(((MOST_PAYLOAD + 8) as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, UDP]);
        assert_eq!(checksum(&[&pseudo, &udp[40..]]), 0);

        // A socket for both families, with an IPv4 peer; and one that is bound to no address.
        assert_eq!(
            packet(way("[::ffff:1.2.3.4]:1", "[::ffff:5.6.7.8]:2"), None, b"")[12..20],
            [1, 2, 3, 4, 5, 6, 7, 8]
        );
        assert_eq!(packet(way("[::]:1", "5.6.7.8:2"), None, b"")[12..20], [0, 0, 0, 0, 5, 6, 7, 8]);
    }
}
