//! What the tests of the server share.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use netkernel_control::*;

pub const WATCHDOG: Duration = Duration::from_secs(30);

/// A server before an engine that only pretends, in a directory of its own.
pub struct Place<Fake> {
    dir: PathBuf,
    pub socket: PathBuf,
    pub fake: Arc<Fake>,
    pub server: Option<Server>,
}

impl<Fake: EngineApi + Default + 'static> Place<Fake> {
    pub fn new(name: &str) -> Place<Fake> {
        let dir = PathBuf::from(format!("/tmp/netkernel-control-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let socket = dir.join("e.sock");
        let fake = Arc::new(Fake::default());
        let access = Access { owner: std::fs::metadata(&dir).unwrap().uid(), ..Access::default() };
        let server = Server::start(Endpoint::bind(&socket).unwrap(), fake.clone(), access).unwrap();
        Place { dir, socket, fake, server: Some(server) }
    }
}

impl<Fake> Drop for Place<Fake> {
    fn drop(&mut self) {
        drop(self.server.take());
        assert!(!self.socket.exists() || std::thread::panicking(), "the socket file goes with the server");
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
