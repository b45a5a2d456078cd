// Servers and clients as they are written in Java: blocking streams, reads with a time limit (for which the socket is made
// non-blocking at the first of them), a selector, and an HTTP server that makes each connection blocking for as long as an exchange takes.
//
//	java Talk.java serve     echoes from streams on port 9000 and from a selector on 9001, and answers HTTP on 9002 with what it is sent
//	java Talk.java run HOST  talks to all three on eight connections each; prints what went wrong, and done

import com.sun.net.httpserver.HttpServer;
import java.io.EOFException;
import java.io.IOException;
import java.io.InputStream;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.net.SocketTimeoutException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.Executors;

public class Talk {
    public static void main(String[] arguments) throws Exception {
        if (arguments[0].equals("serve")) {
            new Thread(Talk::select).start();
            HttpServer http = HttpServer.create(new InetSocketAddress(9002), 0);
            http.createContext("/", exchange -> {
                byte[] body = exchange.getRequestBody().readAllBytes();
                exchange.sendResponseHeaders(200, body.length == 0 ? -1 : body.length);
                exchange.getResponseBody().write(body);
                exchange.close();
            });
            http.setExecutor(Executors.newCachedThreadPool());
            http.start();
            streams();
            return;
        }
        List<Thread> all = new ArrayList<>();
        for (int i = 0; i < 8; i++) {
            attempt(all, "9000", () -> lines(arguments[1], 9000, false));
            attempt(all, "9000 in time", () -> lines(arguments[1], 9000, true));
            attempt(all, "9001", () -> lines(arguments[1], 9001, true));
            attempt(all, "http", () -> requests("http://" + arguments[1] + ":9002/"));
        }
        for (Thread thread : all) thread.join();
        System.out.println("done");
        System.exit(0);
    }

    interface Try { void run() throws Exception; }

    static void attempt(List<Thread> all, String what, Try work) {
        Thread thread = new Thread(() -> {
            try {
                work.run();
            } catch (Exception problem) {
                System.out.println(what + ": " + problem);
            }
        });
        all.add(thread);
        thread.start();
    }

    static void streams() throws IOException {
        ServerSocket listener = new ServerSocket(9000);
        while (true) {
            Socket socket = listener.accept();
            new Thread(() -> {
                try (socket) {
                    socket.getInputStream().transferTo(socket.getOutputStream());
                    socket.shutdownOutput();
                } catch (IOException gone) {
                    // The client has noticed too.
                }
            }).start();
        }
    }

    static void select() {
        try (Selector selector = Selector.open(); ServerSocketChannel listener = ServerSocketChannel.open()) {
            listener.bind(new InetSocketAddress(9001)).configureBlocking(false).register(selector, SelectionKey.OP_ACCEPT);
            ByteBuffer buffer = ByteBuffer.allocateDirect(64 * 1024);
            while (true) {
                selector.select();
                for (SelectionKey key : selector.selectedKeys()) {
                    if (key.isAcceptable()) {
                        listener.accept().configureBlocking(false).register(selector, SelectionKey.OP_READ);
                        continue;
                    }
                    SocketChannel channel = (SocketChannel) key.channel();
                    buffer.clear();
                    if (channel.read(buffer) < 0) {
                        channel.shutdownOutput();
                        channel.close();
                        continue;
                    }
                    buffer.flip();
                    // Lines are short, and asked one at a time.
                    while (buffer.hasRemaining()) channel.write(buffer);
                }
                selector.selectedKeys().clear();
            }
        } catch (IOException problem) {
            problem.printStackTrace();
            System.exit(1);
        }
    }

    // Exchanges lines in turns, lets time limits pass between them, and ends one way and then the other.
    static void lines(String host, int port, boolean limited) throws Exception {
        try (Socket socket = new Socket(host, port)) {
            socket.setTcpNoDelay(true);
            InputStream input = socket.getInputStream();
            for (int i = 0; i < 2000; i++) {
                byte[] want = new byte[100 + i % 900];
                Arrays.fill(want, (byte) ('a' + i % 26));
                if (limited) socket.setSoTimeout(5000);
                socket.getOutputStream().write(want);
                byte[] got = input.readNBytes(want.length);
                if (got.length < want.length) throw new EOFException("in line " + i);
                if (!Arrays.equals(got, want)) throw new IOException("wrong at " + i);
                if (limited && i % 500 == 499) {
                    socket.setSoTimeout(20);
                    try {
                        throw new IOException("no timeout: " + input.read());
                    } catch (SocketTimeoutException wanted) {
                        // Nothing was to come.
                    }
                }
            }
            socket.setSoTimeout(5000);
            socket.shutdownOutput();
            if (input.read() != -1) throw new IOException("no end");
        }
    }

    // Asks on one connection that is kept.
    static void requests(String to) throws Exception {
        HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        for (int i = 0; i < 1000; i++) {
            byte[] want = new byte[i % 5000];
            Arrays.fill(want, (byte) ('a' + i % 26));
            HttpRequest request = HttpRequest.newBuilder(URI.create(to)).timeout(Duration.ofSeconds(5))
                .POST(HttpRequest.BodyPublishers.ofByteArray(want)).build();
            HttpResponse<byte[]> response = client.send(request, HttpResponse.BodyHandlers.ofByteArray());
            if (response.statusCode() != 200 || !Arrays.equals(response.body(), want)) throw new IOException("request " + i);
        }
    }
}
