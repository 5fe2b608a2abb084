// Training: rows are uploaded, a job begins, and its loss is drawn while it goes down.
import { call } from "./api.js";
import { action, actions, card, opened, replace, size } from "./cards.js";
import { $, element } from "./dom.js";
import { models } from "./models.js";

const UNDER_WAY = ["validating_files", "queued", "running", "paused"];
const JOBS = "/v1/fine_tuning/jobs";
const status = $("training-status");
let finished = new Set();
const ended = new Map(); // what was told of jobs that nothing happens to any more

// Losses as a line; its words are for those who do not see it.
function chart(losses) {
  const svg = $("chart").content.firstElementChild.cloneNode(true);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  svg.setAttribute("aria-label", `Loss from ${losses[0].toFixed(3)} to ${losses.at(-1).toFixed(3)}`);
  const at = (loss, index) => `${(100 * index) / Math.max(1, losses.length - 1)},${95 - (90 * (loss - low)) / (high - low || 1)}`;
  svg.firstElementChild.setAttribute("points", losses.map(at).join(" "));
  return svg;
}

// The planned memory of a step: a bar for each category, the largest first.
function plan(bytes) {
  const sorted = Object.entries(bytes).sort(([, one], [, other]) => other - one);
  const whole = sorted.reduce((sum, [, one]) => sum + one, 0);
  const list = element("ul", undefined, "plan");
  list.setAttribute("aria-label", "Planned memory");
  list.append(...sorted.map(([name, one]) => {
    const row = element("li");
    const bar = element("meter");
    [bar.max, bar.value] = [whole, one];
    bar.setAttribute("aria-label", name);
    row.append(element("span", name), bar, element("span", size(one)));
    return row;
  }));
  return list;
}

// What the model says to some of the rows' prompts, before training and after it.
function samples(job, told) {
  const found = new Map();
  for (const { data } of told) {
    if (data.answer !== undefined) found.set(data.sample, { ...found.get(data.sample), ...data, [data.moment]: data.answer });
  }
  if (!found.size) return null;
  const lists = [...found].sort(([one], [other]) => one - other).map(([, one]) => {
    const list = element("dl");
    for (const [term, text] of [["Prompt", one.prompt], ["In the data", one.expected], ["Before", one.before], ["After", one.after]]) {
      if (text !== undefined) list.append(element("dt", term), element("dd", text || "(nothing)"));
    }
    return list;
  });
  return opened("Samples", job.id, ...lists);
}

async function events(job) {
  if (ended.has(job.id)) return ended.get(job.id);
  const list = await call(status, "GET", `${JOBS}/${job.id}/events?limit=10000`);
  if (list && !UNDER_WAY.includes(job.status)) ended.set(job.id, list.data);
  return list?.data ?? [];
}

async function jobCard(job) {
  const made = card(job.fine_tuned_model ?? job.id, `${job.status} · ${job.method.type}`);
  const told = await events(job);
  const steps = told.filter((event) => typeof event.data.train_loss === "number").reverse();
  if (steps.length > 1) made.append(chart(steps.map((event) => event.data.train_loss)));
  const last = steps.at(-1)?.data;
  if (last) made.append(element("p", `Step ${last.step} of ${last.total_steps}, loss ${last.train_loss.toFixed(4)}, at first ${steps[0].data.train_loss.toFixed(4)}`, "meta"));
  const planned = told.find((event) => event.data.planned_bytes)?.data.planned_bytes;
  if (planned) made.append(plan(planned));
  const written = samples(job, told);
  if (written) made.append(written);
  if (job.error) made.append(element("p", job.error.message, "wrong"));
  if (UNDER_WAY.includes(job.status)) {
    const change = (word) => call(status, "POST", `${JOBS}/${job.id}/${word}`);
    const [label, word] = job.status === "paused" ? ["Resume", "resume"] : ["Pause", "pause"];
    made.append(actions(
      action(label, job.id, () => change(word), jobs), action("Cancel", job.id, () => change("cancel"), jobs),
    ));
  }
  return made;
}

export async function jobs() {
  const list = await call(status, "GET", `${JOBS}?limit=20`);
  if (!list?.data.length) return;
  replace($("jobs"), await Promise.all(list.data.map(jobCard)));
  const done = new Set(list.data.filter((job) => job.status === "succeeded").map((job) => job.id));
  if ([...done].some((id) => !finished.has(id))) models();
  finished = done;
}

$("train").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", $("rows").files[0]);
  status.textContent = "Uploading …";
  const file = await call(status, "POST", "/v1/files", form);
  const list = file && await call(status, "GET", "/v1/models");
  if (!list) return;
  const epochs = $("epochs").valueAsNumber;
  const type = $("method").value;
  const job = await call(status, "POST", JOBS, {
    model: list.data.find((model) => !model.parent)?.id,
    training_file: file.id,
    method: { type, [type]: { hyperparameters: Number.isNaN(epochs) ? {} : { n_epochs: epochs } } },
    ...($("suffix").value ? { suffix: $("suffix").value } : {}),
  });
  if (job) status.textContent = "";
  jobs();
});
