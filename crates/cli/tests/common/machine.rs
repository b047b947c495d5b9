//! A machine of one test's own with systemd as its first process: in namespaces, over the host's files, with the units of
//! `contrib/systemd` and the command as a package would install them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Done, Place, children, finish, is_root, until};

const SYSTEMD: &str = "/lib/systemd/systemd";
const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Whether such machines can be there; says so, past what captures a test's output, when they cannot.
pub fn can_run() -> bool {
    let why = obstacle();
    if let Some(why) = &why {
        let _ = writeln!(std::io::stderr(), "\nNOT RUN, the units of systemd are not tested: {why}");
    }
    why.is_none()
}

fn obstacle() -> Option<String> {
    if !Path::new(SYSTEMD).exists() {
        return Some(format!("there is no {SYSTEMD}: install Debian's package systemd (scripts/deps does)"));
    }
    if !is_root() {
        return Some("namespaces and control groups need root: run the tests as root".into());
    }
    let mut command = Command::new("unshare");
    let tried = finish_quietly(command.args(NAMESPACES).args(["mount", "--make-rprivate", "/"]));
    if let Err(why) = tried {
        return Some(format!(
            "no namespaces can be made here ({why}): run the tests outside of a container, or in a privileged one"
        ));
    }
    match Group::new("try") {
        Ok(group) => {
            drop(group);
            None
        }
        Err(why) => Some(format!("no control group can be made here ({why}): mount cgroup2 writable")),
    }
}

const NAMESPACES: &[&str] =
    &["--pid", "--fork", "--kill-child", "--mount", "--cgroup", "--uts", "--ipc", "--net", "--mount-proc"];

fn finish_quietly(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(error) }
}

/// A control group of version 2 below the test's own, removed with all that runs in it.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Result<Group, String> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"));
        let (groups, mounts) = (read("/proc/self/cgroup")?, read("/proc/self/mountinfo")?);
        let own =
            groups.lines().find_map(|line| line.strip_prefix("0::")).ok_or("this process is in none")?;
        let mount = mounts.lines().find_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let point = mount.split(' ').nth(4)?;
            kind.starts_with("cgroup2 ").then_some(point)
        });
        let mount = mount.ok_or("none are mounted")?;
        let path = PathBuf::from(format!("{mount}{own}"))
            .join(format!("netkernel-test-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Group(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        let remove = |path: &Path| remove_groups(path).is_ok();
        if std::thread::panicking() {
            // Once, since nothing may panic now.
            std::thread::sleep(std::time::Duration::from_millis(500));
            remove(&self.0);
        } else {
            until("the control groups are empty", || remove(&self.0));
        }
    }
}

fn remove_groups(path: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(path)?.flatten().filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir()))
    {
        remove_groups(&entry.path())?;
    }
    std::fs::remove_dir(path)
}

/// Ends with the value.
pub struct Machine {
    init: i32,
    first: Child,
    // Behind the processes, in this order.
    _group: Group,
    place: Place,
}

impl Machine {
    /// Neither unit is started yet.
    pub fn new(name: &str, config: &str) -> Machine {
        let place = Place::new(name);
        let group = Group::new(name).unwrap();
        let layer = |path: &str| {
            let path = place.dir.join("layer").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        let binary = Path::new(env!("CARGO_BIN_EXE_netkernel"));
        std::fs::copy(binary, layer("usr/bin/netkernel")).unwrap();
        let library = binary.with_file_name("libnetkernel.so");
        std::fs::copy(library, layer("usr/lib/netkernel/libnetkernel.so")).unwrap();
        for unit in ["netkernel.service", "netkernel.socket"] {
            let from = format!("{REPOSITORY}/contrib/systemd/{unit}");
            std::fs::copy(from, layer(&format!("etc/systemd/system/{unit}"))).unwrap();
        }
        std::fs::write(layer("etc/netkernel/engine.toml"), config).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ >\"$0\" && exec \"$@\""]).arg(group.0.join("cgroup.procs"));
        command.arg("unshare").args(NAMESPACES);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/systemd/boot.sh")).arg(&place.dir);
        // SAFETY: prctl touches no memory and may be called after fork.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, || {
                // Nothing is left of it if the test is killed.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                Ok(())
            });
        }
        let first = command.stdin(Stdio::null()).spawn().unwrap();
        let mut machine = Machine { init: 0, first, _group: group, place };
        let up = machine.place.dir.join("kmsg");
        until("systemd is there", || {
            let status = machine.first.try_wait().unwrap();
            assert!(status.is_none(), "the machine ended: {status:?} {}", read(&up));
            machine.init = children(machine.first.id() as i32).first().copied().unwrap_or(0);
            let comm = std::fs::read_to_string(format!("/proc/{}/comm", machine.init));
            comm.is_ok_and(|name| name == "systemd\n")
        });
        until("the machine is up", || {
            machine.run(&["systemctl", "is-active", "machine.target"]).out == "active\n"
        });
        machine
    }

    /// A command in the machine, as root.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--all", "--target", &self.init.to_string(), "--"]).args(words);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("SYSTEMD_PAGER", "");
        command.stdin(Stdio::null());
        command
    }

    pub fn run(&self, words: &[&str]) -> Done {
        finish(self.command(words))
    }

    /// The engine's configuration file.
    pub fn configure(&self, config: &str) {
        std::fs::write(format!("/proc/{}/root/etc/netkernel/engine.toml", self.init), config).unwrap();
    }

    /// A property of the engine's unit.
    pub fn property(&self, name: &str) -> String {
        self.run(&["systemctl", "show", "--property", name, "--value", "netkernel.service"])
            .out
            .trim()
            .to_owned()
    }

    /// Messages of the engine's unit in the journal, of this priority and worse ones.
    pub fn journal(&self, priority: &str) -> String {
        self.run(&["journalctl", "--sync"]).succeeds();
        let unit = "--unit=netkernel.service";
        self.run(&["journalctl", "--quiet", "--output=cat", unit, "--priority", priority])
            .succeeds()
            .out
            .clone()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() && self.init != 0 {
            let _ = writeln!(std::io::stderr(), "systemd said:\n{}", read(&self.place.dir.join("kmsg")));
            let journal = self.command(&["journalctl", "--unit=netkernel.service"]).output();
            let journal = journal.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            let _ = writeln!(std::io::stderr(), "the unit said:\n{}", journal.unwrap_or_default());
        }
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
