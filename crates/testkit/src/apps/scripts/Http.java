// server PORT FILE: com.sun's HttpServer with a pool of threads; serves the file, and says the sum of what is sent to it.
// client PORT FILE: java.net.http.HttpClient (NIO inside) and HttpURLConnection (plain sockets), kept and closed connections.
// nio-server PORT / nio-client PORT: selectors and channels by hand: an echo, one thread for all connections.
import com.sun.net.httpserver.HttpServer;
import java.io.*;
import java.net.*;
import java.net.http.*;
import java.nio.*;
import java.nio.channels.*;
import java.nio.file.*;
import java.security.MessageDigest;
import java.util.*;
import java.util.concurrent.*;

public class Http {
    public static void main(String[] a) throws Exception {
        int port = Integer.parseInt(a[1]);
        switch (a[0]) {
            case "server": server(port, Files.readAllBytes(Path.of(a[2]))); break;
            case "client": client(port, Files.readAllBytes(Path.of(a[2]))); break;
            case "nio-server": nioServer(port); break;
            case "nio-client": nioClient(port); break;
            default: System.exit(2);
        }
    }

    static String sum(byte[] data) throws Exception {
        StringBuilder text = new StringBuilder();
        for (byte b : MessageDigest.getInstance("SHA-256").digest(data)) text.append(String.format("%02x", b));
        return text.toString();
    }

    static void server(int port, byte[] data) throws Exception {
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", port), 64);
        server.setExecutor(Executors.newFixedThreadPool(8));
        server.createContext("/", exchange -> {
            try (InputStream in = exchange.getRequestBody(); OutputStream out = exchange.getResponseBody()) {
                byte[] body = in.readAllBytes();
                byte[] answer = exchange.getRequestMethod().equals("POST") ? sum(body).getBytes() : data;
                exchange.sendResponseHeaders(200, answer.length);
                out.write(answer);
            } catch (Exception e) {
                e.printStackTrace();
            }
        });
        server.start();
    }

    static void check(boolean good, String what) {
        if (!good) {
            System.err.println("wrong: " + what);
            System.exit(1);
        }
    }

    static void client(int port, byte[] data) throws Exception {
        URI uri = URI.create("http://127.0.0.1:" + port + "/");
        HttpClient http = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        HttpRequest get = HttpRequest.newBuilder(uri).timeout(java.time.Duration.ofSeconds(30)).build();
        List<CompletableFuture<HttpResponse<byte[]>>> all = new ArrayList<>();
        for (int i = 0; i < 20; i++) all.add(http.sendAsync(get, HttpResponse.BodyHandlers.ofByteArray()));
        for (CompletableFuture<HttpResponse<byte[]>> one : all) check(Arrays.equals(one.get().body(), data), "asynchronous");
        HttpRequest post = HttpRequest.newBuilder(uri).POST(HttpRequest.BodyPublishers.ofByteArray(data)).build();
        check(http.send(post, HttpResponse.BodyHandlers.ofString()).body().equals(sum(data)), "sum");
        for (int i = 0; i < 20; i++) {
            HttpURLConnection plain = (HttpURLConnection) uri.toURL().openConnection();
            if (i % 2 == 0) plain.setRequestProperty("Connection", "close");
            plain.setReadTimeout(30000);
            try (InputStream in = plain.getInputStream()) {
                check(Arrays.equals(in.readAllBytes(), data), "plain");
            }
        }
        try {
            new Socket("127.0.0.1", 1).close();
            check(false, "a closed port answers");
        } catch (ConnectException e) {
            check(e.getMessage().contains("refused"), e.getMessage());
        }
        // A read that times out is no end.
        try (ServerSocket listener = new ServerSocket(0); Socket socket = new Socket("127.0.0.1", listener.getLocalPort())) {
            socket.setSoTimeout(50);
            try {
                socket.getInputStream().read();
                check(false, "a read without bytes ends");
            } catch (SocketTimeoutException e) {
                Socket other = listener.accept();
                other.getOutputStream().write(7);
                socket.setSoTimeout(30000);
                check(socket.getInputStream().read() == 7, "a byte after a time-out");
                other.close();
                check(socket.getInputStream().read() == -1, "the end");
            }
        }
        System.out.println("ok");
        System.exit(0);
    }

    static void nioServer(int port) throws Exception {
        Selector selector = Selector.open();
        ServerSocketChannel listener = ServerSocketChannel.open();
        listener.bind(new InetSocketAddress("127.0.0.1", port)).configureBlocking(false);
        listener.register(selector, SelectionKey.OP_ACCEPT);
        while (true) {
            selector.select();
            for (Iterator<SelectionKey> keys = selector.selectedKeys().iterator(); keys.hasNext(); ) {
                SelectionKey key = keys.next();
                keys.remove();
                if (key.isAcceptable()) {
                    SocketChannel channel = listener.accept();
                    channel.configureBlocking(false);
                    channel.register(selector, SelectionKey.OP_READ, ByteBuffer.allocateDirect(65536));
                    continue;
                }
                SocketChannel channel = (SocketChannel) key.channel();
                ByteBuffer buffer = (ByteBuffer) key.attachment();
                if (key.isReadable() && channel.read(buffer) < 0) {
                    channel.close();
                    continue;
                }
                buffer.flip();
                channel.write(buffer);
                key.interestOps(buffer.hasRemaining() ? SelectionKey.OP_WRITE : SelectionKey.OP_READ);
                buffer.compact();
            }
        }
    }

    static void nioClient(int port) throws Exception {
        int connections = 16, total = 1 << 20;
        Selector selector = Selector.open();
        byte[][] sent = new byte[connections][total];
        int[] out = new int[connections], in = new int[connections];
        for (int i = 0; i < connections; i++) {
            new Random(i).nextBytes(sent[i]);
            SocketChannel channel = SocketChannel.open();
            channel.configureBlocking(false);
            channel.connect(new InetSocketAddress("127.0.0.1", port));
            channel.register(selector, SelectionKey.OP_CONNECT, i);
        }
        ByteBuffer buffer = ByteBuffer.allocate(40000);
        int open = connections;
        while (open > 0) {
            check(selector.select(30000) > 0, "nothing happens");
            for (SelectionKey key : selector.selectedKeys()) {
                SocketChannel channel = (SocketChannel) key.channel();
                int i = (Integer) key.attachment();
                if (key.isConnectable()) {
                    check(channel.finishConnect(), "connect");
                    check(((InetSocketAddress) channel.getRemoteAddress()).getPort() == port, "the peer's name");
                    key.interestOps(SelectionKey.OP_READ | SelectionKey.OP_WRITE);
                    continue;
                }
                if (key.isWritable() && out[i] < total) {
                    out[i] += channel.write(ByteBuffer.wrap(sent[i], out[i], Math.min(50000, total - out[i])));
                    if (out[i] == total) key.interestOps(SelectionKey.OP_READ);
                }
                if (key.isReadable()) {
                    buffer.clear();
                    int n = channel.read(buffer);
                    check(n > 0, "cut off");
                    check(Arrays.equals(buffer.array(), 0, n, sent[i], in[i], in[i] + n), "other bytes");
                    in[i] += n;
                    if (in[i] == total) {
                        channel.close();
                        open--;
                    }
                }
            }
            selector.selectedKeys().clear();
        }
        System.out.println("ok");
    }
}
