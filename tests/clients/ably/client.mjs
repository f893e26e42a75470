// Drives the provider's library: commands come as lines of JSON on standard input, answers and events go out as lines
// on standard output. The library asks for its token through an event, and gets it with the command `token`.
//
//   node client.mjs <directory with node_modules> '{"package": ..., "port": ..., "binary": ..., "options": {...}}'

import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const given = JSON.parse(process.argv[3]);
const Ably = createRequire(`${process.argv[2]}/package.json`)(given.package);

const say = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
const reason = (error) => error && { code: error.code, statusCode: error.statusCode, message: error.message };

const waiting = [];
const realtime = new Ably.Realtime.Promise({
  ...(given.port && { realtimeHost: '127.0.0.1', port: given.port, tls: false }),
  useBinaryProtocol: given.binary,
  ...(given.package === 'ably' ? { logLevel: 0 } : { log: { level: 0 } }),
  authCallback: (_params, callback) => {
    waiting.push(callback);
    say({ event: 'token wanted' });
  },
  ...given.options,
});
realtime.connection.on((change) =>
  say({ event: 'connection', state: change.current, reason: reason(change.reason), id: realtime.connection.id }),
);

const watched = new Set();
const channel = (name) => {
  const found = realtime.channels.get(name);
  if (!watched.has(name)) {
    watched.add(name);
    found.on((change) => say({ event: 'channel', channel: name, state: change.current, reason: reason(change.reason) }));
  }
  return found;
};

const commands = {
  token: async ({ details, error }) => waiting.shift()(error ?? null, details),
  subscribe: async ({ channel: name }) => {
    await channel(name).subscribe(({ data, id }) =>
      say({ event: 'message', channel: name, id, binary: Buffer.isBuffer(data), text: data.toString() }),
    );
    return channel(name).modes;
  },
  publish: async ({ channel: name, text }) => channel(name).publish({ data: Buffer.from(text) }),
  publishObject: async ({ channel: name, data }) => channel(name).publish('event', data),
  detach: async ({ channel: name }) => channel(name).detach(),
  enter: async ({ channel: name }) => channel(name).presence.enterClient('somebody', 'x'),
  ping: async () => realtime.connection.ping(),
  state: async () => realtime.connection.state,
  place: async () => {
    const { realtimeHost, port, tls } = realtime.options;
    return { realtimeHost, port, tls };
  },
  authorize: async () => (await realtime.auth.authorize()).token,
  close: async () => {
    realtime.close();
    if (realtime.connection.state !== 'closed') await realtime.connection.once('closed');
  },
};

createInterface({ input: process.stdin })
  .on('line', async (line) => {
    const command = JSON.parse(line);
    try {
      say({ answer: command.number, value: (await commands[command.do](command)) ?? null });
    } catch (error) {
      say({ answer: command.number, error: reason(error) });
    }
  })
  .on('close', () => process.exit(0));
