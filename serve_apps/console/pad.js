// The drawing pad: strokes in, a picture as the training images are out.

const NUM_PIXELS = 560; // of the canvas, about, in its longer direction
const INK_SHARE = 20 / 28; // of the frame; digits of MNIST are fitted into 20 of 28 pixels

/** A canvas to draw on with mouse, touch or pen. */
export class Pad {
  constructor(canvas, onStroke) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.onStroke = onStroke;
    this.isEmpty = true;
    this.last = null;
    canvas.addEventListener("pointerdown", (event) => this.#start(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, () => this.#end());
    }
  }

  /** Take the shape of a model's images and the colour of their border. */
  fit([height, width], fill) {
    this.height = height;
    this.width = width;
    this.paper = fill?.[0] ?? 0;
    this.ink = this.paper < 128 ? 255 : 0;
    this.resolution = Math.max(1, Math.round(NUM_PIXELS / Math.max(height, width)));
    this.canvas.width = width * this.resolution;
    this.canvas.height = height * this.resolution;
    this.clear();
  }

  clear() {
    this.context.fillStyle = grey(this.paper);
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.isEmpty = true;
    this.last = null;
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.canvas.width,
      y: ((event.clientY - box.top) / box.height) * this.canvas.height,
    };
  }

  #start(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.last = this.#at(event);
    this.#line(this.last, this.last);
    this.onStroke("start");
  }

  #move(event) {
    if (!this.last) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) {
      const next = this.#at(one);
      this.#line(this.last, next);
      this.last = next;
    }
  }

  #end() {
    if (!this.last) return;
    this.last = null;
    this.onStroke("end");
  }

  #line(from, to) {
    const { context } = this;
    context.strokeStyle = grey(this.ink);
    context.lineWidth = (Math.min(this.width, this.height) * this.resolution) / 12;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x + 0.01, to.y);
    context.stroke();
    this.isEmpty = false;
  }

  /**
   * Draw what is sent onto a canvas of the model's size: the ink scaled into the middle of the
   * frame and centred by its mass, as the training images were made.
   */
  render(target) {
    const box = inkBox(this.context.getImageData(0, 0, this.canvas.width, this.canvas.height), this);
    const frame = document.createElement("canvas");
    frame.width = this.canvas.width;
    frame.height = this.canvas.height;
    const context = frame.getContext("2d", { willReadFrequently: true });
    context.fillStyle = grey(this.paper);
    context.fillRect(0, 0, frame.width, frame.height);
    const scale = Math.min(
      (INK_SHARE * frame.width) / box.width,
      (INK_SHARE * frame.height) / box.height,
    );
    context.imageSmoothingQuality = "high";
    context.drawImage(
      this.canvas,
      box.x, box.y, box.width, box.height,
      frame.width / 2 - scale * (box.massX - box.x),
      frame.height / 2 - scale * (box.massY - box.y),
      scale * box.width, scale * box.height,
    );
    target.width = this.width;
    target.height = this.height;
    const pixels = means(context.getImageData(0, 0, frame.width, frame.height), this);
    target.getContext("2d").putImageData(pixels, 0, 0);
  }
}

const grey = (value) => `rgb(${value}, ${value}, ${value})`;

/** Return where there is ink, and its centre of mass. */
function inkBox({ data, width, height }, { paper }) {
  let left = width, right = -1, top = height, bottom = -1;
  let mass = 0, massX = 0, massY = 0;
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const ink = Math.abs(data[4 * (y * width + x)] - paper);
      if (ink < 16) continue;
      left = Math.min(left, x);
      right = Math.max(right, x);
      top = Math.min(top, y);
      bottom = y;
      mass += ink;
      massX += ink * (x + 0.5);
      massY += ink * (y + 0.5);
    }
  }
  if (!mass) return { x: 0, y: 0, width, height, massX: width / 2, massY: height / 2 };
  return {
    x: left, y: top, width: right - left + 1, height: bottom - top + 1,
    massX: massX / mass, massY: massY / mass,
  };
}

/** Shrink to the model's size: every pixel the mean of its square. */
function means({ data, width }, { width: columns, height: rows, resolution }) {
  const out = new ImageData(columns, rows);
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      let sum = 0;
      for (let y = 0; y < resolution; y += 1) {
        const start = (row * resolution + y) * width + column * resolution;
        for (let x = 0; x < resolution; x += 1) sum += data[4 * (start + x)];
      }
      const at = 4 * (row * columns + column);
      out.data.fill(Math.round(sum / resolution ** 2), at, at + 3);
      out.data[at + 3] = 255;
    }
  }
  return out;
}
