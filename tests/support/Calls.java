import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.security.MessageDigest;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.concurrent.CompletableFuture;

/** Makes calls with java.net.http and prints what came of each, a line a call: `Calls BASE HTTP_1_1|HTTP_2`. */
public class Calls {
    // Method, path, bytes of the body; -1: a body whose length the client does not tell, so it is chunked.
    private static final Object[][] CALLS = {
        {"GET", "/hello?a=%20b", 0}, {"POST", "/things", 1 << 20}, {"PUT", "/things/1", 1}, {"HEAD", "/hello", 0},
        {"GET", "/bytes?n=1048576", 0}, {"GET", "/chunked?n=3", 0}, {"DELETE", "/things/1", 0}, {"POST", "/things", -1},
        {"GET", "/status?code=404", 0}, {"GET", "/status?code=204", 0}, {"GET", "/chunked?n=5000", 0},
    };

    private static HttpRequest request(String base, String method, String path, int size, boolean expect) {
        HttpRequest.BodyPublisher body = BodyPublishers.noBody();
        if (size > 0) {
            body = BodyPublishers.ofByteArray(new byte[size]);
        } else if (size < 0) {
            body = BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(new byte[300_000]));
        }
        return HttpRequest.newBuilder(URI.create(base + path)).method(method, body).expectContinue(expect)
            .timeout(Duration.ofSeconds(10)).build();
    }

    private static String told(HttpResponse<byte[]> answer) throws Exception {
        String digest = HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(answer.body()));
        String mixed = answer.headers().firstValue("x-mixed-case").orElse("-");
        String cookies = String.join(",", answer.headers().allValues("set-cookie"));
        return String.join(" ", answer.statusCode() + "", answer.version() + "", answer.body().length + "", digest, mixed, cookies);
    }

    public static void main(String[] arguments) throws Exception {
        String base = arguments[0];
        HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.valueOf(arguments[1]))
            .connectTimeout(Duration.ofSeconds(5)).build();
        for (boolean expect : new boolean[] {false, true}) {
            for (Object[] call : CALLS) {
                // Asking for leave makes sense for a body only.
                HttpRequest request = request(base, (String) call[0], (String) call[1], (int) call[2], expect && (int) call[2] != 0);
                System.out.println(call[0] + " " + call[1] + " " + told(client.send(request, BodyHandlers.ofByteArray())));
            }
        }
        // Kept connections, several at once, enough requests on each to be found worth a short cut.
        List<CompletableFuture<HttpResponse<byte[]>>> running = new ArrayList<>();
        for (int round = 0; round < 20; round++) {
            for (int number = 0; number < 8; number++) {
                HttpRequest request = request(base, "GET", "/bytes?n=" + (1 + 30_000 * number), 0, false);
                running.add(client.sendAsync(request, BodyHandlers.ofByteArray()));
            }
            CompletableFuture.allOf(running.toArray(CompletableFuture[]::new)).join();
        }
        for (CompletableFuture<HttpResponse<byte[]>> answer : running) {
            System.out.println(told(answer.join()));
        }
    }
}
