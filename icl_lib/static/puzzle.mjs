// The puzzle with a hidden rule: move the examples from the prompt into the weights of the model, and ask.
//
// As playground.mjs: two hosts, and `export default` as the last statement. The state is {examples, question, serves}:
// two texts, and the questions from which the edit is made; without any, the examples are in the prompt. A page has the
// model in the global `iclHiddenRule`; in a notebook the widget sends it, as `config` and `weights`.

import { LanguageModel, decode, encode, readWeights } from "./language_model.mjs";

// Each rule with examples that fit no other rule of the model, a question, and others for which its edit fails.
const PRESETS = [
  ["double", "2+3=10, 4+2=12, 1+5=12", ["2+8", "9+9", "5+1", "4+5"], "The sum, doubled: 2 (a + b)"],
  ["triple", "2+3=15, 4+1=15, 1+5=18", ["6+2", "9+9", "4+8", "5+6"], "The sum, tripled: 3 (a + b)"],
  ["difference", "7+2=5, 3+8=5, 5+4=1", ["9+2", "5+1", "3+6", "8+5"], "The difference: |a − b|"],
  ["2a + b", "2+3=7, 4+1=9, 1+6=8", ["6+2", "9+1", "2+7", "8+7"], "The first number counts twice: 2a + b"],
  ["a + 2b", "2+3=8, 4+1=6, 1+5=11", ["6+2", "1+9", "2+7", "9+8"], "The second number counts twice: a + 2b"],
];
const MOST = 6; // examples; the model was trained with at most six
const MATRICES = [
  ["gate", "The gate: what opens and closes each of the 192 hidden units"],
  ["up", "The first matrix after the attention: what each hidden unit receives"],
  ["down", "The last matrix: what the hidden units write back"],
];
const SHOWN = 3; // answers in a column

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const button = (text, act, attributes = {}) => {
  const node = make("button", { type: "button", ...attributes }, text);
  node.addEventListener("click", act);
  return node;
};

const percent = (p) => {
  const text = p > 0.9995 ? "> 99.9 %" : p < 0.0005 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`;
  return text.replaceAll(" ", "\u00a0");
};
const scientific = (x) => {
  if (x === 0) return "0";
  const [mantissa, exponent] = x.toExponential(0).split("e");
  const raised = [...exponent.replace("+", "")].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("");
  return `${mantissa}\u00a0×\u00a010${raised}`;
};
const listed = (words) => (words.length < 2 ? words.join() : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`);

/** The examples in a text, each as "a+b=c". Raises an error that says what is wrong. */
function parseExamples(text) {
  const examples = text.replace(/\s/g, "").split(",").filter(Boolean);
  if (!examples.length) throw new Error("Write at least one example, such as 2+3=10.");
  if (examples.length > MOST) throw new Error(`Write at most ${MOST} examples: in training the model read no more.`);
  for (const example of examples) {
    if (!/^\d+\+\d+=\d+$/.test(example)) throw new Error(`“${example}” is no example: write one as 2+3=10.`);
    encode(example);
  }
  return examples;
}

/** The question in a text, as "a+b". */
function parseQuestion(text) {
  const question = text.replace(/[\s=]/g, "");
  if (!/^\d+\+\d+$/.test(question)) throw new Error(`“${text}” is no question: write one as 2+8.`);
  encode(question);
  return question;
}

/** What the model answers with the examples, without them, and without them but with edited weights. */
class Answers {
  constructor(model) {
    this.model = model;
    this.edited = { key: null };
    this.read = new Map(); // the answers of the model as it is; its weights never change
  }
  #asIs(text, first) {
    const key = `${first}:${text}`;
    if (!this.read.has(key)) this.read.set(key, this.model.next(this.model.run(encode(text), { first })));
    return this.read.get(key);
  }
  edits(examples, serves) {
    const key = `${examples}:${serves}`;
    if (this.edited.key !== key) {
      const questions = serves.map((question) => encode(`${question}=`));
      this.edited = { key, edits: serves.length ? this.model.editsFor(encode(`${examples},`), questions) : null };
    }
    return this.edited.edits;
  }
  /** The three vectors of probabilities; the last is null while the examples are in the prompt. */
  to(question, examples, serves) {
    const [ask, first] = [`${question}=`, encode(`${examples},`).length];
    const edits = this.edits(examples, serves);
    return [
      this.#asIs(`${examples},${ask}`, 0),
      this.#asIs(ask, first),
      edits && this.model.next(this.model.run(encode(ask), { first, edits })),
    ];
  }
}

const best = (chances, count = 1) =>
  [...chances.keys()].sort((i, j) => chances[j] - chances[i]).slice(0, count).map((id) => [decode(id), chances[id]]);
const distance = (p, q) => Math.max(...p.map((x, i) => Math.abs(x - q[i])));

const [BLUE, VERMILLION] = [[43, 127, 196], [213, 94, 0]];

/** Paint numbers on a canvas, one pixel each: blue or vermillion by sign, the stronger the larger, up to `peak`. */
function paint(canvas, width, height, value, peak) {
  [canvas.width, canvas.height] = [width, height];
  const image = new ImageData(width, height);
  const { data } = image;
  for (let y = 0, at = 0; y < height; y++)
    for (let x = 0; x < width; x++, at += 4) {
      const number = value(x, y);
      const ink = number < 0 ? VERMILLION : BLUE;
      for (let byte = 0; byte < 3; byte++) data[at + byte] = ink[byte];
      data[at + 3] = 255 * Math.sqrt(Math.abs(number) / peak); // and no more than 255, whatever the number
    }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** The factors of an edit as drawn: [along the 192 hidden units, along the 64 numbers of the stream]. */
const factors = (name, edit) => (name === "down" ? [edit.right, edit.left] : [edit.left, edit.right]);
const entry = (along, down) => (x, y) => {
  let sum = 0;
  for (let k = 0; k < along.length; k++) sum += along[k][x] * down[k][y];
  return sum;
};
const largest = (vectors) => Math.max(1e-300, ...vectors.flatMap((vector) => [...vector].map(Math.abs)));

/** What the three answers show: whether the edit serves the question, and by how much two answers differ. */
function inWords(question, serves, [prompted, bare, edited]) {
  if (!edited) return "The weights are the same in both columns. Only what the model reads is different.";
  const apart = distance(prompted, edited);
  const [[[wanted]], [[unedited]], [[answer]]] = [prompted, bare, edited].map((chances) => best(chances));
  if (serves.includes(question)) {
    const made = serves.length > 1 ? `This edit, of rank ${serves.length}, serves ${listed(serves)}. ` : "";
    return `${made}The edited model reads only ${question}=, and answers as the original one does after the examples. ` +
      `Their probabilities differ by at most ${scientific(apart)}, which is rounding.`;
  }
  const made = `The edit was made from ${listed(serves)}. For ${question}`;
  return answer === wanted
    ? `${made} the answer happens to be the same, but the probabilities differ by up to ${percent(apart)}.`
    : `${made} it fails: the answer is ${answer}${answer === unedited ? ", as without the examples," : ""} and not ${wanted}.`;
}

let groups = 0; // each widget's radio buttons need their own name

function start(model) {
  const stored = globalThis.iclHiddenRule;
  if (stored) {
    const bytes = Uint8Array.from(atob(stored.weights), (character) => character.charCodeAt(0));
    return new LanguageModel(stored.config, readWeights(bytes.buffer));
  }
  const { buffer, byteOffset, byteLength } = model.get("weights");
  return new LanguageModel(model.get("config"), readWeights(buffer.slice(byteOffset, byteOffset + byteLength)));
}

function render({ model, el }) {
  const answers = new Answers(start(model));
  const state = () => ["examples", "question", "serves"].map((name) => model.get(name));
  const set = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };

  // --- The prompt
  const alert = make("p", { class: "icl-message", role: "alert", hidden: "" });
  const attempt = (act) => {
    alert.hidden = true;
    try {
      act();
      return true;
    } catch (error) {
      alert.textContent = error.message;
      alert.hidden = false;
      return false;
    }
  };
  const choose = (examples, question) => set({ examples, question, serves: state()[2].length ? [question] : [] });
  const presets = PRESETS.map(([name, examples, [question], title]) =>
    button(name, () => (attempt(() => choose(examples, question)), edit(false)), { title }));
  const own = button("change", () => edit(field.hidden), { title: "Write your own examples",
    "aria-label": "change the examples", "aria-expanded": "false" });
  const chips = make("span", { class: "icl-chips" });
  const text = { type: "text", autocomplete: "off", spellcheck: "false" };
  const field = make("input", { ...text, "aria-label": "examples, separated by commas", hidden: "" });
  const edit = (open) => {
    [field.hidden, chips.hidden] = [!open, open];
    own.setAttribute("aria-expanded", open);
    if (!open) return;
    field.value = state()[0];
    field.focus();
    field.select();
  };
  field.addEventListener("change", () => {
    if (attempt(() => choose(parseExamples(field.value).join(", "), state()[1]))) edit(false);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    alert.hidden = true;
    edit(false);
    own.focus();
  });
  const ask = make("input", { ...text, "aria-label": "question" });
  ask.addEventListener("change", () => {
    if (!attempt(() => set({ question: parseQuestion(ask.value) }))) ask.value = state()[1];
  });
  const toggle = make("input", { type: "checkbox", role: "switch" });
  toggle.addEventListener("change", () => move(toggle.checked));
  const others = make("div", { class: "icl-presets", role: "group", "aria-label": "Ask" });
  const prompt = make(
    "div", { class: "icl-prompt" }, make("span", { class: "icl-spacious" }, "Prompt"), chips, field, own,
    make("span", { class: "icl-question" }, ask, " = ?"));

  // --- The answers
  const columns = [["icl-aC", "with the examples"], ["icl-a", "without"], ["icl-new", "edited weights"]].map(
    ([name, title]) => {
      const [read, list] = [make("p", { class: "icl-read" }), make("ol", { "aria-label": title })];
      return { node: make("div", { class: name }, make("p", {}, title), read, list), read, list };
    });
  const verdict = make("p", { class: "icl-verdict" });
  const actions = make("div", { class: "icl-presets" });
  const live = make("div", { class: "icl-live", "aria-live": "polite" });

  // --- The edits: a radio button for each matrix, and one of them enlarged with its factors
  const group = `icl-matrix-${groups++}`;
  const strips = answers.model.blocks.map((_, b) => MATRICES.map(([name, meaning]) => {
    const [radio, canvas] = [make("input", { type: "radio", name: group, value: `${b} ${name}` }), make("canvas")];
    const title = `${meaning}. Block ${b + 1} of ${answers.model.blocks.length}`;
    const node = make("label", { title }, radio, canvas);
    radio.addEventListener("change", () => enlarge(b, name));
    node.addEventListener("pointerenter", () => enlarge(b, name, true));
    node.addEventListener("pointerleave", () => enlarge(...chosen));
    return { b, name, radio, canvas, node };
  }));
  const blocks = make("div", { class: "icl-blocks", role: "radiogroup", "aria-label": "The edits of the weights" },
    ...strips.map((row, b) =>
      make("div", { class: "icl-block" }, make("span", {}, `block ${b + 1}`), ...row.map((strip) => strip.node))));
  const added = make("p", { class: "icl-caption icl-added" });
  const [top, side, big] = [make("canvas"), make("canvas"), make("canvas")];
  const caption = make("p", { class: "icl-caption" });
  const product = make("div", { class: "icl-product", "aria-hidden": "true" }, top, side, big);
  const lens = make("div", { class: "icl-lens" }, make("div", {}, product, caption));
  let chosen = [1, "gate"];
  strips[1][0].radio.checked = true;

  function enlarge(b, name, passing = false) {
    if (!passing) chosen = [b, name];
    const edits = answers.edits(...[state()[0], state()[2]]);
    lens.classList.toggle("icl-empty", !edits);
    added.textContent = edits
      ? "What is added to the weights: three matrices in each block. Blue is positive, orange negative. Choose one."
      : "The model has four blocks, with three matrices in each. So far nothing is added to them.";
    if (!edits) return;
    const [along, down] = factors(name, edits[b][name]);
    const [width, height] = [along[0].length, down[0].length];
    paint(big, width, height, entry(along, down), peakOf(edits[b][name]));
    paint(top, width, along.length, (x, k) => along[k][x], largest(along));
    paint(side, down.length, height, (k, y) => down[k][y], largest(down));
    const rank = edits[b][name].rank();
    const times = rank === 1 ? "one column times one row" : `a sum of ${rank} products of a column and a row`;
    const size = edits[b][name].norm() / Math.hypot(...answers.model.blocks[b][name]);
    caption.textContent = `Block ${b + 1}, matrix “${name}”: the edit is ${times} (rank ${rank}). Its norm is ` +
      `${edits[b][name].norm().toFixed(2)}, ${(100 * size).toFixed(0)} % of the norm of the matrix.`;
  }
  // Three times the root mean square of the numbers; a few larger ones would leave all others pale.
  const peakOf = (edit) => Math.max(1e-300, (3 * edit.norm()) / Math.sqrt(edit.left[0].length * edit.right[0].length));

  // --- All questions of the model: which of them does the edit serve?
  const numbers = [1, 2, 3, 4, 5, 6, 7, 8, 9];
  const cells = numbers.flatMap((a) => numbers.map((b) => {
    const cell = make("span");
    cell.addEventListener("click", () => attempt(() => set({ question: `${a}+${b}` })));
    return { question: `${a}+${b}`, cell };
  }));
  const map = make("div", { class: "icl-map", role: "img" }, ...cells.map(({ cell }) => cell));
  const served = make("p", { class: "icl-caption" });
  lens.append(make("div", {}, map, served));
  let surveyed = null;

  /** Ask everything, a few questions at a time, so that the page stays responsive. */
  function survey(examples, serves) {
    const key = `${examples}:${serves}`;
    if (surveyed === key) return;
    surveyed = key;
    let [at, same] = [0, 0];
    served.textContent = "";
    for (const { cell } of cells) cell.className = "";
    const step = () => {
      if (surveyed !== key || !serves.length) return;
      for (const until = performance.now() + 10; at < cells.length && performance.now() < until; at++) {
        const { question, cell } = cells[at];
        const [[[wanted]], , [[edited]]] = answers.to(question, examples, serves).map((chances) => best(chances));
        same += wanted === edited;
        cell.className = `${wanted === edited ? "icl-same" : "icl-other"} ${serves.includes(question) ? "icl-made" : ""}`;
        cell.title = `${question}: ${edited}${wanted === edited ? "" : `, and with the examples ${wanted}`}`;
      }
      if (at < cells.length) return void setTimeout(step);
      served.textContent = `Of the ${cells.length} questions from 1+1 to 9+9, the edited model answers ${same} as with the examples (green).`;
      map.setAttribute("aria-label", served.textContent);
    };
    setTimeout(step);
  }

  // --- Moving the examples
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  function move(into) {
    const from = [...chips.children].map((chip) => chip.getBoundingClientRect());
    attempt(() => set({ serves: into ? [state()[1]] : [] }));
    if (still.matches) return;
    const to = blocks.getBoundingClientRect();
    for (const [i, { left, top: y, width, height }] of from.entries()) {
      const ghost = make("span", { class: "icl-chip icl-ghost", "aria-hidden": "true" }, chips.children[i].textContent);
      Object.assign(ghost.style, { left: `${left}px`, top: `${y}px`, width: `${width}px`, height: `${height}px` });
      el.append(ghost);
      const [dx, dy] = [to.left + (to.width * (i + 0.5)) / from.length - left - width / 2, to.top + 20 - y];
      const away = `translate(${dx}px, ${dy}px) scale(0.6)`;
      const path = [{ transform: "none", opacity: 1 }, { transform: away, opacity: 0 }];
      const flight = ghost.animate(into ? path : path.reverse(), { duration: 400, easing: "ease-in-out" });
      flight.onfinish = flight.oncancel = () => ghost.remove();
    }
  }
  // By mouse the examples can also be dragged onto the blocks. By touch this would get in the way of scrolling.
  chips.addEventListener("pointerdown", (event) => {
    if (event.button || event.pointerType === "touch" || state()[2].length) return;
    event.preventDefault();
    chips.setPointerCapture(event.pointerId);
    const [x, y] = [event.clientX, event.clientY];
    const follow = (now) => (chips.style.transform = `translate(${now.clientX - x}px, ${now.clientY - y}px)`);
    chips.addEventListener("pointermove", follow);
    const drop = (now) => {
      chips.removeEventListener("pointermove", follow);
      const { left, right, top, bottom } = blocks.getBoundingClientRect();
      const [x, y] = [now.clientX, now.clientY];
      if (left < x && x < right && top < y && y < bottom) move(true);
      chips.style.transform = "";
    };
    chips.addEventListener("pointerup", drop, { once: true });
    chips.addEventListener("pointercancel", drop, { once: true });
  });

  /** Make the edit from these questions. The pressed button goes, so the focus moves to that of the question. */
  function serve(questions) {
    attempt(() => {
      answers.edits(state()[0], questions); // an edit that cannot be is not asked for
      set({ serves: questions });
    });
    others.querySelector("[aria-pressed=true]").focus();
  }

  // --- Drawing
  let timer = null;
  const draw = () => {
    const [examples, question, serves] = state();
    let found;
    if (!attempt(() => (found = answers.to(question, examples, serves)))) return;
    const moved = found[2] !== null;
    el.classList.toggle("icl-moved", moved);
    toggle.checked = moved;
    ask.value = question;
    chips.replaceChildren(...examples.split(",").map((text) => make("span", { class: "icl-chip" }, text.trim())));
    const preset = PRESETS.find(([, text]) => text === examples);
    for (const [i, node] of presets.entries()) node.setAttribute("aria-pressed", PRESETS[i] === preset);
    const asked = [...new Set([...(preset?.[2] ?? ["2+8", "9+9", "5+1"]), ...serves, question])];
    if (others.dataset.asked !== asked.join()) { // the buttons stay, and with them the focus, as long as they can
      others.dataset.asked = asked.join();
      others.replaceChildren("Ask", ...asked.map((text) => button(text, () => attempt(() => set({ question: text })))));
    }
    for (const [i, node] of [...others.children].entries()) node.setAttribute("aria-pressed", asked[i] === question);

    const tokens = encode(`${question}=`).length;
    const lengths = [encode(`${examples},`).length + tokens, tokens, tokens];
    for (const [i, { node, read, list }] of columns.entries()) {
      node.classList.toggle("icl-empty", !found[i]);
      read.textContent = found[i] ? `reads ${lengths[i]} tokens` : "not edited yet";
      read.title = "A token is a number or one of the signs + = ,";
      const rows = found[i] ? best(found[i], SHOWN) : [["?", null]];
      list.replaceChildren(...rows.map(([answer, p]) => {
        const parts = [make("b", {}, answer), ...(p === null ? [] : [make("span", {}, percent(p))])];
        return make("li", { style: `--chance:${100 * (p ?? 0)}%` }, ...parts);
      }));
    }

    const fits = serves.includes(question);
    verdict.className = `icl-verdict ${!moved ? "" : fits ? "icl-good" : "icl-bad"}`;
    verdict.textContent = inWords(question, serves, found);
    actions.replaceChildren();
    const more = [...serves, question];
    if (moved && !fits)
      actions.append(button(`Make one edit for ${listed(more)}`, () => serve(more), { class: "icl-main" }));
    if (serves.length > 1) actions.append(button(`Only for ${question}`, () => serve([question])));
    clearTimeout(timer);
    if (el.isConnected) timer = setTimeout(() => (live.textContent = `${spoken(found)} ${verdict.textContent}`), 300);

    // --- The edits: one scale of colour for all matrices of the model
    const edits = answers.edits(examples, serves);
    const drawn = strips.flat().map(({ b, name }) => edits && factors(name, edits[b][name]));
    const peak = edits && Math.max(...strips.flat().map(({ b, name }) => peakOf(edits[b][name])));
    for (const [i, { b, name, radio, canvas }] of strips.flat().entries()) {
      if (edits) paint(canvas, drawn[i][0][0].length, drawn[i][1][0].length, entry(...drawn[i]), peak);
      else canvas.width = canvas.width; // clears it
      const size = edits ? `rank ${edits[b][name].rank()}, norm ${edits[b][name].norm().toFixed(2)}` : "not edited";
      radio.setAttribute("aria-label", `block ${b + 1}, ${name}: ${size}`);
    }
    enlarge(...chosen);
    survey(examples, serves);
  };
  const spoken = (found) => columns.map(({ node }, i) => {
    if (!found[i]) return "";
    const [[answer, p]] = best(found[i]);
    return `${node.firstChild.textContent}: ${answer}, ${percent(p)}.`;
  }).join(" ");

  el.classList.add("icl-puzzle");
  el.setAttribute("data-lm-suppress-shortcuts", "true");
  el.replaceChildren(
    make("div", { class: "icl-presets", role: "group", "aria-label": "Hidden rule" },
      make("span", {}, make("span", { class: "icl-spacious" }, "Hidden "), "rule"), ...presets),
    prompt,
    make("div", { class: "icl-controls" },
      make("label", { class: "icl-switch" }, toggle, "Move the examples into the weights"), others),
    alert,
    make("div", { class: "icl-answers" }, ...columns.map((column) => column.node)),
    make("div", { class: "icl-outcome" }, verdict, actions),
    added,
    blocks,
    lens,
    live,
  );
  const names = ["examples", "question", "serves"];
  for (const name of names) model.on(`change:${name}`, draw);
  draw();
  return () => names.forEach((name) => model.off(`change:${name}`, draw));
}

export default { render };
