// What every page of the book does beside its theme.

// Paper is white, and nothing can be opened on it: a page is printed in the light theme with its folds open, except those of
// code, which are left out. Afterwards the reader's own theme and folds are back.
const root = document.documentElement;
let onScreen = null;
let opened = [];
const paper = () => {
  onScreen ??= root.dataset.theme;
  root.dataset.theme = "light";
  const folds = [...document.querySelectorAll(".bd-article details:not([open]):not(.above-input)")];
  for (const fold of folds) fold.open = true;
  opened = opened.concat(folds);
};
const screen = () => {
  if (onScreen) root.dataset.theme = onScreen;
  onScreen = null;
  for (const fold of opened) fold.open = false;
  opened = [];
};
window.addEventListener("beforeprint", paper);
window.addEventListener("afterprint", screen);

// The buttons of folded solutions are all named "Toggle hidden content". Each gets the title beside it as its name.
document.addEventListener("DOMContentLoaded", () => {
  for (const button of document.querySelectorAll(".toggle-button")) {
    const title = button.closest(".admonition-title")?.textContent.trim();
    if (title) button.setAttribute("aria-label", title);
  }
});

// A line may be broken on either side of a formula, even before a comma. A formula and its punctuation go into one box.
document.addEventListener("DOMContentLoaded", () => {
  for (const formula of document.querySelectorAll(".bd-article abbr.symbols, .bd-article :not(abbr) > span.math")) {
    const [before, after] = [formula.previousSibling, formula.nextSibling];
    const opening = before instanceof Text ? before.data.match(/[([“‘]+$/)?.[0].length ?? 0 : 0;
    const closing = after instanceof Text ? after.data.match(/^[^\s\p{L}\p{N}([“‘]+/u)?.[0].length ?? 0 : 0;
    if (!opening && !closing) continue;
    const box = document.createElement("span");
    box.className = "unbroken";
    formula.before(box);
    if (opening) box.append(before.splitText(before.length - opening));
    box.append(formula);
    if (closing) {
      after.splitText(closing);
      box.append(after);
    }
  }
});

// A finger cannot point: tapping a formula shows, below it, what its symbols mean. Another tap puts it away.
document.addEventListener("click", (event) => {
  const shown = document.querySelector(".symbols-shown");
  shown?.remove();
  const formula = event.target.closest?.("abbr.symbols");
  if (formula && shown?.formula !== formula && !event.target.closest("a, button, summary")) say(formula.title, formula);
});
const say = (textContent, formula) => {
  const said = Object.assign(document.createElement("span"), { className: "symbols-shown", textContent, formula });
  said.setAttribute("role", "status");
  document.body.append(said);
  const at = formula.getBoundingClientRect();
  said.style.top = `${at.bottom + window.scrollY + 6}px`;
  said.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - said.offsetWidth - 8))}px`;
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelector(".symbols-shown")?.remove();
});

// Text is copied with its formulas in TeX. A double click on a formula copies it alone.
document.addEventListener("copy", (event) => {
  if (getSelection().isCollapsed) return;
  const range = getSelection().getRangeAt(0).cloneRange();
  const around = (node) => (node.closest ? node : node.parentElement).closest("[data-tex]"); // a part copies the whole
  const [first, last] = [around(range.startContainer), around(range.endContainer)];
  if (first) range.setStartBefore(first);
  if (last) range.setEndAfter(last);
  const copy = document.createElement("div");
  copy.append(range.cloneContents());
  const formulas = copy.querySelectorAll("[data-tex]");
  if (!formulas.length) return;
  for (const formula of formulas) formula.replaceWith(formula.hasAttribute("display") ? `$$${formula.dataset.tex}$$` : `$${formula.dataset.tex}$`);
  document.body.append(copy); // only what is on a page has lines
  event.clipboardData.setData("text/plain", copy.innerText);
  copy.remove();
  event.preventDefault();
});
document.addEventListener("dblclick", (event) => {
  const formula = event.target.closest?.("[data-tex]");
  if (!formula) return;
  getSelection().selectAllChildren(formula);
  if (document.execCommand("copy")) say(`Copied: ${formula.dataset.tex}`, formula);
});

// The search is loaded when a reader first opens it, or at once on its own page.
const search = () => {
  document.removeEventListener("focusin", whenSearched);
  const src = `${root.dataset.content_root}_static/search.js`;
  document.head.append(Object.assign(document.createElement("script"), { src }));
};
const whenSearched = (event) => event.target.closest?.("form.bd-search") && search();
document.addEventListener("focusin", whenSearched);
if (document.querySelector("#search-results")) search();

// A formula or a table that is too wide scrolls. Then, and only then, the Tab key stops at it, so that the arrow keys can
// scroll it. The theme does this once for tables and code, but not for those in a fold that is opened later.
const widths = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
const wide = ".bd-article :is(mjx-container[display=true], .pst-scrollable-table-container, pre, :is(p, dd):has(> :is(.math, .unbroken, .symbols)))";
for (const node of document.querySelectorAll(wide)) widths.observe(node);
