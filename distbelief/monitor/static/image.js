// Image: the cells of the heatmap, kept as the server's codes and as a picture that is scrolled.

import { getCells } from "./answers.js";
import { areaRgbOf, RAMP_HI, RAMP_LO } from "./theme.js";

export const NONE = 0, DOWN = 1;

export class Image {
  constructor(head, cells, metric) {
    Object.assign(this, head);
    this.metric = metric;
    this.first = Math.round(head.t0 / head.bin_s); // number of the first column, of all time
    this.codes = cells;
    this.canvas = document.createElement("canvas");
    this.at = new Map(head.ids.map((id, i) => [id, i]));
    this.groups = groups(head.nodes);
    this.isByNode = head.ids.length > 0 && head.ids.every((id, i) => id === head.nodes[i] || id.startsWith(`${head.nodes[i]}..`));
    this._lut = new Uint32Array(256);
  }

  /** An answer of api/v1/heatmap. Throws where it is none. */
  static async load(query, metric) {
    const { head, body } = await getCells(query);
    const size = head.rows * head.cols;
    if (head.names !== undefined) Object.assign(head, JSON.parse(new TextDecoder().decode(body.subarray(head.names))));
    return new Image(head, body.slice(0, size), metric);
  }

  get end() {
    return (this.first + this.cols) * this.bin_s;
  }

  /** Value of a code in its metric; null for no data, NaN for down. */
  value(code) {
    if (code === NONE) return null;
    return code === DOWN ? NaN : 2 ** (this.lo + ((code - 2) / 253) * (this.hi - this.lo));
  }

  codeAt(row, column) {
    return column < 0 || column >= this.cols || row < 0 || row >= this.rows ? NONE : this.codes[row * this.cols + column];
  }

  column(t) {
    return Math.floor(t / this.bin_s) - this.first;
  }

  /** Put newer columns behind ours and let as many go in front. Returns: whether they fit. */
  append(newer) {
    const same = newer.bin_s === this.bin_s && newer.rows === this.rows && newer.ids.every((id, i) => id === this.ids[i]);
    const shift = newer.first + newer.cols - (this.first + this.cols);
    if (!same || newer.first > this.first + this.cols || shift < 0) return false;
    const { rows, cols } = this;
    const from = Math.max(0, cols - newer.cols);
    for (let r = 0; r < rows; r += 1) {
      const line = this.codes.subarray(r * cols, (r + 1) * cols);
      if (shift < cols) line.copyWithin(0, shift);
      line.fill(NONE, Math.max(0, cols - shift));
      line.set(newer.codes.subarray(r * newer.cols + Math.max(0, newer.cols - cols), (r + 1) * newer.cols), from);
    }
    this.first += shift;
    const ctx = this.canvas.getContext("2d");
    if (shift && shift < cols && this.canvas.width === cols) {
      ctx.globalCompositeOperation = "copy";
      ctx.drawImage(this.canvas, -shift, 0);
      ctx.globalCompositeOperation = "source-over";
    }
    this._paint(from, cols);
    return true;
  }

  /** Let the picture be of so many columns, empty ones behind: a run that has just begun. */
  widen(cols) {
    if (cols <= this.cols) return;
    const wide = new Uint8Array(this.rows * cols);
    for (let r = 0; r < this.rows; r += 1) wide.set(this.codes.subarray(r * this.cols, (r + 1) * this.cols), r * cols + (cols - this.cols));
    this.first -= cols - this.cols;
    this.codes = wide;
    this.cols = cols;
  }

  /** Colours are others. */
  repaint() {
    for (let code = 2; code < 256; code += 1) {
      let power = this.lo + ((code - 2) / 253) * (this.hi - this.lo);
      // Seconds have a scale of their own: half a second to a minute.
      if (this.metric === "seconds") power = RAMP_LO + ((power + 1) / 7) * (RAMP_HI - RAMP_LO);
      this._lut[code] = areaRgbOf(power);
    }
    if (this.canvas.width !== this.cols || this.canvas.height !== this.rows) Object.assign(this.canvas, { width: this.cols, height: Math.max(1, this.rows) });
    this._paint(0, this.cols);
  }

  /** Where workers are down, or nothing is known of them: {row, from, to}, columns. */
  runs(wanted, most = 400) {
    const found = [];
    for (let r = 0; r < this.rows && found.length < most; r += 1) {
      let begin = -1;
      for (let c = 0; c <= this.cols; c += 1) {
        const is = c < this.cols && this.codes[r * this.cols + c] === wanted;
        if (is && begin < 0) begin = c;
        if (!is && begin >= 0) {
          found.push({ row: r, from: begin, to: c });
          begin = -1;
        }
      }
    }
    return found;
  }

  _paint(from, to) {
    const width = to - from;
    if (width <= 0 || !this.rows) return;
    const data = new ImageData(width, this.rows), out = new Uint32Array(data.data.buffer);
    for (let r = 0, o = 0; r < this.rows; r += 1) {
      for (let c = from, i = r * this.cols + from; c < to; c += 1, i += 1, o += 1) out[o] = this._lut[this.codes[i]];
    }
    this.canvas.getContext("2d").putImageData(data, from, 0);
  }
}

function groups(nodes) {
  const found = [];
  nodes.forEach((node, i) => {
    if (i && nodes[i - 1] === node) found[found.length - 1].to = i + 1;
    else found.push({ node, from: i, to: i + 1 });
  });
  return found;
}
