// Reads values off the pictures of icl_lib.paper.figures: their axes carry limits, their curves names, their heat maps
// the colours of the scale. The pictures below one node are linked: axes with the same x axis are read at the same
// place, and so are heat maps of the same shape.

const draw = (tag, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

/** The middles of equal parts between two ends. */
const middles = (count, from, to) => Array.from({ length: count }, (_, i) => from + ((i + 0.5) / count) * (to - from));

/** Three digits, with the minus sign and the powers of ten of the text. */
const number = (x) => {
  const [mantissa, exponent] = x.toPrecision(3).split("e");
  const high = [...(exponent ?? "").replace("+", "")].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");
  return `${Number(mantissa)}${high && ` × 10${high}`}`.replace("-", "−");
};

const pairs = (path) =>
  [...(path.getAttribute("d") ?? "").matchAll(/[ML] (\S+) (\S+)/g)].map(([, x, y]) => [Number(x), Number(y)]);

/** From a place between two ends to the value there, as exactly as a drawing with so many different places shows it. */
const scaled = ({ limits: [low, high], scale }, part, places = 1000) => {
  if (scale === "log") return low * (high / low) ** part;
  const step = 10 ** Math.floor(Math.log10((high - low) / places));
  return Math.round((low + (high - low) * part) / step) * step;
};

class Axes {
  constructor(node) {
    Object.assign(this, JSON.parse(node.dataset.axes));
    const corners = pairs(node.querySelector("path")); // matplotlib draws the background first
    [this.left, this.right] = [Math.min, Math.max].map((end) => end(...corners.map(([x]) => x)));
    [this.top, this.bottom] = [Math.min, Math.max].map((end) => end(...corners.map(([, y]) => y)));
    this.svg = node.ownerSVGElement;
    this.image = this.heat && node.querySelector("image");
    this.curves = [...node.querySelectorAll("[data-name]")].map((curve) => {
      const path = curve.querySelector(":scope > path");
      const dots = [...curve.querySelectorAll("use")].map((dot) => [dot.x.baseVal.value, dot.y.baseVal.value]);
      return { name: curve.dataset.name, points: path ? pairs(path) : dots, joined: Boolean(path) };
    });
    if (this.heat) {
      [this.columns, this.rows] = ["width", "height"].map((side) => Number(this.image.getAttribute(side)));
      this.xs = middles(this.columns, this.left, this.right);
      this.ys = middles(this.rows, this.top, this.bottom);
    } else {
      const places = this.curves.flatMap(({ points }) => (points.length > 2 ? points.map(([x]) => x) : []));
      this.xs = [...new Set(places)].filter((x) => x > this.left - 1 && x < this.right + 1).sort((a, b) => a - b);
    }
    const linear = [this.x, this.y].every(({ scale }) => ["linear", "log"].includes(scale));
    this.readable = this.xs.length > 0 && (this.heat || linear);
    this.kind = JSON.stringify(this.heat ? [this.columns, this.rows] : this.x);
  }

  holds([x, y]) {
    return x >= this.left - 3 && x <= this.right + 3 && y >= this.top - 3 && y <= this.bottom + 3;
  }

  /** What the axes show at a column of xs (and a row of ys): words, and the marks to draw. */
  async read(column, row) {
    const x = this.xs[column];
    if (this.heat) {
      const [width, height] = [(this.right - this.left) / this.columns, (this.bottom - this.top) / this.rows];
      const mark = draw("rect", { x: x - width / 2, y: this.ys[row] - height / 2, width, height });
      const level = await this.#level(column, row);
      const name = ({ label, names }, i, plain) => [label || (names ? "" : plain), names?.[i] ?? i + 1].join(" ").trim();
      const where = `${name(this.y, row, "row")}, ${name(this.x, column, "column")}`;
      const levels = this.heat.colours.length;
      const value = scaled(this.heat, (level + 0.5) / levels, levels);
      return { where, said: number(value), marks: [mark] };
    }
    const said = [];
    const marks = [draw("path", { d: `M${x} ${this.top}V${this.bottom}` })];
    for (const { name, points, joined } of this.curves) {
      const found = joined ? between(points, x) : points.filter(([at]) => Math.abs(at - x) < 0.5).map(([, y]) => y);
      const seen = [...new Set(found)].filter((y) => y > this.top - 1 && y < this.bottom + 1);
      marks.push(...seen.map((y) => draw("circle", { cx: x, cy: y, r: 4 })));
      const values = seen.map((y) => scaled(this.y, (this.bottom - y) / (this.bottom - this.top)));
      if (seen.length) said.push(`${name} ${values.sort((a, b) => a - b).map(number).join(", ")}`);
    }
    const where = `${this.x.label || "x"} ${number(scaled(this.x, (x - this.left) / (this.right - this.left)))}`;
    return { where, said: said.join("; "), marks };
  }

  /** The place of a pixel's colour on the colour scale. */
  async #level(column, row) {
    if (!this.pixels) {
      const picture = new Image();
      picture.src = this.image.href.baseVal;
      await picture.decode();
      const context = new OffscreenCanvas(this.columns, this.rows).getContext("2d");
      context.drawImage(picture, 0, 0);
      this.pixels = context.getImageData(0, 0, this.columns, this.rows).data;
    }
    const at = 4 * (row * this.columns + column);
    const colour = [...this.pixels.slice(at, at + 3)].map((part) => part.toString(16).padStart(2, "0")).join("");
    return this.heat.colours.indexOf(colour);
  }
}

/** The height of a curve at x, in a list; empty beside the curve. */
const between = (points, x) => {
  for (let i = 1; i < points.length; i++) {
    const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
    if (x < Math.min(x0, x1) - 0.01 || x > Math.max(x0, x1) + 0.01) continue;
    return [x1 === x0 ? y1 : y0 + ((y1 - y0) * (x - x0)) / (x1 - x0)];
  }
  return [];
};

const nearest = (list, x) => list.reduce((best, at, i) => (Math.abs(at - x) < Math.abs(list[best] - x) ? i : best), 0);

/** Lets a reader point at the pictures below `frame`, or walk through them by the arrow keys; `say` gets the words. */
export function readValues(frame, say) {
  let [axes, cursor, asked] = [[], null, 0];
  const show = async () => {
    const turn = ++asked; // the pixels of a heat map come later; a newer question may have been asked by then
    const at = cursor && axes[cursor.axes];
    const linked = at ? axes.filter(({ kind }) => kind === at.kind) : [];
    const read = await Promise.all(linked.map((each) => each.read(cursor.column, cursor.row)));
    if (turn !== asked) return;
    frame.querySelectorAll(".icl-mark").forEach((mark) => mark.remove());
    read.forEach(({ marks }, k) => {
      const group = linked[k].svg.appendChild(draw("g", { class: "icl-mark" }));
      group.append(...marks);
    });
    const parts = read.map(({ said }, k) => (read.length > 1 && linked[k].title ? `${linked[k].title}: ${said}` : said));
    say(read.length ? `${read[0].where}. ${parts.join(". ")}` : "");
  };
  const put = (next) => {
    if (JSON.stringify(next) === JSON.stringify(cursor)) return;
    cursor = next;
    show();
  };
  frame.addEventListener("pointermove", (event) => {
    for (const [k, each] of axes.entries()) {
      const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(each.svg.getScreenCTM().inverse());
      if (!each.holds([p.x, p.y])) continue;
      return put({ axes: k, column: nearest(each.xs, p.x), row: each.heat ? nearest(each.ys, p.y) : 0 });
    }
  });
  frame.addEventListener("pointerleave", () => frame.matches(":focus-visible") || put(null));
  frame.addEventListener("blur", () => put(null));
  frame.addEventListener("keydown", (event) => {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    if (event.key === "Escape") put(null);
    if (dx === undefined || !axes.length || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (!cursor) return put({ axes: 0, column: 0, row: 0 });
    const { xs, ys = [0] } = axes[cursor.axes];
    const within = (i, list) => Math.min(Math.max(i, 0), list.length - 1);
    put({ axes: cursor.axes, column: within(cursor.column + dx, xs), row: within(cursor.row + dy, ys) });
  });
  /** To be called when the pictures are others: the reader keeps the place. Returns whether they have values. */
  return () => {
    axes = [...frame.querySelectorAll("[data-axes]")].map((node) => new Axes(node)).filter(({ readable }) => readable);
    const at = cursor && axes[cursor.axes];
    if (cursor && !(at && cursor.column < at.xs.length && cursor.row < (at.ys?.length ?? 1))) cursor = null;
    show();
    return axes.length > 0;
  };
}

export default { readValues };
