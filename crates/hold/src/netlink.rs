//! Messages of nfnetlink (kernel: include/uapi/linux/netfilter/nfnetlink.h).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

/// struct nlmsghdr and struct nfgenmsg.
const HEADER: usize = 20;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
pub(crate) const CREATE: u16 = 0x400;
const NESTED: u16 = 1 << 15;
const ERROR: u16 = 2;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

/// A socket of netlink to netfilter in the namespace of the thread that made it.
pub(crate) struct Netlink(OwnedFd);

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Netlink {
    pub fn open() -> io::Result<Netlink> {
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(NETFILTER))?;
        bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        Ok(Netlink(fd))
    }

    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        send(&self.0, bytes, SendFlags::empty())?;
        Ok(())
    }

    /// One message or several; `None`: there is none now.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        match recv(&self.0, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((length, _)) => Ok(Some(&buffer[..length.min(buffer.len())])),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends what is to be acknowledged `count` times. The kernel answers before it returns. An error is the first one.
    pub fn ask(&self, bytes: &[u8], count: usize) -> io::Result<()> {
        self.send(bytes)?;
        let mut first = Ok(());
        let mut buffer = [0; 8192];
        let mut left = count;
        while left > 0
            && let Some(answers) = self.receive(&mut buffer)?
        {
            each(answers, |kind, body| {
                if kind == ERROR {
                    left = left.saturating_sub(1);
                    let errno = -(word(body, 0) as i32);
                    if errno != 0 && first.is_ok() {
                        first = Err(io::Error::from_raw_os_error(errno));
                    }
                }
            });
        }
        first
    }
}

/// Calls for each message with its kind, and what comes behind struct nlmsghdr.
pub(crate) fn each(mut rest: &[u8], mut call: impl FnMut(u16, &[u8])) {
    while rest.len() >= 16 {
        let length = (word(rest, 0) as usize).clamp(16, rest.len());
        call(half(rest, 4), &rest[16..length]);
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
}

/// Attributes behind struct nfgenmsg, or in another one.
pub(crate) fn attributes(mut rest: &[u8], mut call: impl FnMut(u16, &[u8])) {
    while rest.len() >= 4 {
        let length = usize::from(half(rest, 0)).clamp(4, rest.len());
        call(half(rest, 2) & !NESTED, &rest[4..length]);
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
}

pub(crate) fn half(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_ne_bytes)
}

pub(crate) fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// What is sent: messages, one behind the other.
#[derive(Default)]
pub(crate) struct Messages {
    pub bytes: Vec<u8>,
    /// Of those to be acknowledged.
    pub count: usize,
}

impl Messages {
    /// Between [`Messages::begin`] and [`Messages::end`] all holds or nothing. `system`: NFNL_SUBSYS_NFTABLES.
    pub fn begin(&mut self, system: u16) {
        self.raw(BATCH_BEGIN, 0, 0, system, |_| ());
    }

    pub fn end(&mut self, system: u16) {
        self.raw(BATCH_END, 0, 0, system, |_| ());
    }

    /// A message that is acknowledged. `number`: res_id.
    pub fn message(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        number: u16,
        fill: impl FnOnce(&mut Vec<u8>),
    ) {
        self.count += 1;
        self.raw(kind, flags | ACKNOWLEDGE, family, number, fill);
    }

    pub fn raw(&mut self, kind: u16, flags: u16, family: u8, number: u16, fill: impl FnOnce(&mut Vec<u8>)) {
        let at = self.bytes.len();
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags | REQUEST).to_ne_bytes());
        self.bytes.extend([0; 8]);
        self.bytes.extend([family, 0]);
        self.bytes.extend(number.to_be_bytes());
        fill(&mut self.bytes);
        let length = (self.bytes.len() - at) as u32;
        debug_assert!(length as usize >= HEADER);
        self.bytes[at..at + 4].copy_from_slice(&length.to_ne_bytes());
    }
}

pub(crate) fn put(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    to.extend(((4 + value.len()) as u16).to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// With the zero behind it.
pub(crate) fn put_text(to: &mut Vec<u8>, kind: u16, text: &str) {
    put(to, kind, &[text.as_bytes(), &[0]].concat());
}

pub(crate) fn put_word(to: &mut Vec<u8>, kind: u16, value: u32) {
    put(to, kind, &value.to_be_bytes());
}

/// With attributes in it.
pub(crate) fn nest(to: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let at = to.len();
    to.extend([0; 4]);
    fill(to);
    let length = (to.len() - at) as u16;
    to[at..at + 2].copy_from_slice(&length.to_ne_bytes());
    to[at + 2..at + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
}
