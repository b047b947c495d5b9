//! Engines with tenants, and clients that send, receive and connect.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};

use super::{Done, Engine, Place, wait};

/// `send N`: sends to the port; `receive N`: receives from it; `connect N`: connects as often, and says what became of it.
const CLIENT: &str = "import errno, socket, sys
port = int(sys.argv[1])
kept = []
for what, n in zip(sys.argv[2::2], map(int, sys.argv[3::2])):
    if what == 'connect':
        for i in range(n):
            s = socket.socket()
            error = s.connect_ex(('127.0.0.1', port))
            print(errno.errorcode.get(error, error), flush=True)
            kept.append(s)
        continue
    s = socket.create_connection(('127.0.0.1', port))
    s.sendall(b'r' if what == 'receive' else b's')
    if what == 'send':
        s.sendall(b'x' * n)
        s.shutdown(socket.SHUT_WR)
        s.recv(1)
    else:
        got = 0
        while got < n:
            got += len(s.recv(65536))
    print(what, flush=True)
sys.stdin.read()
";

pub struct Rig {
    pub place: Place,
    pub socket: String,
    client: String,
    pub port: String,
}

impl Rig {
    pub fn new(name: &str) -> Rig {
        let place = Place::new(name);
        let socket = place.socket().to_str().unwrap().to_owned();
        let client = place.file("client.py", CLIENT).to_str().unwrap().to_owned();
        Rig { place, socket, client, port: serve().to_string() }
    }

    pub fn up(&self, tenants: &str) -> Engine {
        let nsms = "[[nsm]]\nname = \"first\"\ncapacity = \"10 Gbit/s\"\ncores = 2\nprice_per_gb = 0.5\n[[nsm]]\nname = \"second\"\n";
        self.up_with(&format!("{nsms}{tenants}"))
    }

    pub fn up_with(&self, config: &str) -> Engine {
        let config = self.place.file("engine.toml", config);
        self.place.up(&["--socket", &self.socket, "--config", config.to_str().unwrap()])
    }

    /// A tenant of whoever runs the tests.
    pub fn own(limits: &str) -> String {
        // SAFETY: cannot fail and touches no memory.
        let uid = unsafe { libc::geteuid() };
        format!("[[tenant]]\nname = \"own\"\nusers = [{uid}]\n{limits}\n")
    }

    pub fn ask(&self, args: &[&str]) -> Done {
        let (command, more) = args.split_first().unwrap();
        // `tenant set --socket`
        if *command == "tenant" {
            return self.place.run(&[&["tenant", "set", "--socket", &self.socket], more].concat());
        }
        // `nsm restart --socket`
        if *command == "nsm" {
            let (word, more) = more.split_first().unwrap();
            return self.place.run(&[&["nsm", word, "--socket", &self.socket], more].concat());
        }
        self.place.run(&[&[*command, "--socket", &self.socket], more].concat())
    }

    /// What is listed of a tenant.
    pub fn tenant(&self, name: &str) -> serde_json::Value {
        let listed = self.ask(&["tenants", "--json"]).json();
        listed["tenants"].as_array().unwrap().iter().find(|one| one["name"] == name).unwrap().clone()
    }

    /// A static program; see [`BARE`].
    pub fn bare(&self) -> String {
        self.place.program("bare", BARE, &["-static"]).to_str().unwrap().to_owned()
    }

    pub fn client(&self, options: &[&str], acts: &[&str]) -> Running {
        let mut command = self.place.netkernel(&["run", "--socket", &self.socket]);
        command.args(options).args(["--", "python3", &self.client, &self.port]).args(acts);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Running { child, lines }
    }
}

/// A client at work.
pub struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Running {
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(wait(&mut self.child, "the client ends").success());
    }
}

/// Reads connections that begin with `s` to their end; writes to those that begin with `r` for ever; keeps others open.
fn serve() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let one = |mut stream: TcpStream| {
        let mut first = [0];
        if stream.read_exact(&mut first).is_err() {
            return;
        }
        let bytes = vec![b'y'; 65536];
        if first[0] == b'r' {
            while stream.write_all(&bytes).is_ok() {}
        } else {
            let mut bytes = vec![0; 65536];
            while stream.read(&mut bytes).is_ok_and(|n| n > 0) {}
        }
    };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            std::thread::spawn(move || one(stream));
        }
    });
    port
}

/// Makes a connection by system calls of its own, which no preloaded library sees, sends or receives, and says so. Without
/// arguments: reads what it is given to the end.
const BARE: &str = r#"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int argc, char **argv) {
    static char bytes[65536];
    if (argc == 1) { while (read(0, bytes, sizeof bytes) > 0) {} return 0; }
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(atoi(argv[1]))};
    long n = atol(argv[3]), done = 0, r;
    int fd = socket(AF_INET, SOCK_STREAM, 0), sends = !strcmp(argv[2], "send");
    if (fd < 0 || connect(fd, (void *)&to, sizeof to) || write(fd, sends ? "s" : "r", 1) != 1) { perror("bare"); return 1; }
    while (done < n && (r = sends ? write(fd, bytes, sizeof bytes) : read(fd, bytes, sizeof bytes)) > 0) done += r;
    if (sends) { shutdown(fd, SHUT_WR); while (read(fd, bytes, 1) > 0) {} }
    puts(argv[2]);
}
"#;
