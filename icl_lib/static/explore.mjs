// The controls of explore() over frames that were drawn when the page was built.
//
// The state is {controls: [{label, kind, options, at}], frames: [html, …], order: [frame of each combination, the
// last control fastest]}. The frame shown without JavaScript is already in the page: its place in `frames` is null.
// Conventions as in playground.mjs: no imports, `export default` as the last statement.

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

let groups = 0; // radio buttons need a name of their own

const KINDS = {
  slider({ label, options, at }, change) {
    const places = { min: 0, max: options.length - 1, step: 1, value: at };
    const range = make("input", { type: "range", ...places, "aria-label": label, "aria-valuetext": options[at] });
    const shown = make("output", {}, options[at]);
    range.addEventListener("input", () => {
      shown.textContent = options[range.value];
      range.setAttribute("aria-valuetext", options[range.value]);
      change(Number(range.value));
    });
    // Room for the longest value, so that the slider keeps its length while it moves.
    shown.style.minWidth = `${Math.max(...options.map((text) => text.length))}ch`;
    return make("label", { class: "icl-slider" }, make("span", {}, label), range, shown);
  },
  choice({ label, options, at }, change) {
    if (options.length > 4 || options.join("").length > 48) {
      const items = options.map((text, i) => make("option", { value: i }, text));
      const select = make("select", { "aria-label": label }, ...items);
      select.value = at;
      select.addEventListener("change", () => change(Number(select.value)));
      return make("label", {}, make("span", {}, label), select);
    }
    const name = `icl-choice-${groups++}`;
    const buttons = options.map((text, i) => {
      const radio = make("input", { type: "radio", name, value: i });
      radio.checked = i === at;
      radio.addEventListener("change", () => change(i));
      return make("label", {}, radio, make("span", {}, text));
    });
    const role = { role: "radiogroup", "aria-label": label };
    return make("div", { class: "icl-choice", ...role }, make("span", {}, label), ...buttons);
  },
  checkbox({ label, at }, change) {
    const box = make("input", { type: "checkbox" });
    box.checked = at === 1;
    box.addEventListener("change", () => change(box.checked ? 1 : 0));
    return make("label", { class: "icl-checkbox" }, box, make("span", {}, label));
  },
};

function render({ model, el, fallback }) {
  const [controls, order] = [model.get("controls"), model.get("order")];
  const frames = model.get("frames").map((html) => html ?? fallback.querySelector(".icl-frame").innerHTML);
  const at = controls.map((control) => control.at);
  const frame = make("div", { class: "icl-frame" });
  let shown = null;
  const show = () => {
    const next = order[at.reduce((sum, i, k) => sum * controls[k].options.length + i, 0)];
    if (next === shown) return;
    // A frame that is lower than the last one must not make the page jump under the reader's hand.
    frame.style.minHeight = `${Math.max(parseFloat(frame.style.minHeight) || 0, frame.offsetHeight)}px`;
    frame.innerHTML = frames[(shown = next)];
    frame.dataset.frame = next;
    if (frame.querySelector(".math")) window.MathJax?.typesetPromise?.([frame]);
  };
  const nodes = controls.map((control, k) => KINDS[control.kind](control, (i) => ((at[k] = i), show())));
  el.classList.add("icl-explore");
  el.replaceChildren(make("div", { class: "icl-controls" }, ...nodes), frame);
  show();
  window.addEventListener("resize", () => (frame.style.minHeight = ""));
}

export default { render };
