// The page's large files: fetched once, checked, and kept by the browser under their checksum.

const CACHE = `cots-demo ${new URL("./", self.location).pathname}`;

function keyOf(entry) {
  return new URL(`./kept/${entry.sha256}`, self.location).href;
}

async function openCache() {
  try {
    return await caches.open(CACHE); // not there on insecure addresses, nor where the user forbids storage
  } catch {
    return null;
  }
}

// Whether the browser has all of these files already.
export async function areKept(entries) {
  const cache = await openCache();
  if (cache === null) return false;
  const found = await Promise.all(entries.map((entry) => cache.match(keyOf(entry))));
  return found.every((response) => response !== undefined);
}

// Forget files of earlier versions of the page.
export async function forgetOthers(entries) {
  const cache = await openCache();
  if (cache === null) return;
  const wanted = new Set(entries.map(keyOf));
  for (const request of await cache.keys()) if (!wanted.has(request.url)) await cache.delete(request);
}

// The bytes of a file, from the browser or from its server; `onBytes` is told how many have come since it was last told.
export async function getFile(entry, onBytes = () => {}) {
  const cache = await openCache();
  const kept = await cache?.match(keyOf(entry));
  if (kept !== undefined) {
    const bytes = new Uint8Array(await kept.arrayBuffer());
    if (await isIntact(bytes, entry)) {
      onBytes(bytes.length);
      return bytes;
    }
    await cache.delete(keyOf(entry));
  }
  const bytes = await download(entry, onBytes);
  if (!(await isIntact(bytes, entry))) {
    throw new Error(`${entry.url} is damaged: it is not the file that this page was made with. Load the page again.`);
  }
  try {
    await cache?.put(keyOf(entry), new Response(bytes));
  } catch {
    // No room: the file is fetched again next time.
  }
  return bytes;
}

async function download(entry, onBytes) {
  let response;
  try {
    response = await fetch(entry.url, { cache: "no-cache" });
  } catch {
    throw new Error(`${entry.url} cannot be fetched. Check the connection, then load the page again.`);
  }
  if (!response.ok) throw new Error(`${entry.url} is missing on the server (${response.status}).`);
  const parts = [];
  const reader = response.body.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      parts.push(part.value);
      onBytes(part.value.length);
    }
  } catch {
    throw new Error(`The download of ${entry.url} broke off. Load the page again.`);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function isIntact(bytes, entry) {
  if (bytes.length !== entry.bytes) return false;
  if (crypto.subtle === undefined) return true; // an insecure address; the length has to do
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === entry.sha256;
}

// A module out of a file that was checked before any of it runs.
export async function importFile(entry, onBytes) {
  return import(moduleUrl(await getFile(entry, onBytes)));
}

export function moduleUrl(bytes) {
  return URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
}
