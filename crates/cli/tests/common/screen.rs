//! A terminal for programs under test.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use super::{Place, until, wait};

/// A terminal of the test's own with a program on it.
pub struct Screen {
    child: Child,
    keys: File,
    /// The program's end, to ask for its settings.
    slave: OwnedFd,
    written: Arc<Mutex<Vec<u8>>>,
}

impl Screen {
    pub fn start(place: &Place, args: &[&str], colour: bool) -> Screen {
        let mut command = place.netkernel(args);
        command.env_remove("NO_COLOR");
        if !colour {
            command.env("NO_COLOR", "1");
        }
        Screen::of(command, None)
    }

    /// A command on a terminal, with its standard output elsewhere if that is given.
    pub fn of(mut command: Command, out: Option<Stdio>) -> Screen {
        let (mut master, mut slave) = (0, 0);
        let size = libc::winsize { ws_row: 30, ws_col: 110, ws_xpixel: 0, ws_ypixel: 0 };
        let none = std::ptr::null_mut();
        // SAFETY: both numbers are valid for writes, size for reads; name and settings are not asked for.
        let r = unsafe { libc::openpty(&mut master, &mut slave, none, none.cast(), &size) };
        assert_eq!(r, 0);
        // SAFETY: new and owned by nobody else.
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        command.env("TERM", "xterm-256color");
        let stdio = || Stdio::from(slave.try_clone().unwrap());
        command.stdin(stdio()).stdout(out.unwrap_or_else(stdio)).stderr(stdio());
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

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.written.lock().unwrap()).into_owned()
    }

    pub fn shows(&self, what: &str) {
        until(what, || self.text().contains(what));
    }

    pub fn press(&mut self, keys: &str) {
        self.written.lock().unwrap().clear();
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Writes as the program does.
    pub fn write(&self, text: &str) {
        File::from(self.slave.try_clone().unwrap()).write_all(text.as_bytes()).unwrap();
    }

    /// Whether the terminal gives whole lines, as a shell left it.
    pub fn is_cooked(&self) -> bool {
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
    pub fn ended(mut self) {
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
