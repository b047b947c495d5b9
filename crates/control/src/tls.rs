//! The API over TCP: with TLS, and for who shows a token.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use crate::caller::{Access, Caller};
use crate::door::{Door, Entered};
use crate::places::{Limits, Place, Places};
use crate::server::{EngineApi, LIMITS, REQUEST_TIMEOUT, Server, serve, spawn};
use crate::wire::Timed;
use crate::{ApiError, ErrorCode};

/// Connections of who showed no token yet, by address.
const STRANGERS: Limits = Limits { each: 16, all: 64, kept: 1, most: 256 };

/// What is wrong with a certificate, key, address or peer, in one sentence.
#[derive(Debug)]
pub struct TlsError(String);

impl std::fmt::Display for TlsError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TlsError {}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let shown = path.display();
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let all = all.map_err(|e| TlsError(format!("cannot read certificates (PEM) from {shown}: {e}")))?;
    if all.is_empty() {
        return Err(TlsError(format!("there is no certificate (PEM) in {shown}")));
    }
    Ok(all)
}

/// A listening TCP socket with a certificate.
#[derive(Debug)]
pub struct TlsListener {
    listener: TcpListener,
    config: Arc<ServerConfig>,
}

impl TlsListener {
    /// Listens at `address`. The files are PEM: the certificate with those that lead to its root, and its private key.
    pub fn bind(address: SocketAddr, certificate: &Path, key: &Path) -> Result<TlsListener, TlsError> {
        let chain = certificates(certificate)?;
        let private = PrivateKeyDer::from_pem_file(key)
            .map_err(|e| TlsError(format!("cannot read a private key (PEM) from {}: {e}", key.display())))?;
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, private))
            .map_err(|e| {
                let (certificate, key) = (certificate.display(), key.display());
                TlsError(format!("the certificate in {certificate} and the key in {key}: {e}"))
            })?;
        let io = |e: io::Error| TlsError(format!("cannot listen at {address}: {e}"));
        let listener = TcpListener::bind(address).map_err(io)?;
        listener.set_nonblocking(true).map_err(io)?;
        Ok(TlsListener { listener, config: Arc::new(config) })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

struct Shared {
    api: Arc<dyn EngineApi>,
    access: Access,
    config: Arc<ServerConfig>,
    strangers: Arc<Places<IpAddr>>,
    places: Arc<Places<Caller>>,
}

impl Server {
    /// Serves the API over TLS. Who asks is told by tokens only.
    pub fn start_tls(tls: TlsListener, api: Arc<dyn EngineApi>, access: Access) -> io::Result<Server> {
        let TlsListener { listener, config } = tls;
        let (strangers, places) = (Places::new(STRANGERS), Places::new(LIMITS));
        let shared = Arc::new(Shared { api, access, config, strangers, places });
        Server::run("control-tls", move |stopped, door| accept_loop(&listener, stopped, door, &shared))
    }
}

fn accept_loop(listener: &TcpListener, stopped: &OwnedFd, door: &Arc<Door>, shared: &Arc<Shared>) {
    loop {
        let mut waiting = [PollFd::new(listener, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        match poll(&mut waiting, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                log::error!("control over TLS: poll: {e}; no more requests are taken");
                return;
            }
        }
        if waiting[1].revents().contains(PollFlags::IN) {
            return;
        }
        let entered = door.enter();
        match listener.accept() {
            Ok((stream, from)) => serve_on_thread(stream, from.ip(), entered, shared),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                ) => {}
            Err(e) => {
                log::error!("control over TLS: accept: {e}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Who has one IPv6 address has 2^64 of them.
fn neighbourhood(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(six) => six
            .to_ipv4_mapped()
            .map_or(IpAddr::V6(Ipv6Addr::from_bits(six.to_bits() >> 64 << 64)), IpAddr::V4),
    }
}

fn serve_on_thread(stream: TcpStream, from: IpAddr, entered: Entered, shared: &Arc<Shared>) {
    // Too many: closed without a word, which would cost a handshake.
    let Some(place) = shared.strangers.take(neighbourhood(from), false) else { return };
    if stream.set_nonblocking(false).is_err() {
        return;
    }
    let _ = stream.set_nodelay(true);
    let Ok(connection) = ServerConnection::new(Arc::clone(&shared.config)) else { return };
    // The handshake is a part of reading the first request, and of its time.
    let mut wire = StreamOwned::new(connection, Timed::new(stream, REQUEST_TIMEOUT));
    let shared = Arc::clone(shared);
    spawn(move || {
        let mut stranger = Some(place);
        let mut known: Option<(Caller, Place<Caller>)> = None;
        let admit = |caller: &Caller| {
            if known.as_ref().is_some_and(|(before, _)| before == caller) {
                return Ok(());
            }
            let place = shared.places.take(caller.clone(), caller.is_provider()).ok_or_else(|| {
                ApiError::new(ErrorCode::Limit, "the engine serves too many control connections: try again")
            })?;
            known = Some((caller.clone(), place));
            stranger = None;
            Ok(())
        };
        let _ = serve(&mut wire, None, entered, &*shared.api, &shared.access, admit);
        wire.conn.send_close_notify();
        let _ = wire.conn.complete_io(&mut wire.sock);
    });
}

/// Where hosts keep the certificates that they trust.
const BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// A client's TLS connection to `url`: `https://HOST[:PORT]`, port 443 by default. `roots`: a file of the certificates that
/// are trusted (PEM), instead of the host's.
pub(crate) fn connect(
    url: &str,
    roots: Option<&Path>,
    timeout: Duration,
) -> Result<StreamOwned<ClientConnection, Timed<TcpStream>>, TlsError> {
    let bad = |why: &str| TlsError(format!("'{url}' is no engine's address: {why}; use https://HOST[:PORT]"));
    let rest = url.strip_prefix("https://").ok_or_else(|| bad("it does not begin with https://"))?;
    let authority = rest.trim_end_matches('/');
    if authority.is_empty() || authority.contains(['/', '@', '?', '#']) {
        return Err(bad("it has more than a host and a port"));
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => {
            (host, port.parse::<u16>().map_err(|_| bad("its port is no number"))?)
        }
        _ => (authority, 443),
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let name = ServerName::try_from(host.to_owned()).map_err(|_| bad("that is no name of a host"))?;
    let bundle = BUNDLES.iter().map(PathBuf::from).find(|path| path.exists());
    let file = roots.map(Path::to_owned).or(bundle).ok_or_else(|| {
        TlsError("this host has no list of trusted certificates: name one with --ca-file".into())
    })?;
    let mut store = RootCertStore::empty();
    let (good, _) = store.add_parsable_certificates(certificates(&file)?);
    if good == 0 {
        return Err(TlsError(format!("there is no usable certificate in {}", file.display())));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| TlsError(e.to_string()))?
        .with_root_certificates(store)
        .with_no_client_auth();
    let session = ClientConnection::new(Arc::new(config), name).map_err(|e| TlsError(e.to_string()))?;
    let io = |e: io::Error| TlsError(format!("the engine at {url} does not answer: {e}"));
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs().map_err(io)? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                let _ = stream.set_nodelay(true);
                let mut wire = StreamOwned::new(session, Timed::new(stream, timeout));
                // Now, so that what is wrong with the certificate is told as such.
                wire.conn.complete_io(&mut wire.sock).map_err(io)?;
                return Ok(wire);
            }
            Err(e) => last = e,
        }
    }
    Err(io(last))
}
