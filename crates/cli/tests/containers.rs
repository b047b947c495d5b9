//! Containers of runc that have no network of their own, an image that nobody changed, and a stack of somebody's choice. The
//! launcher is outside (`netkernel run -- runc run ..`) or inside. Network: loopback.

mod common;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::{Done, Engine, Place, finish, is_root, until};

/// What a container needs of Linux, and no more: no capabilities, no new privileges, no network.
const CONFIG: &str = r#"{
    "ociVersion": "1.0.2",
    "process": {
        "user": {"uid": 1000, "gid": 1000}, "cwd": "/", "noNewPrivileges": true, "terminal": false,
        "env": ["PATH=/bin"], "args": ARGS,
        "capabilities": {"bounding": [], "effective": [], "inheritable": [], "permitted": [], "ambient": []}
    },
    "root": {"path": "ROOT", "readonly": true},
    "hostname": "container",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
        MOUNTS
    ],
    "linux": {"namespaces": [
        {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}
    ]}
}"#;

/// Says which congestion control its socket has.
const CC: &str = r#"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/socket.h>
int main() {
    char name[16] = ""; socklen_t length = sizeof name;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &length)) return 1;
    puts(name);
    return 0;
}
"#;

const PAGE: &str = "a page of the host's";

/// An image, and containers of it.
struct Images {
    place: Place,
}

impl Images {
    /// None, said loudly, where there is no runc or no root: `scripts/deps` installs it.
    fn new(name: &str) -> Option<Images> {
        let runc = Command::new("runc").arg("--version").stdout(Stdio::null()).status();
        if !is_root() || !runc.is_ok_and(|status| status.success()) {
            eprintln!("NOT RUN: containers need root and runc (scripts/deps installs it)");
            return None;
        }
        let place = Place::new(name);
        let root = place.dir.join("image");
        for dir in ["bin", "proc", "dev", "www", "run"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
        }
        let busybox =
            ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| PathBuf::from(path).exists());
        std::fs::copy(busybox.expect("busybox-static is installed"), root.join("bin/busybox")).unwrap();
        std::fs::write(root.join("www/page"), PAGE).unwrap();
        for (name, flags) in [("cc", &["-static"][..]), ("cc-dynamic", &[])] {
            std::fs::rename(place.program(name, CC, flags), root.join("bin").join(name)).unwrap();
        }
        Some(Images { place })
    }

    /// What runc is told of one container.
    fn bundle(&self, name: &str, args: &[&str], mounts: &str) -> PathBuf {
        let bundle = self.place.dir.join(name);
        std::fs::create_dir_all(&bundle).unwrap();
        let root = self.place.dir.join("image");
        let config = CONFIG.replace("ARGS", &serde_json::to_string(args).unwrap());
        let config = config.replace("ROOT", root.to_str().unwrap()).replace("MOUNTS", mounts);
        std::fs::write(bundle.join("config.json"), config).unwrap();
        bundle
    }

    fn id(&self, name: &str) -> String {
        format!("netkernel-test-{}-{name}", std::process::id())
    }

    fn runc(&self, name: &str, args: &[&str], mounts: &str) -> Vec<String> {
        let bundle = self.bundle(name, args, mounts).to_str().unwrap().to_owned();
        let state = self.place.dir.join("runc").to_str().unwrap().to_owned();
        ["runc", "--root", &state, "run", "--bundle", &bundle, &self.id(name)].map(String::from).to_vec()
    }

    /// `netkernel run OPTIONS -- runc run ..`.
    fn guest(&self, name: &str, options: &[&str], args: &[&str]) -> Command {
        let socket = self.place.socket().to_str().unwrap().to_owned();
        let mut command = self.place.netkernel(&["run", "--socket", &socket, "--name", name]);
        command.args(options).arg("--").args(self.runc(name, args, ""));
        command
    }

    fn up(&self) -> Engine {
        // Who is inside asks as the container's user.
        self.up_with("[engine]\nallow_users = [1000]\n")
    }

    fn up_with(&self, config: &str) -> Engine {
        let config = self.place.file("engine.toml", config);
        let (config, socket) = (config.to_str().unwrap().to_owned(), self.place.socket());
        self.place.up(&["--config", &config, "--socket", socket.to_str().unwrap()])
    }

    fn nobody_is_left(&self) {
        until("all guests are over", || self.place.run(&["ps"]).out.lines().count() <= 1);
    }
}

/// A native web server with one page; its port on 127.0.0.1.
fn web() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut asked = [0; 1024];
            let _ = stream.read(&mut asked);
            let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{PAGE}", PAGE.len());
        }
    });
    port
}

/// Nobody has it at the moment.
fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

#[test]
fn a_container_without_a_network_fetches_a_page() {
    let Some(images) = Images::new("containers-fetch") else { return };
    let engine = images.up();
    let url = format!("http://127.0.0.1:{}/", web());
    let fetch = ["busybox", "wget", "-q", "-O", "-", &url];
    // By itself it reaches nobody.
    let words = images.runc("alone", &fetch, "");
    let mut alone = Command::new(&words[0]);
    alone.args(&words[1..]);
    let alone = finish(alone);
    assert!(alone.code != Some(0) && !alone.out.contains(PAGE), "{alone:?}");
    for (stack, attach) in [("bbr", "auto"), ("bbr", "direct"), ("cubic", "relay"), ("shm", "relay")] {
        let name = format!("{stack}-{attach}");
        let done: Done = finish(images.guest(&name, &["--stack", stack, "--attach", attach], &fetch));
        assert_eq!((done.code, done.out.as_str()), (Some(0), PAGE), "{name}: {done:?}");
    }
    images.nobody_is_left();
    engine.end();
}

#[test]
fn containers_of_one_host_have_different_stacks() {
    let Some(images) = Images::new("containers-stacks") else { return };
    let engine = images.up();
    for stack in ["bbr", "reno", "cubic"] {
        let done = finish(images.guest(stack, &["--stack", stack], &["cc"]));
        assert_eq!(done.succeeds().out.trim(), stack);
    }
    images.nobody_is_left();
    engine.end();
}

#[test]
fn containers_serve_the_host_and_meet_in_memory() {
    let Some(images) = Images::new("containers-memory") else { return };
    let engine = images.up();
    let port = free_port();
    let options = ["--stack", "shm", "--attach", "relay"];
    let mut server = images.guest("server", &options, &["busybox", "httpd", "-f", "-p", &port, "-h", "/www"]);
    let mut server = server.spawn().unwrap();
    let native = || -> Option<String> {
        let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).ok()?;
        stream.write_all(b"GET /page HTTP/1.0\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        text.ends_with(PAGE).then_some(text)
    };
    until("the host sees the page", || native().is_some());
    let url = format!("http://127.0.0.1:{port}/page");
    let fetched = finish(images.guest("client", &options, &["busybox", "wget", "-q", "-O", "-", &url]));
    assert_eq!(fetched.succeeds().out, PAGE);
    // A connection that stays is explained.
    let mut stays = images.guest("stays", &options, &["busybox", "nc", "127.0.0.1", &port]);
    let mut stays = stays.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    until("it goes by memory", || images.place.run(&["explain"]).out.contains("in memory"));
    drop(stays.stdin.take());
    let kill = |name: &str| {
        let mut kill = Command::new("runc");
        kill.arg("--root").arg(images.place.dir.join("runc")).args(["kill", &images.id(name), "KILL"]);
        finish(kill)
    };
    for (name, child) in [("stays", &mut stays), ("server", &mut server)] {
        kill(name);
        common::wait(child, name);
    }
    images.nobody_is_left();
    engine.end();
}

/// The engine's socket and the launcher are mounted into the container, as an operator of containers does it.
#[test]
fn the_launcher_works_inside_a_container() {
    let Some(images) = Images::new("containers-inside") else { return };
    let url = format!("http://127.0.0.1:{}/", web());
    let root = images.place.dir.join("image");
    let launcher = env!("CARGO_BIN_EXE_netkernel");
    let mut mounts = String::new();
    let mut mount = |from: &str, to: &str| {
        let target = root.join(&to[1..]);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::write(target, "").unwrap();
        mounts += &format!(
            ", {{\"destination\": \"{to}\", \"type\": \"bind\", \"source\": \"{from}\", \"options\": [\"bind\", \"ro\"]}}"
        );
    };
    // A bind mount is of this inode: the engine has to be there first, and be the same to the end.
    let engine = images.up();
    mount(launcher, "/bin/netkernel");
    mount(images.place.socket().to_str().unwrap(), "/run/netkernel/engine.sock");
    let library = PathBuf::from(launcher).with_file_name("libnetkernel.so");
    mount(library.to_str().unwrap(), "/bin/libnetkernel.so");
    // The C library that they are linked with; the image has none.
    let mut libraries = std::collections::BTreeSet::new();
    for linked in [launcher, library.to_str().unwrap()] {
        let mut ldd = Command::new("ldd");
        ldd.arg(linked);
        let found = finish(ldd).succeeds().out.clone();
        libraries.extend(found.split_whitespace().filter(|word| word.starts_with('/')).map(String::from));
    }
    for path in libraries {
        mount(&path, &path);
    }
    let run = |name: &str, args: &[&str]| {
        let words = images.runc(name, args, &mounts);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        finish(command)
    };
    for attach in ["auto", "relay"] {
        let program = ["busybox", "wget", "-q", "-O", "-", &url];
        let args =
            [&["netkernel", "run", "--stack", "reno", "--attach", attach, "--"], &program[..]].concat();
        let done = run(&format!("inside-{attach}"), &args);
        assert_eq!((done.code, done.out.as_str()), (Some(0), PAGE), "{attach}: {done:?}");
    }
    let queued = ["netkernel", "run", "--stack", "bbr", "--attach", "queued", "--", "cc-dynamic"];
    assert_eq!(run("inside-queued", &queued).succeeds().out, "bbr\n");
    images.nobody_is_left();
    engine.end();
    // An engine that does not know the container's user says so, since nothing else can be done in there.
    let engine = images.up_with("");
    let refused = run("inside-refused", &["netkernel", "run", "--", "busybox", "true"]);
    refused.fails(125, &["uid 1000 may not create guests", "allow_users", "private engine"]);
    engine.end();
}
