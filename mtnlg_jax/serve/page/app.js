"use strict";
const $ = (id) => document.getElementById(id);
const TABS = ["write", "chat", "rank", "fill"];
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
// A browser in private mode may refuse to keep anything.
const store = (name, value) => { try { localStorage.setItem("mtnlg." + name, value); } catch { /* not kept */ } };
const stored = (name) => { try { return localStorage.getItem("mtnlg." + name); } catch { return null; } };
let language = stored("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let models = [];
let running = null;  // the AbortController of the request that runs
let turns = [];  // of the conversation

const word = (name, ...values) => {
  const found = WORDS[language][name];
  return typeof found === "function" ? found(...values) : found;
};
function say(text, bad = false) {
  $("state").textContent = text;
  $("state").className = bad ? "bad" : "";
}
function make(tag, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
const all = (selector) => document.querySelectorAll(selector);

// --- requests

async function ask(path, body, signal) {
  const key = $("key").value.trim();
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
  let reply;
  try {
    reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(word("lost"));
  }
  if (!reply.ok) {
    const told = await reply.json().catch(() => ({}));
    throw new Error(told.error ? told.error.message : reply.status + " " + reply.statusText);
  }
  return reply;
}
async function* events(reply) {
  const reader = reply.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    for (let at; (at = held.indexOf("\n\n")) >= 0;) {
      const line = held.slice(0, at);
      held = held.slice(at + 2);
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
// Run one request at a time: its buttons wait, Stop and Escape end it.
async function busy(words, work) {
  if (running) return;
  running = new AbortController();
  for (const each of all("button.main")) each.disabled = true;
  for (const each of all("button.halt")) each.disabled = false;
  say(word(words));
  try {
    say((await work(running.signal)) || word("done"));
  } catch (error) {
    if (error.name === "AbortError") say(word("stopped"));
    else say(error.message, true);
  } finally {
    running = null;
    for (const each of all("button.main")) each.disabled = false;
    for (const each of all("button.halt")) each.disabled = true;
    able();
  }
}
function halt() { if (running) running.abort(); }

const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
function settings() {
  const given = { model: $("model").value || undefined };
  for (const name of [...SAMPLING, "repetition_penalty"]) given[name] = number(name);
  if ($("stop").value) given.stop = $("stop").value.replace(/\\n/g, "\n");
  const form = $("form").value.trim();
  if (form) {
    try {
      given.response_format = { type: "json_schema", json_schema: { name: "form", schema: JSON.parse(form) } };
    } catch (error) { throw new Error("JSON schema: " + error.message); }
  }
  return given;
}
const lines = () => $("candidates").value.split("\n").filter((line) => line.trim());
function ranking() {
  const given = settings();
  const scorers = $("scorer").value.split(/[\s,+]+/).filter(Boolean).map((each) => each.split("="));
  const body = {
    model: given.model, prompt: $("before").value, normalise: $("normalise").value,
    scorers: Object.fromEntries(scorers.map(([name, weight]) => [name, weight ? Number(weight) : 1])),
  };
  if (lines().length) body.candidates = lines();
  else {
    body.n = number("number");
    for (const name of [...SAMPLING, "stop"]) body[name] = given[name];
  }
  return body;
}

// --- tokens, shaded by probability

const shade = (p) => (p > 0.5 ? "p0" : p > 0.1 ? "p1" : p > 0.01 ? "p2" : "p3");
const percent = (logprob) => (100 * Math.exp(logprob)).toFixed(1).padStart(5) + " %";
function token(text, told) {
  const [logprob, others] = told;
  const made = make("span", text, "t " + shade(Math.exp(logprob)));
  made.tabIndex = 0;
  const best = others.sort((a, b) => b[1] - a[1]);
  made.dataset.tip = best.map(([name, value]) => percent(value) + "  " + JSON.stringify(name)).join("\n");
  made.setAttribute("aria-description", made.dataset.tip);
  return made;
}
function tip(target) {
  const box = $("tip");
  const told = target && target.dataset && target.dataset.tip;
  box.hidden = !told;
  if (!told) return;
  box.textContent = told;
  const at = target.getBoundingClientRect();
  box.style.left = Math.max(4, Math.min(at.left + scrollX, scrollX + innerWidth - box.offsetWidth - 8)) + "px";
  box.style.top = at.bottom + scrollY + 4 + "px";
}

// --- the four panels

async function write(signal) {
  const prompt = $("prompt").value;
  const body = { ...settings(), prompt, stream: true, logprobs: 5, stream_options: { include_usage: true } };
  $("out").replaceChildren(make("span", prompt, "given"));
  $("stats").textContent = "";
  $("append").disabled = true;
  const begun = performance.now();
  let first = 0;
  let reason = "";
  let told = [0, []];  // of the last token; earlier ones are held back until a character is whole
  try {
    for await (const event of events(await ask("v1/completions", body, signal))) {
      for (const choice of event.choices) {
        first = first || performance.now();
        reason = choice.finish_reason || reason;
        const numbers = choice.logprobs;
        if (numbers && numbers.tokens.length) {
          told = [numbers.token_logprobs[0], Object.entries(numbers.top_logprobs[0])];
        }
        if (choice.text) $("out").append(token(choice.text, told));
      }
      if (event.usage) {
        const seconds = Math.max((performance.now() - begun) / 1000, 1e-3);
        const { prompt_tokens: read, completion_tokens: written } = event.usage;
        const rate = (written / seconds).toFixed(1);
        $("stats").textContent = word("stats", read, written, Math.round(first - begun), rate, event.seed);
      }
    }
  } finally {
    // Also after Stop: what was written can be kept.
    $("append").disabled = false;
  }
  return reason === "length" ? word("done") + " (" + word("cut") + ")" : "";
}

function showTurns() {
  $("talk").replaceChildren(...turns.map((turn) => {
    const made = make("div", "", "turn");
    made.append(make("b", word(turn.role === "user" ? "you" : "answer")), make("span", turn.content));
    return made;
  }));
  store("turns", JSON.stringify(turns));
  $("talk").scrollTop = $("talk").scrollHeight;
}
async function talk(signal) {
  const text = $("say").value.trim();
  if (!text) return "";
  const before = turns;
  const asked = [...turns, { role: "user", content: text }];
  turns = asked;
  showTurns();
  let answer = "";
  try {
    const reply = await ask("v1/chat/completions", { ...settings(), messages: asked, stream: true }, signal);
    $("say").value = "";
    store("say", "");
    for await (const event of events(reply)) {
      for (const choice of event.choices) answer += choice.delta.content || "";
      turns = [...asked, { role: "assistant", content: answer }];
      showTurns();
    }
  } catch (error) {
    // A message that got no answer goes back to its field.
    if (!answer) {
      turns = before;
      $("say").value = text;
      store("say", text);
      showTurns();
    }
    throw error;
  }
  return "";
}

async function rank(signal) {
  const told = await (await ask("v1/rank", ranking(), signal)).json();
  const parts = Object.keys(told.candidates[0].parts).filter((name) => name !== "logprob");
  const columns = ["rank", "score", "sum", "per_token", "per_char", "per_byte", "count", ...parts];
  const head = make("tr");
  for (const name of [...columns, "text"]) head.append(make("th", name));
  $("table").tHead.replaceChildren(head);
  $("table").tBodies[0].replaceChildren(...told.candidates.map((each) => {
    const row = make("tr");
    for (const name of columns) {
      const value = name in each ? each[name] : each.parts[name];
      row.append(make("td", ["rank", "count"].includes(name) ? value : value.toFixed(4), "n"));
    }
    row.append(make("td", each.text, "text"));
    return row;
  }));
  return word("ranked", told.size);
}

async function fill(signal) {
  const body = { model: $("model").value || undefined, text: $("gaps").value };
  const told = await (await ask("v1/fill", body, signal)).json();
  $("filled").textContent = told.text;
  $("guesses").replaceChildren(...told.masks.map((guesses) => {
    const table = make("table");
    for (const guess of guesses) {
      const row = make("tr");
      row.append(make("td", (100 * guess.probability).toFixed(2) + " %", "n"), make("td", guess.text, "text"));
      table.append(row);
    }
    return table;
  }));
  return "";
}

function curl() {
  const [path, body] = {
    write: () => ["/v1/completions", { ...settings(), prompt: $("prompt").value }],
    chat: () => ["/v1/chat/completions", { ...settings(), messages: [...turns, { role: "user", content: $("say").value }] }],
    rank: () => ["/v1/rank", ranking()],
    fill: () => ["/v1/fill", { text: $("gaps").value }],
  }[selected()]();
  const quoted = JSON.stringify(body).replace(/'/g, "'\\''");
  const key = $("key").value ? ' -H "Authorization: Bearer $KEY"' : "";
  const text = `curl ${location.origin}${path} -H 'Content-Type: application/json'${key} -d '${quoted}'`;
  // Without a clipboard the command is shown.
  if (!navigator.clipboard) say(text);
  else navigator.clipboard.writeText(text).then(() => say(word("copied")), () => say(text));
}

// --- the page

const selected = () => TABS.find((name) => $("tab-" + name).getAttribute("aria-selected") === "true");
function select(name) {
  for (const each of TABS) {
    const on = each === name;
    $("tab-" + each).setAttribute("aria-selected", on);
    $("tab-" + each).tabIndex = on ? 0 : -1;
    $("panel-" + each).hidden = !on;
  }
  store("tab", name);
}
function able() {
  const model = models.find((each) => each.id === $("model").value);
  if (!model || running) return;
  $("facts").textContent = word("context", model.max_model_len);
  $("send").disabled = !model.chat;
  $("guess").disabled = !model.fill;
  $("send").title = model.chat ? "" : word("nochat");
  $("guess").title = model.fill ? "" : word("nofill");
}
function speak(to) {
  language = to;
  store("language", to);
  // What it said was in the other language.
  if (!running) say("");
  document.documentElement.lang = to;
  for (const each of all("[data-w]")) each.textContent = word(each.dataset.w);
  $("language").textContent = to === "en" ? "中文" : "English";
  $("language").lang = to === "en" ? "zh" : "en";
  showTurns();
  able();
}
async function load() {
  try {
    models = (await (await ask("v1/models")).json()).data;
    $("model").replaceChildren(...models.map((each) => make("option", each.id)));
    const kept = stored("model");
    if (models.some((each) => each.id === kept)) $("model").value = kept;
    say("");
    able();
  } catch (error) { say(error.message, true); }
}

for (const each of all("[data-keep]")) {
  const kept = stored(each.id);
  if (kept !== null) each.value = kept;
  each.addEventListener("input", () => store(each.id, each.value));
}
try { turns = JSON.parse(stored("turns")) || []; } catch { turns = []; }
try { $("key").value = sessionStorage.getItem("mtnlg.key") || ""; } catch { /* not kept */ }
$("key").addEventListener("change", () => {
  try { sessionStorage.setItem("mtnlg.key", $("key").value); } catch { /* not kept */ }
  load();
});
$("model").addEventListener("change", () => { store("model", $("model").value); able(); });
$("go").addEventListener("click", () => busy("writing", write));
$("send").addEventListener("click", () => busy("writing", talk));
$("order").addEventListener("click", () => busy("ranking", rank));
$("guess").addEventListener("click", () => busy("filling", fill));
$("forget").addEventListener("click", () => { turns = []; showTurns(); $("say").focus(); });
$("append").addEventListener("click", () => {
  $("prompt").value = $("out").textContent;
  store("prompt", $("prompt").value);
  $("prompt").focus();
});
$("curl").addEventListener("click", () => { try { curl(); } catch (error) { say(error.message, true); } });
$("language").addEventListener("click", () => speak(language === "en" ? "zh" : "en"));
for (const each of all("button.halt")) each.addEventListener("click", halt);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { halt(); tip(null); }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    $({ write: "go", chat: "send", rank: "order", fill: "guess" }[selected()]).click();
    event.preventDefault();
  }
});
$("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const name = TABS[(TABS.indexOf(selected()) + step + TABS.length) % TABS.length];
  select(name);
  $("tab-" + name).focus();
});
for (const name of TABS) $("tab-" + name).addEventListener("click", () => select(name));
for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, (event) => tip(event.target));
document.addEventListener("mouseout", () => tip(null));
select(TABS.includes(stored("tab")) ? stored("tab") : "write");
speak(language);
load();
