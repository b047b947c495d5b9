//! A guest with connections of all kinds, all of which are checked.

/// What a guest runs, given the port of an [`echo`]: streams in both directions that are checked byte by byte, and short connections, which
/// may be reset but must not hang or carry wrong bytes.
pub const LOAD: &str = r#"
import sys, socket, threading, random, hashlib
port = int(sys.argv[1])
stop = threading.Event()
bad = []
blocks = [0] * 6
short = [0, 0]
def check(ok, what):
    if not ok: bad.append(what); stop.set()
def read(c, n):
    out = bytearray()
    while len(out) < n:
        d = c.recv(n - len(out))
        if not d: raise EOFError
        out += d
    return bytes(out)
def stream(i):
    r = random.Random(i)
    c = socket.create_connection(('127.0.0.1', port))
    try:
        while not stop.is_set():
            data = r.randbytes(r.choice((1, 100, 5000, 70000, 400000)))
            w = threading.Thread(target=c.sendall, args=(data,))
            w.start()
            back = read(c, len(data))
            w.join()
            check(back == data, f'stream {i} differs')
            blocks[i] += 1
        c.shutdown(socket.SHUT_WR)
        check(c.recv(1) == b'', 'no end')
    except (OSError, EOFError) as e:
        check(False, f'stream {i}: {e!r} after {blocks[i]} blocks')
def brief():
    r = random.Random(99)
    while not stop.is_set():
        data = r.randbytes(3000)
        try:
            with socket.create_connection(('127.0.0.1', port)) as c:
                c.settimeout(20)
                c.sendall(data)
                check(read(c, len(data)) == data, 'a short connection differs')
                short[0] += 1
        except TimeoutError:
            check(False, 'a short connection hangs')
        except (OSError, EOFError):
            short[1] += 1
l = socket.create_server(('127.0.0.1', 0))
def serve(c):
    try:
        while d := c.recv(65536): c.sendall(d)
    except OSError: pass
    c.close()
def accept():
    while True:
        try: c, _ = l.accept()
        except OSError: return
        threading.Thread(target=serve, args=(c,), daemon=True).start()
threading.Thread(target=accept, daemon=True).start()
threads = [threading.Thread(target=stream, args=(i,)) for i in range(6)] + [threading.Thread(target=brief)]
for t in threads: t.start()
print('port', l.getsockname()[1], flush=True)
for line in sys.stdin:
    print('blocks', min(blocks), bad, flush=True)
stop.set()
for t in threads: t.join()
print('end', min(blocks), short, bad, flush=True)
"#;

/// An echo server outside of NetKernel.
pub fn echo() -> u16 {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let (mut from, mut to) = (stream.try_clone().unwrap(), stream);
                let mut buffer = vec![0; 65536];
                while let Ok(n) = from.read(&mut buffer)
                    && n > 0
                    && to.write_all(&buffer[..n]).is_ok()
                {}
            });
        }
    });
    port
}
