//! Chromium: many processes, one of which does all networking, with and without its own sandbox.

use anyhow::{Result, ensure};
use netkernel_testkit::{Ctx, Scenario};

use super::{TERM, http_server, says};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("chromium/page", &["chromium", "python3"], |ctx| page(ctx, false)).limit(120),
    Scenario::new("chromium/sandboxed", &["chromium", "python3", "setpriv"], |ctx| page(ctx, true))
        .limit(120),
];

/// A page whose script asks for more, and writes down what came.
const PAGE: &str = "<html><body><p id=out>nothing</p><img id=i><script>
(async () => {
  const answers = await Promise.all([...Array(12).keys()].map(n => fetch('/part.txt?' + n).then(a => a.text())));
  const big = new Uint8Array(await (await fetch('/file.bin')).arrayBuffer());
  const sum = Array.from(new Uint8Array(big.slice(-4))).join(',');
  let refused = 'no';
  try { await fetch('http://127.0.0.1:1/'); } catch (e) { refused = 'yes'; }
  document.getElementById('out').textContent =
    `parts ${answers.filter(a => a === 'part\\n').length} bytes ${big.length} end ${sum} refused ${refused}`;
})();
</script></body></html>";

fn page(ctx: &mut Ctx, sandboxed: bool) -> Result<()> {
    ctx.write("www/page.html", PAGE)?;
    ctx.write("www/part.txt", "part\n")?;
    let file = ctx.noise("www/file.bin", 2 << 20)?;
    let (server, port) = http_server(ctx, &ctx.path("www"))?;
    let profile = ctx.path("profile");
    std::fs::create_dir(&profile)?;
    let mut browser = ctx.client("chromium")?;
    if sandboxed && is_root() {
        // Root's browser has no sandbox.
        std::os::unix::fs::chown(&profile, Some(NOBODY), Some(NOBODY))?;
        browser = browser.through(&[
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--no-new-privs",
        ]);
    }
    if !sandboxed {
        browser = browser.arg("--no-sandbox");
    }
    let browser = browser
        .line("--headless --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions")
        .line("--disable-background-networking --disable-component-update --disable-sync --disable-breakpad")
        .line("--no-proxy-server --virtual-time-budget=20000 --dump-dom")
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("http://127.0.0.1:{port}/page.html"))
        .env("HOME", &profile);
    let said = browser.run()?;
    let bytes = std::fs::read(&file)?;
    let end: Vec<String> = bytes[bytes.len() - 4..].iter().map(u8::to_string).collect();
    let expected = format!("parts 12 bytes {} end {} refused yes", bytes.len(), end.join(","));
    says(&said, &expected)?;
    ensure!(!said.text().contains("nothing"), "the page was not finished");
    server.stop(TERM, &[0])
}

const NOBODY: u32 = 65534;

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}
