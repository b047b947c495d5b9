//! What the stack must know of a frame before smoltcp sees it: a SYN needs a socket that listens, an RST is a reason, and
//! smoltcp has no use for what routers say of lost packets. All of it is the network's word: parsed with checks, believed
//! only where it names a connection that exists.

use std::net::Ipv4Addr;

use smoltcp::wire::{
    ArpPacket, EthernetFrame, EthernetProtocol, Icmpv4Message, Icmpv4Packet, Icmpv6Message, Icmpv6Packet,
    IpAddress, IpEndpoint, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    Tcp {
        from: IpEndpoint,
        to: IpEndpoint,
        /// SYN without ACK.
        opens: bool,
        resets: bool,
    },
    Udp {
        from: IpEndpoint,
        to: IpEndpoint,
    },
    /// A packet that went from `from` to `to` did not arrive.
    Lost {
        tcp: bool,
        from: IpEndpoint,
        to: IpEndpoint,
        errno: i32,
    },
    /// This neighbour is there.
    Neighbour(IpAddress),
    Other,
    /// Must not come over a wire: from an address of this host, or to its loopback.
    Martian,
}

/// `wire`: it is not one of the stack's own. `own`: whether an address is.
pub fn look(frame: &[u8], wire: bool, own: impl Fn(IpAddress) -> bool) -> Seen {
    parse(frame, wire, own).unwrap_or(Seen::Other)
}

fn parse(frame: &[u8], wire: bool, own: impl Fn(IpAddress) -> bool) -> Option<Seen> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    match frame.ethertype() {
        EthernetProtocol::Arp => {
            let arp = ArpPacket::new_checked(frame.payload()).ok()?;
            let source: [u8; 4] = arp.source_protocol_addr().try_into().ok()?;
            let from = Ipv4Addr::from(source);
            // Who claims an address of ours would get what our sockets send to each other.
            if wire && (from.is_loopback() || own(from.into())) {
                return Some(Seen::Martian);
            }
            Some(Seen::Neighbour(from.into()))
        }
        EthernetProtocol::Ipv4 => {
            let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
            let (from, to) = (packet.src_addr(), packet.dst_addr());
            if wire && (from.is_loopback() || to.is_loopback() || own(from.into())) {
                return Some(Seen::Martian);
            }
            match packet.next_header() {
                IpProtocol::Tcp => tcp(from.into(), to.into(), packet.payload()),
                IpProtocol::Udp => udp(from.into(), to.into(), packet.payload()),
                IpProtocol::Icmp => lost_v4(packet.payload()),
                _ => None,
            }
        }
        EthernetProtocol::Ipv6 => {
            let packet = Ipv6Packet::new_checked(frame.payload()).ok()?;
            let (from, to) = (packet.src_addr(), packet.dst_addr());
            if wire && (from.is_loopback() || to.is_loopback() || own(from.into())) {
                return Some(Seen::Martian);
            }
            match packet.next_header() {
                IpProtocol::Tcp => tcp(from.into(), to.into(), packet.payload()),
                IpProtocol::Udp => udp(from.into(), to.into(), packet.payload()),
                IpProtocol::Icmpv6 => v6(from.into(), packet.payload()),
                _ => None,
            }
        }
        _ => None,
    }
}

fn tcp(from: IpAddress, to: IpAddress, payload: &[u8]) -> Option<Seen> {
    let segment = TcpPacket::new_checked(payload).ok()?;
    Some(Seen::Tcp {
        from: IpEndpoint::new(from, segment.src_port()),
        to: IpEndpoint::new(to, segment.dst_port()),
        opens: segment.syn() && !segment.ack() && !segment.rst(),
        resets: segment.rst(),
    })
}

fn udp(from: IpAddress, to: IpAddress, payload: &[u8]) -> Option<Seen> {
    let datagram = UdpPacket::new_checked(payload).ok()?;
    let (from, to) = (IpEndpoint::new(from, datagram.src_port()), IpEndpoint::new(to, datagram.dst_port()));
    Some(Seen::Udp { from, to })
}

/// The ends of a packet of which a message quotes the first bytes.
fn quoted(tcp: IpProtocol, from: IpAddress, to: IpAddress, payload: &[u8], errno: i32) -> Option<Seen> {
    let ports = payload.get(..4)?;
    let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
    let (from, to) = (IpEndpoint::new(from, port(0)), IpEndpoint::new(to, port(2)));
    match tcp {
        IpProtocol::Tcp => Some(Seen::Lost { tcp: true, from, to, errno }),
        IpProtocol::Udp => Some(Seen::Lost { tcp: false, from, to, errno }),
        _ => None,
    }
}

fn lost_v4(payload: &[u8]) -> Option<Seen> {
    let message = Icmpv4Packet::new_checked(payload).ok()?;
    if message.msg_type() != Icmpv4Message::DstUnreachable {
        return None;
    }
    // As Linux's icmp_err_convert.
    let errno = match message.msg_code() {
        0 | 6 => libc::ENETUNREACH,
        2 => libc::ENOPROTOOPT,
        3 => libc::ECONNREFUSED,
        // The packet was too large: the next ones are smaller.
        4 => return None,
        5 => libc::EOPNOTSUPP,
        9 => libc::ENETUNREACH,
        _ => libc::EHOSTUNREACH,
    };
    let inner = message.data();
    // Only the header and eight bytes are quoted: lengths are not those of a whole packet.
    let header = usize::from(inner.first()? & 0xf) * 4;
    if inner.first()? >> 4 != 4 || header < 20 || inner.len() < header + 4 {
        return None;
    }
    let address = |at: usize| -> Option<IpAddress> {
        let bytes: [u8; 4] = inner.get(at..at + 4)?.try_into().ok()?;
        Some(IpAddress::Ipv4(bytes.into()))
    };
    quoted(IpProtocol::from(inner[9]), address(12)?, address(16)?, &inner[header..], errno)
}

fn v6(from: IpAddress, payload: &[u8]) -> Option<Seen> {
    let message = Icmpv6Packet::new_checked(payload).ok()?;
    match message.msg_type() {
        Icmpv6Message::NeighborAdvert | Icmpv6Message::NeighborSolicit => Some(Seen::Neighbour(from)),
        Icmpv6Message::DstUnreachable => {
            let errno = match message.msg_code() {
                0 => libc::ENETUNREACH,
                1 | 5 | 6 => libc::EACCES,
                4 => libc::ECONNREFUSED,
                _ => libc::EHOSTUNREACH,
            };
            // Type, code, checksum and four unused bytes stand before the quoted packet.
            let inner = payload.get(8..)?;
            let address = |at: usize| -> Option<IpAddress> {
                let bytes: [u8; 16] = inner.get(at..at + 16)?.try_into().ok()?;
                Some(IpAddress::Ipv6(bytes.into()))
            };
            quoted(IpProtocol::from(*inner.get(6)?), address(8)?, address(24)?, inner.get(40..)?, errno)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_are_looked_at_without_harm() {
        let mut seed = 7u64;
        for len in 0..200 {
            for ethertype in [[8, 0], [8, 6], [0x86, 0xdd]] {
                let mut frame = vec![0u8; len];
                for byte in &mut frame {
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    *byte = (seed >> 56) as u8;
                }
                if len >= 24 {
                    frame[12..14].copy_from_slice(&ethertype);
                    frame[14] = if ethertype == [8, 0] { 0x45 } else { 0x60 };
                    frame[23] = [1, 6, 17][len % 3];
                }
                look(&frame, true, |_| false);
            }
        }
    }
}
