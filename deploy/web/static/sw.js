// Keeps the page's files, so that it opens without a network. VERSION and FILES stand above, written with the page.

const BIG = /asyncify/; // WebGPU's runtime is kept once it was needed

self.addEventListener("install", (event) => {
  self.skipWaiting();
  // "reload": a former page's files, which the browser may still hold, are not taken for these.
  const files = FILES.filter((file) => !BIG.test(file)).map((file) => new Request(file, { cache: "reload" }));
  event.waitUntil(caches.open(VERSION).then((cache) => cache.addAll(files)));
});

self.addEventListener("activate", (event) => {
  const old = async () => {
    for (const name of await caches.keys()) {
      if (name.startsWith(PREFIX) && name !== VERSION) await caches.delete(name);
    }
    await self.clients.claim();
  };
  event.waitUntil(old());
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || new URL(request.url).origin !== self.location.origin) return;
  const answer = async () => {
    const cache = await caches.open(VERSION);
    const kept = await cache.match(request, { ignoreSearch: true });
    if (kept) return kept;
    const found = await fetch(request);
    const path = new URL(request.url).pathname;
    if (found.ok && FILES.some((file) => path.endsWith(`/${file}`))) await cache.put(request, found.clone());
    return found;
  };
  event.respondWith(answer());
});
