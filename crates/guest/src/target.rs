//! Whether a program that is about to be executed will have this library.

use core::ffi::CStr;

use crate::sys::{self, raw};

const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const MACHINE: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
const MAX_HEADERS: usize = 64;

/// True when the program will be preloaded to, as far as its file tells. What cannot be read is not for us to judge: true.
pub fn will_be_served(directory: i32, path: &CStr) -> bool {
    let mut name = path.to_bytes_with_nul().to_vec();
    let mut directory = directory;
    // Interpreters of scripts, as deep as the kernel goes.
    for _ in 0..5 {
        let fd = raw!(libc::SYS_openat, directory, name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) as i32;
        if fd < 0 {
            return true;
        }
        let seen = look(fd);
        sys::close(fd);
        match seen {
            Seen::Served(served) => return served,
            Seen::Script(interpreter) => name = interpreter,
        }
        directory = libc::AT_FDCWD;
    }
    true
}

/// As [`will_be_served`], for an open file.
pub fn descriptor_will_be_served(fd: i32) -> bool {
    match look(fd) {
        Seen::Served(served) => served,
        Seen::Script(mut interpreter) => {
            interpreter.pop();
            std::ffi::CString::new(interpreter)
                .map_or(true, |path| will_be_served(libc::AT_FDCWD, path.as_c_str()))
        }
    }
}

/// The file that `execvp` would take, as a C string.
pub fn search(file: &CStr) -> Option<std::ffi::CString> {
    if file.to_bytes().contains(&b'/') {
        return Some(file.into());
    }
    let path = crate::guest::variable("PATH").unwrap_or("/bin:/usr/bin");
    path.split(':').find_map(|directory| {
        let directory = if directory.is_empty() { "." } else { directory };
        let whole = [directory.as_bytes(), b"/", file.to_bytes()].concat();
        let whole = std::ffi::CString::new(whole).ok()?;
        (raw!(libc::SYS_faccessat, libc::AT_FDCWD, whole.as_ptr(), libc::X_OK) == 0).then_some(whole)
    })
}

enum Seen {
    Served(bool),
    /// The interpreter's path, with its NUL.
    Script(Vec<u8>),
}

fn look(fd: i32) -> Seen {
    let mut head = [0u8; 256];
    let n = read(fd, 0, &mut head);
    let head = &head[..n];
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|&b| b == b'\n').next().unwrap_or_default();
        let mut words = line.split(|b| b" \t".contains(b)).filter(|word| !word.is_empty());
        return match words.next() {
            Some(interpreter) => Seen::Script([interpreter, b"\0"].concat()),
            None => Seen::Served(true),
        };
    }
    Seen::Served(!head.starts_with(b"\x7fELF") || elf(fd, head).unwrap_or(true))
}

/// A native ELF file with glibc's loader, and not Go's, which makes its own system calls. `None`: damaged.
fn elf(fd: i32, head: &[u8]) -> Option<bool> {
    if *head.get(4)? != 2 || u16_at(head, 18)? != MACHINE {
        return Some(false);
    }
    let (size, count) = (u16_at(head, 54)? as usize, u16_at(head, 56)? as usize);
    if size < 56 || count > MAX_HEADERS {
        return None;
    }
    let mut headers = vec![0u8; size * count];
    if read(fd, u64_at(head, 32)?, &mut headers) < headers.len() {
        return None;
    }
    let mut loader = None;
    for header in headers.chunks_exact(size) {
        let (at, length) = (u64_at(header, 8)?, u64_at(header, 32)?.min(4096) as usize);
        match u32_at(header, 0)? {
            PT_INTERP => {
                let mut text = vec![0u8; length];
                let n = read(fd, at, &mut text);
                text.truncate(n);
                loader = Some(text);
            }
            PT_NOTE => {
                let mut notes = vec![0u8; length];
                let n = read(fd, at, &mut notes);
                if notes[..n].windows(8).any(|w| w == b"\x04\0\0\0Go\0\0") {
                    return Some(false);
                }
            }
            _ => {}
        }
    }
    Some(loader.is_some_and(|loader| !loader.windows(7).any(|w| w == b"ld-musl")))
}

fn read(fd: i32, at: u64, into: &mut [u8]) -> usize {
    let n = raw!(libc::SYS_pread64, fd, into.as_mut_ptr(), into.len(), at);
    n.max(0) as usize
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
