"use strict";
// Errors are kept where a test can see them.
window.addEventListener("error", (event) => {
  document.documentElement.dataset.error = event.message;
});

const SVG = "http://www.w3.org/2000/svg";

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

function readable(svg) {
  const lines = JSON.parse(svg.dataset.lines).filter((line) => line.x.length);
  const [x0, x1, left, right] = svg.dataset.x.split(",").map(Number);
  const [y0, y1, bottom, top, log] = svg.dataset.y.split(",").map(Number);
  const readout = svg.parentElement.querySelector(".readout");
  const still = readout.textContent;
  const scale = log ? Math.log10 : (v) => v;
  const atX = (v) => left + (v - x0) / (x1 - x0) * (right - left);
  const atY = (v) => bottom + (scale(v) - scale(y0)) / (scale(y1) - scale(y0)) * (top - bottom);
  let marks = null;
  let at = null;

  function clear() {
    if (marks) marks.remove();
    marks = null;
    readout.textContent = still;
  }

  function show(x) {
    clear();
    at = Math.min(x1, Math.max(x0, x));
    marks = document.createElementNS(SVG, "g");
    const said = [];
    lines.forEach((line, number) => {
      const i = nearest(line.x, at);
      const px = atX(line.x[i]);
      if (!number) {
        const cursor = document.createElementNS(SVG, "line");
        for (const [name, value] of Object.entries({ x1: px, x2: px, y1: bottom, y2: top, class: "cursor" })) {
          cursor.setAttribute(name, value);
        }
        marks.append(cursor);
        said.push(`epoch ${Number(line.x[i].toPrecision(4))}, step ${Math.round(line.x[i] * line.each)}`);
      }
      const dot = document.createElementNS(SVG, "circle");
      dot.setAttribute("cx", px);
      dot.setAttribute("cy", atY(line.y[i]));
      dot.setAttribute("r", 4);
      const group = document.createElementNS(SVG, "g");
      group.setAttribute("class", svg.querySelectorAll(".of-run")[number].getAttribute("class"));
      group.append(dot);
      marks.append(group);
      said.push(lines.length > 1 ? `${line.label} ${line.y[i]}` : `${line.y[i]}`);
    });
    svg.append(marks);
    readout.textContent = said.join(" · ");
  }

  function pointed(event) {
    const box = svg.getBoundingClientRect();
    const px = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    show(x0 + (px - left) / (right - left) * (x1 - x0));
  }

  svg.addEventListener("pointermove", pointed);
  svg.addEventListener("pointerdown", pointed);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") clear(); });
  svg.addEventListener("blur", clear);
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !lines.length) return;
    event.preventDefault();
    const xs = lines[0].x;
    show(xs[at === null ? xs.length - 1 : Math.min(xs.length - 1, Math.max(0, nearest(xs, at) + by))]);
  });
}

// The first picture stays, the slider chooses the one beside it.
function slide(frames) {
  const figures = [...frames.children];
  if (figures.length < 3) return;
  const input = document.createElement("input");
  Object.assign(input, { type: "range", min: 1, max: figures.length - 1, step: 1, value: figures.length - 1 });
  const label = document.createElement("label");
  label.className = "slider";
  const name = document.createElement("span");
  label.append("Compare the first with ", input, name);
  function choose() {
    figures.forEach((figure, i) => { figure.hidden = i > 0 && i !== Number(input.value); });
    name.textContent = figures[input.value].querySelector("figcaption").textContent;
  }
  input.addEventListener("input", choose);
  frames.before(label);
  frames.classList.add("slid");
  choose();
}

document.querySelectorAll("svg[data-lines]").forEach(readable);
document.querySelectorAll(".frames").forEach(slide);
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
});
document.documentElement.dataset.ready = document.querySelectorAll("svg[data-lines]").length;
