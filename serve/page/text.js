// The text panel: a prompt, its text as it is written, and a button that stops it.

import { messages, post } from "./api.js";
import { $, complain, remember, seedOf } from "./dom.js";

let writing = null; // the AbortController of the text under way

export async function write(event) {
  event?.preventDefault();
  if (!$("text-form").reportValidity()) return;
  writing?.abort();
  const mine = (writing = new AbortController());
  const request = {
    prompt: $("prompt").value,
    temperature: $("temperature").valueAsNumber,
    max_tokens: Math.min($("max_tokens").valueAsNumber, room($("prompt").value)),
    top_k: $("top_k").valueAsNumber,
    top_p: unless(1, $("top_p").valueAsNumber),
    repetition_penalty: unless(1, $("repetition_penalty").valueAsNumber),
    stop: unless("", $("stop-at").value.replaceAll("\\n", "\n")),
    seed: seedOf($("text-seed")),
  };
  remember({ ...request, stop: $("stop-at").value, seed: undefined, text_seed: request.seed });
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

/** A control's value; nothing where it is what the server takes by itself. */
const unless = (usual, value) => (value === usual ? undefined : value);

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
  const rate = (tokens, milliseconds) => ($("rate").textContent = Math.round((tokens / milliseconds) * 1000));
  let [first, tokensOfFirst, reason] = [null, 0, null];
  for await (const { choices, usage } of messages(response)) {
    const now = performance.now();
    if (first === null) {
      [first, tokensOfFirst] = [now, usage.completion_tokens];
      $("first").textContent = `${Math.round(now - started)} ms`;
    }
    show(choices[0].text);
    $("tokens").textContent = usage.completion_tokens;
    reason = choices[0].finish_reason;
    if (now - first > 50) rate(usage.completion_tokens - tokensOfFirst, now - first);
    else if (reason) rate(usage.completion_tokens, now - started); // too short to leave the wait for the first token out
  }
  return { stop: request.stop ? "stop string or end of text" : "end of text", length: "token limit", content_filter: "blocked words" }[reason];
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
  if (document.activeElement === $("stop")) $("write").focus(); // a disabled button loses the focus to nowhere
  $("stop").disabled = true;
  $("reason").textContent = reason;
  $("text-status").textContent = `Ended by ${reason}, ${$("tokens").textContent} tokens.`;
}

export function listen() {
  $("text-form").addEventListener("submit", write);
  $("stop").addEventListener("click", () => writing?.abort());
  for (const id of ["temperature", "max_tokens", "top_p", "repetition_penalty"]) $(id).addEventListener("input", () => ($(`${id}-value`).textContent = $(id).value));
  $("text-form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write(event);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") writing?.abort();
  });
}

export function offer({ context }) {
  $("max_tokens").max = Math.max(1, context - 1);
}
