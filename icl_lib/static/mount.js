// The host of the modules on a page without a kernel. It calls `render({model, el})` as anywidget does, with a model that
// is kept in the page. The bundle defines `modules` before this.
class PageModel {
  #state;
  #listeners = new Map();
  constructor(state) {
    this.#state = state;
  }
  get(name) {
    return this.#state[name];
  }
  set(name, value) {
    this.#state[name] = value;
    this.#changed.add(name);
  }
  #changed = new Set();
  // As in anywidget, listeners run once after several changes, so a listener to all of them draws once.
  save_changes() {
    const called = new Set([...this.#changed].flatMap((name) => this.#listeners.get(`change:${name}`) ?? []));
    this.#changed.clear();
    for (const listener of called) listener();
  }
  on(event, listener) {
    this.#listeners.set(event, [...(this.#listeners.get(event) ?? []), listener]);
  }
  off(event, listener) {
    this.#listeners.set(event, (this.#listeners.get(event) ?? []).filter((other) => other !== listener));
  }
}

// What a widget reads besides its state: a global, and the script beside this one that defines it. It is loaded after the
// page is drawn, when the widget is near.
const NEEDED = { puzzle: ["iclHiddenRule", "hidden_rule.js"] };
const beside = document.currentScript?.src;
const whenReady = (place, start) => {
  const [name, file] = NEEDED[place.dataset.widget] ?? [];
  if (!name || globalThis[name]) return start();
  const near = new IntersectionObserver(
    (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      near.disconnect();
      const script = Object.assign(document.createElement("script"), { onload: start, onerror: start });
      script.src = new URL(file, beside);
      requestAnimationFrame(() => setTimeout(() => document.head.append(script)));
    },
    { rootMargin: "100%" },
  );
  near.observe(place);
};

const start = async (place) => {
  const el = document.createElement("div");
  try {
    const state = JSON.parse(place.querySelector("script[type='application/json']").textContent);
    await modules[place.dataset.widget].render({ model: new PageModel(state), el, fallback: place });
    place.replaceChildren(el);
    place.dataset.ready = "true";
  } catch (error) {
    console.error(`The widget ${place.dataset.widget} could not start; the page keeps its static picture.`, error);
  }
};

for (const place of document.querySelectorAll(".icl-widget[data-widget]")) whenReady(place, () => start(place));
