//! Control messages of datagrams: Linux's `cmsghdr`s as 64-bit processes lay them out, and which of them may be sent.

/// Most bytes of control messages in one record.
pub const MAX_CONTROL: u32 = 512;

/// Bytes of a `cmsghdr`: length (u64, with the header), level, type.
pub const HEADER: usize = 16;

/// One control message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ancillary<'a> {
    pub level: i32,
    pub kind: i32,
    pub data: &'a [u8],
}

/// A length that does not fit (`CMSG_OK` fails: EINVAL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// The control messages in `bytes`, as the kernel walks them: what is too short for a header at the end is ignored.
pub fn messages(bytes: &[u8]) -> Messages<'_> {
    Messages { rest: bytes }
}

#[derive(Clone, Debug)]
pub struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Ancillary<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let (header, _) = self.rest.split_first_chunk::<HEADER>()?;
        let [a, b, c, d, e, f, g, h, level @ .., k, l, m, n] = *header;
        let len = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        let inside = usize::try_from(len).ok().filter(|len| (HEADER..=self.rest.len()).contains(len));
        let Some(len) = inside else {
            self.rest = &[];
            return Some(Err(Malformed));
        };
        let data = &self.rest[HEADER..len];
        self.rest = self.rest.get((len + 7) & !7..).unwrap_or(&[]);
        Some(Ok(Ancillary { level: i32::from_ne_bytes(level), kind: i32::from_ne_bytes([k, l, m, n]), data }))
    }
}

/// What becomes of a control message that a program sends with a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Pass,
    /// Linux does not look at it.
    Ignore,
    /// The send fails with this errno.
    Refuse(i32),
}

const EPERM: i32 = 1;
const EINVAL: i32 = 22;

const SOL_SOCKET: i32 = 1;
const SCM_RIGHTS: i32 = 1;
const SCM_CREDENTIALS: i32 = 2;
const SO_MARK: i32 = 36;
const SOL_IP: i32 = 0;
const IP_TOS: i32 = 1;
const IP_TTL: i32 = 2;
const IP_RETOPTS: i32 = 7;
const IP_PKTINFO: i32 = 8;
const SOL_UDP: i32 = 17;
const UDP_SEGMENT: i32 = 103;
const SOL_IPV6: i32 = 41;
const IPV6_2292PKTINFO: i32 = 2;
const IPV6_2292HOPLIMIT: i32 = 8;
const IPV6_PKTINFO: i32 = 50;
const IPV6_HOPLIMIT: i32 = 52;
const IPV6_DONTFRAG: i32 = 62;
const IPV6_TCLASS: i32 = 67;

impl Ancillary<'_> {
    /// The errno is Linux's for a process without privileges (ip_cmsg_send, ip6_datagram_send_ctl, udp_cmsg_send,
    /// __sock_cmsg_send). `v6`: of an IPv6 socket.
    pub fn fate(&self, v6: bool) -> Fate {
        let sized = |sizes: &[usize]| {
            if sizes.contains(&self.data.len()) { Fate::Pass } else { Fate::Refuse(EINVAL) }
        };
        match (self.level, self.kind) {
            (SOL_SOCKET, SCM_RIGHTS | SCM_CREDENTIALS) => Fate::Ignore,
            (SOL_SOCKET, SO_MARK) => Fate::Refuse(EPERM),
            (SOL_SOCKET, _) => Fate::Refuse(EINVAL),
            (SOL_UDP, UDP_SEGMENT) => sized(&[2]),
            (SOL_UDP, _) => Fate::Refuse(EINVAL),
            (SOL_IP, IP_PKTINFO) => sized(&[12]),
            (SOL_IP, IP_TTL) => sized(&[4]),
            (SOL_IP, IP_TOS) => sized(&[1, 4]),
            (SOL_IP, IP_RETOPTS) => Fate::Refuse(EPERM),
            (SOL_IP, _) => Fate::Refuse(EINVAL),
            (SOL_IPV6, _) if !v6 => Fate::Ignore,
            (SOL_IPV6, IPV6_PKTINFO | IPV6_2292PKTINFO) => sized(&[20]),
            (SOL_IPV6, IPV6_HOPLIMIT | IPV6_2292HOPLIMIT | IPV6_TCLASS | IPV6_DONTFRAG) => sized(&[4]),
            // Extension headers need CAP_NET_RAW.
            (SOL_IPV6, 3..=5 | 54 | 55 | 57 | 59) => Fate::Refuse(EPERM),
            (SOL_IPV6, _) => Fate::Refuse(EINVAL),
            _ => Fate::Ignore,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(level: i32, kind: i32, data: &[u8], out: &mut [u8]) -> usize {
        out[..8].copy_from_slice(&(16 + data.len() as u64).to_ne_bytes());
        out[8..12].copy_from_slice(&level.to_ne_bytes());
        out[12..16].copy_from_slice(&kind.to_ne_bytes());
        out[16..16 + data.len()].copy_from_slice(data);
        16 + data.len().next_multiple_of(8)
    }

    #[test]
    fn messages_are_walked_as_the_kernel_does() {
        let mut bytes = [0u8; 80];
        let mut n = message(SOL_IP, IP_PKTINFO, &[1; 12], &mut bytes);
        n += message(SOL_IPV6, IPV6_HOPLIMIT, &[2; 4], &mut bytes[n..]);
        let mut seen = messages(&bytes[..n]);
        assert_eq!(seen.next(), Some(Ok(Ancillary { level: SOL_IP, kind: IP_PKTINFO, data: &[1; 12] })));
        let hops = Ancillary { level: SOL_IPV6, kind: IPV6_HOPLIMIT, data: &[2; 4] };
        assert_eq!(seen.next(), Some(Ok(hops)));
        assert_eq!(seen.next(), None);
        assert_eq!((hops.fate(true), hops.fate(false)), (Fate::Pass, Fate::Ignore));
        // The last one needs no padding; less than a header is nothing.
        assert_eq!(messages(&bytes[..n - 4]).count(), 2);
        assert_eq!(messages(&bytes[..n - 8]).filter(Result::is_err).count(), 1);
        assert_eq!(messages(&bytes[..15]).next(), None);
    }

    #[test]
    fn lengths_that_lie_end_the_walk() {
        for len in [0u64, 15, 41, u64::MAX] {
            let mut bytes = [0u8; 40];
            bytes[..8].copy_from_slice(&len.to_ne_bytes());
            let mut seen = messages(&bytes);
            assert_eq!(seen.next(), Some(Err(Malformed)), "{len}");
            assert_eq!(seen.next(), None);
        }
    }

    #[test]
    fn privileges_are_not_lent() {
        let fate = |level, kind, len| Ancillary { level, kind, data: &[0; 64][..len] }.fate(true);
        assert_eq!(fate(SOL_SOCKET, SO_MARK, 4), Fate::Refuse(EPERM));
        assert_eq!(fate(SOL_IP, IP_RETOPTS, 8), Fate::Refuse(EPERM));
        assert_eq!(fate(SOL_IPV6, 54, 8), Fate::Refuse(EPERM));
        assert_eq!(fate(SOL_SOCKET, SCM_RIGHTS, 4), Fate::Ignore);
        assert_eq!(fate(SOL_IP, IP_PKTINFO, 11), Fate::Refuse(EINVAL));
    }
}
