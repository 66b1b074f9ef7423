// The service worker: keeps the page itself for when there is no network, and isolates it, so that WASM may use threads.
// The large files are kept by files.js.

const SHELL = ["./", "index.html", "style.css", "app.js", "encoder.js", "files.js", "images.js", "demo.json"];
const CACHE = `cots-demo-shell ${new URL("./", self.location).pathname}`;

self.addEventListener("install", (event) => {
  const fresh = SHELL.map((name) => new Request(name, { cache: "reload" }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(fresh)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  const isShell = SHELL.some((name) => new URL(name, self.location).pathname === url.pathname);
  if (event.request.method === "GET" && url.origin === self.location.origin && isShell) {
    event.respondWith(newest(event.request));
  }
});

// From the server where it answers, or else as it was last time.
async function newest(request) {
  const cache = await caches.open(CACHE);
  let response;
  try {
    response = await fetch(request);
    if (response.ok) await cache.put(request.url.split(/[?#]/)[0], response.clone());
  } catch (error) {
    response = await cache.match(request, { ignoreSearch: true });
    if (response === undefined) throw error;
  }
  return isolated(response);
}

function isolated(response) {
  if (response.type === "opaque" || response.type === "opaqueredirect") return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  const { status, statusText } = response;
  return new Response(response.body, { status, statusText, headers });
}
