// The text panel: a prompt, the completion as it streams, and its metrics.

import { post, readEvents } from "./api.js";
import { byId, clearError, readSeed, showError } from "./dom.js";
import { saveToQuery } from "./query.js";

const SLIDERS = ["temperature", "max_tokens", "top_p", "repetition_penalty"];
const MIN_RATE_WINDOW_MS = 50;
const FOLLOW_DISTANCE_PX = 40;

let currentAbort = null; // the AbortController of the request in progress

export function configure({ context }) {
  byId("max_tokens").max = Math.max(1, context - 1);
}

/** Sends the form's request and shows the completion; aborts the request in progress, if any. */
export async function generate(event) {
  event?.preventDefault();
  if (!byId("text-form").reportValidity()) return;
  currentAbort?.abort();
  const abort = new AbortController();
  currentAbort = abort;
  const request = readRequest();
  const stop = byId("stop-string").value; // as typed, with \\n for a newline
  saveToQuery({ ...request, stop, seed: undefined, text_seed: request.seed });
  startOutput(request);
  let finishReason = "stop button";
  try {
    finishReason = await streamCompletion(request, abort.signal);
  } catch (error) {
    if (error.name !== "AbortError") {
      finishReason = "error";
      showError(error);
    }
  }
  if (currentAbort === abort) finishOutput(finishReason);
}

function readRequest() {
  const prompt = byId("prompt").value;
  return {
    prompt,
    temperature: byId("temperature").valueAsNumber,
    max_tokens: Math.min(byId("max_tokens").valueAsNumber, estimateTokenBudget(prompt)),
    top_k: byId("top_k").valueAsNumber,
    top_p: omitDefault(byId("top_p").valueAsNumber, 1),
    repetition_penalty: omitDefault(byId("repetition_penalty").valueAsNumber, 1),
    stop: omitDefault(byId("stop-string").value.replaceAll("\\n", "\n"), ""),
    seed: readSeed(byId("text-seed")),
  };
}

const omitDefault = (value, defaultValue) => (value === defaultValue ? undefined : value);

/** Shows a completion as it streams. Returns why it ended. */
async function streamCompletion(request, signal) {
  const startTime = performance.now();
  const response = await postCompletion(request, signal);
  let firstTime = null;
  let firstTokens = 0;
  let finishReason = null;
  for await (const { choices, usage } of readEvents(response)) {
    const now = performance.now();
    const tokens = usage.completion_tokens;
    if (firstTime === null) {
      firstTime = now;
      firstTokens = tokens;
      byId("time-to-first-token").textContent = `${Math.round(now - startTime)} ms`;
    }
    appendText(choices[0].text);
    byId("tokens").textContent = tokens;
    finishReason = choices[0].finish_reason;
    if (now - firstTime > MIN_RATE_WINDOW_MS) {
      showTokensPerSecond(tokens - firstTokens, now - firstTime);
    } else if (finishReason) {
      // The completion is too short to exclude the time to first token.
      showTokensPerSecond(tokens, now - startTime);
    }
  }
  const descriptions = {
    stop: request.stop ? "stop string or end of text" : "end of text",
    length: "token limit",
    content_filter: "blocked words",
  };
  return descriptions[finishReason];
}

/** Requests a completion. If it exceeds the context, retries with a `max_tokens` that fits. */
async function postCompletion(request, signal) {
  const options = { stream: true, stream_options: { continuous_usage_stats: true } };
  try {
    return await post("v1/completions", { ...request, ...options }, signal);
  } catch (error) {
    const max_tokens = minimumTokenBudget(request.prompt);
    if (error.status !== 413 || request.max_tokens <= max_tokens) throw error;
    return post("v1/completions", { ...request, ...options, max_tokens }, signal);
  }
}

function showTokensPerSecond(tokens, milliseconds) {
  byId("tokens-per-second").textContent = Math.round((tokens / milliseconds) * 1000);
}

// Only the server can count a prompt's tokens. A prompt has at most one token per byte, and long
// English prompts have less than half a token per byte.

const countBytes = (text) => new TextEncoder().encode(text).length;
const contextLength = () => Number(byId("max_tokens").max) + 1;

/** Returns a number of tokens that usually fits into the context after the prompt. */
function estimateTokenBudget(prompt) {
  const bytes = countBytes(prompt);
  if (bytes < contextLength() / 4) return minimumTokenBudget(prompt);
  return Math.max(1, contextLength() - Math.ceil(bytes / 2));
}

/** Returns a number of tokens that fits into the context after the prompt in any language. */
function minimumTokenBudget(prompt) {
  return Math.max(1, contextLength() - (countBytes(prompt) || 1));
}

/** Appends to the completion, and scrolls along unless the user has scrolled up. */
function appendText(text) {
  const output = byId("text-output");
  const distanceToEnd = output.scrollHeight - output.scrollTop - output.clientHeight;
  byId("completion").append(text);
  if (distanceToEnd < FOLLOW_DISTANCE_PX) output.scrollTop = output.scrollHeight;
}

function startOutput({ prompt, seed }) {
  clearError();
  byId("output-prompt").textContent = prompt;
  byId("completion").textContent = "";
  byId("text-output").ariaBusy = "true";
  byId("text-metrics").hidden = false;
  for (const id of ["tokens-per-second", "time-to-first-token", "finish-reason"]) {
    byId(id).textContent = "–";
  }
  byId("tokens").textContent = 0;
  byId("used-seed").textContent = seed;
  byId("stop").disabled = false;
  byId("text-status").textContent = "Generating text";
}

function finishOutput(finishReason) {
  currentAbort = null;
  byId("text-output").ariaBusy = "false";
  // A disabled button loses the keyboard focus: move it first.
  if (document.activeElement === byId("stop")) byId("generate-text").focus();
  byId("stop").disabled = true;
  byId("finish-reason").textContent = finishReason;
  const tokens = byId("tokens").textContent;
  byId("text-status").textContent = `Generated ${tokens} tokens. Ended by: ${finishReason}.`;
}

export function addListeners() {
  byId("text-form").addEventListener("submit", generate);
  byId("stop").addEventListener("click", () => currentAbort?.abort());
  for (const id of SLIDERS) {
    byId(id).addEventListener("input", () => {
      byId(`${id}-value`).textContent = byId(id).value;
    });
  }
  byId("text-form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate(event);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") currentAbort?.abort();
  });
}
