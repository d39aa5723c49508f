// Everything that the page does: load model and tokenizer, embed the sentences, answer queries, say what it took.

import * as ort from "./vendor/ort.wasm.min.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";

const BATCH = 16;
const SHOWN = 5;
const MOST_TOKENS = 128;
const element = (id) => document.getElementById(id);

ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

function say(text, share) {
  element("status").textContent = text;
  element("progress").hidden = share === undefined;
  element("progress").value = share ?? 0;
}

function fact(name, value) {
  const box = document.createElement("div");
  box.append(document.createElement("dt"), document.createElement("dd"));
  box.children[0].textContent = name;
  box.children[1].textContent = value;
  element("facts").append(box);
}

async function fetched(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

/** Unit vectors of some texts, one Float32Array each. */
async function embed({ session, tokenizer }, texts) {
  const rows = texts.map((text) => tokenizer.encode(text).ids.slice(0, MOST_TOKENS));
  const length = Math.max(...rows.map((row) => row.length));
  const ids = new BigInt64Array(rows.length * length);
  const mask = new BigInt64Array(rows.length * length);
  rows.forEach((row, index) =>
    row.forEach((id, place) => {
      ids[index * length + place] = BigInt(id);
      mask[index * length + place] = 1n;
    }),
  );
  const shape = [rows.length, length];
  const found = await session.run({
    input_ids: new ort.Tensor("int64", ids, shape),
    attention_mask: new ort.Tensor("int64", mask, shape),
  });
  const { data, dims } = found[session.outputNames[0]];
  return rows.map((_, index) => data.slice(index * dims[1], (index + 1) * dims[1]));
}

function median(numbers) {
  return [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)];
}

async function load() {
  say("Loading the model…", 0);
  const begin = performance.now();
  const model = new Uint8Array(await (await fetched("model.onnx")).arrayBuffer());
  const read = async (name) => (await fetched(name)).json();
  const tokenizer = new Tokenizer(await read("tokenizer.json"), await read("tokenizer_config.json"));
  const sentences = await read("sentences.json");
  const opening = performance.now();
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  const opened = performance.now();
  fact("model file", `${(model.length / 1e6).toFixed(1)} MB`);
  fact("fetched in", `${((opening - begin) / 1e3).toFixed(1)} s`);
  fact("opened in", `${((opened - opening) / 1e3).toFixed(1)} s`);
  return { session, tokenizer, sentences };
}

async function index(engine) {
  // By length, so that a batch holds little padding.
  const order = engine.sentences.map((_, place) => place);
  order.sort((a, b) => engine.sentences[a].text.length - engine.sentences[b].text.length);
  const vectors = new Array(order.length);
  const start = performance.now();
  for (let at = 0; at < order.length; at += BATCH) {
    say(`Embedding sentence ${at + 1} of ${order.length}…`, at / order.length);
    const places = order.slice(at, at + BATCH);
    const found = await embed(engine, places.map((place) => engine.sentences[place].text));
    places.forEach((place, row) => (vectors[place] = found[row]));
    await new Promise((done) => setTimeout(done)); // let the page be drawn
  }
  const each = (performance.now() - start) / order.length;
  fact("sentences", String(order.length));
  fact("a sentence takes", `${each.toFixed(1)} ms`);
  return vectors;
}

async function answer(engine, vectors, query) {
  const start = performance.now();
  const [wanted] = await embed(engine, [query]);
  const scores = vectors.map((vector) => vector.reduce((sum, value, place) => sum + value * wanted[place], 0));
  const best = scores.map((_, place) => place).sort((a, b) => scores[b] - scores[a]).slice(0, SHOWN);
  const took = performance.now() - start;
  element("results").replaceChildren(
    ...best.map((place) => {
      const item = document.createElement("li");
      item.style.setProperty("--score", Math.max(scores[place], 0));
      for (const [tag, text, kind] of [
        ["code", engine.sentences[place].name, "name"],
        ["span", engine.sentences[place].text, "text"],
        ["span", scores[place].toFixed(2), "score"],
      ]) {
        const part = document.createElement(tag);
        part.className = kind;
        part.textContent = text;
        item.append(part);
      }
      return item;
    }),
  );
  return took;
}

async function main() {
  const engine = await load();
  const vectors = await index(engine);
  const times = [];
  for (let turn = 0; turn < 6; turn++) times.push(await answer(engine, vectors, element("query").value));
  fact("a query takes", `${median(times.slice(1)).toFixed(0)} ms`); // the first warms up
  const search = async () => {
    const query = element("query").value.trim();
    if (!query) return say("Type what you are looking for.");
    const took = await answer(engine, vectors, query);
    say(`${vectors.length} sentences searched in ${took.toFixed(0)} ms.`);
  };
  element("search").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  for (const example of document.querySelectorAll(".examples button")) {
    example.addEventListener("click", () => {
      element("query").value = example.textContent;
      search();
    });
  }
  for (const control of document.querySelectorAll("input, button")) control.disabled = false;
  say(`Ready: ${vectors.length} sentences searched in ${times.at(-1).toFixed(0)} ms.`);
  document.body.dataset.ready = "true";
}

main().catch((error) => {
  say(`This did not work: ${error.message}`);
  document.body.dataset.ready = "failed";
});
