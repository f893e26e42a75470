// For `node --require`: has the pubsub library of kachery-daemon 1.2 connect to the hub that KACHERY_BANDS_URL names,
// instead of to its provider. See older-daemons.md.
'use strict';

const Module = require('node:module');

const hub = new URL(process.env.KACHERY_BANDS_URL);
const tls = hub.protocol === 'https:';
const place = {
  realtimeHost: hub.hostname,
  tls,
  ...(tls ? { tlsPort: Number(hub.port || 443) } : { port: Number(hub.port || 80) }),
  // Neither another host nor the provider's test page is asked when the hub does not answer.
  fallbackHosts: [],
};

const placed = (options) => ({ ...options, ...place });

const placing = (Realtime) =>
  new Proxy(Realtime, {
    construct: (target, [options], own) => Reflect.construct(target, [placed(options)], own),
    apply: (target, self, [options]) => Reflect.apply(target, self, [placed(options)]),
    get: (target, name) => (name === 'Promise' ? placing(target.Promise) : target[name]),
  });

const load = Module._load;
const done = new WeakSet();

Module._load = function (request, ...more) {
  const found = load.call(this, request, ...more);
  if (request === 'ably' && !done.has(found)) {
    found.Realtime = placing(found.Realtime);
    done.add(found);
  }
  return found;
};
