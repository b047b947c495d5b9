// cluster_client.js PORT: 200 connections, 20 at once; both workers must have answered.
const http = require('http');
const port = +process.argv[2];
const seen = new Map();
function ask() {
  return new Promise((resolve, reject) => {
    http.get({ host: '127.0.0.1', port, agent: false, timeout: 20000 }, response => {
      let text = '';
      response.on('data', piece => { text += piece; });
      response.on('end', () => { seen.set(text, (seen.get(text) || 0) + 1); resolve(); });
    }).on('error', reject);
  });
}
async function main() {
  let started = 0;
  await Promise.all(Array.from({ length: 20 }, async () => { while (started++ < 200) await ask(); }));
  const total = [...seen.values()].reduce((a, b) => a + b, 0);
  if (total !== 200 || seen.size !== 2) throw new Error(`${total} answers from ${seen.size} workers`);
  console.log('ok');
}
main().catch(error => { console.error(error); process.exit(1); });
