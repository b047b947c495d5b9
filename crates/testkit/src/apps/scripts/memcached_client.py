"""memcached_client.py PORT: 8 threads set, get, add and count over connections of their own; all is compared."""
import random, socket, sys, threading

port = int(sys.argv[1])
good = []


class Client:
    def __init__(self):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def line(self, *lines):
        self.socket.sendall(b"".join(lines))
        return self.file.readline().rstrip(b"\r\n")

    def set(self, key, value):
        return self.line(b"set %s 0 0 %d\r\n" % (key, len(value)), value, b"\r\n")

    def get(self, *keys):
        self.socket.sendall(b"get " + b" ".join(keys) + b"\r\n")
        found = {}
        while (line := self.file.readline().rstrip(b"\r\n")) != b"END":
            word, key, _, size = line.split()
            assert word == b"VALUE", line
            found[key] = self.file.read(int(size))
            assert self.file.read(2) == b"\r\n"
        return found


def work(number):
    noise = random.Random(number)
    client = Client()
    values = {}
    for i in range(120):
        key = b"t%d-%d" % (number, i)
        values[key] = noise.randbytes(noise.choice((10, 100, 3000, 60000)))
        assert client.set(key, values[key]) == b"STORED"
    keys = list(values)
    for i in range(0, len(keys), 10):
        group = keys[i : i + 10]
        found = client.get(*group, b"nothing")
        assert found == {k: values[k] for k in group}, group
    for _ in range(200):
        client.line(b"incr counter 1\r\n")
    # Many requests in one piece.
    client.socket.sendall(b"".join(b"get %s\r\n" % k for k in keys[:50]))
    for key in keys[:50]:
        assert client.file.readline().split()[1] == key
        assert client.file.read(len(values[key]) + 2)[:-2] == values[key]
        assert client.file.readline() == b"END\r\n"
    good.append(1)


first = Client()
assert first.set(b"counter", b"0") == b"STORED"
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(good) == 8, good
assert first.get(b"counter") == {b"counter": b"1600"}, first.get(b"counter")
print("ok")
