//! `netkernel run`: makes a guest and becomes the program.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use netkernel_abi::control::{Message, env, kind};
use netkernel_agent::filter::Watch;
use netkernel_control::{Attached, Client, ClientError, ErrorCode, NewGuest};

use crate::args::{Attach, RunArgs};
use crate::program::{self, Kind, Program};
use crate::{Exit, exit, library, locate, private, sys};

pub fn run(args: &RunArgs) -> Result<i32> {
    let name = &args.program[0];
    let program = program::resolve(name)?;
    let mut environment: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
    for name in env::ALL {
        environment.remove(OsStr::new(name));
    }
    let report = program::inspect(&program);
    let unserved = |why: String| -> Result<()> {
        if args.fail_open {
            eprintln!("netkernel: warning: {why}; it runs on the kernel's own stack now (--fail-open)");
            return Ok(());
        }
        Err(Exit(exit::FAILED, format!("{why}, or --fail-open to run it on the kernel's own stack")).into())
    };
    let name = name_of(args, &program);
    // The stack has its say when the command line has none.
    let (attach, made) = match args.attach {
        Some(attach) => (attach, None),
        None => {
            let made = guest(args, &name)?;
            (by_name(&made.0.attach)?, Some(made))
        }
    };
    let made = || made.map_or_else(|| guest(args, &name), Ok);
    // GuestLib keeps away from some system calls where somebody else's filter might forbid them.
    let unfiltered = sys::seccomp_filters() == Some(0);
    // Nothing after this makes a socket, and nothing undoes the filter.
    match (attach, report.verdict()) {
        (_, Err(why)) if report.kind == Kind::Bits32 => {
            remove_preload(&mut environment);
            unserved(why)?;
        }
        (Attach::Queued, Err(why)) => {
            remove_preload(&mut environment);
            unserved(format!("{why}: use --attach direct or relay, or a dynamically linked build"))?;
        }
        (Attach::Queued, Ok(())) => {
            queued(args, made()?, &mut environment)?;
            if unfiltered {
                environment.insert(env::FILTERS.into(), "0".into());
            }
        }
        (Attach::Auto, Ok(())) => {
            let (attached, channel) = queued(args, made()?, &mut environment)?;
            match filtered(args, channel.as_fd(), true, agent_watch(&attached)) {
                // Programs that cannot attach have the agent.
                Ok(()) => {
                    environment.insert(env::UNATTACHED.into(), "agent".into());
                    if unfiltered {
                        environment.insert(env::FILTERS.into(), "1".into());
                    }
                }
                Err(why) => eprintln!(
                    "netkernel: warning: {why}; sockets that the preloaded library does not see are not served"
                ),
            }
        }
        (Attach::Auto | Attach::Direct | Attach::Relay, verdict) => {
            remove_preload(&mut environment);
            match (report.privileged && sys::effective_uid() != 0, verdict) {
                (true, Err(why)) if attach == Attach::Auto => {
                    unserved(format!("{why}; a filter would take its privileges: run it as root"))?;
                }
                _ => {
                    let (attached, fds, _) = made()?;
                    let watch = match attach {
                        Attach::Relay => Watch::Relay,
                        Attach::Direct if !attached.direct => {
                            bail!(
                                "there are no kernel sockets to give away (the stack is another one, or the tenant has limits): use --attach relay"
                            )
                        }
                        _ => agent_watch(&attached),
                    };
                    if let Err(why) = filtered(args, fds[1].as_fd(), false, watch) {
                        unserved(format!("{why} if the program can be preloaded to"))?;
                    }
                }
            }
        }
    }
    let arguments: Vec<CString> = args.program.iter().filter_map(|a| sys::c_string(a)).collect();
    let environment: Vec<CString> = environment
        .iter()
        .filter_map(|(name, value)| {
            let mut pair = name.clone();
            pair.push("=");
            pair.push(value);
            sys::c_string(&pair)
        })
        .collect();
    let error = sys::execute(&program.path, &arguments, &environment);
    let code = match error.raw_os_error() {
        Some(libc::ENOENT) => exit::NOT_FOUND,
        _ => exit::NOT_EXECUTABLE,
    };
    Err(Exit(code, format!("cannot execute {}: {error}", program.path.display())).into())
}

fn by_name(attach: &str) -> Result<Attach> {
    <Attach as clap::ValueEnum>::from_str(attach, false).map_err(|_| {
        anyhow::anyhow!("the engine wants programs attached as '{attach}', which this command does not know: say --attach, or use the command that came with the engine")
    })
}

/// The guest's name: as asked for, or the program's.
fn name_of(args: &RunArgs, program: &Program) -> String {
    let own = || program.path.file_name().map(|n| n.to_string_lossy().into_owned());
    args.name.clone().or_else(own).unwrap_or_else(|| "guest".into())
}

/// What the agent of such a guest does when nobody chose: gives the kernel's sockets away, or relays.
fn agent_watch(attached: &Attached) -> Watch {
    if attached.direct { Watch::Direct } else { Watch::Relay }
}

/// Puts the seccomp filter on this process and gives the other end to the engine.
fn filtered(args: &RunArgs, channel: BorrowedFd<'_>, behind_preload: bool, watch: Watch) -> Result<()> {
    let message = Message {
        kind: kind::AGENT,
        a: u32::from(args.fail_open),
        b: u32::from(behind_preload),
        c: u32::from(watch == Watch::Relay),
        ..Message::default()
    };
    let send = |listener: OwnedFd| {
        netkernel_shm::fds::send(channel.as_raw_fd(), &message.to_bytes(), &[listener.as_raw_fd()], 0)
    };
    // Sending is a call of which the agent is told, and nobody has the listener yet: a thread without the filter does it.
    std::thread::scope(|scope| {
        let (filter, listener) = std::sync::mpsc::sync_channel(1);
        let sender = std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn_scoped(scope, move || listener.recv().map(send))
            .context("no thread to send the filter's listener with")?;
        filter.send(netkernel_agent::filter::install(watch)?)?;
        match sender.join() {
            Ok(Ok(sent)) => sent.map(drop).context("the engine is gone"),
            _ => bail!("the filter's listener was not sent"),
        }
    })
}

/// Puts what the guest's library needs into descriptors and environment. Returns the guest and its channel.
fn queued(
    args: &RunArgs,
    (attached, fds, socket): (Attached, [OwnedFd; 3], PathBuf),
    environment: &mut BTreeMap<OsString, OsString>,
) -> Result<(Attached, OwnedFd)> {
    let library = library::find()?;
    let channel = fds[1].try_clone().context("no descriptor is left")?;
    let numbers = place(fds)?;
    let mut set = |name: &str, value: OsString| environment.insert(name.into(), value);
    set(env::FDS, numbers.map(|n| n.to_string()).join(",").into());
    set(env::SOCKET, socket.into());
    set(env::TOKEN, attached.token.clone().into());
    if args.fail_open {
        set(env::UNATTACHED, "warn".into());
    }
    if let Some(level) = args.trace {
        set(env::TRACE, level.to_string().into());
    }
    let before = environment.get(OsStr::new("LD_PRELOAD")).cloned();
    environment.insert("LD_PRELOAD".into(), library::preload(&library, before.as_deref()));
    environment.insert(env::LIBRARY.into(), library.into());
    Ok((attached, channel))
}

/// A guest of the engine that was named, of one that runs, or of a private one.
fn guest(args: &RunArgs, name: &str) -> Result<(Attached, [OwnedFd; 3], PathBuf)> {
    let token = args.tenant_token.as_deref().map(crate::config::read_token).transpose()?;
    let create = |client: &mut Client| {
        client.create_guest(NewGuest {
            name: Some(name.to_owned()),
            stack: args.stack.clone(),
            tenant_token: token.clone(),
        })
    };
    let named = args.socket.clone().or_else(|| std::env::var_os(locate::SOCKET_ENV).map(PathBuf::from));
    if locate::is_remote() {
        bail!("a program runs with an engine of its own host: --host is for asking others");
    }
    if args.private && args.socket.is_some() {
        bail!("--private starts an engine of its own, --socket names one that runs: give one of them");
    }
    let mut refused = None;
    if !args.private {
        for mut client in locate::find(named.as_deref())? {
            match create(&mut client) {
                Ok((attached, fds)) => return Ok((attached, fds, client.path().to_owned())),
                // Somebody else's engine that nobody asked for: a private one does as well.
                Err(ClientError::Refused(e)) if named.is_none() && e.code == ErrorCode::Permission => {
                    refused = Some(format!("the engine at {} refuses: {e}", client.path().display()));
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
    let socket = private::start(args.trace.is_some()).map_err(|e| match refused {
        Some(refused) => e.context(refused),
        None => e,
    })?;
    let mut client = Client::connect(&socket)?;
    match create(&mut client) {
        Ok((attached, fds)) => Ok((attached, fds, socket)),
        Err(e) => {
            // Nobody else knows of it.
            let _ = client.stop();
            Err(e.into())
        }
    }
}

/// Moves the descriptors to high numbers, out of the way of programs that count on low ones, open across exec. Not to the
/// highest: the kernel's table reaches up to the highest open number, and every fork copies it.
fn place(fds: [OwnedFd; 3]) -> Result<[RawFd; 3]> {
    let (soft, _) = sys::limit(libc::RLIMIT_NOFILE).context("cannot ask for RLIMIT_NOFILE")?;
    let soft = soft.min(4096) as RawFd;
    let mut numbers = [0; 3];
    for (number, fd) in numbers.iter_mut().zip(&fds) {
        let new = [soft - 32, soft / 2, 3]
            .into_iter()
            .filter(|&start| start >= 3)
            .find_map(|start| sys::duplicate_for_exec(fd.as_fd(), start).ok())
            .context("no descriptor is left for the guest's memory: raise RLIMIT_NOFILE (`ulimit -n`)")?;
        *number = new.as_raw_fd();
        // Stays open for the program.
        std::mem::forget(new);
    }
    Ok(numbers)
}

/// Without a guest the library has nothing to do.
fn remove_preload(environment: &mut BTreeMap<OsString, OsString>) {
    let name = OsStr::new("LD_PRELOAD");
    if let Some(before) = environment.remove(name) {
        let rest = library::without(&before);
        if !rest.is_empty() {
            environment.insert(name.into(), rest);
        }
    }
}
