// Two dimensions, for the widgets: vectors and matrices of them, planes with arrows, points to drag, matrices in text.
//
// As in the other modules, the last statement must be `export default`.

export const HALF = 150; // half the side of a panel, in SVG units

export const times = (M, v) => M.map((row) => row[0] * v[0] + row[1] * v[1]);
export const plus = (u, v) => u.map((x, i) => x + v[i]);
export const minus = (u, v) => u.map((x, i) => x - v[i]);
export const outer = (u, v) => u.map((x) => v.map((y) => x * y));
export const norm = (v) => Math.hypot(...v);
export const circle = (n) => Array.from({ length: n }, (_, i) => (2 * Math.PI * i) / n).map((t) => [Math.cos(t), Math.sin(t)]);
export const tidy = (v) => v.map((x) => Math.round(x * 1e9) / 1e9); // ten steps of 0.1 make exactly 1

export const number = (x, digits = 2) => x.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
export const pair = (v) => `(${v.map((x) => number(x)).join(", ")})`;
export const scientific = (x) => {
  if (x === 0) return "0";
  if (Math.abs(x) >= 0.01) return number(x, 3);
  const [mantissa, exponent] = x.toExponential(1).split("e");
  return `${mantissa.replace("-", "−")} × 10<sup>${exponent.replace("-", "−")}</sup>`;
};

export const make = (tag, attributes = {}, ...children) => {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
// "W a_C" with a subscript C, for the labels of the drawings and of the text.
export const label = (node, text, tag) => {
  node.replaceChildren();
  for (const part of text.split(/(_\w|₀)/)) {
    if (part === "₀" || part[0] === "_") {
      const low = tag === "sub" ? make("sub") : make("svg:tspan", { dy: 4, "font-size": "72%" });
      low.textContent = part === "₀" ? "0" : part[1];
      node.append(low);
      if (tag !== "sub") node.append(make("svg:tspan", { dy: -4 }, "\u200b"));
    } else node.append(part);
  }
  return node;
};

export class Plane {
  constructor(title, reach) {
    const viewBox = `${-HALF} ${-HALF} ${2 * HALF} ${2 * HALF}`;
    this.svg = make("svg:svg", { viewBox, role: "group", "aria-label": title });
    this.node = make("div", { class: "icl-plane" }, make("p", {}, title), this.svg);
    this.grid = this.svg.appendChild(make("svg:path", { class: "icl-grid" }));
    this.svg.append(make("svg:path", { class: "icl-axes", d: `M${-HALF} 0H${HALF}M0 ${-HALF}V${HALF}` }));
    this.scale(reach);
  }
  scale(reach) {
    this.unit = HALF / reach;
    const step = reach > 20 ? 10 : reach > 8 ? 5 : 1;
    let lines = "";
    for (let x = step; x < reach; x += step) {
      for (const p of [x * this.unit, -x * this.unit]) lines += `M${p} ${-HALF}V${HALF}M${-HALF} ${p}H${HALF}`;
    }
    this.grid.setAttribute("d", lines);
  }
  at([x, y]) {
    return [x * this.unit, -y * this.unit];
  }
  ellipse(name) {
    return this.svg.appendChild(make("svg:path", { class: `icl-ellipse ${name}` }));
  }
  setEllipse(node, M) {
    const points = circle(72).map((v) => this.at(times(M, v)).map((x) => x.toFixed(1)).join(" "));
    node.setAttribute("d", `M${points.join("L")}Z`);
  }
  /** A line through the origin, across the whole panel. */
  setLine(node, v) {
    const [x, y] = this.at(v.map((component) => component / (norm(v) || 1)));
    const far = (2 * HALF) / this.unit;
    node.setAttribute("d", `M${-far * x} ${-far * y}L${far * x} ${far * y}`);
  }
  arrow(name) {
    const text = make("svg:text", { "aria-hidden": true });
    const [line, head] = [make("svg:path", { class: "icl-line" }), make("svg:path", { class: "icl-head" })];
    const group = this.svg.appendChild(make("svg:g", { class: `icl-arrow ${name}` }, line, head, text));
    return { group, line, head, text };
  }
  setArrow({ group, line, head, text }, from, to, name = "", below = false) {
    const [x0, y0] = this.at(from);
    const [x, y] = this.at(to);
    const length = Math.hypot(x - x0, y - y0);
    group.style.display = "";
    const [ux, uy] = length ? [(x - x0) / length, (y - y0) / length] : [0, 0];
    const tip = Math.min(10, length);
    const [bx, by] = [x - tip * ux, y - tip * uy];
    line.setAttribute("d", `M${x0} ${y0}L${bx} ${by}`);
    head.setAttribute("d", length < 1 ? "" : `M${x} ${y}L${bx - 5 * uy} ${by + 5 * ux}L${bx + 5 * uy} ${by - 5 * ux}Z`);
    label(text, name);
    // Beside the tip, away from the origin (or beside the middle of an arrow that starts elsewhere), within the panel.
    const half = name.replace(/_/g, "").length * 5.1;
    const away = 9 + half * Math.abs(uy);
    const [tx, ty] = norm(from) > 0
      ? [(x0 + x) / 2 - away * uy, (y0 + y) / 2 + away * ux + 5]
      : [x + (x < 0 ? -1 : 1) * (half + 12), y + (below ? 24 : -14)];
    const x1 = Math.min(Math.max(tx, half + 6 - HALF), HALF - half - 6);
    const y1 = Math.min(Math.max(ty, 18 - HALF), HALF - 8);
    text.setAttribute("x", x1.toFixed(1));
    text.setAttribute("y", y1.toFixed(1));
  }
}

/** A draggable tip. `move` gets the new plane coordinates, and whether they come from the pointer.
 * Returns a function that places the point; its `node` is the handle. */
export function handle(plane, name, text, move, current) {
  const role = { role: "slider", "aria-roledescription": "movable point", "aria-label": text };
  const node = make(
    "svg:g",
    { class: `icl-handle ${name}`, tabindex: 0, ...role },
    // a₀ has the wider grip, so that it can still be taken where a_C lies on it.
    make("svg:circle", { class: "icl-touch", r: name === "icl-a" ? 27 : 19 }),
    make("svg:circle", { class: "icl-ring", r: name === "icl-a" ? 20 : 14 }),
    make("svg:circle", { class: "icl-dot", r: 8 }),
  );
  plane.svg.append(node);
  let grip = null;
  const pointer = (event) => {
    const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(plane.svg.getScreenCTM().inverse());
    return [p.x / plane.unit, -p.y / plane.unit];
  };
  node.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    node.focus({ preventScroll: true });
    node.setPointerCapture(event.pointerId);
    grip = minus(current(), pointer(event));
  });
  node.addEventListener("pointermove", (event) => grip && move(plus(pointer(event), grip), true));
  for (const end of ["pointerup", "pointercancel"]) node.addEventListener(end, () => (grip = null));
  // Chromium applies CSS's touch-action to boxes, but not to the shapes of an SVG.
  node.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  node.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!way || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const step = event.shiftKey ? 0.02 : 0.1;
    move(plus(current(), way.map((x) => x * step)), false);
  });
  const place = (v) => {
    node.setAttribute("transform", `translate(${plane.at(v).join(" ")})`);
    node.setAttribute("aria-valuenow", number(norm(v)));
    node.setAttribute("aria-valuetext", `x ${number(v[0])}, y ${number(v[1])}`);
  };
  return Object.assign(place, { node });
}

export const matrix = (rows, caption, heat) => {
  const peak = Math.max(...rows.flat().map(Math.abs), 1e-300);
  const cells = rows.flat().map((x) => {
    const style = `--heat:${Math.round((60 * Math.abs(x)) / peak)}%`;
    return make("span", heat ? { class: x < 0 ? "icl-minus" : "icl-plus", style } : {}, number(x));
  });
  const columns = `grid-template-columns:repeat(${rows[0].length},auto)`;
  const grid = make("span", { class: "icl-cells", style: columns }, ...cells);
  const text = make("span", { class: "icl-caption" });
  text.innerHTML = caption;
  return make("span", { class: "icl-matrix" }, grid, text);
};

export default {
  HALF, times, plus, minus, outer, norm, circle, tidy, number, pair, scientific, make, label, Plane, handle, matrix,
};
