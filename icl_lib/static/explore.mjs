// The controls of explore(), and the frames that were drawn when the page was built.
//
// The state is {controls: [{name, label, kind, options, at}], frames, order: [frame of each combination, the last
// control fastest]}. `frames` is [html, …], or the same as JSON, compressed (zlib), in base64. There null stands for
// the frame shown without JavaScript, which is in the page already. The last statement is `export default`, as in playground.mjs.

import { readValues } from "./values.mjs";

const STEP = 500; // milliseconds between the frames while they are played

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

/** A list, or what it is packed into. */
const unpacked = async (text) => {
  if (typeof text !== "string") return text;
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
};

// Each returns the node of a control, and a function that shows a value. The value is an index into the options.
const KINDS = {
  slider({ label, options }, change) {
    const range = make("input", { type: "range", min: 0, max: options.length - 1, step: 1, "aria-label": label });
    const shown = make("output");
    range.addEventListener("input", () => change(Number(range.value)));
    // There is room for the longest value, so the slider does not change its length while it moves.
    shown.style.minWidth = `${Math.max(...options.map((text) => text.length))}ch`;
    const put = (i) => {
      range.value = i;
      range.setAttribute("aria-valuetext", (shown.textContent = options[i]));
    };
    return [make("label", { class: "icl-slider" }, make("span", {}, label), range, shown), put];
  },
  choice({ label, options }, change) {
    if (options.length > 4 || options.join("").length > 48) {
      const items = options.map((text, i) => make("option", { value: i }, text));
      const select = make("select", { "aria-label": label }, ...items);
      select.addEventListener("change", () => change(Number(select.value)));
      return [make("label", {}, make("span", {}, label), select), (i) => (select.value = i)];
    }
    const name = `icl-choice-${groups++}`;
    const radios = options.map((_, i) => make("input", { type: "radio", name, value: i }));
    radios.forEach((radio, i) => radio.addEventListener("change", () => change(i)));
    const buttons = radios.map((radio, i) => make("label", {}, radio, make("span", {}, options[i])));
    const role = { role: "radiogroup", "aria-label": label };
    return [
      make("div", { class: "icl-choice", ...role }, make("span", {}, label), ...buttons),
      (i) => (radios[i].checked = true),
    ];
  },
  checkbox({ label }, change) {
    const box = make("input", { type: "checkbox" });
    box.addEventListener("change", () => change(box.checked ? 1 : 0));
    return [make("label", { class: "icl-checkbox" }, box, make("span", {}, label)), (i) => (box.checked = i === 1)];
  },
};

async function render({ model, el, fallback }) {
  const [controls, order] = [model.get("controls"), model.get("order")];
  const first = fallback.querySelector(".icl-frame").innerHTML;
  const frames = (await unpacked(model.get("frames"))).map((html) => html ?? first);
  const at = controls.map((control) => control.at);
  const frame = make("div", { class: "icl-frame" });
  const said = make("p", { class: "icl-said" });
  // Hidden from sight. A screen reader reads aloud what changes in it.
  const live = make("div", { class: "icl-live", "aria-live": "polite" });
  let [shown, timer, writing, player] = [null, null, null, null];
  // Only the state at which a reader comes to rest is announced.
  const announce = (words) => {
    clearTimeout(timer);
    timer = setTimeout(() => (live.textContent = words()), 300);
  };
  const reread = readValues(frame, (text) => {
    said.textContent = text;
    if (text && frame.matches(":focus-visible")) announce(() => text);
  });
  const show = () => {
    nodes.forEach(([, put], k) => put(at[k]));
    const next = order[at.reduce((sum, i, k) => sum * controls[k].options.length + i, 0)];
    if (next === shown) return;
    // A frame lower than the last one must not make the page jump while the reader moves a control.
    frame.style.minHeight = `${Math.max(parseFloat(frame.style.minHeight) || 0, frame.offsetHeight)}px`;
    frame.innerHTML = frames[next];
    frame.dataset.frame = next;
    if (reread()) {
      const names = { role: "group", "aria-label": "Values of the picture; move with the arrow keys" };
      for (const [name, value] of Object.entries({ tabindex: 0, ...names })) frame.setAttribute(name, value);
    }
    if (shown !== null) announce(() => words(frame)); // the first frame is read with the page
    shown = next;
  };
  // The state in the address, after #: on a page from the disk a script may change nothing else there. Browsers refuse
  // many changes within a short time.
  const address = () => {
    clearTimeout(writing);
    const fields = controls.map(({ name, options }, k) => [name, options[at[k]]]);
    writing = setTimeout(() => history.replaceState(null, "", `#${new URLSearchParams(fields)}`), 200);
  };
  const follow = () => {
    const fields = new URLSearchParams(location.hash.slice(1));
    const found = controls.map(({ name, options }) => options.indexOf(fields.get(name)));
    if (found.includes(-1)) return;
    found.forEach((i, k) => (at[k] = i));
    show();
    el.scrollIntoView({ block: "center" });
  };
  const move = (k, i) => {
    at[k] = i;
    show();
    address();
  };
  const stop = () => {
    clearInterval(player);
    player = null;
    play.textContent = "Play";
  };
  const nodes = controls.map((control, k) => KINDS[control.kind](control, (i) => (stop(), move(k, i))));
  const played = controls.findIndex(({ kind, options }) => kind === "slider" && options.length > 2);
  const play = make("button", { type: "button" }, "Play");
  play.addEventListener("click", () => {
    if (player !== null) return stop();
    const last = controls[played].options.length - 1;
    const step = () => (at[played] < last ? move(played, at[played] + 1) : stop());
    play.textContent = "Pause";
    player = setInterval(step, STEP);
    if (at[played] === last) move(played, 0);
    else step();
  });
  const all = nodes.map(([node]) => node);
  if (played >= 0) all.splice(played, 0, make("span", { class: "icl-presets" }, play));
  el.classList.add("icl-explore");
  el.replaceChildren(make("div", { class: "icl-controls" }, ...all), frame, said, live);
  show();
  window.addEventListener("resize", () => (frame.style.minHeight = ""));
  window.addEventListener("hashchange", follow);
  if (location.hash) requestAnimationFrame(follow); // when the widget is in the page
}

export default { render };
