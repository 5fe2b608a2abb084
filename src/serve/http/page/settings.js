// The settings: the system prompt, and how tokens are drawn. They last as long as the browser's tab.
import { key } from "./api.js";
import { $ } from "./dom.js";

// A field's id is its name in a request.
const FIELDS = [...$("panel").querySelectorAll("input, textarea")].filter((field) => field.id !== "key");

function store(field) {
  sessionStorage.setItem(`setting ${field.id}`, field.type === "checkbox" ? String(field.checked) : field.value);
}

for (const field of FIELDS) {
  const kept = sessionStorage.getItem(`setting ${field.id}`);
  if (kept !== null && field.type === "checkbox") field.checked = kept === "true";
  else if (kept !== null) field.value = kept;
  field.addEventListener("change", () => store(field));
}

$("key").value = key.get();
$("key").addEventListener("change", () => {
  key.set($("key").value);
  document.dispatchEvent(new Event("key-given"));
});

function open(now) {
  $("panel").hidden = !now;
  $("toggle").setAttribute("aria-expanded", String(now));
}

document.addEventListener("key-wanted", () => {
  open(true);
  $("key").focus();
});
$("toggle").addEventListener("click", () => open($("panel").hidden));
$("defaults").addEventListener("click", () => {
  for (const field of FIELDS) {
    field.value = field.defaultValue;
    field.checked = field.defaultChecked;
    store(field);
  }
});

export function system() {
  const text = $("system").value.trim();
  return text ? [{ role: "system", content: text }] : [];
}

// What a request says besides its messages; what is empty is left to the server.
export function sampling() {
  const numbers = FIELDS.filter((field) => field.type === "number" && !Number.isNaN(field.valueAsNumber));
  const stop = $("stop").value.split("\n").filter((line) => line);
  return {
    ...Object.fromEntries(numbers.map((field) => [field.id, field.valueAsNumber])),
    ...(stop.length ? { stop } : {}),
    ...($("logprobs").checked ? { logprobs: true, top_logprobs: 4 } : {}),
  };
}
