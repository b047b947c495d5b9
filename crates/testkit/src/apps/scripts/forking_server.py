"""forking_server.py PORT: a process for each connection, which answers with its number."""
import os, signal, socketserver, sys


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.settimeout(20)
        while data := self.request.recv(65536):
            self.request.sendall(b"%d:" % os.getpid() + data)


class Server(socketserver.ForkingTCPServer):
    allow_reuse_address = True
    request_queue_size = 64
    max_children = 100


signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
    server.serve_forever(poll_interval=0.05)
