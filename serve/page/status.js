// The replicas and latency on each model's card, from /status.

import { byId, fillList, formatValue } from "./dom.js";

const POLL_INTERVAL_MS = 5000;
const STATUS_KEYS = {
  gpt: {
    deployment: "TextReplica",
    latency: "text_time_to_first_token",
    name: "time to first token",
  },
  gan: { deployment: "ImageReplica", latency: "image", name: "latency" },
};

/** Polls /status while the page is visible; stops if the server does not have that route. */
export async function watchStatus() {
  const response = document.hidden ? null : await fetch("status").catch(() => null);
  if (response?.status === 404) return;
  if (response?.ok) showStatus(await response.json());
  setTimeout(watchStatus, POLL_INTERVAL_MS);
}

function showStatus({ deployments, latency_ms }) {
  for (const card of byId("models").children) {
    const keys = STATUS_KEYS[card.dataset.kind];
    const deployment = deployments?.[keys.deployment];
    const latency = latency_ms?.[keys.latency];
    const entries = [];
    if (deployment) entries.push(["replicas", describeReplicas(deployment)]);
    if (typeof latency?.p50 === "number") entries.push([keys.name, describeLatency(latency)]);
    const list = card.querySelector(".status");
    fillList(list, entries);
    list.hidden = entries.length === 0;
  }
}

function describeReplicas({ replicas, target, status }) {
  const count = target > replicas ? `${replicas} of ${target}` : `${replicas}`;
  return `${count}, ${status.toLowerCase().replaceAll("_", " ")}`;
}

function describeLatency({ p50, p99 }) {
  return `${formatValue(p50)} ms (p50), ${formatValue(p99)} ms (p99)`;
}
