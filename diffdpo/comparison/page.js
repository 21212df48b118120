"use strict";
// Draws the curves of a comparison as SVG: one panel a metric, a line a run, runs of one colour differ by seed alone.
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#3b6fd4", "#d9682b", "#2a9d5c", "#b5368c", "#8a6d1d", "#6a4fc9", "#c0392b", "#138d90", "#5d6d7e", "#9aae07"];
const colorOf = (number) => COLORS[number % COLORS.length];
const dashOf = (number) => ["", "6 3", "2 3"][Math.floor(number / COLORS.length) % 3];
const W = 460, H = 250, LEFT = 56, RIGHT = 12, TOP = 10, BOTTOM = 30;
const state = { hidden: new Set(), smooth: 0, time: false, log: false };

function element(name, attributes = {}, parent = null, text = null) {
  const svg = ["svg", "path", "line", "text", "circle", "g"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}

// values smoothed as TensorBoard does: an exponential mean, corrected for its start
function smoothed(values, weight) {
  let mean = 0, count = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    count += 1;
    return mean / (1 - Math.pow(weight, count));
  });
}

// minutes since a run's start at a step: between two known steps on the straight line
function minutesAt(run, step) {
  const [steps, minutes] = run.minutes;
  const next = steps.findIndex((known) => known >= step);
  if (next < 0) return minutes.length ? minutes[minutes.length - 1] : step;
  if (next === 0 || steps[next] === step) return minutes[next];
  const share = (step - steps[next - 1]) / (steps[next] - steps[next - 1]);
  return minutes[next - 1] + share * (minutes[next] - minutes[next - 1]);
}

function linesOf(panel) {
  return panel.curves.map((curve, index) => ({ curve, index, run: data.runs[index] }))
    .filter(({ curve, index }) => curve && curve[0].length && !state.hidden.has(index))
    .map(({ curve, index, run }) => {
      const y = panel.dots ? curve[1] : smoothed(curve[1], state.smooth);
      const points = curve[0].map((step, i) => ({ step, x: state.time ? minutesAt(run, step) : step, y: y[i], raw: curve[1][i] }));
      return { run, index, points: state.log ? points.filter((point) => point.y > 0) : points };
    }).filter((line) => line.points.length);
}

function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count, power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: 2 * count + 2 }, (_, i) => (first + i) * step).filter((tick) => tick <= high + step * 1e-6);
}

function shown(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}

function draw(panel, figure) {
  figure.querySelectorAll("svg, .tip, .none").forEach((old) => old.remove());
  const lines = linesOf(panel);
  if (!lines.length) return element("p", { class: "none note" }, figure, "no value of the runs that are shown");
  const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": panel.title }, figure);
  const xs = lines.flatMap((line) => line.points.map((point) => point.x));
  const ys = lines.flatMap((line) => line.points.map((point) => state.log ? Math.log10(point.y) : point.y));
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  // of a curve that is flat but for rounding, rounding is not shown
  const room = y1 - y0 > 1e-9 * Math.abs(y0) ? 0.05 * (y1 - y0) : Math.abs(y0) * 0.1 || 0.5;
  [y0, y1] = [y0 - room, y1 + room];
  const px = (x) => LEFT + (x - x0) / (x1 - x0) * (W - LEFT - RIGHT);
  const py = (y) => H - BOTTOM - ((state.log ? Math.log10(y) : y) - y0) / (y1 - y0) * (H - TOP - BOTTOM);
  for (const tick of ticks(y0, y1, 5)) {
    const value = state.log ? Math.pow(10, tick) : tick;
    element("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: py(value), y2: py(value) }, svg);
    element("text", { x: LEFT - 6, y: py(value) + 4, "text-anchor": "end" }, svg, shown(value));
  }
  for (const tick of ticks(x0, x1, 6)) element("text", { x: px(tick), y: H - 14, "text-anchor": "middle" }, svg, shown(tick));
  element("text", { x: W - RIGHT, y: H - 2, "text-anchor": "end" }, svg, state.time ? "minutes" : "step");
  for (const { run, points } of lines) {
    const path = points.map((point, i) => `${i ? "L" : "M"}${px(point.x).toFixed(1)} ${py(point.y).toFixed(1)}`).join("");
    element("path", { class: "curve", d: path, stroke: colorOf(run.color), "stroke-dasharray": dashOf(run.color) }, svg);
    if (panel.dots || points.length === 1) {
      for (const point of points) element("circle", { cx: px(point.x), cy: py(point.y), r: 3, fill: colorOf(run.color) }, svg);
    }
  }
  return tooltip(figure, svg, lines, px, py);
}

function tooltip(figure, svg, lines, px, py) {
  const tip = element("div", { class: "tip" }, figure), cursor = element("line", { class: "grid", y1: TOP, y2: H - BOTTOM }, svg);
  cursor.style.display = "none";
  svg.addEventListener("pointerleave", () => { tip.style.display = "none"; cursor.style.display = "none"; });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * W;
    const nearest = lines.map((line) => ({
      line, point: line.points.reduce((best, point) => Math.abs(px(point.x) - at) < Math.abs(px(best.x) - at) ? point : best),
    }));
    const x = px(nearest.reduce((best, one) => Math.abs(px(one.point.x) - at) < Math.abs(px(best.point.x) - at) ? one : best).point.x);
    tip.replaceChildren();
    for (const { line, point } of nearest) {
      const row = element("div", {}, tip);
      element("i", { class: "dot", style: `background:${colorOf(line.run.color)}` }, row);
      row.append(`${line.run.name}  ${shown(point.raw)}  (step ${point.step})`);
    }
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.display = "";
    tip.style.display = "block";
    tip.style.left = `${Math.min(x / W * box.width + 12, Math.max(0, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${box.height * 0.15}px`;
  });
}

const figures = [];
function redraw() { for (const { panel, figure, section } of figures) if (section.open) draw(panel, figure); }

function build() {
  const controls = document.getElementById("controls"), curves = document.getElementById("curves");
  data.runs.forEach((run, index) => {
    const button = element("button", { type: "button", title: `${run.state}; click to hide or show` }, controls);
    element("i", { class: "dot", style: `background:${colorOf(run.color)}` }, button);
    button.append(run.name);
    button.addEventListener("click", () => {
      state.hidden.has(index) ? state.hidden.delete(index) : state.hidden.add(index);
      button.classList.toggle("off");
      redraw();
    });
  });
  const smooth = element("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0 }, element("label", {}, controls, "smooth "));
  smooth.addEventListener("input", () => { state.smooth = Number(smooth.value); redraw(); });
  for (const [key, text] of [["time", " over minutes"], ["log", " log scale"]]) {
    const label = element("label", {}, controls), box = element("input", { type: "checkbox" }, label);
    label.append(text);
    box.addEventListener("change", () => { state[key] = box.checked; redraw(); });
  }
  for (const part of data.sections) {
    const section = element("details", part.open ? { open: "" } : {}, curves);
    element("summary", {}, section, part.title);
    const panels = element("div", { class: "panels" }, section);
    for (const panel of part.panels) {
      const figure = element("figure", {}, panels);
      element("figcaption", {}, figure, panel.title);
      figures.push({ panel, figure, section });
    }
    section.addEventListener("toggle", redraw);
  }
  document.querySelectorAll(".dot[data-color]").forEach((dot) => { dot.style.background = colorOf(Number(dot.dataset.color)); });
  redraw();
}

build();
