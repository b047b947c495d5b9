"""ssl_client.py PORT CERTIFICATE: verified TLS; 6 clients at once, 1 MiB each way; a stranger's name is refused."""
import os, socket, ssl, sys, threading

port = int(sys.argv[1])
context = ssl.create_default_context(cafile=sys.argv[2])
good = []


def client():
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as connection:
            assert connection.version() in ("TLSv1.2", "TLSv1.3"), connection.version()
            for _ in range(64):
                message = os.urandom(16384)
                connection.sendall(message)
                answer = b""
                while len(answer) < len(message):
                    piece = connection.recv(65536)
                    assert piece, "cut off"
                    answer += piece
                assert answer == message
            connection.unwrap()
            good.append(1)


threads = [threading.Thread(target=client) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(good) == 6, good
try:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        context.wrap_socket(plain, server_hostname="stranger.example")
    raise SystemExit("a certificate for another name was taken")
except ssl.SSLCertVerificationError:
    pass
print("ok")
