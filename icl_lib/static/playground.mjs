// The rank-one playground: (W + ΔW) a₀ = W a_C with ΔW = W δ a₀ᵀ / ‖a₀‖², by hand.
//
// One ES module with two hosts: anywidget where there is a kernel, mount.js on a page without one. The page bundles it
// into a classic script, so it must not import, and its last statement must be `export default`.

const HALF = 150; // half the side of a panel, in SVG units
const NEAR = 0.12; // dragged closer to the origin than this, a₀ becomes zero
const PRESETS = [
  ["Start", null, "Back to the first vectors"],
  ["δ = 0", { a: [1.5, 0.4], d: [0, 0] }, "The context changes nothing, and the edit is zero"],
  ["δ ∥ a₀", { a: [1.2, 0.6], d: [0.8, 0.4] }, "The context only stretches a₀"],
  ["δ ⊥ a₀", { a: [1.2, 0.6], d: [-0.8, 1.6] }, "The context turns a₀"],
  ["small a₀", { a: [0.2, 0.1], d: [0.9, 1.3] }, "The smaller a₀, the larger the edit"],
];

const times = (M, v) => M.map((row) => row[0] * v[0] + row[1] * v[1]);
const plus = (u, v) => u.map((x, i) => x + v[i]);
const minus = (u, v) => u.map((x, i) => x - v[i]);
const outer = (u, v) => u.map((x) => v.map((y) => x * y));
const norm = (v) => Math.hypot(...v);
const circle = (n) => Array.from({ length: n }, (_, i) => (2 * Math.PI * i) / n).map((t) => [Math.cos(t), Math.sin(t)]);
const tidy = (v) => v.map((x) => Math.round(x * 1e9) / 1e9); // ten steps of 0.1 make exactly 1

/** Everything the playground shows, from its state; `edit` is null where the theorem does not apply (a₀ = 0). */
export function evaluate({ W, a, d, applied }) {
  const target = times(W, plus(a, d));
  const without = times(W, a);
  if (norm(a) === 0) return { target, without, edit: null };
  const left = times(W, d);
  const right = a.map((x) => x / (a[0] * a[0] + a[1] * a[1]));
  const edit = outer(left, right);
  const det = edit[0][0] * edit[1][1] - edit[0][1] * edit[1][0];
  const size = norm(edit.flat());
  const rank = size === 0 ? 0 : Math.abs(det) <= 1e-12 * size * size ? 1 : 2;
  const edited = W.map((row, i) => plus(row, edit[i]));
  const result = applied ? times(edited, a) : without;
  return { target, without, left, right, edit, det, rank, edited, result, residual: norm(minus(result, target)) };
}

const number = (x, digits = 2) => x.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
const pair = (v) => `(${v.map((x) => number(x)).join(", ")})`;
const scientific = (x) => {
  if (x === 0) return "0";
  if (Math.abs(x) >= 0.01) return number(x, 3);
  const [mantissa, exponent] = x.toExponential(1).split("e");
  return `${mantissa.replace("-", "−")} × 10<sup>${exponent.replace("-", "−")}</sup>`;
};

const make = (tag, attributes = {}, ...children) => {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
// "W a_C" with a subscript C, for the labels of the drawings and of the text.
const label = (node, text, tag) => {
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

class Plane {
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

/** A draggable tip. `move` gets the new plane coordinates from the pointer or the arrow keys. */
function handle(plane, name, text, move, current) {
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
  node.addEventListener("pointermove", (event) => grip && move(plus(pointer(event), grip), NEAR));
  for (const end of ["pointerup", "pointercancel"]) node.addEventListener(end, () => (grip = null));
  // Chromium applies CSS's touch-action to boxes, but not to the shapes of an SVG.
  node.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  node.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!way || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const step = event.shiftKey ? 0.02 : 0.1;
    move(plus(current(), way.map((x) => x * step)), 0);
  });
  return (v) => {
    node.setAttribute("transform", `translate(${plane.at(v).join(" ")})`);
    node.setAttribute("aria-valuenow", number(norm(v)));
    node.setAttribute("aria-valuetext", `x ${number(v[0])}, y ${number(v[1])}`);
  };
}

const matrix = (rows, caption, heat) => {
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

function render({ model, el }) {
  const state = () => Object.fromEntries(["W", "a", "d", "applied"].map((name) => [name, model.get(name)]));
  const start = { a: model.get("a"), d: model.get("d") };
  const set = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };

  const reach = Math.max(2.6, 1.2 * Math.max(norm(start.a), norm(plus(start.a, start.d))));
  const input = new Plane("What the layer reads", reach);
  const output = new Plane("What the layer outputs", 1);
  const within = (v) => tidy(v.map((x) => (x * (reach - 0.15)) / Math.max(reach - 0.15, norm(v))));
  const unit = input.ellipse("icl-plain");
  const ellipses = [output.ellipse("icl-plain"), output.ellipse("icl-edited")];
  const fixed = [input, output].map((plane) => [plane, plane.ellipse("icl-fixed")]);
  const across = ([x, y]) => [-y, x]; // perpendicular
  const arrows = {
    delta: input.arrow("icl-delta"),
    a: input.arrow("icl-a"),
    aC: input.arrow("icl-aC"),
    Wa: output.arrow("icl-a"),
    WaC: output.arrow("icl-aC icl-goal"),
    new: output.arrow("icl-new"),
    gap: output.arrow("icl-gap"),
  };
  // Either vector moves by itself; δ is their difference.
  const moveA = (v, near) => {
    const { a, d } = state();
    const to = within(norm(v) <= near ? [0, 0] : v);
    set({ a: to, d: tidy(minus(plus(a, d), to)) });
  };
  const moveC = (v) => set({ d: tidy(minus(within(v), model.get("a"))) });
  const hint = "drag, or use the arrow keys (with Shift in small steps)";
  const at = { a: () => model.get("a"), aC: () => plus(model.get("a"), model.get("d")) };
  const placeA = handle(input, "icl-a", `a₀, the input without the context; ${hint}`, moveA, at.a);
  const placeC = handle(input, "icl-aC", `a_C, the input with the context; ${hint}`, moveC, at.aC);

  const toggle = make("input", { type: "checkbox", role: "switch", "aria-label": "apply ΔW" });
  toggle.addEventListener("change", () => set({ applied: toggle.checked }));
  const presets = PRESETS.map(([text, to, title]) => {
    const button = label(make("button", { type: "button", title }), text, "sub");
    button.addEventListener("click", () => set(to ?? { ...start, applied: true }));
    return button;
  });
  const note = make("p", { class: "icl-note" });
  note.innerHTML =
    "Dotted: the unit circle and its image under W. Green: its image under W + ΔW. Dashed: the line perpendicular to " +
    "a<sub>0</sub>, and its image. The edit does not move it.";
  const controls = make(
    "div", { class: "icl-controls" },
    make("label", { class: "icl-switch" }, toggle, " apply ΔW"), make("span", { class: "icl-presets" }, ...presets));
  const edit = make("div", { class: "icl-edit" });
  const facts = make("div", { class: "icl-facts" });
  const row = (name) => {
    const [term, value] = [make("span"), make("output")];
    facts.append(make("div", { class: name }, term, value));
    return (text, result) => (label(term, text, "sub"), (value.innerHTML = result), value);
  };
  const [goalRow, resultRow, residualRow] = ["icl-aC", "icl-new", "icl-residual"].map(row);

  // The edit comes and goes within 400 ms: W + part ΔW, where part runs from 0 to 1 or back. It closes the gap.
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let [part, aim, frame] = [null, null, 0];
  const shear = (seen, to) => {
    if (part === null || still.matches || !seen.edit) {
      cancelAnimationFrame(frame);
      part = to;
    }
    if (aim !== to && part !== to) {
      const [from, begin] = [part, performance.now()];
      const step = (time) => {
        const done = Math.min(1, Math.max(0, time - begin) / 400);
        part = from + (to - from) * done;
        drawEdited(evaluate(state()));
        if (done < 1) frame = requestAnimationFrame(step);
      };
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(step);
    }
    aim = to;
    drawEdited(seen);
  };
  const drawEdited = (seen) => {
    const mixed = seen.edit && state().W.map((row, i) => plus(row, seen.edit[i].map((x) => part * x)));
    const tip = seen.edit && times(mixed, state().a);
    ellipses[1].style.display = part ? "" : "none";
    arrows.new.group.style.display = arrows.gap.group.style.display = "none";
    if (part) {
      output.setEllipse(ellipses[1], mixed);
      output.setArrow(arrows.new, [0, 0], tip);
    }
    if (tip && norm(minus(seen.target, tip)) * output.unit > 1) output.setArrow(arrows.gap, tip, seen.target, "gap");
  };

  const draw = () => {
    const now = state();
    const { W, a, d, applied } = now;
    const seen = evaluate(now);
    const aC = plus(a, d);
    const origin = [0, 0];
    const spread = Math.max(...circle(12).map((v) => norm(times(W, v))));
    output.scale(1.08 * reach * spread || 1);
    toggle.checked = applied;
    placeA(a);
    placeC(aC);
    input.setEllipse(unit, [[1, 0], [0, 1]]);
    input.setArrow(arrows.a, origin, a, "a₀", a[1] < aC[1]);
    input.setArrow(arrows.aC, origin, aC, "a_C", aC[1] < a[1]);
    input.setArrow(arrows.delta, a, aC, norm(d) * input.unit > 34 && norm(a) ? "δ" : "");
    output.setEllipse(ellipses[0], W);
    el.classList.toggle("icl-off", !applied);
    el.classList.toggle("icl-undefined", !seen.edit);
    fixed.forEach(([plane, node], i) => plane.setLine(node, i ? times(W, across(a)) : across(a)));
    const low = seen.without[1] < seen.target[1];
    output.setArrow(arrows.WaC, origin, seen.target, applied && seen.edit ? "W a_C = (W+ΔW) a₀" : "W a_C", !low);
    output.setArrow(arrows.Wa, origin, seen.without, "W a₀", low);
    shear(seen, applied && seen.edit ? 1 : 0);

    goalRow("W a_C", pair(seen.target));
    if (!seen.edit) {
      const message = make("p", { class: "icl-message", role: "alert" });
      message.innerHTML =
        "<strong>a<sub>0</sub> = 0: there is no such edit.</strong> Every weight matrix maps 0 to 0, so no ΔW has " +
        "an effect here; the theorem needs a<sub>0</sub> ≠ 0. Drag a<sub>0</sub> away from the origin.";
      edit.replaceChildren(message);
      resultRow("(W + ΔW) a₀", "not defined");
      residualRow("‖(W + ΔW) a₀ − W a_C‖", "not defined").removeAttribute("data-residual");
      return;
    }
    const rank = `rank ${seen.rank} <span class="icl-quiet">det ${scientific(seen.det)}</span>`;
    edit.replaceChildren(
      label(make("span", { class: "icl-term" }), "ΔW =", "sub"),
      matrix(seen.left.map((x) => [x]), "W δ"),
      matrix([seen.right], "a<sub>0</sub><sup>⊤</sup> / ‖a<sub>0</sub>‖²"),
      make("span", { class: "icl-term" }, "="),
      matrix(seen.edit, rank, true),
    );
    const left = applied ? "(W + ΔW) a₀" : "W a₀";
    resultRow(left, pair(seen.result));
    residualRow(`‖${left} − W a_C‖`, scientific(seen.residual)).setAttribute("data-residual", seen.residual);
  };

  el.classList.add("icl-playground");
  el.setAttribute("data-lm-suppress-shortcuts", "true"); // the arrow keys go to the handles, not to JupyterLab
  el.replaceChildren(make("div", { class: "icl-planes" }, input.node, output.node), controls, edit, facts, note);
  const names = ["W", "a", "d", "applied"];
  for (const name of names) model.on(`change:${name}`, draw);
  draw();
  return () => names.forEach((name) => model.off(`change:${name}`, draw));
}

export default { render };
