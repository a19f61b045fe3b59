// The client of the HTTP API that /docs describes.

/**
 * Returns the response if it is successful.
 * @throws {Error} with the server's error message and a `status` property.
 */
export async function checkResponse(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `the server responded with status ${response.status}`;
  throw Object.assign(new Error(message), { status: response.status });
}

export async function getJson(path) {
  const response = await checkResponse(await fetch(path));
  return response.json();
}

export async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(body), signal };
  return checkResponse(await fetch(path, options));
}

/** Yields the parsed messages of a server-sent event stream until its `[DONE]`. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the stream ended before its [DONE] message");
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
