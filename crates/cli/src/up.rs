//! `netkernel up`: a long-lived engine.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use anyhow::{Context as _, Result};
use netkernel_control::{Access, Endpoint, EngineApi as _, NsmInfo, Server, default_socket};
use serde_json::json;

use crate::args::UpArgs;
use crate::config::Config;
use crate::engine::Adapter;
use crate::{restart, show, sys};

pub fn up(args: &UpArgs) -> Result<()> {
    if let Some(format) = &args.check_handover {
        return restart::answer_check(format);
    }
    let left = restart::left()?;
    crate::logger::start(&args.log);
    let config = match &args.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    if args.check {
        let catalog = crate::catalog::of(&config)?;
        let offered = crate::catalog::offered(catalog)?;
        if !config.nsms.is_empty() {
            crate::catalog::check(&offered)?;
        }
        if args.json {
            return show::print_json(&json!({ "ok": true, "stacks": names(&offered) }));
        }
        println!("the configuration is good; stacks: {}", names(&offered).join(", "));
        return Ok(());
    }
    // What the number names by now is something else.
    let ready = args
        .ready_fd
        .filter(|_| left.is_none())
        .map(sys::adopt)
        .transpose()
        .context("--ready-fd names no open descriptor")?;
    let users = config.users()?;
    let inherited = sys::inherited_socket().context("socket activation")?;
    // Before there are threads: they must not take the signals.
    let signals = sys::termination_signals().context("cannot take signals")?;
    sys::raise_descriptor_limit();
    let socket = args.socket.clone().or_else(|| config.engine.socket.clone()).unwrap_or_else(default_socket);
    let endpoint = match (&left, inherited) {
        (Some(left), _) => {
            let lock = left.lock.map(restart::adopt).transpose()?;
            Endpoint::handed_over(restart::adopt(left.listener)?, lock, &left.path)?
        }
        (None, Some(socket)) => Endpoint::inherited(socket)?,
        (None, None) => Endpoint::bind(&socket)?,
    };
    let tls = config.listen()?;
    let address = tls.as_ref().map(|tls| tls.address()).transpose().context("cannot ask for the address")?;
    let socket = endpoint.path().to_owned();
    let document = left.map(|left| restart::adopt(left.document)).transpose()?;
    let engine = Adapter::start(&config, &socket, false, document)?;
    let listening = endpoint.descriptors();
    let access = Access { owner: sys::effective_uid(), users: users.list, everybody: users.everybody };
    let servers = (
        Server::start(endpoint, engine.clone(), access.clone()).context("no control thread")?,
        tls.map(|tls| Server::start_tls(tls, engine.clone(), access))
            .transpose()
            .context("no control thread")?,
    );

    if crate::logger::is_json() {
        // In text, it would be said twice.
        log::info!(socket:% = socket.display(); "ready");
    }
    say_ready(args.json, &socket, address, &names(&engine.stacks()));
    if let Some(fd) = ready {
        let _ = std::fs::File::from(fd).write_all(format!("{}\n", socket.display()).as_bytes());
    }
    notify_service_manager("READY=1");

    loop {
        sys::wait_readable(&[signals.as_fd(), engine.stop_requested(), engine.restart_requested()])
            .context("cannot wait for signals")?;
        if sys::is_readable(signals.as_fd()) || sys::is_readable(engine.stop_requested()) {
            break;
        }
        let _nobody_comes = (servers.0.close(), servers.1.as_ref().map(Server::close));
        // Comes back only if it fails.
        engine.restart(listening);
    }
    notify_service_manager("STOPPING=1");
    log::debug!("ends");
    drop(servers);
    engine.shutdown();
    Ok(())
}

/// One line on standard output.
fn say_ready(as_json: bool, socket: &Path, address: Option<std::net::SocketAddr>, stacks: &[&str]) {
    let (socket, pid) = (socket.display().to_string(), std::process::id());
    let url = address.map(|address| format!("https://{address}"));
    let line = if as_json {
        json!({ "ready": true, "socket": socket, "url": url, "pid": pid, "stacks": stacks }).to_string()
    } else {
        let url = url.map(|url| format!(" and {url}")).unwrap_or_default();
        format!("netkernel: ready at {socket}{url} (pid {pid}, stacks {})", stacks.join(", "))
    };
    // Nobody may read it.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn names(offered: &[NsmInfo]) -> Vec<&str> {
    offered.iter().filter(|nsm| nsm.available).map(|nsm| nsm.name.as_str()).collect()
}

/// Tells systemd, if it started us.
fn notify_service_manager(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    if let (Ok(address), Ok(socket)) = (address, UnixDatagram::unbound()) {
        let _ = socket.send_to_addr(state.as_bytes(), &address);
    }
}
