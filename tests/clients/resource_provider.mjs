// What the published resource program does, with the WebSocket library that it uses: offers the files of a directory of
// kachery-cloud in a zone, and has `kachery-cloud-store` of the PATH upload those that are asked for. Like it, it takes
// no frame that has other fields than it knows.
//
//     node resource_provider.mjs PACKAGES ADDRESS ZONE      KACHERY_* of the environment are for kachery-cloud-store
//
// Prints a line for each thing that happens.

import { execFile } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [packages, address, zone] = process.argv.slice(2);
const WebSocket = createRequire(`${packages}/`)("ws");
const directory = process.env.KACHERY_CLOUD_DIR;

function has(value, ...fields) {
  return Object.keys(value).sort().join() === fields.sort().join();
}

function pathOf(sha1) {
  const below = `sha1/${sha1.slice(0, 2)}/${sha1.slice(2, 4)}/${sha1.slice(4, 6)}/${sha1}`;
  if (existsSync(`${directory}/${below}`)) return `${directory}/${below}`;
  const link = `${directory}/linked_files/${below}`;
  return existsSync(link) ? JSON.parse(readFileSync(link, "utf8")).path : null;
}

function upload(path, milliseconds) {
  return new Promise((resolve) => {
    const waiting = setTimeout(() => resolve({ status: "running", bytesUploaded: 0 }), milliseconds);
    execFile("kachery-cloud-store", [path], (failure) => {
      clearTimeout(waiting);
      const error = failure && `Error executing kachery-cloud-store: ${failure.message}`;
      resolve(error ? { status: "error", error } : { status: "completed", timestampCompleted: Date.now() });
    });
  });
}

async function respond(message) {
  const { requestId, request } = message;
  const known =
    has(message, "type", "requestId", "resourceName", "zone", "request", "timeoutMsec") &&
    has(request, "type", "uri", "timeoutMsec") &&
    request.type === "fileUpload" &&
    /^sha1:\/\/[0-9a-f]{40}$/.test(request.uri);
  if (!known) return { type: "responseToClient", requestId, response: {}, error: "Invalid kachery resource request" };
  const path = pathOf(request.uri.slice("sha1://".length));
  const status = path === null ? { status: "not-found" } : await upload(path, request.timeoutMsec);
  console.log("asked", request.uri, status.status);
  return { type: "responseToClient", requestId, response: { type: "fileUpload", status } };
}

const socket = new WebSocket(address.replace("http:", "ws:"));
socket.on("open", () => {
  const fields = { resourceName: zone, zone, proxySecret: "typed by a person" };
  socket.send(JSON.stringify({ type: "initialize", ...fields }));
});
socket.on("message", async (data) => {
  const message = JSON.parse(data.toString());
  if (message.type === "acknowledge" && has(message, "type")) {
    setInterval(() => socket.send(JSON.stringify({ type: "ping" })), 20_000).unref();
    console.log("acknowledged");
  } else {
    socket.send(JSON.stringify(await respond(message)));
  }
});
socket.on("close", (code, reason) => console.log("closed", code, reason.toString()));
socket.on("error", (error) => console.log("error", error.message));
