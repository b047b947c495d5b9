"""subprocess_client.py PORT"""
import os, socket, sys, threading

port = int(sys.argv[1])


def ask(what, message):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(what)

        def send():
            connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        sender.join()
        return answer


for size in (10, 300_000):
    message = os.urandom(size)
    answer = ask(b"c", message)
    assert answer == message, ("cat", len(answer), size)
    answer = ask(b"p", message)
    assert answer == message, ("pass_fds", len(answer), size)
# A guest's library may keep descriptors of its own, far above those that programs get.
descriptors = sorted(int(d) for d in ask(b"f", b"").split())
assert [d for d in descriptors if d < 256] == [0, 1, 2, 3], descriptors
print("ok")
