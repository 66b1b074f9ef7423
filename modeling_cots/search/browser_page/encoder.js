// The two encoders, in a worker of their own so that the page stays awake: texts and images to unit-length embeddings.

import { getFile, importFile, moduleUrl } from "./files.js";
import { pixelValues } from "./images.js";

let demo, device, dtype, ort, tokenizer;
const sessions = {};

const requests = {
  // Load the runtime and one encoder, "text" or "image".
  async load({ encoder }, onBytes) {
    ort ??= await loadRuntime(onBytes);
    const model = await getFile(demo.files[demo.encoders[encoder][dtype]], onBytes);
    if (encoder === "text") tokenizer ??= await loadTokenizer(onBytes);
    const executionProviders = device === "webgpu" ? ["webgpu", "wasm"] : ["wasm"];
    try {
      sessions[encoder] = await ort.InferenceSession.create(model, { executionProviders, logSeverityLevel: 3 });
    } catch (error) {
      throw new Error(`The ${encoder} encoder cannot be started: ${error.message}`);
    }
  },

  async texts({ texts }) {
    const embeds = [];
    for (const text of texts) { // one at a time: without padding, as if alone
      const ids = BigInt64Array.from(tokenIds(text), BigInt);
      const shape = [1, ids.length];
      embeds.push(await run("text", {
        input_ids: new ort.Tensor("int64", ids, shape),
        attention_mask: new ort.Tensor("int64", ids.map(() => 1n), shape),
      }));
    }
    return embeds;
  },

  async image({ file }) {
    const { height, width } = demo.image;
    const pixels = await pixelValues(file, demo.image);
    return run("image", { pixel_values: new ort.Tensor("float32", pixels, [1, 3, height, width]) });
  },
};

async function run(encoder, inputs) {
  const outputs = await sessions[encoder].run(inputs);
  return Float32Array.from(outputs[`${encoder}_embeds`].data);
}

async function loadRuntime(onBytes) {
  const files = demo.runtime[device];
  const module = await importFile(demo.files[files.module], onBytes);
  const glue = await getFile(demo.files[files.glue], onBytes);
  const { wasm } = module.env;
  wasm.wasmBinary = await getFile(demo.files[files.wasm], onBytes);
  wasm.wasmPaths = { mjs: moduleUrl(glue) };
  // Threads need shared memory, which a page has only where its server, or its service worker, isolates it.
  wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  return module;
}

async function loadTokenizer(onBytes) {
  const { Tokenizer } = await importFile(demo.files[demo.runtime.tokenizer], onBytes);
  const [rules, settings] = await Promise.all(
    [demo.tokenizer.rules, demo.tokenizer.settings].map((name) => getFile(demo.files[name], onBytes)),
  );
  const read = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
  return new Tokenizer(read(rules), read(settings));
}

// Token ids, cut as the tokenizer of transformers cuts: what it puts behind a text, such as [SEP], stays.
function tokenIds(text) {
  const { ids } = tokenizer.encode(text);
  const { maxLength } = demo.tokenizer;
  if (ids.length <= maxLength) return ids;
  const empty = tokenizer.encode("").ids;
  let before = 0;
  while (before < empty.length && empty[before] === ids[before]) before++;
  const after = empty.slice(before);
  return [...ids.slice(0, maxLength - after.length), ...after];
}

// Messages are {id, name, ...}; answers {id, result} or {id, error}, and {id, bytes} while files come in.
let turn = Promise.resolve(); // one at a time, as a session runs one at a time
self.onmessage = ({ data }) => {
  if (data.demo !== undefined) {
    ({ demo, device, dtype } = data);
    return;
  }
  turn = turn.then(async () => {
    try {
      const result = await requests[data.name](data, (bytes) => self.postMessage({ id: data.id, bytes }));
      self.postMessage({ id: data.id, result });
    } catch (error) {
      self.postMessage({ id: data.id, error: error.message });
    }
  });
};
