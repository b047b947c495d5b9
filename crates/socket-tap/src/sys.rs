//! bpf(2).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

// Commands.
const MAP_CREATE: i32 = 0;
const MAP_LOOKUP: i32 = 1;
const MAP_UPDATE: i32 = 2;
const PROGRAM_LOAD: i32 = 5;
const BTF_LOAD: i32 = 18;
const LINK_CREATE: i32 = 28;
// Kinds of maps.
const ARRAY: u32 = 2;
const SOCKET_STORAGE: u32 = 24;
const RING_BUFFER: u32 = 27;
/// BPF_F_NO_PREALLOC, and BPF_F_CLONE: connections have what their listener had.
const STORAGE_FLAGS: u32 = 1 | 1 << 9;
const CGROUP_SKB: u32 = 8;

/// `union bpf_attr`, filled from the beginning.
#[repr(C, align(8))]
struct Attributes([u8; 144]);

impl Attributes {
    fn of(words: &[u32]) -> Attributes {
        let mut attributes = Attributes([0; 144]);
        for (at, word) in words.iter().enumerate() {
            attributes.0[4 * at..4 * at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        attributes
    }

    /// A pointer, or another word of 64 bits, at a place in bytes.
    fn with(mut self, at: usize, value: u64) -> Attributes {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }
}

fn bpf(command: i32, attributes: &mut Attributes) -> io::Result<i32> {
    // SAFETY: the attributes are as long as is said; what they point to is alive during the callers' calls.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<Attributes>() as u32) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn made(command: i32, mut attributes: Attributes) -> io::Result<OwnedFd> {
    let fd = bpf(command, &mut attributes)?;
    // SAFETY: new, and owned by nobody else. The kernel sets close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn pointer(bytes: &[u8]) -> u64 {
    bytes.as_ptr() as u64
}

/// A `u32` beside each socket that has one.
pub fn socket_storage() -> io::Result<OwnedFd> {
    // Such a map must say what its keys and values are: `int`, of 32 bits, the first and only type (Documentation/bpf/btf.rst).
    let strings = b"\0int\0";
    let types: [u32; 4] = [1, 1 << 24, 4, 32];
    let mut btf = Vec::new();
    btf.extend(0xeb9f_u16.to_ne_bytes());
    btf.extend([1, 0]);
    let type_bytes = size_of_val(&types) as u32;
    for word in [24, 0, type_bytes, type_bytes, strings.len() as u32].into_iter().chain(types) {
        btf.extend(word.to_ne_bytes());
    }
    btf.extend(strings);
    let attributes = Attributes::of(&[]).with(0, pointer(&btf)).with(16, btf.len() as u64);
    let btf = made(BTF_LOAD, attributes)?;
    // Kind, key, value, entries, flags; then the types.
    let mut words = [0; 15];
    words[..5].copy_from_slice(&[SOCKET_STORAGE, 4, 4, 0, STORAGE_FLAGS]);
    words[12..].copy_from_slice(&[btf.as_raw_fd() as u32, 1, 1]);
    made(MAP_CREATE, Attributes::of(&words))
}

pub fn ring_buffer(bytes: usize) -> io::Result<OwnedFd> {
    made(MAP_CREATE, Attributes::of(&[RING_BUFFER, 0, 0, bytes as u32, 0]))
}

/// A map of one `u64`.
pub fn counter() -> io::Result<OwnedFd> {
    made(MAP_CREATE, Attributes::of(&[ARRAY, 4, 8, 1, 0]))
}

fn element(map: BorrowedFd<'_>, key: &[u8], value: u64) -> Attributes {
    Attributes::of(&[map.as_raw_fd() as u32]).with(8, pointer(key)).with(16, value)
}

pub fn update(map: BorrowedFd<'_>, key: &[u8; 4], value: &[u8; 4]) -> io::Result<()> {
    bpf(MAP_UPDATE, &mut element(map, key, pointer(value))).map(drop)
}

/// What stands in a [`counter`].
pub fn count(map: BorrowedFd<'_>) -> io::Result<u64> {
    let mut value = 0_u64;
    bpf(MAP_LOOKUP, &mut element(map, &[0; 4], &raw mut value as u64))?;
    Ok(value)
}

/// A program for packets of sockets. An error has the verifier's last words.
pub fn load(program: &[u64]) -> io::Result<OwnedFd> {
    let mut log = vec![0; 1 << 16];
    let attributes = |log: &mut [u8]| {
        Attributes::of(&[CGROUP_SKB, program.len() as u32])
            .with(8, program.as_ptr() as u64)
            .with(16, c"MIT OR Apache-2.0".as_ptr() as u64)
            .with(24, u64::from(!log.is_empty()) | (log.len() as u64) << 32)
            .with(32, if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 })
    };
    made(PROGRAM_LOAD, attributes(&mut [])).map_err(|error| {
        let _ = made(PROGRAM_LOAD, attributes(&mut log));
        let text = String::from_utf8_lossy(&log);
        let text = text.trim_end_matches('\0').trim_end();
        let last = text.lines().rev().take(2).collect::<Vec<_>>();
        if last.is_empty() {
            error
        } else {
            io::Error::new(error.kind(), format!("{error}: {}", last.join("; ")))
        }
    })
}

/// Puts a program to a control group, beside others that may be there.
pub fn attach(program: BorrowedFd<'_>, group: BorrowedFd<'_>, inbound: bool) -> io::Result<OwnedFd> {
    let words = [program.as_raw_fd() as u32, group.as_raw_fd() as u32, u32::from(!inbound), 0];
    made(LINK_CREATE, Attributes::of(&words))
}
