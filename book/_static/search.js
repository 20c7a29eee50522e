// The search. `pages` is [[address, [[anchor, title, text], …]], …] in reading order: see book/_ext/section_search.py.

const MOST = 20; // results that are shown
const root = document.documentElement.dataset.content_root ?? "";
// Greek letters are searched by their names too: ΔW is "delta w".
const GREEK =
  "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma sigma tau upsilon phi chi psi omega";
const greek = (letter) => ` ${GREEK.split(" ")[letter.charCodeAt(0) - 0x3b1]} `;
const plain = (text) => {
  const letters = text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase().replace(/[α-ω]/g, greek);
  return letters.replace(/[-‐–’'_\s]+/g, " ").trim();
};

const sections = pages.flatMap(([address, parts]) =>
  parts.map(([anchor, title, text]) => ({
    href: `${root}${address}${anchor && `#${anchor}`}`,
    page: parts[0][1],
    title,
    text,
    inTitle: ` ${plain(title)} `,
    inText: ` ${plain(text)} `,
    reference: /^book\/(api|claims|notation|bibliography|architectures|cost)\b/.test(address),
  })),
);

const literal = (word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

/** How much of a text is about what a pattern finds, from 0 to 1: many hits in a short text. */
const about = (text, pattern) => {
  const hits = text.split(pattern).length - 1;
  return hits / (hits + 2 + text.length / 4000);
};

/** How well a section answers: each word must be in it, and count most in the title and next to each other. The pages of
 * reference answer queries that look like code; for all others the chapters come first. */
const score = ({ title, inTitle, inText, page, reference }, words, query) => {
  const starts = words.map((word) => new RegExp(`(?<![\\p{L}\\p{N}])${literal(word)}`, "u"));
  const phrase = new RegExp(`(?<![\\p{L}\\p{N}])${words.map(literal).join("(?: \\S+){0,2} ")}`, "u"); // "rank at most one"
  let sum = 0;
  for (const start of starts) {
    if (!start.test(inTitle) && !start.test(inText)) return 0;
    sum += (start.test(inTitle) ? 2 : 0) + about(inText, start);
  }
  sum = sum / words.length + (phrase.test(inTitle) ? (3 * words.join(" ").length) / inTitle.length : 0) + 3 * about(inText, phrase) + (phrase.test(plain(page)) ? 0.5 : 0);
  if (title.split(".").pop() === query) sum += 3;
  return reference && !/[_.()]/.test(query) ? sum / 20 : sum;
};

/** The best sections, the best first; of two that are as good, the one that is read first. */
const search = (query) => {
  const words = plain(query).split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const found = sections.map((section) => ({ section, rank: score(section, words, query.trim()) })).filter(({ rank }) => rank > 0);
  return found.sort((a, b) => b.rank - a.rank).slice(0, MOST).map(({ section }) => section);
};

const make = (tag, attributes, ...children) => {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
};

/** The words around the first hit, with the hits marked. */
const excerpt = (text, query) => {
  const words = query.trim().split(/[\s-]+/).filter(Boolean).map(literal);
  const whole = new RegExp(words.join("[\\s-]+(?:\\S+\\s+){0,2}"), "i");
  // Of a letter or two, only the whole word is a hit.
  const hits = words.map((word) => (word.length < 3 ? `${word}(?![\\p{L}\\p{N}])` : word));
  const any = new RegExp(`(?<![\\p{L}\\p{N}])(?:${hits.join("|")})`, "giu");
  const at = Math.max(0, (whole.exec(text) ?? any.exec(text))?.index ?? 0);
  any.lastIndex = 0;
  const from = at < 60 ? 0 : text.indexOf(" ", at - 60) + 1;
  const to = from + 180 < text.length ? text.lastIndexOf(" ", from + 180) : text.length;
  const shown = text.slice(from, to);
  const node = make("p", {}, from ? "… " : "");
  let end = 0;
  for (const hit of shown.matchAll(any)) {
    node.append(shown.slice(end, hit.index), make("mark", { textContent: hit[0] }));
    end = hit.index + hit[0].length;
  }
  node.append(shown.slice(end), to < text.length ? " …" : "");
  return node;
};

/** Show the sections for what is typed in a field, in an element beside it. */
const follow = (field, results) => {
  const said = make("p", { className: "search-said", role: "status" });
  const list = make("ol", {});
  results.replaceChildren(said, list);
  const show = () => {
    const query = field.value.trim();
    const found = search(query);
    results.hidden = !query;
    said.textContent = !query ? "" : found.length === MOST ? `The best ${MOST} sections` : found.length === 1 ? "1 section" : `${found.length || "No"} sections`;
    list.replaceChildren(
      ...found.map(({ href, page, title, text }) =>
        make("li", {}, make("a", { href }, title, make("span", {}, title === page ? "" : page)), excerpt(text, query)),
      ),
    );
  };
  field.addEventListener("input", show);
  // The arrow keys lead from the field through the results; the field opens the first with Enter.
  results.parentElement.addEventListener("keydown", (event) => {
    const stops = [field, ...list.querySelectorAll("a")];
    const at = stops.indexOf(document.activeElement);
    if (event.key === "Enter" && at === 0 && stops[1]) {
      event.preventDefault();
      stops[1].click();
    } else if (at >= 0 && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      event.preventDefault();
      stops[Math.max(0, Math.min(stops.length - 1, at + (event.key === "ArrowDown" ? 1 : -1)))].focus();
    }
  });
  show();
};

const dialog = document.querySelector("#pst-search-dialog");
const field = dialog.querySelector("input");
dialog.append(make("div", { id: "search-as-you-type", className: "search-results" }));
follow(field, dialog.lastElementChild);
// A result may be on this page.
dialog.addEventListener("click", (event) => event.target.closest("a") && dialog.close());

const page = document.querySelector("#search-results");
if (page) {
  const own = page.parentElement.querySelector("input");
  own.value = new URLSearchParams(location.search).get("q") ?? "";
  page.classList.add("search-results");
  follow(own, page);
}
document.documentElement.dataset.search = "ready";
