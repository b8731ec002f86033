
"use strict";

const PERIOD = 1000;  // ms between two looks
const SHORTEST = 60, LONGEST = 300, GAP = 10;  // seconds that charts show, and that a line bridges
const by = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let columns = [], points = [], next = 0, missed = 0;

// -- numbers ---------------------------------------------------------------------------------------------------------

const whole = (n) => Math.round(n).toLocaleString("en");

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) { n /= 1024; unit++; }
  return `${n < 10 && unit ? n.toFixed(2) : n < 100 && unit ? n.toFixed(1) : Math.round(n)} ${units[unit]}`;
}

function seconds(s) {
  if (s === null) return ["–", "ms"];
  if (s < 0.01) return [(1000 * s).toFixed(1), "ms"];
  if (s < 1) return [Math.round(1000 * s).toString(), "ms"];
  return [s < 10 ? s.toFixed(2) : s < 100 ? s.toFixed(1) : whole(s), "s"];
}

/** A round time: 10 s, not 10.0 s. */
const bare = (s) => s < 1 ? `${+(1000 * s).toPrecision(3)} ms` : `${+s.toPrecision(3)} s`;

function age(s) {
  if (s < 60) return `${s.toFixed(s < 10 ? 1 : 0)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  return `${Math.floor(s / 3600)} h`;
}

/** The least round number that is not below n. */
function round_up(n) {
  const power = 10 ** Math.floor(Math.log10(n));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((digit) => digit * power).find((value) => value >= n * 0.999999);
}

const ago = (span) => span < 90 ? "last minute" : `last ${Math.round(span / 60)} minutes`;

function text(id, value) {
  const element = by(id);
  if (element.textContent !== value) element.textContent = value;
}

// -- charts ----------------------------------------------------------------------------------------------------------

/** An SVG path through [x, y]; it is interrupted where y is null. */
function path(xy, closed) {
  let d = "", last = null, first = null;
  for (const [x, y] of xy) {
    if (y === null) {
      if (closed && last) d += `L${last} 100L${first} 100Z`;
      last = first = null;
      continue;
    }
    d += `${last === null ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
    last = x.toFixed(1);
    if (first === null) first = last;
  }
  if (closed && last) d += `L${last} 100L${first} 100Z`;
  return d;
}

function draw_vital(figure) {
  const is_time = figure.dataset.unit === "s";
  const names = [figure.dataset.line, figure.dataset.second].filter(Boolean);
  const at = columns.indexOf("time"), end = points.length ? points[points.length - 1][at] : 0;
  const span = points.length ? Math.max(SHORTEST, end - points[0][at]) : SHORTEST;
  const lines = names.map((name) => {
    const column = columns.indexOf(name);
    const x = (point) => 300 - 300 * (end - point[at]) / span;
    return points.flatMap((point, i) => {
      const gap = i && point[at] - points[i - 1][at] > GAP;  // nobody knows what was in between
      return gap ? [[x(point), null], [x(point), point[column]]] : [[x(point), point[column]]];
    });
  });
  const most = Math.max(...lines.flat().map(([, y]) => y ?? 0));
  const top = most > 0 ? round_up(most) : 1;
  const scaled = lines.map((line) => line.map(([x, y]) => [x, y === null ? null : 100 - 94 * y / top]));
  const shapes = [["area", path(scaled[0], true)], ["", path(scaled[0], false)]];
  if (scaled[1]) shapes.push(["second", path(scaled[1], false)]);

  const svg = figure.querySelector("svg");
  shapes.forEach(([name, d], i) => {
    const shape = svg.children[i] ?? svg.appendChild(document.createElementNS(SVG, "path"));
    shape.setAttribute("class", name);
    shape.setAttribute("d", d);
  });
  const now = names.map((name) => points.length ? points[points.length - 1][columns.indexOf(name)] : null);
  const shown = is_time ? seconds(now[0]) : [now[0] === null ? "–" : whole(now[0]), "tokens/s"];
  figure.querySelector(".value").textContent = shown[0];
  figure.querySelector(".unit").textContent = shown[1];
  if (names[1]) figure.querySelector(".second").textContent = now[1] === null ? "–" : seconds(now[1]).join(" ");
  figure.querySelector(".top").textContent = most > 0 ? (is_time ? bare(top) : whole(top)) : "";
  figure.querySelector(".ago").textContent = ago(span);
  svg.setAttribute("aria-label",
    `${figure.querySelector("figcaption").textContent}: ${shown.join(" ")} now, at most ${is_time ? seconds(most).join(" ") : whole(most)} ${ago(span)}`);
}

// -- memory ----------------------------------------------------------------------------------------------------------

function draw_memory(memory) {
  const parts = { live: memory.live, kept: memory.kept, free: memory.free, broken: memory.broken };
  const bar = by("budget");
  for (const [name, size] of Object.entries(parts)) {
    let part = bar.querySelector("." + name);
    if (!part) {
      part = bar.appendChild(document.createElement("i"));
      part.className = name;
    }
    part.style.width = `${100 * size / memory.budget}%`;
  }
  const none = Math.max(0, memory.budget - memory.created);
  for (const [name, size] of Object.entries({ ...parts, none })) if (name !== "broken") text(name, bytes(size));
  text("memory-text", `${bytes(memory.created)} created of a budget of ${bytes(memory.budget)}, behind ${bytes(memory.reserved)} of addresses` + (memory.needed > memory.live ? `; sharing saves ${bytes(memory.needed - memory.live)}` : ""));
  bar.setAttribute("aria-label", `Of ${bytes(memory.budget)}: ${bytes(memory.live)} held by requests, ${bytes(memory.kept)} kept for the next ones, ${bytes(memory.free)} free, ${bytes(none)} not created`);
}

// -- slots -----------------------------------------------------------------------------------------------------------

let scale = 0;

/** Tokens that the width of a bar stands for. It shrinks only when that is worth it: bars should not jump. */
function rescale(wanted, longest) {
  let fit = 64;
  while (fit < wanted) fit *= 2;
  if (fit > scale || fit < scale / 2) scale = fit;
  scale = Math.min(scale, longest);
}

function draw_axis(longest) {
  const axis = by("axis"), step = scale / 4, ticks = [0, 1, 2, 3, 4].map((i) => Math.round(i * step));
  if (axis.dataset.scale === String(scale)) return;
  axis.dataset.scale = scale;
  axis.replaceChildren(...ticks.map((tick) => {
    const label = document.createElement("span");
    label.textContent = whole(tick);
    label.style.left = `${100 * tick / scale}%`;
    return label;
  }));
  by("slot-list").classList.toggle("goes-on", scale < longest);
}

function new_slot(number) {
  const row = document.createElement("li");
  row.className = "slot";
  row.innerHTML = '<span class="number"></span><span class="track" role="img"><i class="mapped"></i><i class="needed"></i><i class="shared"></i></span><span class="tokens"></span>';
  row.querySelector(".number").textContent = number;
  return row;
}

function draw_slots(now) {
  const per = now.bytes_per_token, list = by("slot-list");
  rescale(Math.max(1, ...now.slots.map(([, , mapped]) => mapped / per)), now.max_model_len);
  draw_axis(now.max_model_len);
  const sums = { needed: 0, shared: 0, surplus: 0 };
  now.slots.forEach(([live, tokens, mapped, needed, shared], number) => {
    const row = list.children[number] ?? list.appendChild(new_slot(number));
    const width = (size) => `${Math.min(100, 100 * size / per / scale)}%`;
    row.classList.toggle("idle", !live);
    row.querySelector(".mapped").style.width = width(mapped);
    row.querySelector(".needed").style.width = width(needed);
    row.querySelector(".shared").style.width = width(Math.min(shared, needed));
    row.querySelector(".tokens").textContent = live ? whole(tokens) : "idle";
    row.querySelector(".track").setAttribute("aria-label", live
      ? `Slot ${number}: ${whole(tokens)} tokens; ${bytes(needed)} needed, ${bytes(mapped)} mapped, ${bytes(shared)} shared`
      : `Slot ${number}: idle, ${bytes(mapped)} still mapped`);
    if (live) { sums.needed += needed; sums.shared += shared; sums.surplus += Math.max(0, mapped - needed); }
  });
  for (const [name, size] of Object.entries(sums)) text(name, bytes(size));
  const more = now.num_slots - now.slots.length;
  text("slots-text", `each reserves addresses for ${whole(now.max_model_len)} tokens, ${bytes(per * now.max_model_len)}` + (more > 0 ? `; ${more} more are not shown` : ""));
}

// -- requests --------------------------------------------------------------------------------------------------------

/** 0, 1, 2, 5 becomes "0–2, 5". */
function ranges(numbers) {
  const runs = [];
  for (const n of numbers.sort((a, b) => a - b)) {
    if (runs.length && runs[runs.length - 1][1] === n - 1) runs[runs.length - 1][1] = n;
    else runs.push([n, n]);
  }
  return runs.map(([a, b]) => a === b ? `${a}` : `${a}–${b}`).join(", ");
}

function draw_requests(now) {
  const found = new Map();
  for (const [id, , slot, prompt, computed, output, years] of now.requests) {
    const request = found.get(id) ?? { id, slots: [], prompt, computed: 0, output: 0, years };
    if (slot !== null) request.slots.push(slot);
    request.computed = Math.max(request.computed, computed);
    request.output += output;
    found.set(id, request);
  }
  const body = by("request-list"), requests = [...found.values()].slice(0, 24);
  while (body.rows.length > requests.length) body.deleteRow(-1);
  requests.forEach((request, i) => {
    let row = body.rows[i];
    if (!row) {
      row = body.insertRow();
      for (let n = 0; n < 5; n++) row.insertCell();
    }
    const waits = !request.slots.length, reads = !waits && request.computed < request.prompt;
    const cells = [
      request.id, waits ? "waits" : ranges(request.slots),
      reads ? `${whole(request.computed)} of ${whole(request.prompt)}` : whole(request.prompt),
      whole(request.output), age(request.years),
    ];
    cells.forEach((value, n) => { if (row.cells[n].textContent !== value) row.cells[n].textContent = value; });
    row.cells[0].title = request.id;
    row.cells[1].className = waits ? "waits" : "";
  });
  const ended = Object.values(now.ended).reduce((a, b) => a + b, 0);
  text("requests-text", `${whole(ended)} ended, ${whole(now.generated_tokens)} tokens generated, ${whole(now.preemptions)} preemptions`);
  by("no-requests").hidden = requests.length > 0;
}

// -- the loop --------------------------------------------------------------------------------------------------------

function status(kind, words) {
  by("status").className = kind;
  text("status", words);
}

function show(data) {
  columns = data.columns;
  const first = data.points.length ? data.points[0][0] : next;
  if (first < next) points = [];
  points = points.concat(data.points);
  if (points.length) {
    next = points[points.length - 1][0] + 1;
    const at = columns.indexOf("time"), oldest = points[points.length - 1][at] - LONGEST;
    points = points.filter((point) => point[at] >= oldest);
  }
  text("model", data.model);
  document.title = `${data.model} · vattention`;
  document.querySelectorAll(".vital").forEach(draw_vital);
  const now = data.now;
  if (now) {
    text("running", whole(now.running));
    text("waiting", whole(now.waiting));
    draw_memory(now.memory);
    draw_slots(now);
    draw_requests(now);
  }
  if (data.up) status("good", "live"); else status("bad", "the engine has stopped");
}

async function poll() {
  try {
    const answer = await fetch(`dashboard/data?after=${next}`, { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(answer.status);
    show(await answer.json());
    missed = 0;
  } catch {
    missed++;
    if (missed > 2) { status("bad", "no answer"); next = 0; }
  }
}

async function run() {
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((done) => setTimeout(done, PERIOD));
  }
}

run();
