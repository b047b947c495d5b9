"""udp_client.py PORT: sizes from nothing to the largest, connected and not; nobody answers on a closed port."""
import os, socket, sys

port = int(sys.argv[1])
for family, address, largest in ((socket.AF_INET, "127.0.0.1", 65507), (socket.AF_INET6, "::1", 65487)):
    for connected in (False, True):
        client = socket.socket(family, socket.SOCK_DGRAM)
        client.settimeout(10)
        if connected:
            client.connect((address, port))
        for size in [0, 1, 2, 511, 1472, 1473, 9000, 30000, largest] + [64] * 100:
            message = os.urandom(size)
            if connected:
                client.send(message)
                answer = client.recv(65536)
            else:
                client.sendto(message, (address, port))
                answer, sender = client.recvfrom(65536)
                assert sender[:2] == (address, port), sender
            assert answer == message, (size, len(answer))
        try:
            client.send(b"x" * 66000) if connected else client.sendto(b"x" * 66000, (address, port))
            raise SystemExit("a datagram of 66000 bytes was taken")
        except OSError as e:
            assert e.errno == 90, e
        client.close()
# Two datagrams that wait stay two.
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(10)
client.connect(("127.0.0.1", port))
for message in (b"first", b"second"):
    client.send(message)
assert [client.recv(100), client.recv(100)] == [b"first", b"second"]
closed = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
closed.bind(("127.0.0.1", 0))
address = closed.getsockname()
closed.close()
client.connect(address)
client.send(b"anybody?")
try:
    client.recv(10)
    raise SystemExit("an answer from a closed port")
except ConnectionRefusedError:
    pass
print("ok")
