//! Programs that a scenario starts.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{self, Signal};

/// A program about to be started, as a guest or natively.
#[derive(Debug)]
pub struct Cmd {
    label: String,
    /// `netkernel run ... --`, empty for a native program.
    wrapper: Vec<OsString>,
    argv: Vec<OsString>,
    env: Vec<(String, OsString)>,
    cwd: PathBuf,
    stdin: Stdin,
    out: PathBuf,
    err: PathBuf,
    limit: Instant,
}

#[derive(Debug)]
enum Stdin {
    Null,
    File(PathBuf),
    Piped,
}

#[derive(Debug)]
pub struct Output {
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Output {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Cmd {
    pub(crate) fn new(
        program: &Path,
        wrapper: Vec<OsString>,
        cwd: &Path,
        files: (PathBuf, PathBuf),
        limit: Instant,
    ) -> Cmd {
        let label = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Cmd {
            label,
            wrapper,
            argv: vec![program.into()],
            env: Vec::new(),
            cwd: cwd.to_owned(),
            stdin: Stdin::Null,
            out: files.0,
            err: files.1,
            limit,
        }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Cmd {
        self.argv.push(arg.as_ref().to_owned());
        self
    }

    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Cmd {
        self.argv.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Arguments separated by spaces.
    pub fn line(self, args: &str) -> Cmd {
        self.args(args.split_whitespace())
    }

    /// The program is started by another one (`setpriv ... --`), which then is the guest's first.
    pub fn through(mut self, argv: &[&str]) -> Cmd {
        self.argv.splice(0..0, argv.iter().map(OsString::from));
        self
    }

    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Cmd {
        self.env.push((key.to_owned(), value.as_ref().to_owned()));
        self
    }

    pub fn cwd(mut self, dir: &Path) -> Cmd {
        self.cwd = dir.to_owned();
        self
    }

    pub fn stdin_file(mut self, path: &Path) -> Cmd {
        self.stdin = Stdin::File(path.to_owned());
        self
    }

    pub fn stdin_text(mut self, text: &str) -> Result<Cmd> {
        let path = self.out.with_extension("in");
        fs::write(&path, text)?;
        self.stdin = Stdin::File(path);
        Ok(self)
    }

    /// Standard output goes there.
    pub fn stdout_file(mut self, path: &Path) -> Cmd {
        self.out = path.to_owned();
        self
    }

    pub fn spawn(self) -> Result<Proc> {
        let mut argv = self.wrapper.iter().chain(&self.argv);
        let program = argv.next().context("no program")?;
        let mut command = Command::new(program);
        command
            .args(argv)
            .current_dir(&self.cwd)
            .stdout(File::create(&self.out)?)
            .stderr(File::create(&self.err)?)
            .process_group(0);
        match &self.stdin {
            Stdin::Null => command.stdin(Stdio::null()),
            Stdin::File(path) => command.stdin(File::open(path)?),
            Stdin::Piped => command.stdin(Stdio::piped()),
        };
        // What a test machine's environment could change.
        for key in ["http_proxy", "https_proxy", "all_proxy", "no_proxy"] {
            command.env_remove(key).env_remove(key.to_uppercase());
        }
        command.env("LC_ALL", "C").env("HOME", &self.cwd);
        command.envs(self.env.iter().map(|(k, v)| (k, v)));
        let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Proc {
            child,
            label: self.label,
            wrapper: self.wrapper.first().map(PathBuf::from),
            out: self.out,
            err: self.err,
            limit: self.limit,
            status: None,
        })
    }

    /// Runs it to its end, whatever its exit code.
    pub fn output(self) -> Result<Output> {
        self.spawn()?.output()
    }

    /// Runs it to its end, which must be a good one.
    pub fn run(self) -> Result<Output> {
        self.spawn()?.finish()
    }

    /// A shell in which several programs are run, one after another.
    pub fn shell(mut self) -> Result<Shell> {
        self.stdin = Stdin::Piped;
        let mut proc = self.spawn()?;
        let stdin = proc.child.stdin.take();
        Ok(Shell { proc, stdin, commands: 0 })
    }
}

/// A running program. Dropped, it is ended the hard way.
#[derive(Debug)]
pub struct Proc {
    child: Child,
    label: String,
    /// The `netkernel` that stands before the program.
    wrapper: Option<PathBuf>,
    out: PathBuf,
    err: PathBuf,
    limit: Instant,
    status: Option<ExitStatus>,
}

impl Proc {
    /// The program's own process, even where `netkernel run` stays as its parent.
    pub fn pid(&mut self) -> Result<u32> {
        let mut pid = self.child.id();
        let Some(wrapper) = self.wrapper.clone() else { return Ok(pid) };
        let wrapper = fs::canonicalize(wrapper)?;
        loop {
            match process::exe(pid) {
                Some(exe) if exe == wrapper => match process::children(pid).first() {
                    Some(child) => pid = child.pid,
                    None => {
                        self.check_running()?;
                        ensure!(Instant::now() < self.limit, "`netkernel run` does not start {}", self.label);
                        sleep(Duration::from_millis(2));
                    }
                },
                _ => return Ok(pid),
            }
        }
    }

    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        let pid = self.pid()?;
        process::signal(pid, signal);
        Ok(())
    }

    /// An error if it has ended.
    pub fn check_running(&mut self) -> Result<()> {
        if let Some(status) = self.try_status()? {
            bail!("{} ended too early ({status}){}", self.label, self.complaints());
        }
        Ok(())
    }

    fn try_status(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Its exit code, or 128 and the signal that ended it.
    pub fn wait(&mut self) -> Result<i32> {
        let mut pause = Duration::from_micros(500);
        loop {
            if let Some(status) = self.try_status()? {
                return Ok(code_of(status));
            }
            if Instant::now() > self.limit {
                let tree = process::tree(self.child.id()).join("\n");
                bail!("{} does not end (watchdog)\n{tree}{}", self.label, self.complaints());
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    pub fn output(mut self) -> Result<Output> {
        let code = self.wait()?;
        Ok(Output { code, stdout: fs::read(&self.out)?, stderr: fs::read(&self.err)? })
    }

    /// Waits for its end, which must be a good one.
    pub fn finish(mut self) -> Result<Output> {
        let code = self.wait()?;
        ensure!(code == 0, "{} ended with {code}{}", self.label, self.complaints());
        self.output()
    }

    /// Asks it to end with `signal`; it must, with one of these codes.
    pub fn stop(mut self, signal: Signal, codes: &[i32]) -> Result<()> {
        self.check_running()?;
        self.signal(signal)?;
        let code = self.wait()?;
        ensure!(
            codes.contains(&code),
            "{} ended with {code} when asked to end{}",
            self.label,
            self.complaints()
        );
        Ok(())
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.out).unwrap_or_default()).into_owned()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.err).unwrap_or_default()).into_owned()
    }

    fn complaints(&self) -> String {
        let mut text = String::new();
        for path in [&self.out, &self.err] {
            let bytes = fs::read(path).unwrap_or_default();
            let tail = tail(&bytes, 12);
            if !tail.is_empty() {
                text.push('\n');
                text.push_str(&tail);
            }
        }
        text
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        if self.status.is_none() {
            for info in process::descendants(self.child.id(), &[]) {
                process::signal(info.pid, Signal::KILL);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A shell (a guest's, if its role is one) that runs what it is told: programs of one guest, started one by one.
#[derive(Debug)]
pub struct Shell {
    proc: Proc,
    stdin: Option<ChildStdin>,
    commands: usize,
}

impl Shell {
    /// Runs a command line and waits for its exit code, which must be 0.
    pub fn run(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("the shell was left")?;
        writeln!(stdin, "( {line} ) </dev/null; echo \"@exit $?\"")?;
        self.commands += 1;
        loop {
            let text = self.proc.stdout();
            let codes: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("@exit ")).collect();
            if codes.len() >= self.commands && text.ends_with('\n') {
                let code = codes[self.commands - 1];
                ensure!(code == "0", "`{line}` ended with {code}{}", self.proc.complaints());
                return Ok(());
            }
            self.proc.check_running()?;
            ensure!(
                Instant::now() < self.proc.limit,
                "`{line}` does not end (watchdog){}",
                self.proc.complaints()
            );
            sleep(Duration::from_millis(3));
        }
    }

    /// Leaves the shell.
    pub fn leave(mut self) -> Result<()> {
        drop(self.stdin.take());
        self.proc.finish()?;
        Ok(())
    }
}

/// As shells count: 128 and the signal.
pub fn code_of(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

pub(crate) fn tail(bytes: &[u8], lines: usize) -> String {
    let start = bytes.len().saturating_sub(4000);
    let text = String::from_utf8_lossy(&bytes[start..]);
    let all: Vec<&str> = text.trim().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
