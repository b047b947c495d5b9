//! What a program is, and whether the preloaded library can serve it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Exit, exit, sys};

/// Interpreters of interpreters that the kernel follows.
const MAX_SCRIPTS: usize = 4;

/// A program as found.
#[derive(Clone, Debug)]
pub struct Program {
    pub path: PathBuf,
}

/// Finds the program as execvp does. Errors carry env(1)'s exit codes.
pub fn resolve(name: &OsStr) -> Result<Program, Exit> {
    let shown = name.to_string_lossy();
    let not_found = |why: &str| Exit(exit::NOT_FOUND, format!("program '{shown}' was not found{why}"));
    if name.is_empty() {
        return Err(not_found(": its name is empty"));
    }
    let candidates: Vec<PathBuf> = if name.as_bytes().contains(&b'/') {
        vec![name.into()]
    } else {
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
        std::env::split_paths(&path)
            .map(|dir| if dir.as_os_str().is_empty() { name.into() } else { dir.join(name) })
            .collect()
    };
    let mut refused = None;
    for path in candidates {
        match std::fs::metadata(&path) {
            Ok(meta) if meta.is_file() && sys::may_execute(&path) => return Ok(Program { path }),
            Ok(meta) => {
                let why = if meta.is_dir() {
                    "is a directory"
                } else {
                    "is not executable: chmod +x it, or run its interpreter"
                };
                refused.get_or_insert(format!("{} {why}", path.display()));
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                refused.get_or_insert(format!("{} cannot be reached: permission denied", path.display()));
            }
            Err(_) => {}
        }
    }
    match refused {
        Some(why) => Err(Exit(exit::NOT_EXECUTABLE, why)),
        None if shown.contains('/') => Err(not_found(": check the path")),
        None => Err(not_found(" in PATH: check the spelling, or give its path")),
    }
}

/// What was seen of a program, from its file to the binary that the kernel will load.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub program: PathBuf,
    /// Interpreters of scripts on the way, in order.
    pub interpreters: Vec<PathBuf>,
    pub binary: PathBuf,
    pub kind: Kind,
    pub loader: Option<PathBuf>,
    /// Set-user-id, set-group-id or file capabilities that take effect: the loader then ignores LD_PRELOAD.
    pub privileged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Dynamically linked against the C library that libnetkernel.so is made for.
    Dynamic,
    Static,
    /// Makes system calls by itself, whatever it is linked with.
    Go,
    Musl,
    /// i386 and x32.
    Bits32,
    OtherArchitecture,
    NotReadable,
    Unknown,
}

impl Report {
    /// Served by preload, or why not (a sentence without its end).
    pub fn verdict(&self) -> Result<(), String> {
        let name = self.binary.display();
        match self.kind {
            _ if self.privileged => Err(format!(
                "{name} changes its user, group or capabilities when executed, and the loader then refuses to preload"
            )),
            // Not for us to say: execve will.
            Kind::Dynamic | Kind::NotReadable | Kind::Unknown => Ok(()),
            Kind::Static => Err(format!("{name} is statically linked and cannot be served by preload")),
            Kind::Go => Err(format!(
                "{name} is a Go program, which makes its own system calls, and cannot be served by preload"
            )),
            Kind::Musl => {
                Err(format!("{name} is linked with musl and cannot be served by the glibc preload library"))
            }
            Kind::Bits32 => Err(format!(
                "{name} is a 32-bit program: it asks for sockets by socketcall(2), which no filter can judge, and cannot be served; use a 64-bit build of it"
            )),
            Kind::OtherArchitecture => Err(format!(
                "{name} is made for another architecture than libnetkernel.so and cannot be served"
            )),
        }
    }
}

/// Looks at the program's file, and at its interpreters when it is a script.
pub fn inspect(program: &Program) -> Report {
    let mut report = Report {
        program: program.path.clone(),
        interpreters: Vec::new(),
        binary: program.path.clone(),
        kind: Kind::Unknown,
        loader: None,
        privileged: false,
    };
    for _ in 0..=MAX_SCRIPTS {
        match look(&report.binary) {
            Ok(Seen::Script(interpreter)) => {
                report.interpreters.push(interpreter.clone());
                report.binary = interpreter;
            }
            Ok(Seen::Binary { kind, loader }) => {
                report.kind = kind;
                report.loader = loader;
                break;
            }
            Err(_) => {
                report.kind = Kind::NotReadable;
                break;
            }
        }
    }
    report.privileged = is_privileged(&report.binary);
    report
}

enum Seen {
    Script(PathBuf),
    Binary { kind: Kind, loader: Option<PathBuf> },
}

fn look(path: &Path) -> io::Result<Seen> {
    let file = File::open(path)?;
    let mut head = [0; 256];
    let n = file.read_at(&mut head, 0)?;
    let head = &head[..n];
    if head.starts_with(b"#!") {
        return Ok(script(head).map_or(Seen::Binary { kind: Kind::Unknown, loader: None }, Seen::Script));
    }
    if !head.starts_with(b"\x7fELF") {
        // execvp gives it to the shell.
        return Ok(Seen::Script("/bin/sh".into()));
    }
    let (kind, loader) = elf(&file, head).unwrap_or((Kind::Unknown, None));
    Ok(Seen::Binary { kind, loader })
}

/// The interpreter of a script; `env NAME` is looked through.
fn script(head: &[u8]) -> Option<PathBuf> {
    let line = head[2..].split(|&b| b == b'\n').next()?;
    let mut words = line.split(|b| b" \t".contains(b)).filter(|w| !w.is_empty());
    let interpreter = PathBuf::from(OsString::from_vec(words.next()?.to_vec()));
    if interpreter.file_name() == Some("env".as_ref()) {
        let name = words.find(|w| !w.starts_with(b"-") && !w.contains(&b'='));
        if let Some(program) = name.and_then(|name| resolve(OsStr::from_bytes(name)).ok()) {
            return Some(program.path);
        }
    }
    Some(interpreter)
}

const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const EM_386: u16 = 3;
const NATIVE_MACHINE: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
/// Bounds on what a file may make us read.
const MAX_HEADERS: u64 = 4096;
const MAX_NOTES: u64 = 64 * 1024;

/// Kind and loader of an ELF file; `None` when it is damaged.
fn elf(file: &File, head: &[u8]) -> Option<(Kind, Option<PathBuf>)> {
    let native = *head.get(4)? == 2 && *head.get(5)? == 1 && u16_at(head, 18)? == NATIVE_MACHINE;
    if !native {
        let kind = match (*head.get(4)?, u16_at(head, 18)?) {
            (1, EM_386) | (1, NATIVE_MACHINE) => Kind::Bits32,
            _ => Kind::OtherArchitecture,
        };
        return Some((kind, None));
    }
    let headers = read_table(file, u64_at(head, 32)?, u16_at(head, 54)?, u16_at(head, 56)?)?;
    let mut loader = None;
    let mut go = false;
    for header in headers.chunks_exact(u16_at(head, 54)? as usize) {
        let (offset, size) = (u64_at(header, 8)?, u64_at(header, 32)?);
        match u32_at(header, 0)? {
            PT_INTERP => {
                let text = read(file, offset, size.min(4096))?;
                let text = text.split(|&b| b == 0).next()?;
                loader = Some(PathBuf::from(OsString::from_vec(text.to_vec())));
            }
            PT_NOTE => go |= has_go_note(&read(file, offset, size.min(MAX_NOTES))?),
            _ => {}
        }
    }
    go |= has_go_section(file, head).unwrap_or(false);
    let musl =
        loader.as_ref().and_then(|l| l.file_name()).is_some_and(|n| n.as_bytes().starts_with(b"ld-musl"));
    let kind = match &loader {
        _ if go => Kind::Go,
        None => Kind::Static,
        Some(_) if musl => Kind::Musl,
        Some(_) => Kind::Dynamic,
    };
    Some((kind, loader))
}

/// Go's linker writes a build id note whose owner is "Go".
fn has_go_note(mut notes: &[u8]) -> bool {
    while let (Some(name), Some(description), Some(kind)) =
        (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8))
    {
        if name == 4 && kind == 4 && notes.get(12..16) == Some(b"Go\0\0") {
            return true;
        }
        let length = 12 + (name as usize).next_multiple_of(4) + (description as usize).next_multiple_of(4);
        let Some(rest) = notes.get(length..) else { return false };
        notes = rest;
    }
    false
}

fn has_go_section(file: &File, head: &[u8]) -> Option<bool> {
    let (entry, count, names) = (u16_at(head, 58)?, u16_at(head, 60)?, u16_at(head, 62)?);
    let table = read_table(file, u64_at(head, 40)?, entry, count)?;
    let sections: Vec<&[u8]> = table.chunks_exact(entry as usize).collect();
    let names = sections.get(names as usize)?;
    let names = read(file, u64_at(names, 24)?, u64_at(names, 32)?.min(1 << 20))?;
    Some(sections.iter().any(|section| {
        let name = u32_at(section, 0).and_then(|at| names.get(at as usize..)).unwrap_or(&[]);
        name.starts_with(b".go.buildinfo\0") || name.starts_with(b".note.go.buildid\0")
    }))
}

fn read_table(file: &File, offset: u64, entry: u16, count: u16) -> Option<Vec<u8>> {
    if entry < 56 || u64::from(count) > MAX_HEADERS {
        return None;
    }
    read(file, offset, u64::from(entry) * u64::from(count))
}

fn read(file: &File, offset: u64, size: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(size).ok()?];
    file.read_exact_at(&mut bytes, offset).ok()?;
    Some(bytes)
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

/// Whether the kernel marks the process as privileged (AT_SECURE) when this user executes the file.
fn is_privileged(path: &Path) -> bool {
    let Ok(meta) = std::fs::metadata(path) else { return false };
    if sys::on_nosuid_mount(path) {
        return false;
    }
    let (uid, gid) = (sys::effective_uid(), sys::effective_gid());
    let set_uid = meta.mode() & libc::S_ISUID != 0 && meta.uid() != uid;
    let set_gid =
        meta.mode() & (libc::S_ISGID | libc::S_IXGRP) == libc::S_ISGID | libc::S_IXGRP && meta.gid() != gid;
    set_uid || set_gid || (uid != 0 && sys::has_file_capabilities(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str, content: &[u8]) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = std::env::temp_dir().join(format!("netkernel-program-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn kind(name: &str, content: &[u8]) -> Kind {
        let path = scratch(name, content);
        let report = inspect(&Program { path: path.clone() });
        std::fs::remove_file(path).unwrap();
        report.kind
    }

    /// A minimal ELF file with these segments: type and content.
    fn elf_file(machine: u16, segments: &[(u32, &[u8])]) -> Vec<u8> {
        let mut file = vec![0; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18..20].copy_from_slice(&machine.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
        let mut at = 64 + 56 * segments.len() as u64;
        for (kind, content) in segments {
            let mut header = [0; 56];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..16].copy_from_slice(&at.to_le_bytes());
            header[32..40].copy_from_slice(&(content.len() as u64).to_le_bytes());
            file.extend(header);
            at += content.len() as u64;
        }
        segments.iter().for_each(|(_, content)| file.extend(*content));
        file
    }

    #[test]
    fn binaries_are_told_apart() {
        let loader: (u32, &[u8]) = (PT_INTERP, b"/lib64/ld-linux-x86-64.so.2\0");
        let go_note: (u32, &[u8]) = (PT_NOTE, b"\x04\0\0\0\x04\0\0\0\x04\0\0\0Go\0\0abcd");
        let other_note: (u32, &[u8]) = (PT_NOTE, b"\x04\0\0\0\x04\0\0\0\x03\0\0\0GNU\0abcd");
        let n = NATIVE_MACHINE;
        assert_eq!(kind("dynamic", &elf_file(n, &[loader, other_note])), Kind::Dynamic);
        assert_eq!(kind("static", &elf_file(n, &[other_note])), Kind::Static);
        assert_eq!(kind("musl", &elf_file(n, &[(PT_INTERP, b"/lib/ld-musl-x86_64.so.1\0")])), Kind::Musl);
        assert_eq!(kind("go", &elf_file(n, &[other_note, go_note])), Kind::Go);
        assert_eq!(kind("cgo", &elf_file(n, &[loader, go_note])), Kind::Go);
        let mut narrow = elf_file(3, &[loader]);
        narrow[4] = 1;
        assert_eq!(kind("i386", &narrow), Kind::Bits32);
        assert_eq!(kind("riscv", &elf_file(243, &[loader])), Kind::OtherArchitecture);
    }

    #[test]
    fn damaged_files_are_left_to_the_kernel() {
        let whole = elf_file(NATIVE_MACHINE, &[(PT_INTERP, b"/lib64/ld-linux-x86-64.so.2\0")]);
        for length in 4..whole.len() {
            kind("cut", &whole[..length]);
        }
        let mut far = whole.clone();
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(kind("far", &far), Kind::Unknown);
    }

    #[test]
    fn scripts_are_followed_to_their_interpreter() {
        let path = scratch("script", b"#!/usr/bin/env -S sh -e\nexit 0\n");
        let report = inspect(&Program { path: path.clone() });
        std::fs::remove_file(&path).unwrap();
        assert_eq!(report.program, path);
        assert_eq!(report.kind, Kind::Dynamic, "{report:?}");
        assert_eq!(report.interpreters.len(), 1);
        let looping = scratch("loop", b"");
        std::fs::write(&looping, format!("#!{}\n", looping.display())).unwrap();
        assert_eq!(inspect(&Program { path: looping.clone() }).kind, Kind::Unknown);
        std::fs::remove_file(looping).unwrap();
    }
}
