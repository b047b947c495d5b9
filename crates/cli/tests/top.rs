//! `netkernel top`, on a pseudo-terminal and for scripts.

mod common;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

use common::{Engine, Place, until, wait};

/// A terminal of the test's own with a program on it.
struct Screen {
    child: Child,
    keys: File,
    /// The program's end, to ask for its settings.
    slave: OwnedFd,
    written: Arc<Mutex<Vec<u8>>>,
}

impl Screen {
    fn start(place: &Place, args: &[&str], colour: bool) -> Screen {
        let (mut master, mut slave) = (0, 0);
        let size = libc::winsize { ws_row: 30, ws_col: 110, ws_xpixel: 0, ws_ypixel: 0 };
        let none = std::ptr::null_mut();
        // SAFETY: both numbers are valid for writes, size for reads; name and settings are not asked for.
        let r = unsafe { libc::openpty(&mut master, &mut slave, none, none.cast(), &size) };
        assert_eq!(r, 0);
        // SAFETY: new and owned by nobody else.
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        let mut command = place.netkernel(args);
        command.env("TERM", "xterm-256color").env_remove("NO_COLOR");
        if !colour {
            command.env("NO_COLOR", "1");
        }
        let stdio = || Stdio::from(slave.try_clone().unwrap());
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: between fork and exec only system calls are made; 0 is the terminal then.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            })
        };
        let child = command.spawn().unwrap();
        let (written, mut screen) = (Arc::<Mutex<Vec<u8>>>::default(), master.try_clone().unwrap());
        let own = written.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = screen.read(&mut bytes) {
                own.lock().unwrap().extend_from_slice(&bytes[..n]);
            }
        });
        Screen { child, keys: master, slave, written }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.written.lock().unwrap()).into_owned()
    }

    fn shows(&self, what: &str) {
        until(what, || self.text().contains(what));
    }

    fn press(&mut self, keys: &str) {
        self.written.lock().unwrap().clear();
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Whether the terminal gives whole lines, as a shell left it.
    fn is_cooked(&self) -> bool {
        // SAFETY: an all-zero termios is a valid value; it is valid for writes.
        let (mut settings, r): (libc::termios, i32) = unsafe {
            let mut settings = std::mem::zeroed();
            let r = libc::tcgetattr(self.slave.as_raw_fd(), &mut settings);
            (settings, r)
        };
        assert_eq!(r, 0);
        settings.c_lflag &= libc::ICANON | libc::ECHO;
        settings.c_lflag == libc::ICANON | libc::ECHO
    }

    /// It ended well, and the terminal is as it was: lines, cursor, the screen of before.
    fn ended(mut self) {
        let status = wait(&mut self.child, "netkernel top");
        assert_eq!(status.code(), Some(0), "{}", self.text());
        self.shows("\u{1b}[?1049l");
        assert!(self.is_cooked());
        self.shows("\u{1b}[?25h");
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An engine with a guest that waits.
fn served(place: &Place) -> (Engine, Engine) {
    let socket = place.socket();
    let socket = socket.to_str().unwrap();
    let engine = place.up(&["--socket", socket]);
    let mut guest = place.netkernel(&["run", "--socket", socket, "--name", "waiting", "--", "python3", "-c"]);
    guest.arg(
        "import socket, sys\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\nsys.stdin.read()",
    );
    let guest = Engine::of(guest.stdin(Stdio::piped()).spawn().unwrap());
    until("the guest is there", || place.run(&["ss", "--socket", socket, "-lH"]).out.contains("LISTEN"));
    (engine, guest)
}

#[test]
fn keys_change_what_is_seen_and_the_terminal_is_given_back() {
    let place = Place::new("top");
    let (engine, guest) = served(&place);
    let socket = place.socket();
    let args = ["top", "--socket", socket.to_str().unwrap(), "--interval", "0.1"];

    let mut screen = Screen::start(&place, &args, true);
    screen.shows("waiting");
    assert!(!screen.is_cooked());
    assert!(screen.text().contains("\u{1b}[?1049h"), "a screen of its own");
    assert!(screen.text().contains("\u{1b}[38;5;") || screen.text().contains("\u{1b}[3"), "colours");
    screen.press("4");
    screen.shows("LISTEN");
    screen.press("2");
    screen.shows("kernel,");
    screen.press("h");
    screen.shows("this help");
    screen.press("h\t");
    screen.shows("ATTACHMENT");
    screen.press("q");
    screen.ended();

    // Ctrl-C, which is a key here, and signals.
    let mut screen = Screen::start(&place, &args, false);
    screen.shows("waiting");
    assert!(!screen.text().contains("\u{1b}[38;"), "no colour was wanted: {:?}", screen.text());
    screen.press("\u{3}");
    screen.ended();
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
        let screen = Screen::start(&place, &args, true);
        screen.shows("waiting");
        // SAFETY: a child that was not waited for.
        unsafe { libc::kill(screen.child.id() as i32, signal) };
        screen.ended();
    }

    // It outlives the engine, and says so.
    let mut screen = Screen::start(&place, &args, true);
    screen.shows("waiting");
    engine.end();
    screen.shows("no engine answers at");
    screen.press("q");
    screen.ended();
    drop(guest);
}

#[test]
fn scripts_get_text_and_json() {
    let place = Place::new("top-once");
    let (engine, guest) = served(&place);
    let socket = place.socket();
    let top = |args: &[&str]| {
        place.run(&[&["top", "--socket", socket.to_str().unwrap(), "-d", "0.1"], args].concat())
    };
    let text = top(&["--once"]).succeeds().out.clone();
    assert!(text.lines().next().unwrap().contains("1 guests, 1 sockets; in 0 bit/s"), "{text}");
    assert!(text.contains("waiting") && text.contains("queued"), "{text}");
    let json = top(&["--json"]).json();
    assert_eq!(json["guests"][0]["name"], "waiting");
    assert_eq!(json["sockets"][0]["state"], "LISTEN");
    assert!(json["seconds"].as_f64().unwrap() >= 0.1, "{json}");
    assert!(json["nsms"].as_array().unwrap().iter().any(|nsm| nsm["guests"] == 1), "{json}");
    top(&[]).fails(125, &["this is no terminal", "--once"]);
    place.run(&["top", "--interval", "0"]).fails(125, &["--interval 0", "0.1 to 60"]);
    drop(guest);
    engine.end();
}
