// Images as the model was trained to see them: upright, RGB, resized as torchvision does, normalized.
//
// The canvas' own resizing is another one in every browser. This one gives torchvision's numbers for uint8 images with
// antialiasing, bit for bit: weights of 16 bits, rows before columns, 8 bits in between.

const FILTERS = {
  2: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) }, // bilinear, by PIL's number
  3: { support: 2, weight: (x) => cubic(Math.abs(x)) },           // bicubic
};

function cubic(x) {
  const a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// For each output position: where its pixels begin, and their weights as integers of `precision` bits after the point.
function integerWeights(from, to, filter) {
  const scale = from / to, stretch = Math.max(1, scale), reach = filter.support * stretch;
  const rows = [];
  for (let i = 0; i < to; i++) {
    const center = scale * (i + 0.5);
    const start = Math.max(0, Math.trunc(center - reach + 0.5));
    const end = Math.min(from, Math.trunc(center + reach + 0.5));
    const weights = [];
    for (let j = start; j < end; j++) weights.push(filter.weight((j - center + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    rows.push({ start, weights: weights.map((weight) => weight / sum) });
  }
  const largest = Math.max(...rows.map((row) => Math.max(...row.weights)));
  let precision = 0;
  while (precision < 22 && Math.trunc(0.5 + largest * 2 ** (precision + 1)) < 2 ** 15) precision++;
  for (const row of rows) {
    row.weights = Int32Array.from(row.weights, (w) => Math.trunc(w * 2 ** precision + (w < 0 ? -0.5 : 0.5)));
  }
  return { rows, precision };
}

// Resize along one axis: `lines` lines of `from` pixels, `step` and `lineStep` bytes from pixel to pixel and line to line.
function resizeAxis(source, target, to, lines, { rows, precision }, [step, lineStep], [outStep, outLineStep]) {
  const half = 1 << (precision - 1);
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < to; i++) {
      const { start, weights } = rows[i];
      for (let channel = 0; channel < 3; channel++) {
        let sum = half, place = line * lineStep + start * step + channel;
        for (let j = 0; j < weights.length; j++, place += step) sum += source[place] * weights[j];
        target[line * outLineStep + i * outStep + channel] = sum >> precision; // a clamped array: 0 to 255
      }
    }
  }
}

// Pixels (height, width, 4) as RGBA bytes, resized to (newHeight, newWidth, 3).
export function resize({ data, width, height }, newWidth, newHeight, resample) {
  const filter = FILTERS[resample];
  const narrow = new Uint8ClampedArray(height * newWidth * 3);
  const across = integerWeights(width, newWidth, filter);
  resizeAxis(data, narrow, newWidth, height, across, [4, 4 * width], [3, 3 * newWidth]);
  const small = new Uint8ClampedArray(newHeight * newWidth * 3);
  const down = integerWeights(height, newHeight, filter);
  resizeAxis(narrow, small, newHeight, newWidth, down, [3 * newWidth, 3], [3 * newWidth, 3]);
  return small;
}

// A file as `pixel_values`, (3, height, width) floats. `settings` are those of `image` in demo.json.
export async function pixelValues(file, settings) {
  const pixels = await decode(file);
  const small = resize(pixels, settings.width, settings.height, settings.resample);
  const area = settings.width * settings.height;
  const values = new Float32Array(3 * area);
  for (let i = 0; i < area; i++) {
    for (let channel = 0; channel < 3; channel++) {
      values[channel * area + i] = small[3 * i + channel] * settings.scale[channel] + settings.shift[channel];
    }
  }
  return values;
}

// The pixels of a file as RGBA bytes: upright by its EXIF orientation, which is the default, and colors as they are in it.
async function decode(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    const { width, height } = bitmap;
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    const pixels = context.getImageData(0, 0, width, height);
    return pixels.data.some((value, i) => i % 4 === 3 && value < 255) ? readTransparent(bitmap) ?? pixels : pixels;
  } catch {
    throw new Error(`“${file.name || "The file"}” cannot be read as an image. Try another JPEG, PNG or WebP file.`);
  } finally {
    bitmap?.close();
  }
}

// A canvas multiplies colors with their transparency, and loses those that are wholly transparent; a texture keeps them.
function readTransparent(bitmap) {
  const { width, height } = bitmap;
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (gl === null || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  const texture = gl.getParameter(gl.TEXTURE_BINDING_2D);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const data = new Uint8Array(4 * width * height);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, data);
  gl.getExtension("WEBGL_lose_context")?.loseContext(); // frees its memory
  return { data, width, height };
}
