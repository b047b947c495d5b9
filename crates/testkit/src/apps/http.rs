//! curl and wget.

use std::fs;

use anyhow::{Result, ensure};
use netkernel_testkit::{Ctx, Scenario, same_bytes};

use super::{TERM, http_server, says, sha256, together};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("curl/download", &["curl", "python3"], curl_download),
    Scenario::new("curl/post", &["curl", "python3"], curl_post),
    Scenario::new("wget/download", &["wget", "python3"], wget_download),
    Scenario::new("wget/post", &["wget", "python3"], wget_post),
    Scenario::new("bash/dev-tcp", &["bash", "python3"], bash_dev_tcp),
];

const MIB: usize = 1 << 20;

fn curl_download(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 10 * MIB)?;
    let (server, port) = http_server(ctx, &ctx.path("www"))?;
    for (name, host) in [("v4", "127.0.0.1"), ("v6", "[::1]"), ("name", "localhost")] {
        let out = ctx.path(name);
        let curl = ctx.client("curl")?.line("-sS --fail --max-time 20 -o").arg(&out);
        curl.arg(format!("http://{host}:{port}/file.bin")).run()?;
        ctx.same_files(&file, &out)?;
    }
    let url = format!("http://127.0.0.1:{port}/file.bin");
    // Twice over one connection, and four at once by one program.
    let again =
        ctx.client("curl")?.line("-sS --fail --max-time 20 -w %{num_connects} -o a -o b").args([&url, &url]);
    let again = again.run()?;
    ensure!(again.text() == "10", "the connection was not used again: {}", again.text());
    ctx.same_files(&file, &ctx.path("b"))?;
    let names = ["p1", "p2", "p3", "p4"];
    let mut curl = ctx.client("curl")?.line("-sS --fail --max-time 20 --parallel --parallel-immediate");
    for name in names {
        curl = curl.args(["-o", name, &url]);
    }
    curl.run()?;
    for name in names {
        ctx.same_files(&file, &ctx.path(name))?;
    }
    // A slow reader.
    let out = ctx.path("slow");
    ctx.client("curl")?.line("-sS --fail --max-time 20 --limit-rate 20M -o").arg(&out).arg(&url).run()?;
    ctx.same_files(&file, &out)?;
    let missing =
        ctx.client("curl")?.line("-sS --fail").arg(format!("http://127.0.0.1:{port}/none")).output()?;
    ensure!(missing.code == 22, "404 gave {}", missing.code);
    let closed = ctx.port()?;
    let refused = ctx.client("curl")?.arg("-sS").arg(format!("http://127.0.0.1:{closed}/")).output()?;
    ensure!(refused.code == 7, "a closed port gave {}", refused.code);
    server.stop(TERM, &[0])
}

fn curl_post(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("upload.bin", 5 * MIB)?;
    let (server, port) = http_server(ctx, &ctx.path("log"))?;
    let url = format!("http://127.0.0.1:{port}/");
    let expected = format!("{} {}\n", sha256(ctx, &file)?, 5 * MIB);
    let at = format!("@{}", file.display());
    let ways: [&[&str]; 3] = [
        &["--data-binary", &at],
        &["-T", "upload.bin"],
        &["-T", "upload.bin", "-H", "Transfer-Encoding: chunked", "-H", "Expect:"],
    ];
    for way in ways {
        let answer = ctx.client("curl")?.line("-sS --fail --max-time 20").args(way).arg(&url).run()?;
        same_bytes(answer.text().as_bytes(), expected.as_bytes())?;
    }
    server.stop(TERM, &[0])
}

fn wget_download(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("www/file.bin", 10 * MIB)?;
    ctx.write("www/page.html", "<html><a href=\"file.bin\">file</a><a href=\"other.html\">other</a></html>")?;
    ctx.write("www/other.html", "<html>other</html>")?;
    let (server, port) = http_server(ctx, &ctx.path("www"))?;
    let command = |host: &str, out: &str| -> Result<_> {
        let url = format!("http://{host}:{port}/file.bin");
        Ok(ctx.client("wget")?.line("-q --no-proxy -t 1 -T 20 -O").arg(ctx.path(out)).arg(url))
    };
    together(vec![command("127.0.0.1", "a")?, command("[::1]", "b")?])?;
    ctx.same_files(&file, &ctx.path("a"))?;
    ctx.same_files(&file, &ctx.path("b"))?;
    // A page and all that it names, over one connection.
    let url = format!("http://127.0.0.1:{port}/page.html");
    ctx.client("wget")?.line("-q --no-proxy -t 1 -T 20 -r -nH -P mirror").arg(url).run()?;
    ctx.same_files(&file, &ctx.path("mirror/file.bin"))?;
    ensure!(fs::read_to_string(ctx.path("mirror/other.html"))? == "<html>other</html>", "other.html differs");
    let none = format!("http://127.0.0.1:{port}/none");
    let missing = ctx.client("wget")?.line("-q --no-proxy -t 1 -O /dev/null").arg(none).output()?;
    ensure!(missing.code == 8, "404 gave {}", missing.code);
    server.stop(TERM, &[0])
}

fn wget_post(ctx: &mut Ctx) -> Result<()> {
    let file = ctx.noise("upload.bin", 3 * MIB)?;
    let (server, port) = http_server(ctx, &ctx.path("log"))?;
    let url = format!("http://127.0.0.1:{port}/");
    let post = format!("--post-file={}", file.display());
    let answer = ctx.client("wget")?.line("-q --no-proxy -t 1 -T 20 -O -").args([post, url]).run()?;
    says(&answer, &format!("{} {}", sha256(ctx, &file)?, 3 * MIB))?;
    server.stop(TERM, &[0])
}

/// The shell's own sockets: a redirection connects, `read` and `cat` use the descriptor.
fn bash_dev_tcp(ctx: &mut Ctx) -> Result<()> {
    ctx.write("www/hello.txt", "hello, shell\n")?;
    let (server, port) = http_server(ctx, &ctx.path("www"))?;
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{port}
         printf 'GET /hello.txt HTTP/1.0\\r\\n\\r\\n' >&3
         read -r status <&3
         echo \"$status\"
         cat <&3 | tail -n 1
         exec 3>&-"
    );
    let output = ctx.client("bash")?.arg("-c").arg(script).run()?;
    says(&output, "200 OK")?;
    says(&output, "hello, shell")?;
    server.stop(TERM, &[0])
}
