//! Where engines are found, and how an engine takes its place in the file system.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// The directory of this user's engines, and where a private engine puts its socket.
#[derive(Clone, Debug)]
pub struct RuntimeDir(PathBuf);

/// Replaces the runtime directory.
pub const RUNTIME_DIR_ENV: &str = "NETKERNEL_RUNTIME_DIR";

/// `$NETKERNEL_RUNTIME_DIR`, else `/run/netkernel` for root, else `$XDG_RUNTIME_DIR`, else `/tmp/netkernel-UID`.
pub fn runtime_dir() -> RuntimeDir {
    if let Some(dir) = std::env::var_os(RUNTIME_DIR_ENV) {
        return RuntimeDir(dir.into());
    }
    let uid = rustix::process::geteuid().as_raw();
    if uid == 0 {
        return RuntimeDir("/run/netkernel".into());
    }
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() && dir.is_dir() => RuntimeDir(dir),
        _ => RuntimeDir(format!("/tmp/netkernel-{uid}").into()),
    }
}

/// Where private engines go when the runtime directory cannot be written.
pub fn fallback_dir() -> RuntimeDir {
    RuntimeDir(format!("/tmp/netkernel-{}", rustix::process::geteuid().as_raw()).into())
}

/// Where this user's `netkernel up` listens and `netkernel run` looks.
pub fn default_socket() -> PathBuf {
    let dir = runtime_dir().0;
    // Others put their files into $XDG_RUNTIME_DIR too.
    let shared = std::env::var_os("XDG_RUNTIME_DIR").is_some_and(|xdg| xdg == dir);
    dir.join(if shared { "netkernel.sock" } else { "engine.sock" })
}

impl RuntimeDir {
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the directory if it is ours to make, and refuses one that another user prepared for us.
    pub fn ensure(&self) -> io::Result<()> {
        ensure_parent(&self.0.join("x"))
    }

    pub fn is_writable(&self) -> bool {
        rustix::fs::access(&self.0, rustix::fs::Access::WRITE_OK).is_ok()
    }

    /// Where the private engine with this unique tag listens.
    pub fn private_socket(&self, tag: &str) -> PathBuf {
        self.0.join(format!("netkernel-private-{tag}.sock"))
    }

    /// Sockets of private engines, alive or dead.
    pub fn private_sockets(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(&self.0) else { return Vec::new() };
        let mut found: Vec<_> = entries
            .flatten()
            .filter(|e| {
                let name = e.file_name();
                let name = name.to_string_lossy();
                name.starts_with("netkernel-private-") && name.ends_with(".sock")
            })
            .map(|e| e.path())
            .collect();
        found.sort();
        found
    }
}

/// Makes the directory of a socket path (0755: the socket's own protocol decides who may do what).
fn ensure_parent(path: &Path) -> io::Result<()> {
    let Some(dir) = path.parent().filter(|d| !d.as_os_str().is_empty()) else { return Ok(()) };
    match fs::DirBuilder::new().mode(0o755).create(dir) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e),
    }
    if dir.starts_with("/tmp") {
        // Anybody may make a directory there before us.
        let meta = fs::symlink_metadata(dir)?;
        let uid = rustix::process::geteuid().as_raw();
        if dir != Path::new("/tmp") && (!meta.is_dir() || (meta.uid() != uid && meta.uid() != 0)) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "{} is not a directory of yours: remove it, or name another place with --socket",
                    dir.display()
                ),
            ));
        }
    }
    Ok(())
}

#[derive(Debug)]
pub enum BindError {
    /// An engine is alive there.
    InUse(PathBuf),
    /// The path is taken by something that is no socket.
    NotASocket(PathBuf),
    TooLong(PathBuf),
    Io(PathBuf, io::Error),
}

impl std::fmt::Display for BindError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BindError::InUse(path) => write!(
                f,
                "an engine already runs at {}: use it (`netkernel run` finds it), end it, or give another --socket",
                path.display()
            ),
            BindError::NotASocket(path) => {
                write!(
                    f,
                    "{} exists and is not a socket: remove it, or give another --socket",
                    path.display()
                )
            }
            BindError::TooLong(path) => {
                write!(f, "the socket path {} is longer than the 107 bytes that Linux allows", path.display())
            }
            BindError::Io(path, e) => write!(f, "cannot listen at {}: {e}", path.display()),
        }
    }
}

impl std::error::Error for BindError {}

/// A listening control socket. Its file (and lock file) go when it is dropped.
#[derive(Debug)]
pub struct Endpoint {
    listener: UnixListener,
    path: PathBuf,
    /// Of the file, if it is ours to remove.
    inode: Option<(u64, u64)>,
    lock: Option<(File, PathBuf)>,
}

impl Endpoint {
    /// Takes `path`: a stale socket file is replaced, a live engine is an error. A lock file beside it makes this
    /// exclusive; the socket appears by rename, already listening, so that nobody sees it refuse.
    pub fn bind(path: &Path) -> Result<Endpoint, BindError> {
        let io = |e| BindError::Io(path.into(), e);
        let path = &std::path::absolute(path).map_err(io)?;
        let mut temporary = path.clone().into_os_string();
        temporary.push(format!(".{}", std::process::id()));
        if temporary.len() > 107 {
            return Err(BindError::TooLong(path.into()));
        }
        ensure_parent(path).map_err(io)?;
        let lock = take_lock(path).map_err(io)?.ok_or_else(|| BindError::InUse(path.into()))?;
        match fs::symlink_metadata(path) {
            Ok(meta) if rustix::fs::FileType::from_raw_mode(meta.mode()) != rustix::fs::FileType::Socket => {
                return Err(BindError::NotASocket(path.into()));
            }
            // Somebody who does not know of the lock may listen there all the same.
            Ok(_) if UnixStream::connect(path).is_ok() => return Err(BindError::InUse(path.into())),
            _ => {}
        }
        let temporary = PathBuf::from(temporary);
        let _ = fs::remove_file(&temporary);
        let made = || -> io::Result<(UnixListener, (u64, u64))> {
            let listener = UnixListener::bind(&temporary)?;
            listener.set_nonblocking(true)?;
            // Who may do what is decided by peer credentials and tokens, not by the file.
            fs::set_permissions(&temporary, fs::Permissions::from_mode(0o666))?;
            let meta = fs::symlink_metadata(&temporary)?;
            fs::rename(&temporary, path)?;
            Ok((listener, (meta.dev(), meta.ino())))
        };
        let (listener, inode) = made().map_err(|e| {
            let _ = fs::remove_file(&temporary);
            io(e)
        })?;
        Ok(Endpoint { listener, path: path.into(), inode: Some(inode), lock: Some(lock) })
    }

    /// A socket that somebody else listens on for us (systemd's socket activation). Its file stays when this is dropped.
    pub fn inherited(socket: OwnedFd) -> Result<Endpoint, BindError> {
        let unusable = |e| BindError::Io("the inherited descriptor".into(), e);
        let no_listener = || {
            unusable(io::Error::new(io::ErrorKind::InvalidInput, "it is no Unix stream socket that listens"))
        };
        let is = |option: rustix::io::Result<bool>| option.is_ok_and(|yes| yes);
        let stream = rustix::net::sockopt::socket_type(&socket) == Ok(rustix::net::SocketType::STREAM);
        let unix = rustix::net::sockopt::socket_domain(&socket) == Ok(rustix::net::AddressFamily::UNIX);
        if !stream || !unix || !is(rustix::net::sockopt::socket_acceptconn(&socket)) {
            return Err(no_listener());
        }
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true).map_err(unusable)?;
        let address = listener.local_addr().map_err(unusable)?;
        let path = address.as_pathname().ok_or_else(no_listener)?.to_owned();
        Ok(Endpoint { listener, path, inode: None, lock: None })
    }

    /// Its descriptors, for the program that this process executes next: of the socket, and of the lock if there is one.
    pub fn descriptors(&self) -> (RawFd, Option<RawFd>) {
        (self.listener.as_raw_fd(), self.lock.as_ref().map(|(lock, _)| lock.as_raw_fd()))
    }

    /// What the program before this one listened with, at `path`. With a lock the file is ours to remove.
    pub fn handed_over(socket: OwnedFd, lock: Option<OwnedFd>, path: &Path) -> Result<Endpoint, BindError> {
        let mut endpoint = Endpoint::inherited(socket)?;
        // Its address is the name that it was bound by, before that was changed.
        endpoint.path = path.into();
        if let Some(lock) = lock {
            let meta = fs::symlink_metadata(&endpoint.path).ok();
            endpoint.inode = meta.map(|meta| (meta.dev(), meta.ino()));
            let mut name = endpoint.path.as_os_str().to_owned();
            name.push(".lock");
            endpoint.lock = Some((File::from(lock), name.into()));
        }
        Ok(endpoint)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // Only our own file: somebody may have removed it and started another engine.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| Some((m.dev(), m.ino())) == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
        if let Some((_held, path)) = &self.lock {
            let _ = fs::remove_file(path);
        }
    }
}

/// Takes the lock of `path`, or says `None` when a live process has it.
fn take_lock(path: &Path) -> io::Result<Option<(File, PathBuf)>> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    loop {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&name)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        // The last holder removes the file: what we locked must still be what the name means.
        let ours = file.metadata()?;
        if fs::metadata(&name).is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino())) {
            return Ok(Some((file, name)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("netkernel-test-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = scratch("stale");
        let path = dir.join("e.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file: this is the stale one");
        let endpoint = Endpoint::bind(&path).unwrap();
        assert!(matches!(Endpoint::bind(&path), Err(BindError::InUse(_))));
        UnixStream::connect(&path).unwrap();
        drop(endpoint);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "socket and lock are gone");
        fs::remove_dir(&dir).unwrap();
    }

    #[test]
    fn an_inherited_socket_is_used_and_left_there() {
        let dir = scratch("inherited");
        let path = dir.join("e.sock");
        let endpoint = Endpoint::inherited(UnixListener::bind(&path).unwrap().into()).unwrap();
        assert_eq!(endpoint.path(), path);
        UnixStream::connect(&path).unwrap();
        assert!(matches!(Endpoint::bind(&path), Err(BindError::InUse(_))));
        drop(endpoint);
        assert!(path.exists(), "it is not ours to remove");
        for other in [UnixStream::pair().unwrap().0.into(), File::open("/dev/null").unwrap().into()] {
            let error = Endpoint::inherited(other).unwrap_err().to_string();
            assert!(error.contains("no Unix stream socket that listens"), "{error}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_live_socket_without_a_lock_is_respected() {
        let dir = scratch("live");
        let path = dir.join("e.sock");
        let _other = UnixListener::bind(&path).unwrap();
        assert!(matches!(Endpoint::bind(&path), Err(BindError::InUse(_))));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_not_touched() {
        let dir = scratch("file");
        let path = dir.join("notes.txt");
        fs::write(&path, "mine").unwrap();
        assert!(matches!(Endpoint::bind(&path), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_long_path_is_an_error_of_its_own() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(120)));
        assert!(matches!(Endpoint::bind(&path), Err(BindError::TooLong(_))));
    }
}
