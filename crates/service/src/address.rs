/// The bytes of a `sockaddr_in` or `sockaddr_in6` (or of something else that a guest passed: stacks check the family).
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct SocketAddress {
    len: u8,
    bytes: [u8; 28],
}

const AF_INET: u16 = libc::AF_INET as u16;
const AF_INET6: u16 = libc::AF_INET6 as u16;

impl SocketAddress {
    /// Takes at most 28 bytes; the family is not checked.
    pub fn from_bytes(bytes: &[u8]) -> SocketAddress {
        let len = bytes.len().min(28);
        let mut out = SocketAddress { len: len as u8, bytes: [0; 28] };
        out.bytes[..len].copy_from_slice(&bytes[..len]);
        out
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len as usize]
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address family, 0 when there is no room for one.
    pub fn family(&self) -> u16 {
        if self.len < 2 { 0 } else { u16::from_ne_bytes([self.bytes[0], self.bytes[1]]) }
    }

    /// Port of an IPv4 or IPv6 address, else 0.
    pub fn port(&self) -> u16 {
        match self.family() {
            AF_INET | AF_INET6 if self.len >= 4 => u16::from_be_bytes([self.bytes[2], self.bytes[3]]),
            _ => 0,
        }
    }

    /// As the seven words of a socket entry.
    pub fn to_words(&self) -> [u32; 7] {
        let mut words = [0; 7];
        for (word, chunk) in words.iter_mut().zip(self.bytes.chunks_exact(4)) {
            *word = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        }
        words
    }

    /// From the six words of a datagram header. `None`: not an address.
    pub fn from_datagram(words: &[u32; 6], len: u32) -> Option<SocketAddress> {
        let family = words[0] as u16;
        let mut out = SocketAddress::default();
        out.bytes[..4].copy_from_slice(&words[0].to_le_bytes());
        match family {
            AF_INET if len >= 16 => {
                out.len = 16;
                out.bytes[4..8].copy_from_slice(&words[1].to_le_bytes());
            }
            AF_INET6 if len >= 24 => {
                out.len = 28;
                for (i, word) in words[1..6].iter().enumerate() {
                    out.bytes[8 + 4 * i..12 + 4 * i].copy_from_slice(&word.to_le_bytes());
                }
            }
            _ => return None,
        }
        Some(out)
    }

    /// Inverse of [`SocketAddress::from_datagram`]: words, and the length for the header.
    pub fn to_datagram(&self) -> ([u32; 6], u32) {
        let word = |at: usize| {
            u32::from_le_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
        };
        match self.family() {
            AF_INET => ([word(0), word(4), 0, 0, 0, 0], 16),
            AF_INET6 => ([word(0), word(8), word(12), word(16), word(20), word(24)], 28),
            _ => ([0; 6], 0),
        }
    }

    /// The address for people and for tests.
    pub fn to_std(&self) -> Option<std::net::SocketAddr> {
        let port = u16::from_be_bytes([self.bytes[2], self.bytes[3]]);
        match self.family() {
            AF_INET if self.len >= 16 => {
                let ip: [u8; 4] = self.bytes[4..8].try_into().ok()?;
                Some((ip, port).into())
            }
            AF_INET6 if self.len >= 24 => {
                let ip: [u8; 16] = self.bytes[8..24].try_into().ok()?;
                Some((ip, port).into())
            }
            _ => None,
        }
    }
}

impl From<std::net::SocketAddr> for SocketAddress {
    fn from(address: std::net::SocketAddr) -> SocketAddress {
        let mut out = SocketAddress::default();
        out.bytes[2..4].copy_from_slice(&address.port().to_be_bytes());
        match address {
            std::net::SocketAddr::V4(v4) => {
                out.len = 16;
                out.bytes[..2].copy_from_slice(&AF_INET.to_ne_bytes());
                out.bytes[4..8].copy_from_slice(&v4.ip().octets());
            }
            std::net::SocketAddr::V6(v6) => {
                out.len = 28;
                out.bytes[..2].copy_from_slice(&AF_INET6.to_ne_bytes());
                out.bytes[8..24].copy_from_slice(&v6.ip().octets());
                out.bytes[24..28].copy_from_slice(&v6.scope_id().to_ne_bytes());
            }
        }
        out
    }
}

impl std::fmt::Debug for SocketAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.to_std() {
            Some(address) => address.fmt(f),
            None => write!(f, "{:?}", self.as_bytes()),
        }
    }
}

impl std::fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_datagram_header() {
        for text in ["127.0.0.1:80", "[2001:db8::7]:65535", "0.0.0.0:0"] {
            let address = SocketAddress::from(text.parse::<std::net::SocketAddr>().unwrap());
            let (words, len) = address.to_datagram();
            assert_eq!(SocketAddress::from_datagram(&words, len), Some(address), "{text}");
            assert_eq!(address.to_std().unwrap().to_string(), text);
        }
        assert_eq!(SocketAddress::from_datagram(&[9; 6], 28), None);
        assert_eq!(SocketAddress::from_bytes(&[2]).to_std(), None);
    }
}
