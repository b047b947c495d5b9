// http_client.js PORT FILE: 300 small requests over 20 kept connections, the file 4 times at once, a POST of 3 MiB.
const http = require('http'), fs = require('fs'), crypto = require('crypto'), assert = require('assert');
const [port, file] = process.argv.slice(2);
const agent = new http.Agent({ keepAlive: true, maxSockets: 20 });
function ask(method, path, body) {
  return new Promise((resolve, reject) => {
    const request = http.request({ host: '127.0.0.1', port, path, method, agent, timeout: 20000 }, response => {
      const pieces = [];
      response.on('data', piece => pieces.push(piece));
      response.on('end', () => resolve([response.statusCode, Buffer.concat(pieces)]));
      response.on('error', reject);
    });
    request.on('error', reject);
    request.on('timeout', () => request.destroy(new Error('timeout')));
    request.end(body);
  });
}
async function main() {
  const names = Array.from({ length: 300 }, (_, i) => '/name' + i);
  const answers = await Promise.all(names.map(name => ask('GET', name)));
  answers.forEach(([code, body], i) => {
    assert.strictEqual(code, 200);
    assert.strictEqual(body.toString(), 'hello ' + names[i]);
  });
  const content = fs.readFileSync(file);
  for (const [code, body] of await Promise.all([1, 2, 3, 4].map(() => ask('GET', '/file')))) {
    assert.strictEqual(code, 200);
    assert(body.equals(content), `${body.length} of ${content.length} bytes`);
  }
  const big = crypto.randomBytes(3 << 20);
  const [, digest] = await ask('POST', '/', big);
  assert.strictEqual(digest.toString(), crypto.createHash('sha256').update(big).digest('hex'));
  agent.destroy();
  console.log('ok');
}
main().catch(error => { console.error(error); process.exit(1); });
