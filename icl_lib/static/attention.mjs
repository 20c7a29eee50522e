// One head of softmax attention over tokens in the plane, and the edits that its tokens make, one at a time.
//
// Keys, queries and values are the tokens themselves, so α = softmax(⟨c, x⟩ / √2) and a₀ = x. As in playground.mjs.

import {
  times, plus, minus, outer, norm, tidy, number, pair, scientific, make, label, Plane, handle, matrix,
} from "./plane.mjs";

const MOST = 8;
const REACH = 3.2;

/** What the head reads at `query`. Of each token: its weight α, its rate among the tokens so far, a = A(c₁ … cᵢ, x). */
function read(tokens, query, uniform) {
  const scores = [query, ...tokens].map((t) => (uniform ? 0 : (t[0] * query[0] + t[1] * query[1]) / Math.SQRT2));
  const parts = scores.map((score) => Math.exp(score - Math.max(...scores)));
  const all = parts.reduce((sum, part) => sum + part);
  let [sofar, a] = [parts[0], query];
  const steps = tokens.map((token, i) => {
    const rate = parts[i + 1] / (sofar += parts[i + 1]);
    a = plus(a, minus(token, a).map((x) => rate * x));
    return { weight: parts[i + 1] / all, rate, a };
  });
  return { steps, a };
}

/** Everything the widget shows, from its state; `edit` is null where the theorem does not apply (a₀ = 0). */
export function attend({ W, tokens, query, other, uniform }) {
  const { steps, a } = read(tokens, query, uniform);
  const target = times(W, a);
  if (norm(query) === 0) return { steps, a, target, edit: null };
  const size = query[0] * query[0] + query[1] * query[1];
  const left = times(W, minus(a, query));
  const right = query.map((x) => x / size);
  const edit = outer(left, right);
  // The steps: gradient descent on the loss of one token after the other, ½‖U a₀ − W v‖², at the rate α/‖a₀‖².
  let U = W;
  for (const [i, step] of steps.entries()) {
    const miss = (V) => minus(times(V, query), times(W, tokens[i]));
    const slope = outer(miss(U), query);
    const moved = U.map((row, k) => minus(row, slope[k].map((x) => (step.rate / size) * x)));
    const loss = (V) => norm(miss(V)) ** 2 / 2;
    const length = norm(minus(moved.flat(), U.flat()));
    Object.assign(step, { before: loss(U), after: loss(moved), length, output: times(moved, query) });
    U = moved;
  }
  for (const [i, step] of steps.entries()) step.end = norm(minus(times(U, query), times(W, tokens[i]))) ** 2 / 2;
  const edited = W.map((row, i) => plus(row, edit[i]));
  const [there, wanted] = [times(edited, other), times(W, read(tokens, other, uniform).a)];
  const off = (M) => norm(minus(M.flat(), edited.flat()));
  const residuals = { output: norm(minus(times(edited, query), target)), steps: off(U), other: norm(minus(there, wanted)) };
  return { steps, a, target, edit, left, right, there, wanted, residuals };
}

const NAMES = ["W", "tokens", "query", "other", "uniform"];
const HINT = "drag, or use the arrow keys (with Shift in small steps)";

function render({ model, el }) {
  const state = () => Object.fromEntries(NAMES.map((name) => [name, model.get(name)]));
  const start = state();
  const set = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };
  const within = (v) => tidy(v.map((x) => Math.min(Math.max(x, -REACH + 0.2), REACH - 0.2)));
  const input = new Plane("What the head reads: tokens, query x", REACH);
  const output = new Plane("What the layer outputs for x, token by token", 1);
  const [rays, targets] = [input, output].map((plane) => plane.svg.appendChild(make("svg:g")));
  const drawn = [[input, "aC"], [output, "a"], [output, "new"], [output, "gap"]];
  const arrows = Object.fromEntries(drawn.map(([plane, name]) => [name, plane.arrow(`icl-${name}`)]));
  const trails = [input, output].map((plane) => plane.svg.appendChild(make("svg:g", { class: "icl-trail" })));
  const place = {};
  const queries = [["other", "x′", "another query", "icl-other"], ["query", "x", "the query", "icl-a"]];
  for (const [name, text, words, kind] of queries) {
    const move = (v) => set({ [name]: within(v) });
    place[name] = handle(input, kind, `${text}, ${words}; ${HINT}`, move, () => model.get(name));
    place[name].node.append(make("svg:text", { y: -13, "aria-hidden": true }, text));
  }
  let places = [];
  let chosen = null; // the token that is removed next
  const remove = (i) => {
    const tokens = model.get("tokens").filter((_, k) => k !== i);
    if (tokens.length) set({ tokens });
  };
  const rebuild = (count) => {
    while (places.length > count) places.pop().node.remove();
    while (places.length < count) {
      const i = places.length;
      const move = (v) => set({ tokens: model.get("tokens").map((token, k) => (k === i ? within(v) : token)) });
      const name = `token ${i + 1}; ${HINT}; Delete removes it`;
      const each = handle(input, "icl-token", name, move, () => model.get("tokens")[i]);
      each.node.append(make("svg:text", { y: 4, "aria-hidden": true }, String(i + 1)));
      each.node.addEventListener("focus", () => ((chosen = i), draw()));
      each.node.addEventListener("keydown", (event) => ["Delete", "Backspace"].includes(event.key) && remove(i));
      places.push(each);
    }
  };

  const button = (text, press) => {
    const node = make("button", { type: "button" }, text);
    node.addEventListener("click", press);
    return node;
  };
  const add = button("Add a token", () => {
    const tokens = model.get("tokens");
    const angle = 2.4 * tokens.length; // far from the last ones
    set({ tokens: [...tokens, tidy([2.2 * Math.cos(angle), 2.2 * Math.sin(angle)])] });
  });
  const take = button("", () => remove(chosen ?? model.get("tokens").length - 1));
  const reset = button("Start", () => set(start));
  const toggle = make("input", { type: "checkbox", role: "switch", "aria-label": "uniform attention" });
  toggle.addEventListener("change", () => set({ uniform: toggle.checked }));
  const controls = make(
    "div", { class: "icl-controls" },
    make("label", { class: "icl-switch" }, toggle, " uniform attention"),
    make("span", { class: "icl-presets" }, add, take, reset));
  const table = make("table", { class: "icl-steps" });
  const edit = make("div", { class: "icl-edit" });
  const facts = make("div", { class: "icl-facts" });

  const draw = () => {
    const now = state();
    const seen = attend(now);
    const { W, tokens, query, other } = now;
    if (chosen !== null && chosen >= tokens.length) chosen = null;
    rebuild(tokens.length);
    places.forEach((each, i) => each(tokens[i]));
    place.query(query);
    place.other(other);
    toggle.checked = now.uniform;
    add.disabled = tokens.length >= MOST;
    take.disabled = tokens.length === 1;
    take.textContent = `Remove token ${(chosen ?? tokens.length - 1) + 1}`;
    el.classList.toggle("icl-undefined", !seen.edit);

    rays.replaceChildren(...tokens.map((token, i) => {
      const [[x, y], [u, v]] = [input.at(query), input.at(token)];
      return make("svg:path", { class: "icl-ray", d: `M${x} ${y}L${u} ${v}`, "stroke-width": 1 + 13 * seen.steps[i].weight });
    }));
    const trail = (group, plane, points) => {
      const at = points.map((v) => plane.at(v));
      const dots = at.map(([cx, cy]) => make("svg:circle", { cx, cy, r: 3.5 }));
      group.replaceChildren(make("svg:path", { d: `M${at.map((p) => p.join(" ")).join("L")}` }), ...dots);
    };
    trail(trails[0], input, [query, ...seen.steps.map(({ a }) => a)]);
    input.setArrow(arrows.aC, [0, 0], seen.a, "A(C, x)", true); // tokens are beyond the tip

    const images = tokens.map((token) => times(W, token));
    const shown = [...images, times(W, query), seen.target, seen.there ?? [0, 0], seen.wanted ?? [0, 0]];
    output.scale(1.15 * Math.max(...shown.flat().map(Math.abs), 1));
    targets.replaceChildren(...images.map((v, i) => {
      const [x, y] = output.at(v);
      const parts = [make("svg:circle", { r: 9 }), make("svg:text", { y: 4 }, String(i + 1))];
      return make("svg:g", { class: "icl-image", transform: `translate(${x} ${y})` }, ...parts);
    }));
    output.setArrow(arrows.a, [0, 0], times(W, query), "W x", times(W, query)[1] < seen.target[1]);
    output.setArrow(arrows.new, [0, 0], seen.target, "W A", true);
    if (seen.edit) trail(trails[1], output, [times(W, query), ...seen.steps.map((step) => step.output)]);
    arrows.gap.group.style.display = "none";
    const gap = seen.edit && seen.residuals.other * output.unit > 1;
    if (gap) output.setArrow(arrows.gap, seen.there, seen.wanted, "gap at x′");

    const cells = (tag, texts) => make("tr", {}, ...texts.map((text) => {
      const cell = make(tag);
      cell.innerHTML = text;
      return cell;
    }));
    const rows = seen.steps.map(({ weight, rate, before, after, end, length }, i) =>
      cells("td", [i + 1, ...[weight, rate, before, after, end, length].map((x) => (x === undefined ? "–" : number(x)))]));
    const head = ["token", "α", "rate", "its loss before", "after its step", "at the end", "‖step‖"];
    table.replaceChildren(make("thead", {}, cells("th", head)), make("tbody", {}, ...rows));

    const fact = (name, text, value, kind) => {
      const shown = make("output", kind ? { [`data-${kind}`]: seen.residuals?.[kind] } : {});
      shown.innerHTML = value;
      facts.append(make("div", { class: name }, label(make("span"), text, "sub"), shown));
    };
    facts.replaceChildren();
    fact("icl-aC", "A(C, x)", pair(seen.a));
    if (!seen.edit) {
      const words = "x = 0: there is no such edit, as every matrix maps 0 to 0. Move x away from the origin.";
      return edit.replaceChildren(make("p", { class: "icl-message", role: "alert" }, words));
    }
    edit.replaceChildren(
      make("span", { class: "icl-term" }, "ΔW ="),
      matrix([...seen.left.map((x) => [x])], "W (A(C, x) − x)"),
      matrix([seen.right], "x<sup>⊤</sup> / ‖x‖²"),
      make("span", { class: "icl-term" }, "="),
      matrix(seen.edit, "rank one", true));
    fact("icl-residual", "‖(W + ΔW) x − W A(C, x)‖", scientific(seen.residuals.output), "output");
    fact("icl-residual", "‖W + steps − (W + ΔW)‖", scientific(seen.residuals.steps), "steps");
    fact("icl-wrong", "‖(W + ΔW) x′ − W A(C, x′)‖", scientific(seen.residuals.other), "other");
  };

  el.classList.add("icl-attention");
  el.setAttribute("data-lm-suppress-shortcuts", "true"); // the arrow keys go to the handles, not to JupyterLab
  const scroll = make("div", { class: "icl-scroll" }, table);
  el.replaceChildren(make("div", { class: "icl-planes" }, input.node, output.node), controls, scroll, edit, facts);
  for (const name of NAMES) model.on(`change:${name}`, draw);
  draw();
  return () => NAMES.forEach((name) => model.off(`change:${name}`, draw));
}

export default { render, attend };
