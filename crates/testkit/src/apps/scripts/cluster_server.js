// cluster_server.js PORT [none]: two workers on one port; `none`: they share the listener, else the primary deals out.
const cluster = require('cluster'), http = require('http');
if (process.argv[3] === 'none') cluster.schedulingPolicy = cluster.SCHED_NONE;
if (cluster.isPrimary) {
  let up = 0, stopping = false;
  cluster.fork();
  cluster.fork();
  cluster.on('listening', () => { if (++up === 2) console.log('ready'); });
  cluster.on('exit', (worker, code, signal) => {
    if (!stopping) { console.error('worker died', code, signal); process.exit(1); }
  });
  process.on('SIGTERM', () => {
    stopping = true;
    cluster.disconnect(() => process.exit(0));
  });
} else {
  http.createServer((request, response) => {
    // Not yet: the other worker shall get the next connection.
    setTimeout(() => response.end(`${process.pid}`), 2);
  }).listen(+process.argv[2], '127.0.0.1');
  process.on('SIGTERM', () => {});
}
