// The rank-one playground: (W + ΔW) a₀ = W a_C with ΔW = W δ a₀ᵀ / ‖a₀‖², by hand.
//
// One ES module with two hosts: anywidget where there is a kernel, mount.js on a page without one. The page bundles it
// into a classic script, so it may import names only, and its last statement must be `export default`.

import {
  HALF, times, plus, minus, outer, norm, circle, tidy, number, pair, scientific, make, label, Plane, handle, matrix,
} from "./plane.mjs";

const NEAR = 0.12; // dragged closer to the origin than this, a₀ becomes zero
const PRESETS = [
  ["Start", null, "Back to the first vectors"],
  ["δ = 0", { a: [1.5, 0.4], d: [0, 0] }, "The context changes nothing, and the edit is zero"],
  ["δ ∥ a₀", { a: [1.2, 0.6], d: [0.8, 0.4] }, "The context only stretches a₀"],
  ["δ ⊥ a₀", { a: [1.2, 0.6], d: [-0.8, 1.6] }, "The context turns a₀"],
  ["small a₀", { a: [0.2, 0.1], d: [0.9, 1.3] }, "The smaller a₀, the larger the edit"],
];

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

function render({ model, el }) {
  const state = () => Object.fromEntries(["W", "a", "d", "applied"].map((name) => [name, model.get(name)]));
  const start = { W: model.get("W"), a: model.get("a"), d: model.get("d") };
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
  const moveA = (v, pointed) => {
    const { a, d } = state();
    const to = within(norm(v) <= (pointed ? NEAR : 0) ? [0, 0] : v);
    set({ a: to, d: tidy(minus(plus(a, d), to)) });
  };
  const moveC = (v) => set({ d: tidy(minus(within(v), model.get("a"))) });
  const hint = "drag, or use the arrow keys (with Shift in small steps)";
  const at = { a: () => model.get("a"), aC: () => plus(model.get("a"), model.get("d")) };
  const placeA = handle(input, "icl-a", `a₀, the input without the context; ${hint}`, moveA, at.a);
  const placeC = handle(input, "icl-aC", `a_C, the input with the context; ${hint}`, moveC, at.aC);

  // The columns of W are the images of the two unit vectors.
  const placeColumns = [0, 1].map((k) => {
    const current = () => model.get("W").map((row) => row[k]);
    const move = (v) => {
      const reached = HALF / output.unit;
      const to = tidy(v.map((x) => (x * reached) / Math.max(reached, 1.1 * norm(v))));
      set({ W: model.get("W").map((row, i) => row.map((x, j) => (j === k ? to[i] : x))) });
    };
    const place = handle(output, "icl-column", `column ${k + 1} of W; ${hint}`, move, current);
    // The scale follows W when the reader leaves its columns.
    place.node.addEventListener("blur", ({ relatedTarget }) => relatedTarget?.matches(".icl-column") || draw());
    return () => place(current());
  });

  const toggle = make("input", { type: "checkbox", role: "switch", "aria-label": "apply ΔW" });
  toggle.addEventListener("change", () => set({ applied: toggle.checked }));
  const presets = PRESETS.map(([text, to, title]) => {
    const button = label(make("button", { type: "button", title }), text, "sub");
    button.addEventListener("click", () => set(to ?? { ...start, applied: true }));
    return button;
  });
  const note = make("p", { class: "icl-note" });
  note.innerHTML =
    "Dotted: the unit circle and its image under W. Blue: its image under W + ΔW. Dashed: the line perpendicular to " +
    "a<sub>0</sub>, and its image. The edit does not move it. The two small points are the columns of W. " +
    "<strong>Challenge:</strong> move the arrows so that no edit of W can close the gap.";
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
    if (!el.querySelector(".icl-column:focus")) output.scale(1.08 * reach * spread || 1); // not under the pointer
    toggle.checked = applied;
    placeA(a);
    placeC(aC);
    placeColumns.forEach((place) => place());
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
      message.innerHTML = norm(d)
        ? "<strong>Found: with a<sub>0</sub> = 0 there is no such edit.</strong> Every weight matrix maps 0 to 0, so no " +
          "ΔW has an effect here, and the context has one. The theorem needs a<sub>0</sub> ≠ 0; this is its only condition."
        : "<strong>a<sub>0</sub> = a<sub>C</sub> = 0:</strong> the context changes nothing, and there is nothing to imitate.";
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
