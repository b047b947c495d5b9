"""ssl_server.py PORT CERTIFICATE KEY: an echo over TLS, one thread for each client."""
import signal, socket, ssl, sys, threading

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2], sys.argv[3])
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=64)


def serve(plain):
    with context.wrap_socket(plain, server_side=True) as connection:
        while data := connection.recv(65536):
            connection.sendall(data)
        connection.unwrap()


def accept():
    while True:
        plain, _ = listener.accept()
        plain.settimeout(20)
        threading.Thread(target=serve, args=(plain,), daemon=True).start()


threading.Thread(target=accept, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
signal.sigwait({signal.SIGTERM})
