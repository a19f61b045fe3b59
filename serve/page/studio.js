// The studio: the same API that /docs describes, called from a page. No build step, no library.
//
// A query runs the page at once: ?prompt=ROMEO:&seed=7&run=text, ?n=16&seed=7&run=pictures, or run=1 for both.

const $ = (id) => document.getElementById(id);
const anySeed = () => Math.floor(Math.random() * 2 ** 31);
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
let writing = null; // the AbortController of the text under way

// ---- the API

async function answer(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `the server answered ${response.status}`);
  throw Object.assign(error, { status: response.status });
}

async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return answer(await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal }));
}

/** The messages of a server-sent event stream, parsed; its [DONE] ends them. */
async function* messages(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the stream broke off");
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const message = JSON.parse(data);
      if (message.error) throw new Error(message.error.message);
      yield message;
    }
  }
}

// ---- text

async function write(event) {
  event?.preventDefault();
  if (!$("text-form").reportValidity()) return;
  writing?.abort();
  const mine = (writing = new AbortController());
  const request = {
    prompt: $("prompt").value,
    temperature: $("temperature").valueAsNumber,
    max_tokens: Math.min($("max_tokens").valueAsNumber, room($("prompt").value)),
    top_k: $("top_k").valueAsNumber,
    seed: $("text-seed").value === "" ? anySeed() : $("text-seed").valueAsNumber,
  };
  remember({ ...request, seed: undefined, text_seed: request.seed });
  startSheet(request);
  let ended = "stop button";
  try {
    ended = await stream(request, mine.signal);
  } catch (error) {
    if (error.name !== "AbortError") {
      ended = "error";
      complain(error);
    }
  }
  if (writing === mine) endSheet(ended);
}

/** Shows a completion as it comes; returns why it ended. */
async function stream(request, signal) {
  const started = performance.now();
  const options = { stream: true, stream_options: { continuous_usage_stats: true } };
  const send = (max_tokens) => post("v1/completions", { ...request, max_tokens, ...options }, signal);
  const sure = surelyFits(request.prompt);
  const response = await send(request.max_tokens).catch((error) => {
    if (error.status !== 413 || request.max_tokens <= sure) throw error;
    return send(sure);
  });
  let [first, tokensOfFirst, reason] = [null, 0, null];
  for await (const { choices, usage } of messages(response)) {
    const now = performance.now();
    if (first === null) {
      [first, tokensOfFirst] = [now, usage.completion_tokens];
      $("first").textContent = `${Math.round(now - started)} ms`;
    }
    show(choices[0].text);
    $("tokens").textContent = usage.completion_tokens;
    if (now - first > 50) $("rate").textContent = Math.round(((usage.completion_tokens - tokensOfFirst) / (now - first)) * 1000);
    reason = choices[0].finish_reason;
  }
  return { stop: "end of text", length: "token limit" }[reason];
}

// Only the server can count a prompt's tokens: they are no more than its bytes, and in long English prompts less than half.
const bytesOf = (text) => new TextEncoder().encode(text).length;
const context = () => Number($("max_tokens").max) + 1;

/** The tokens to ask for at most after a prompt, which as a rule fit. */
function room(prompt) {
  const bytes = bytesOf(prompt);
  return bytes < context() / 4 ? surelyFits(prompt) : Math.max(1, context() - Math.ceil(bytes / 2));
}

/** The tokens that there is room for after a prompt in any language. */
function surelyFits(prompt) {
  return Math.max(1, context() - (bytesOf(prompt) || 1));
}

function show(text) {
  const sheet = $("written");
  const atEnd = sheet.scrollHeight - sheet.scrollTop - sheet.clientHeight < 40;
  $("generated").append(text);
  if (atEnd) sheet.scrollTop = sheet.scrollHeight; // follow the text, unless the reader has scrolled up
}

function startSheet({ prompt, seed }) {
  complain(null);
  $("given").textContent = prompt;
  $("generated").textContent = "";
  $("written").ariaBusy = "true";
  $("figures").hidden = false;
  for (const id of ["rate", "first", "reason"]) $(id).textContent = "–";
  $("tokens").textContent = 0;
  $("used-seed").textContent = seed;
  $("stop").disabled = false;
  $("text-status").textContent = "Writing";
}

function endSheet(reason) {
  writing = null;
  $("written").ariaBusy = "false";
  $("stop").disabled = true;
  $("reason").textContent = reason;
  $("text-status").textContent = `Ended by ${reason}, ${$("tokens").textContent} tokens.`;
}

// ---- pictures

async function draw(event) {
  event?.preventDefault();
  if (!$("picture-form").reportValidity()) return;
  const request = { n: Number($("n").value), seed: $("picture-seed").value === "" ? anySeed() : $("picture-seed").valueAsNumber };
  if ($("label").value !== "") request.label = $("label").value;
  remember({ n: request.n, label: request.label, picture_seed: request.seed });
  complain(null);
  $("draw").disabled = true;
  try {
    const started = performance.now();
    const images = await (await post("v1/images/generations", request)).json();
    hang(images, Math.round(performance.now() - started));
  } catch (error) {
    complain(error);
  } finally {
    $("draw").disabled = false;
  }
}

function hang({ data, seed, model }, milliseconds) {
  const columns = Math.min(8, Math.ceil(Math.sqrt(data.length)));
  $("grid").style.setProperty("--columns", columns);
  $("grid").classList.toggle("dense", columns > 4);
  $("grid").replaceChildren(...data.map((picture, index) => frame(picture, `${model.replace("/", "-")}-seed${seed}-${index}.png`)));
  $("picture-status").textContent = `${data.length} of seed ${seed} by ${model}, ${milliseconds} ms. Choose a picture to download it.`;
  $("picture-status").dataset.seed = seed;
  $("next").disabled = false;
  offerSheet(columns, `${model.replace("/", "-")}-seed${seed}.png`);
}

function frame({ b64_json, label }, filename) {
  const [item, link, image, caption] = ["li", "a", "img", "span"].map((name) => document.createElement(name));
  image.src = link.href = `data:image/png;base64,${b64_json}`;
  link.download = filename;
  image.alt = label ?? "Picture";
  link.title = `${image.alt}: download ${filename}`;
  link.append(image);
  if (label) {
    caption.textContent = label;
    caption.ariaHidden = "true"; // the picture's name says it already
    link.append(caption);
  }
  item.append(link);
  return item;
}

/** All pictures as one file. */
async function offerSheet(columns, filename) {
  const images = [...$("grid").querySelectorAll("img")];
  await Promise.all(images.map((image) => image.decode()));
  const side = images[0].naturalWidth;
  const canvas = document.createElement("canvas");
  canvas.width = side * columns;
  canvas.height = side * Math.ceil(images.length / columns);
  images.forEach((image, index) => canvas.getContext("2d").drawImage(image, side * (index % columns), side * Math.floor(index / columns)));
  $("download").href = canvas.toDataURL("image/png");
  $("download").download = filename;
  $("download").hidden = images.length < 2;
}

// ---- what is served

function card(model) {
  const box = document.createElement("article");
  const title = document.createElement("h3");
  const version = document.createElement("span");
  const about = document.createElement("p");
  const facts = document.createElement("dl");
  box.className = "card";
  title.append(model.id, version);
  version.textContent = `version ${model.version}`;
  about.textContent = `${describe(model)}. Run ${model.run.name}, step ${model.run.step}, data ${model.dataset.name}; ${new Date(model.created * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}.`;
  for (const [name, value] of Object.entries(model.metrics)) {
    const [term, detail] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name.replaceAll("_", " ");
    detail.textContent = typeof value === "number" ? number.format(value) : value;
    facts.append(term, detail);
  }
  box.append(title, about, facts);
  return box;
}

function describe({ kind, model }) {
  if (kind === "gpt") return `GPT of ${model.layers} layers, context ${model.context}, ${model.vocab_size} tokens`;
  const classes = model.num_classes ? `, ${model.num_classes} classes` : "";
  return `DCGAN of ${model.image_size} × ${model.image_size} pixels${classes}`;
}

function chip(model) {
  const item = document.createElement("li");
  item.textContent = `${model.id}/${model.version}`;
  return item;
}

function offer(models) {
  $("chips").replaceChildren(...models.map(chip));
  $("served").replaceChildren(...models.map(card));
  for (const { kind, model } of models) {
    if (kind === "gpt") {
      $("max_tokens").max = Math.max(1, model.context - 1);
    } else if (model.num_classes) {
      $("label").replaceChildren(new Option("all in turn", ""), ...model.class_names.map((name) => new Option(name, name)));
      $("label-field").hidden = false;
    }
    const panel = $(kind === "gpt" ? "text" : "pictures");
    panel.hidden = false;
    panel.classList.toggle("alone", models.length === 1);
  }
}

// ---- the page

function complain(error) {
  $("notice").hidden = error === null;
  if (error) $("notice").textContent = error.message[0].toUpperCase() + error.message.slice(1);
}

const FIELDS = { prompt: "prompt", temperature: "temperature", max_tokens: "max_tokens", top_k: "top_k", text_seed: "text-seed", n: "n", label: "label", picture_seed: "picture-seed" };

/** Keeps what was asked for in the address, so that it can be sent to somebody. */
function remember(values) {
  const query = new URLSearchParams(location.search);
  query.delete("run");
  for (const [name, value] of Object.entries(values)) {
    if (value === undefined || value === "") query.delete(name);
    else query.set(name, value);
  }
  history.replaceState(null, "", `?${query}`);
}

function recall(query) {
  for (const [name, id] of Object.entries(FIELDS)) if (query.has(name)) $(id).value = query.get(name);
  if (query.has("seed")) $("text-seed").value = $("picture-seed").value = query.get("seed");
  for (const id of ["temperature", "max_tokens"]) $(id).dispatchEvent(new Event("input"));
}

function listen() {
  $("text-form").addEventListener("submit", write);
  $("picture-form").addEventListener("submit", draw);
  $("stop").addEventListener("click", () => writing?.abort());
  $("next").addEventListener("click", () => {
    $("picture-seed").value = Number($("picture-status").dataset.seed) + 1;
    draw();
  });
  for (const id of ["temperature", "max_tokens"]) $(id).addEventListener("input", () => ($(`${id}-value`).textContent = $(id).value));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") writing?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write(event);
  });
}

async function start() {
  listen();
  try {
    const models = (await (await answer(await fetch("v1/models"))).json()).data;
    offer(models);
    const query = new URLSearchParams(location.search);
    recall(query);
    const kinds = models.map(({ kind }) => kind);
    if (kinds.includes("gan") && query.get("run") !== "text") draw();
    if (kinds.includes("gpt") && ["1", "text"].includes(query.get("run"))) write();
  } catch (error) {
    complain(error);
  }
}

start();
