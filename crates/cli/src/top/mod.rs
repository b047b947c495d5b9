//! `netkernel top`: a live view of an engine.

mod model;
mod view;

use std::io::{IsTerminal as _, Write as _};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use netkernel_control::{Client, ClientError, ErrorCode, SocketQuery};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use crate::args::{TopArgs, TopView};
use crate::{locate, show, sys};
use model::{Look, Model};
use view::{Ui, View};

/// Longest wait for a key between two looks at signals and at what the engine said.
const TICK: Duration = Duration::from_millis(50);
/// Between two looks at the engine, in milliseconds.
const INTERVALS: std::ops::RangeInclusive<u64> = 100..=60_000;

pub fn top(args: &TopArgs) -> Result<()> {
    let interval = Duration::try_from_secs_f64(args.interval)
        .ok()
        .filter(|interval| INTERVALS.contains(&(interval.as_millis() as u64)));
    let Some(interval) = interval else { bail!("--interval {}: use 0.1 to 60 seconds", args.interval) };
    let mut client = engine(args)?;
    if args.once || args.json {
        return once(args, &mut client, interval);
    }
    if !std::io::stdout().is_terminal() {
        bail!("this is no terminal: use `netkernel top --once`, or --json");
    }
    // Before there are threads: they must not take the signals.
    let signals = sys::termination_signals().context("cannot take signals")?;
    let mut ui = Ui::new(colour());
    ui.view = view_of(args.view);
    // Restores the terminal when this panics, too.
    let mut terminal = ratatui::try_init().context("the terminal cannot be used")?;
    let looks = Looks::start(client, args, interval, ui.view);
    let result = looks.and_then(|looks| live(&mut terminal, &mut ui, &looks, signals.as_fd()));
    ratatui::restore();
    result
}

fn engine(args: &TopArgs) -> Result<Client> {
    match show::engines(&args.show())?.into_iter().next() {
        Some(client) => Ok(client),
        None => locate::require(args.socket.as_deref()),
    }
}

/// <https://no-color.org>
fn colour() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

fn view_of(view: TopView) -> View {
    match view {
        TopView::Tenants => View::Tenants,
        TopView::Stacks => View::Nsms,
        TopView::Guests => View::Guests,
        TopView::Sockets => View::Sockets,
        TopView::Latency => View::Stages,
    }
}

fn look(client: &mut Client, since: Instant, sockets: bool) -> Result<Look, ClientError> {
    let tenants = match client.tenants() {
        Ok(tenants) => Some(tenants),
        Err(ClientError::Refused(error)) if error.code == ErrorCode::Permission => None,
        Err(error) => return Err(error),
    };
    let stacks = client.stacks()?;
    let sockets = if sockets { Some(client.find_sockets(SocketQuery::default())?) } else { None };
    let status = client.status()?;
    Ok(Look {
        at: since.elapsed().as_secs_f64(),
        status,
        stacks,
        tenants,
        sockets: sockets.map(|list| list.iter().filter_map(crate::catalog::convert).collect()),
    })
}

/// Two looks, and what came between them.
fn once(args: &TopArgs, client: &mut Client, interval: Duration) -> Result<()> {
    let (since, sockets) = (Instant::now(), args.json || args.view == TopView::Sockets);
    let mut model = Model::default();
    model.take(look(client, since, sockets)?);
    std::thread::sleep(interval);
    model.take(look(client, since, sockets)?);
    if args.json {
        return show::print_json(&model.shown);
    }
    let mut ui = Ui::new(false);
    ui.view = view_of(args.view);
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", view::summary(&model))?;
    write!(out, "{}", view::text(&ui, &model, 240))?;
    Ok(())
}

/// Looks at the engine, by a thread of their own: the keys answer while the engine does not.
struct Looks {
    receiver: Receiver<Result<Look, String>>,
    wanted: Arc<Wanted>,
    wake: mpsc::Sender<()>,
}

struct Wanted {
    interval_ms: AtomicU64,
    sockets: AtomicBool,
}

impl Looks {
    fn start(client: Client, args: &TopArgs, interval: Duration, view: View) -> Result<Looks> {
        let (sender, receiver) = sync_channel(1);
        let (wake, woken) = mpsc::channel();
        let wanted = Arc::new(Wanted {
            interval_ms: AtomicU64::new(interval.as_millis() as u64),
            sockets: AtomicBool::new(view == View::Sockets),
        });
        let (own, path, named) = (wanted.clone(), client.path().to_owned(), args.socket.is_some());
        let mut client = Some(client);
        let work = move || {
            let since = Instant::now();
            loop {
                if client.is_none() {
                    // Whom it trusted before; by name, whoever is there.
                    let connect = if named { Client::connect } else { Client::connect_trusted };
                    client = connect(&path).ok();
                }
                let result = match &mut client {
                    Some(client) => look(client, since, own.sockets.load(Relaxed)).map_err(|e| e.to_string()),
                    None => Err(format!("no engine answers at {}", path.display())),
                };
                if result.is_err() {
                    client = None;
                }
                if sender.send(result).is_err() {
                    return;
                }
                let interval = Duration::from_millis(own.interval_ms.load(Relaxed));
                if let Err(mpsc::RecvTimeoutError::Disconnected) = woken.recv_timeout(interval) {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("top-looks".into()).spawn(work).context("no thread")?;
        Ok(Looks { receiver, wanted, wake })
    }

    fn change_interval(&self, change: impl Fn(u64) -> u64) {
        let ms = change(self.wanted.interval_ms.load(Relaxed));
        self.wanted.interval_ms.store(ms.clamp(*INTERVALS.start(), *INTERVALS.end()), Relaxed);
    }
}

fn live(
    terminal: &mut DefaultTerminal,
    ui: &mut Ui,
    looks: &Looks,
    signals: std::os::fd::BorrowedFd<'_>,
) -> Result<()> {
    let mut model = Model::default();
    let mut changed = true;
    loop {
        while let Ok(result) = looks.receiver.try_recv() {
            changed = true;
            match result {
                Ok(look) => {
                    ui.trouble = None;
                    if !ui.paused {
                        model.take(look);
                    }
                }
                Err(trouble) => ui.trouble = Some(trouble),
            }
        }
        if changed {
            terminal.draw(|frame| view::draw(frame, ui, &model))?;
            changed = false;
        }
        if sys::is_readable(signals) {
            return Ok(());
        }
        if event::poll(TICK)? {
            changed = true;
            if let Event::Key(key) = event::read()?
                && !pressed(key, ui, looks)
            {
                return Ok(());
            }
        }
    }
}

/// False: it is over.
fn pressed(key: KeyEvent, ui: &mut Ui, looks: &Looks) -> bool {
    if key.kind == KeyEventKind::Release {
        return true;
    }
    let view = ui.view;
    match key.code {
        KeyCode::Char('c' | 'd') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
        KeyCode::Esc if ui.help => ui.help = false,
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('h' | '?') => ui.help = !ui.help,
        KeyCode::Char(digit @ '1'..='5') => ui.view = view::VIEWS[digit as usize - '1' as usize],
        KeyCode::Tab => ui.view = ui.view.after(1),
        KeyCode::BackTab => ui.view = ui.view.after(view::VIEWS.len() - 1),
        KeyCode::Char('<' | ',') | KeyCode::Left => ui.sort_by(false),
        KeyCode::Char('>' | '.' | 's') | KeyCode::Right => ui.sort_by(true),
        KeyCode::Char('r') => ui.reverse(),
        KeyCode::Char('p' | ' ') => ui.paused = !ui.paused,
        KeyCode::Char('+') => looks.change_interval(|ms| ms / 2),
        KeyCode::Char('-') => looks.change_interval(|ms| ms * 2),
        KeyCode::Up => ui.first = ui.first.saturating_sub(1),
        KeyCode::Down => ui.first += 1,
        KeyCode::PageUp => ui.first = ui.first.saturating_sub(20),
        KeyCode::PageDown => ui.first += 20,
        KeyCode::Home => ui.first = 0,
        _ => {}
    }
    if ui.view != view {
        ui.first = 0;
        looks.wanted.sockets.store(ui.view == View::Sockets, Relaxed);
        let _ = looks.wake.send(());
    }
    true
}
