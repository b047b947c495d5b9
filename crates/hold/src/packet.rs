//! What a packet is of, and what it asks for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::table::{TCP, UDP};

/// A packet that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// [`crate::Hold::release`] wants it.
    pub id: u32,
    pub flow: Flow,
    /// Bytes behind the headers. One packet here may be many on the way (segmentation offload).
    pub payload: u32,
    /// Of TCP: up to where the other side's bytes are here.
    pub acknowledges: Option<u32>,
    /// It is the first of a connection that is made from here.
    pub begins: bool,
}

/// Whose packets: `IPPROTO_TCP` or `IPPROTO_UDP`, from where, and to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    pub protocol: u8,
    pub local: SocketAddr,
    pub peer: SocketAddr,
}

/// IPv6's headers between its own and the transport's that have their length in the second byte.
const EXTENSIONS: [u8; 3] = [0, 43, 60];

impl Packet {
    /// `bytes`: the beginning of a packet of IP that is `length` bytes long. `None`: neither TCP nor UDP, or a fragment.
    pub(crate) fn parse(id: u32, bytes: &[u8], length: usize) -> Option<Packet> {
        let (protocol, mut at, from, to): (u8, usize, IpAddr, IpAddr) = match bytes.first()? >> 4 {
            4 => {
                let address =
                    |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
                (*bytes.get(9)?, usize::from(bytes[0] & 15) * 4, address(12)?.into(), address(16)?.into())
            }
            6 => {
                let address =
                    |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?));
                (*bytes.get(6)?, 40, address(8)?.into(), address(24)?.into())
            }
            _ => return None,
        };
        let mut protocol = protocol;
        while from.is_ipv6() && EXTENSIONS.contains(&protocol) {
            let next = *bytes.get(at)?;
            at += 8 + 8 * usize::from(*bytes.get(at + 1)?);
            protocol = next;
        }
        let header = bytes.get(at..)?;
        let port = |at: usize| Some(u16::from_be_bytes([*header.get(at)?, *header.get(at + 1)?]));
        let flow =
            Flow { protocol, local: SocketAddr::new(from, port(0)?), peer: SocketAddr::new(to, port(2)?) };
        let (own, acknowledges, begins) = match protocol {
            TCP => {
                let flags = *header.get(13)?;
                let number = u32::from_be_bytes(header.get(8..12)?.try_into().ok()?);
                let own = usize::from(header.get(12)? >> 4) * 4;
                (own, (flags & 0x10 != 0).then_some(number), flags & 0x12 == 2)
            }
            UDP => (8, None, false),
            _ => return None,
        };
        let payload = length.saturating_sub(at + own) as u32;
        Some(Packet { id, flow, payload, acknowledges, begins })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(flags: u8, acknowledges: u32) -> Vec<u8> {
        let mut header = vec![0; 32];
        header[..2].copy_from_slice(&80_u16.to_be_bytes());
        header[2..4].copy_from_slice(&1234_u16.to_be_bytes());
        header[8..12].copy_from_slice(&acknowledges.to_be_bytes());
        header[12] = 8 << 4;
        header[13] = flags;
        header
    }

    #[test]
    fn both_versions_of_ip_are_understood() {
        let mut four = vec![0; 20];
        (four[0], four[9]) = (0x45, TCP);
        four[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        four.extend(tcp(0x10, 77));
        let packet = Packet::parse(9, &four, 20 + 32 + 60_000).unwrap();
        let flow = Flow {
            protocol: TCP,
            local: "10.0.0.1:80".parse().unwrap(),
            peer: "10.0.0.2:1234".parse().unwrap(),
        };
        assert_eq!(packet, Packet { id: 9, flow, payload: 60_000, acknowledges: Some(77), begins: false });

        let mut six = vec![0; 40];
        (six[0], six[6]) = (0x60, 60);
        (six[23], six[39]) = (1, 2);
        // Destination options of 16 bytes.
        six.extend([TCP, 1]);
        six.extend([0; 14]);
        six.extend(tcp(2, 0));
        let packet = Packet::parse(1, &six, six.len()).unwrap();
        assert_eq!((packet.payload, packet.acknowledges, packet.begins), (0, None, true));
        assert_eq!(packet.flow.local, "[::1]:80".parse().unwrap());

        let mut datagram = vec![0; 28];
        (datagram[0], datagram[9]) = (0x45, UDP);
        let packet = Packet::parse(1, &datagram, 28 + 5).unwrap();
        assert_eq!((packet.payload, packet.flow.protocol), (5, UDP));
    }

    #[test]
    fn what_is_cut_or_strange_is_none() {
        let mut four = vec![0; 20];
        (four[0], four[9]) = (0x45, TCP);
        four.extend(tcp(0x10, 77));
        for length in 0..20 + 14 {
            assert_eq!(Packet::parse(1, &four[..length], 5000), None, "{length}");
        }
        four[9] = 1;
        assert_eq!(Packet::parse(1, &four, 5000), None);
        assert_eq!(Packet::parse(1, &[0xff; 60], 60), None);
    }
}
