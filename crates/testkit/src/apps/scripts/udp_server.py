"""udp_server.py PORT: datagrams come back, over IPv4 and IPv6."""
import selectors, signal, socket, sys

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
selector = selectors.DefaultSelector()
for family, address in ((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")):
    server = socket.socket(family, socket.SOCK_DGRAM)
    server.bind((address, int(sys.argv[1])))
    server.setblocking(False)
    selector.register(server, selectors.EVENT_READ)
while True:
    for key, _ in selector.select():
        try:
            while True:
                data, sender = key.fileobj.recvfrom(65536)
                key.fileobj.sendto(data, sender)
        except BlockingIOError:
            pass
