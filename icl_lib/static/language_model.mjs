// The book's small language model in the browser, and the weight edits that replace a context.
//
// A Llama: RMSNorm, rotary positions, causal attention, a gated MLP, no biases. Vectors are Float64Arrays. Several
// vectors lie one after the other in one array: n vectors of width d in an array of length n d. A matrix [out, in] lies
// row by row. As in playground.mjs: no imports, and `export default` as the last statement.

// --- Text

const SIGNS = "+=,";
const NUMBERS = 100; // the number n has the id n, and the signs follow

/** The ids of a text. Raises an error that names the first symbol that is not a token. */
export function encode(text) {
  return [...text.matchAll(/[0-9]+|\S/g)].map(([token]) => {
    if (SIGNS.includes(token)) return NUMBERS + SIGNS.indexOf(token);
    if (!/^[0-9]+$/.test(token)) throw new Error(`“${token}” is no token: write numbers and the signs + = , only.`);
    if (token >= NUMBERS || String(Number(token)) !== token)
      throw new Error(`${token} is no token: write a whole number from 0 to ${NUMBERS - 1}, without leading zeros.`);
    return Number(token);
  });
}

/** The token with an id, as text. */
export const decode = (id) => (id < NUMBERS ? String(id) : SIGNS[id - NUMBERS]);

// --- Linear algebra

function dot(u, v, at = 0, from = 0, length = u.length) {
  // Four sums that do not wait for each other take half the time of one.
  let [a, b, c, d, k] = [0, 0, 0, 0, 0];
  for (; k + 3 < length; k += 4) {
    a += u[at + k] * v[from + k];
    b += u[at + k + 1] * v[from + k + 1];
    c += u[at + k + 2] * v[from + k + 2];
    d += u[at + k + 3] * v[from + k + 3];
  }
  for (; k < length; k++) a += u[at + k] * v[from + k];
  return a + b + (c + d);
}

const norm = (v) => Math.sqrt(dot(v, v));
const minus = (u, v) => u.map((x, i) => x - v[i]);

/** y ← y + s x */
const add = (y, s, x) => {
  for (let i = 0; i < y.length; i++) y[i] += s * x[i];
};

/**
 * W x for each vector x of `vectors`, which have the given width. Four rows are multiplied by two vectors at a time, so
 * each number is read less often: nearly all the time of the model is spent here, and this halves it.
 */
function times(W, vectors, width) {
  const [out, count] = [W.length / width, vectors.length / width];
  const products = new Float64Array(count * out);
  const whole = out - (out % 4);
  for (let i = 0; i < count; i += 2) {
    const x = i * width;
    const y = i + 1 < count ? x + width : x; // the last of an odd number of vectors goes alone, twice
    for (let row = 0; row < whole; row += 4) {
      const p = row * width, q = p + width, r = q + width, s = r + width;
      let a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
      for (let k = 0; k < width; k++) {
        const u = vectors[x + k], v = vectors[y + k];
        const w0 = W[p + k], w1 = W[q + k], w2 = W[r + k], w3 = W[s + k];
        a += w0 * u, b += w1 * u, c += w2 * u, d += w3 * u;
        e += w0 * v, f += w1 * v, g += w2 * v, h += w3 * v;
      }
      let at = i * out + row;
      products[at] = a, products[at + 1] = b, products[at + 2] = c, products[at + 3] = d;
      if (y > x) at += out, products[at] = e, products[at + 1] = f, products[at + 2] = g, products[at + 3] = h;
    }
    for (let row = whole; row < out; row++)
      for (let n = i; n < Math.min(i + 2, count); n++)
        products[n * out + row] = dot(W, vectors, row * width, n * width, width);
  }
  return products;
}

/** The i-th of several vectors; changing it changes them. */
const vector = (vectors, i, width) => vectors.subarray(i * width, (i + 1) * width);

/** A matrix kept as factors, Σ left[k] right[k]ᵀ. */
class LowRank {
  constructor(left, right) {
    [this.left, this.right] = [left, right];
  }
  /** Add the product with x to y: that of one term, or of all. */
  addProduct(x, y, only = null) {
    for (const k of only === null ? this.left.keys() : [only]) add(y, dot(this.right[k], x), this.left[k]);
  }
  /** The Frobenius norm; the vectors of `right` are orthonormal in every edit of this module. */
  norm() {
    return Math.hypot(...this.left.map(norm));
  }
  /** The number of terms that are not sums of the terms before them. */
  rank() {
    const kept = [];
    for (const column of this.left) {
      const rest = column.slice();
      for (const direction of kept) add(rest, -dot(direction, rest), direction);
      const length = norm(rest);
      if (length > 1e-12 * this.norm()) kept.push(rest.map((x) => x / length));
    }
    return kept.length;
  }
}

/**
 * The smallest ΔW with ΔW reads[k] = changes[k] for all k, ΔH Z⁺, by the Gram-Schmidt process. For one read z it is
 * Δh zᵀ / ‖z‖². Raises an error if the reads are not linearly independent, and so for a read that is zero.
 */
function leastNormEdit(reads, changes) {
  const [left, right] = [[], []];
  for (const [k, read] of reads.entries()) {
    const [rest, change] = [read.slice(), changes[k].slice()];
    for (let again = 0; again < 2; again++) // once more removes what rounding left
      for (const [j, direction] of right.entries()) {
        const part = dot(direction, rest);
        add(rest, -part, direction);
        add(change, -part, left[j]);
      }
    const length = norm(rest);
    if (!(length > 1e-12 * norm(read)))
      throw new Error("No single edit serves these tokens: what a block reads at one depends linearly on the others.");
    right.push(rest.map((x) => x / length));
    left.push(change.map((x) => x / length));
  }
  return new LowRank(left, right);
}

// --- The model

/** The tensors of a safetensors file, by name; `bytes` is an ArrayBuffer, and the numbers are float32. */
export function readWeights(bytes) {
  const size = Number(new DataView(bytes).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, size)));
  const tensors = {};
  for (const [name, { dtype, data_offsets: [start, end] = [] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (dtype !== "F32") throw new Error(`${name} is ${dtype}: the weights must be float32.`);
    tensors[name] = Float64Array.from(new Float32Array(bytes.slice(8 + size + start, 8 + size + end)));
  }
  return tensors;
}

/** Tokens on their way through one block: what each matrix reads at each of them. */
class Tokens {
  constructor(model, ids, first) {
    Object.assign(this, { ids, first, blocks: [] });
    this.stream = new Float64Array(ids.length * model.width);
    ids.forEach((id, i) => this.stream.set(vector(model.embedding, id, model.width), i * model.width));
  }
}

export class LanguageModel {
  /** `config` and `weights` are those of `transformers`. */
  constructor(config, weights) {
    this.width = config.hidden_size;
    this.heads = config.num_attention_heads;
    this.hidden = config.intermediate_size;
    this.epsilon = config.rms_norm_eps;
    this.theta = config.rope_parameters.rope_theta;
    this.embedding = weights["lm_head.weight"]; // the same matrix for both
    this.norm = weights["model.norm.weight"];
    this.blocks = Array.from({ length: config.num_hidden_layers }, (_, b) => {
      const of = (name) => weights[`model.layers.${b}.${name}.weight`];
      const [q, k, v, o] = ["q", "k", "v", "o"].map((name) => of(`self_attn.${name}_proj`));
      const [gate, up, down] = ["gate", "up", "down"].map((name) => of(`mlp.${name}_proj`));
      return { q, k, v, o, gate, up, down, before: of("input_layernorm"), between: of("post_attention_layernorm") };
    });
  }

  #normed(stream, scale) {
    const [d, result] = [this.width, new Float64Array(stream.length)];
    for (let i = 0; i < stream.length; i += d) {
      const size = Math.sqrt(dot(stream, stream, i, i, d) / d + this.epsilon);
      for (let k = 0; k < d; k++) result[i + k] = (scale[k] * stream[i + k]) / size;
    }
    return result;
  }

  /** Rotate each head of each vector by the angles of its position, in place. */
  #rotate(vectors, first) {
    const [d, size] = [this.width, this.width / this.heads];
    for (let k = 0; k < size / 2; k++) {
      const frequency = this.theta ** ((-2 * k) / size);
      for (let i = 0; i < vectors.length / d; i++) {
        const [cosine, sine] = [Math.cos((first + i) * frequency), Math.sin((first + i) * frequency)];
        for (let low = i * d + k; low < (i + 1) * d; low += size) {
          const [x, y] = [vectors[low], vectors[low + size / 2]];
          vectors[low] = x * cosine - y * sine;
          vectors[low + size / 2] = y * cosine + x * sine;
        }
      }
    }
    return vectors;
  }

  /** The first half of a block: note the attention, the stream h behind it and the vectors z that the MLP reads. */
  #attend(tokens, b) {
    const [block, d, count] = [this.blocks[b], this.width, tokens.ids.length];
    const size = d / this.heads;
    const reads = this.#normed(tokens.stream, block.before);
    const [q, k] = [block.q, block.k].map((W) => this.#rotate(times(W, reads, d), tokens.first));
    const v = times(block.v, reads, d);
    const mixed = new Float64Array(count * d);
    const attention = new Float64Array(this.heads * count * count); // [heads, to, from]
    for (let head = 0; head < this.heads; head++)
      for (let i = 0; i < count; i++) {
        const row = attention.subarray((head * count + i) * count, (head * count + i + 1) * count);
        for (let j = 0; j <= i; j++)
          row[j] = dot(q, k, i * d + head * size, j * d + head * size, size) / Math.sqrt(size);
        softmax(row.subarray(0, i + 1));
        for (let j = 0; j <= i; j++)
          for (let c = head * size; c < (head + 1) * size; c++) mixed[i * d + c] += row[j] * v[j * d + c];
      }
    const stream = times(block.o, mixed, d);
    add(stream, 1, tokens.stream);
    tokens.blocks.push({ attention, stream, read: this.#normed(stream, block.between) });
  }

  /** What the hidden units output at each token; the inner matrices have the edits, if there are any. */
  #hidden(read, b, edits) {
    const [gate, up] = ["gate", "up"].map((name) => this.#edited(name, read, this.width, b, edits));
    return gate.map((x, i) => (x / (1 + Math.exp(-x))) * up[i]);
  }

  /** W x for each vector x that the matrix reads, with the edit of W: that of each token, or one for all. */
  #edited(name, reads, width, b, edits) {
    const products = times(this.blocks[b][name], reads, width);
    const out = products.length / (reads.length / width);
    if (edits)
      for (let i = 0; i < reads.length / width; i++)
        edits[name].addProduct(vector(reads, i, width), vector(products, i, out), edits.own ? i : null);
    return products;
  }

  /** The second half of a block: the MLP, and the stream that leaves the block. */
  #transform(tokens, b, edits = null) {
    const seen = tokens.blocks[b];
    seen.hidden = this.#hidden(seen.read, b, edits);
    tokens.stream = this.#edited("down", seen.hidden, this.hidden, b, edits);
    add(tokens.stream, 1, seen.stream);
  }

  /**
   * Run the model on token ids, the first of which is at position `first`. `edits`, from `editsFor`, are added to the
   * weights of each block. Returns the logits [tokens, vocabulary], and for each block the `attention`
   * [heads, to, from], the `stream` behind the attention, what the MLP reads (`read`) and what its `hidden`
   * units output.
   */
  run(ids, { first = 0, edits = null } = {}) {
    const tokens = new Tokens(this, ids, first);
    for (const b of this.blocks.keys()) {
      this.#attend(tokens, b);
      this.#transform(tokens, b, edits?.[b]);
    }
    return { logits: times(this.embedding, this.#normed(tokens.stream, this.norm), this.width), blocks: tokens.blocks };
  }

  /**
   * The edits of every block with which the model reads these questions alone, at their positions after the examples,
   * as it reads them behind the examples: the same output of each block at each of the tokens that are served.
   *
   * `examples` are token ids, `questions` lists of them. By default one edit of each matrix serves the last token of
   * every question, and its rank is at most the number of questions. With `all`, it serves every token of the
   * questions; with `own`, each token has its own edits, of rank at most one.
   */
  editsFor(examples, questions, { all = false, own = false } = {}) {
    if (own && questions.length > 1)
      throw new Error("With `own`, each token of a question has its own edit: give one question.");
    const first = examples.length;
    const behind = questions.map((question) => new Tokens(this, [...examples, ...question], 0));
    const alone = questions.map((question) => new Tokens(this, question, first));
    const served = questions.flatMap((question, n) =>
      (all || own ? [...question.keys()] : [question.length - 1]).map((i) => [n, i]));
    return this.blocks.map((_, b) => {
      for (const tokens of [...behind, ...alone]) this.#attend(tokens, b);
      const pairs = (name) => {
        const before = served.map(([n, i]) => vector(alone[n].blocks[b][name], i, this.width));
        const after = served.map(([n, i]) => vector(behind[n].blocks[b][name], first + i, this.width));
        return [before, after.map((x, k) => minus(x, before[k]))];
      };
      const fit = (reads, changes) => {
        if (!own) return leastNormEdit(reads, changes);
        const each = reads.map((read, k) => leastNormEdit([read], [changes[k]]));
        return new LowRank(each.flatMap((edit) => edit.left), each.flatMap((edit) => edit.right));
      };
      const [reads, moved] = pairs("read");
      const [, carried] = pairs("stream");
      const edits = { own };
      for (const name of ["gate", "up"])
        edits[name] = fit(reads, moved.map((change) => times(this.blocks[b][name], change, this.width)));
      const hidden = alone.map((tokens) => this.#hidden(tokens.blocks[b].read, b, edits));
      edits.down = fit(served.map(([n, i]) => vector(hidden[n], i, this.hidden)), carried);
      if (b === this.blocks.length - 1) return edits; // no block reads on
      for (const tokens of behind) this.#transform(tokens, b);
      for (const tokens of alone) this.#transform(tokens, b, edits);
      return edits;
    });
  }

  /** The probabilities of the token after the last one of a run. */
  next({ logits }) {
    return softmax(logits.slice(logits.length - this.embedding.length / this.width));
  }
}

/** The softmax of a vector, in place. */
function softmax(v) {
  const top = Math.max(...v);
  let sum = 0;
  for (let i = 0; i < v.length; i++) sum += v[i] = Math.exp(v[i] - top);
  for (let i = 0; i < v.length; i++) v[i] /= sum;
  return v;
}

export default { encode, decode, readWeights, LanguageModel };
