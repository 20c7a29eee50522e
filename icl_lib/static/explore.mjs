// The controls of explore(), and the frames that were drawn when the page was built.
//
// The state is {controls: [{label, kind, options, at}], frames: [html, …], order: [frame of each combination, the
// last control fastest]}. In `frames`, null stands for the frame shown without JavaScript, which is in the page already.
// As in playground.mjs: no imports, and `export default` as the last statement.

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

let groups = 0; // each group of radio buttons needs its own name

/** A text for screen readers: the alternative texts of the pictures below a node, or else its own text. */
const words = (node) => {
  const pictures = [...node.querySelectorAll("[role=img], img")];
  const texts = pictures.map((picture) => picture.getAttribute("aria-label") ?? picture.getAttribute("alt") ?? "");
  return texts.filter(Boolean).join(" ") || node.textContent;
};

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
    // There is room for the longest value, so the slider does not change its length while it moves.
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
  // Hidden from sight. A screen reader reads aloud what changes in it.
  const live = make("div", { class: "icl-live", "aria-live": "polite" });
  let [shown, timer] = [null, null];
  const show = () => {
    const next = order[at.reduce((sum, i, k) => sum * controls[k].options.length + i, 0)];
    if (next === shown) return;
    const first = shown === null;
    // A frame lower than the last one must not make the page jump while the reader moves a control.
    frame.style.minHeight = `${Math.max(parseFloat(frame.style.minHeight) || 0, frame.offsetHeight)}px`;
    frame.innerHTML = frames[(shown = next)];
    frame.dataset.frame = next;
    // Only the frame at which a slider comes to rest is announced, and not the one that the page starts with.
    clearTimeout(timer);
    if (!first) timer = setTimeout(() => (live.textContent = words(frame)), 300);
  };
  const nodes = controls.map((control, k) => KINDS[control.kind](control, (i) => ((at[k] = i), show())));
  el.classList.add("icl-explore");
  el.replaceChildren(make("div", { class: "icl-controls" }, ...nodes), frame, live);
  show();
  window.addEventListener("resize", () => (frame.style.minHeight = ""));
}

export default { render };
