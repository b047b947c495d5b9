"""http_server.py PORT DIR: files by GET; POST and PUT answer with the SHA-256 and length of what came. IPv4 and IPv6."""
import hashlib, os, signal, socket, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while True:
                size = int(self.rfile.readline().split(b";")[0], 16)
                piece = self.rfile.read(size)
                self.rfile.readline()
                if size == 0:
                    return
                yield piece
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left:
                piece = self.rfile.read(min(left, 65536))
                if not piece:
                    raise ConnectionError("body cut off")
                left -= len(piece)
                yield piece

    def do_POST(self):
        digest, length = hashlib.sha256(), 0
        for piece in self.body():
            digest.update(piece)
            length += len(piece)
        answer = f"{digest.hexdigest()} {length}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST


class Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()


port = int(sys.argv[1])
os.chdir(sys.argv[2])
servers = [Server6(("::1", port), Handler), ThreadingHTTPServer(("127.0.0.1", port), Handler)]
for server in servers:
    threading.Thread(target=server.serve_forever, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
signal.sigwait({signal.SIGTERM})
for server in servers:
    server.shutdown()
    server.server_close()
