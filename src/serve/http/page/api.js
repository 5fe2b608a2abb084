// The server's API: the key, requests, streams, and what went wrong in words.
const UNREACHABLE = "the server cannot be reached";

export const key = {
  get: () => sessionStorage.getItem("key") ?? "",
  set: (text) => sessionStorage.setItem("key", text),
};

function headers(extra) {
  return key.get() ? { ...extra, authorization: `Bearer ${key.get()}` } : { ...extra };
}

// A response that is well; a body that is no form and no text goes as JSON. Throws an error with the server's words.
export async function request(method, path, body, signal) {
  const json = body !== undefined && !(body instanceof FormData) && typeof body !== "string";
  const kind = json ? "application/json" : typeof body === "string" ? "text/plain" : null;
  let response;
  try {
    response = await fetch(path, {
      method, signal, body: json ? JSON.stringify(body) : body, headers: headers(kind ? { "content-type": kind } : {}),
    });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(UNREACHABLE);
  }
  if (response.ok) return response;
  if (response.status === 401) document.dispatchEvent(new Event("key-wanted"));
  throw new Error(await words(response));
}

async function words(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// The server's answer as JSON, or null after a word in `status` about why there is none.
export async function call(status, method, path, body) {
  try {
    return await (await request(method, path, body)).json();
  } catch (error) {
    status.textContent = error.message;
    return null;
  }
}

// The server-sent events of a response, until its end.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error(UNREACHABLE);
    }
    if (read.done) throw new Error("the answer broke off");
    const parts = (rest + read.value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}
