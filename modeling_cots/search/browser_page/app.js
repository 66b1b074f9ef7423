// The page: loads the collection and the encoders, ranks by dot products, shows what was found.

import { areKept, forgetOthers, getFile } from "./files.js";

const TOP = 12;
const ASK_FROM_BYTES = 100e6; // larger downloads wait for a click
const at = (id) => document.getElementById(id);

let demo, collection;
let device; // "webgpu" or "wasm"
let dtype; // what the encoders compute in there

// ---------------------------------------------------------------------------------------------------- the two encoders

const worker = new Worker("encoder.js", { type: "module" });
const waiting = new Map();
let lastId = 0;

worker.onmessage = ({ data: { id, result, error, bytes } }) => {
  const { resolve, reject, onBytes } = waiting.get(id);
  if (bytes !== undefined) return onBytes(bytes);
  waiting.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
};
worker.onerror = () => {
  const error = new Error("A file of this page, encoder.js or one that it needs, is missing or damaged.");
  for (const { reject } of waiting.values()) reject(error);
  tellOfLoading(error);
};

function ask(name, request, onBytes = () => {}) {
  const id = ++lastId;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject, onBytes });
    worker.postMessage({ id, name, ...request });
  });
}

// A GPU where there is one, in half precision if it has that; or else the CPU.
async function chooseDevice() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  device = adapter ? "webgpu" : "wasm";
  if (adapter) dtype = adapter.features.has("shader-f16") ? "float16" : "float32";
  else dtype = demo.dtype;
}

// ------------------------------------------------------------------------------------------------------------- loading

function filesOf(part) {
  if (part === "collection") return [demo.collection.embeddings, demo.collection.thumbnails, demo.collection.entries];
  const model = demo.encoders[part][dtype];
  if (part === "image") return [model];
  const { module, glue, wasm } = demo.runtime[device];
  return [model, module, glue, wasm, demo.runtime.tokenizer, demo.tokenizer.rules, demo.tokenizer.settings];
}

const PARTS = { collection: "the images", text: "the text encoder", image: "the image encoder" };
const sizeOf = (names) => names.reduce((sum, name) => sum + demo.files[name].bytes, 0);
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

async function start() {
  demo = await readDemo();
  await chooseDevice();
  worker.postMessage({ demo, device, dtype });
  showExamples();
  at("labels").value = demo.labels.join("\n");
  const names = Object.keys(PARTS).flatMap(filesOf);
  const entries = names.map((name) => demo.files[name]);
  const total = sizeOf(names);
  forgetOthers(entries);
  if (total >= ASK_FROM_BYTES && !(await areKept(entries))) await askToDownload(total);
  await loadAll(total);
}

async function readDemo() {
  let response;
  try {
    response = await fetch("demo.json", { cache: "no-cache" });
  } catch {
    throw new Error("demo.json cannot be fetched. Check the connection, then load the page again.");
  }
  if (!response.ok) throw new Error(`demo.json, which lists this page's files, is missing (${response.status}).`);
  try {
    return await response.json();
  } catch {
    throw new Error("demo.json, which lists this page's files, is damaged. Export the demo again.");
  }
}

function askToDownload(total) {
  at("status").textContent = "The encoders are downloaded once, and kept by your browser.";
  at("start").textContent = `Download ${megabytes(total)} MB and start`;
  at("start").hidden = false;
  return new Promise((resolve) => {
    at("start").onclick = () => {
      at("start").hidden = true;
      resolve();
    };
  });
}

const ready = {}; // a promise for each part
let resolveLoading;
const loading = new Promise((resolve) => { resolveLoading = resolve; });

async function loadAll(total) {
  let done = 0;
  at("progress").hidden = false;
  const report = (part) => (bytes) => {
    done += bytes;
    if (loadingHasFailed) return; // other files may still be coming in
    at("progress").value = done / total;
    at("status").textContent = `Loading ${PARTS[part]}: ${megabytes(done)} of ${megabytes(total)} MB, once; your browser keeps it.`;
  };
  ready.collection = loadCollection(report("collection"));
  ready.text = ready.collection.then(() => ask("load", { encoder: "text" }, report("text")));
  ready.image = ready.text.then(() => ask("load", { encoder: "image" }, report("image")));
  resolveLoading();
  for (const part of Object.values(ready)) part.catch(() => {}); // told below, once
  await ready.image;
  at("progress").hidden = true;
  at("status").textContent = `Ready: ${collection.entries.length.toLocaleString("en")} images, ${megabytes(total)} MB loaded and kept by your browser. Works offline from now on.`;
  const where = device === "webgpu" ? "the graphics card (WebGPU" : "the CPU (WebAssembly";
  at("runtime").textContent = `Computed in this browser on ${where}, ${dtype}), by ${demo.runtime.name}.`;
  document.body.dataset.ready = device;
}

async function loadCollection(onBytes) {
  const [embeddings, thumbnails, text] = await Promise.all(
    filesOf("collection").map((name) => getFile(demo.files[name], onBytes)),
  );
  const entries = JSON.parse(new TextDecoder().decode(text));
  const { dim } = demo.collection, count = entries.length;
  const scales = new Float32Array(embeddings.buffer, 0, count);
  const coarse = new Int8Array(embeddings.buffer, 4 * count, count * dim);
  const fine = new Int8Array(embeddings.buffer, 4 * count + count * dim, count * dim);
  collection = { entries, thumbnails, scales, coarse, fine, dim };
}

// -------------------------------------------------------------------------------------------------------------- ranking

// An embedding is scale * (coarse + fine / 254): int8, and what int8 rounded away, in int8 again.
function scoresOf(query) {
  const { scales, coarse, fine, dim } = collection;
  return scales.map((scale, row) => {
    let large = 0, small = 0;
    for (let i = 0, place = row * dim; i < dim; i++, place++) {
      large += coarse[place] * query[i];
      small += fine[place] * query[i];
    }
    return scale * (large + small / 254);
  });
}

function best(scores) {
  const order = Array.from(scores.keys());
  return order.sort((a, b) => scores[b] - scores[a] || a - b).slice(0, TOP).map((row) => ({ row, score: scores[row] }));
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

// -------------------------------------------------------------------------------------------------------------- showing

function tell(error) {
  at("error").textContent = error.message;
}

let loadingHasFailed = false;
function tellOfLoading(error) {
  loadingHasFailed = true;
  tell(error);
  at("progress").hidden = true;
  at("status").textContent = "Not everything could be loaded.";
}

function showImages(list, hits) {
  for (const image of list.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  list.replaceChildren(...hits.map(({ row, score }, place) => {
    const { name, caption, start, end } = collection.entries[row];
    const image = document.createElement("img");
    image.src = URL.createObjectURL(new Blob([collection.thumbnails.subarray(start, end)], { type: "image/jpeg" }));
    image.alt = caption || name;
    const rank = Object.assign(document.createElement("b"), { textContent: `${place + 1}. ${score.toFixed(3)} ` });
    const title = Object.assign(document.createElement("span"), { textContent: caption || name });
    const figcaption = document.createElement("figcaption");
    figcaption.append(rank, title);
    const figure = document.createElement("figure");
    figure.append(image, figcaption);
    const item = document.createElement("li");
    item.dataset.row = row;
    item.append(figure);
    return item;
  }));
}

function showExamples() {
  at("examples").replaceChildren(...demo.examples.map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.onclick = () => {
      at("query").value = text;
      at("search").requestSubmit();
    };
    return button;
  }));
}

// Run the newest action of a kind: an older one that is still computing shows nothing any more.
const newest = {};
async function act(kind, note, action) {
  const mine = newest[kind] = Symbol(kind);
  at("error").textContent = "";
  note.textContent = document.body.dataset.ready ? "Computing …" : "This runs as soon as the encoders are loaded.";
  try {
    const text = await action(() => newest[kind] === mine);
    if (newest[kind] === mine) note.textContent = text;
  } catch (error) {
    if (newest[kind] !== mine) return;
    note.textContent = "";
    tell(error);
  }
}

function search(text) {
  act("search", at("found-note"), async (isNewest) => {
    await loading;
    await ready.text;
    const [embed] = await ask("texts", { texts: [text] });
    const hits = best(scoresOf(embed));
    if (isNewest()) showImages(at("found"), hits);
    return `The best ${hits.length} of ${collection.entries.length.toLocaleString("en")} images for “${text}”, with their cosine.`;
  });
}

let broughtEmbed = null;

function bring(file) {
  broughtEmbed = null;
  showBrought(file);
  act("image", at("nearest-note"), async (isNewest) => {
    await loading;
    await ready.image;
    const embed = await ask("image", { file });
    if (!isNewest()) return "";
    broughtEmbed = embed;
    const hits = best(scoresOf(embed));
    showImages(at("nearest"), hits);
    await rankLabels();
    return `The nearest ${hits.length} of ${collection.entries.length.toLocaleString("en")} images, with their cosine.`;
  });
}

function showBrought(file) {
  const image = at("brought");
  URL.revokeObjectURL(image.src);
  image.hidden = true;
  image.onload = () => { image.hidden = false; };
  image.src = URL.createObjectURL(file);
  at("drop-text").textContent = file.name || "Pasted image";
  at("nearest").replaceChildren();
  at("scores").replaceChildren();
}

// The labels of the text field, by their probability among each other.
async function rankLabels() {
  const labels = [...new Set(at("labels").value.split("\n").map((label) => label.trim()).filter(Boolean))];
  const image = broughtEmbed;
  const embeds = await ask("texts", { texts: labels });
  if (image !== broughtEmbed) return;
  const logits = embeds.map((embed) => dot(embed, image) / demo.temperature);
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  const ranked = labels.map((label, i) => ({ label, share: powers[i] / sum })).sort((a, b) => b.share - a.share);
  at("scores").replaceChildren(...ranked.map(({ label, share }) => {
    const percent = `${(100 * share).toFixed(1)} %`;
    const name = Object.assign(document.createElement("span"), { textContent: label });
    const value = Object.assign(document.createElement("b"), { textContent: percent });
    const meter = Object.assign(document.createElement("meter"), { max: 1, value: share });
    meter.setAttribute("aria-label", `${label}: ${percent}`);
    const item = document.createElement("li");
    item.append(name, value, meter);
    return item;
  }));
}

// --------------------------------------------------------------------------------------------------------------- events

at("search").onsubmit = (event) => {
  event.preventDefault();
  const text = at("query").value;
  if (text.trim()) search(text);
  else at("found-note").textContent = "Type what the images should show.";
};
at("file").onchange = ({ target }) => {
  if (target.files.length > 0) bring(target.files[0]);
  target.value = ""; // the same file can be chosen again
};
at("labels").onchange = () => {
  if (broughtEmbed !== null) rankLabels().catch(tell);
};

const drop = at("drop");
for (const [name, isOver] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", isOver);
    if (name === "drop" && event.dataTransfer.files.length > 0) bring(event.dataTransfer.files[0]);
  });
}
addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file !== undefined) bring(file);
});

if (navigator.serviceWorker !== undefined) {
  navigator.serviceWorker.register("sw.js").catch(() => {}); // without it the page is not there offline
}
start().catch(tellOfLoading);
