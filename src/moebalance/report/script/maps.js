// Maps of load on canvases, drawn from packed frames: a slider chooses the frame for all of them.

// The inverse of pack.py: deflated bytes in base64, one frame after another.
async function unpack(pack, length) {
  const bytes = Uint8Array.from(atob(pack.codes), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = new Uint8Array(await new Response(stream).arrayBuffer());
  if (pack.delta) for (let i = length; i < data.length; i++) data[i] += data[i - length];
  return Array.from({ length: data.length / length }, (_, i) => data.subarray(i * length, (i + 1) * length));
}

const ratio = (code) => (code < 2 ? 0 : 2 ** ((code - 82) / 12));

function colourName(code) {
  if (code < 2) return code ? "--dead" : "--paper";
  return `--h${Math.max(-6, Math.min(6, Math.round((code - 82) / 4))) + 6}`;
}

let palette = null;
function colours() {
  if (palette) return palette;
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  palette = { codes: Array.from({ length: 256 }, (_, c) => read(colourName(c))) };
  for (const name of ["ink", "muted", "paper", "rule"]) palette[name] = read(`--${name}`);
  return palette;
}

// Experts in a chain from each to the one that serves with it most, of those that are left.
function chain(codes, columns) {
  const left = new Set(Array.from({ length: columns }, (_, e) => e));
  const largest = (e) => codes.subarray(e * columns, (e + 1) * columns).reduce((a, b) => Math.max(a, b), 0);
  let last = [...left].reduce((a, b) => (largest(b) > largest(a) ? b : a));
  const found = [];
  while (left.size) {
    found.push(last);
    left.delete(last);
    const from = last * columns;
    last = [...left].reduce((a, b) => (a === -1 || codes[from + b] > codes[from + a] ? b : a), -1);
  }
  return found;
}

// For every row the experts from left to right; for pairs the rows are experts in the same order.
function arrangement(card, kind, order) {
  const { rows, columns } = card.pack;
  const own = Array.from({ length: columns }, (_, e) => e);
  const sorted = (codes, row) => [...own].sort((a, b) => codes[row * columns + b] - codes[row * columns + a]);
  card.lines = kind === "pairs" && order === "groups" ? chain(card.codes, columns) : rows.map((_, row) => row);
  if (kind === "pairs") return rows.map(() => card.lines);
  if (order === "own") return rows.map(() => own);
  if (kind === "loads") {
    const codes = order === "final" ? card.frames.at(-1) : card.codes;
    return rows.map((_, row) => sorted(codes, row));
  }
  const served = own.map((e) => {
    const column = rows.map((_, row) => ratio(card.codes[row * columns + e]));
    const largest = Math.max(...column);
    return [column.indexOf(largest), -largest / (column.reduce((a, b) => a + b, 0) || 1)];
  });
  const together = [...own].sort((a, b) => served[a][0] - served[b][0] || served[a][1] - served[b][1]);
  return rows.map(() => together);
}

function draw(card) {
  const { canvas, pack, codes, experts, lines } = card;
  const { rows, columns } = pack;
  const ink = colours();
  const width = card.figure.clientWidth;
  if (!width) return;
  const square = rows.length === columns && card.figure.closest(".squares");
  // The experts of a square are all named: in as many columns of numbers as their rows are low.
  const lanes = square ? Math.ceil((10 * columns) / (width - 40)) : 1;
  const gutterOfSquare = 12 + 24 * lanes;
  const lineHeight = rows.length <= 8 ? 22 : rows.length <= 16 ? 15 : rows.length <= 32 ? 11 : 8;
  const height = square ? (width - gutterOfSquare) / columns : lineHeight;
  const scale = devicePixelRatio || 1;
  canvas.style.height = `${rows.length * height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(rows.length * height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = `${Math.min(12, Math.max(9, height))}px ${getComputedStyle(canvas).fontFamily}`;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const name = (row) => square ? String(row) : (rows[row].length > 18 ? `${rows[row].slice(0, 17)}…` : rows[row]);
  const gutter = square ? gutterOfSquare : Math.ceil(Math.max(...rows.map((_, r) => pen.measureText(name(r)).width))) + 10;
  const cell = (width - gutter) / columns;
  const gap = cell > 5 ? 1 : 0;
  const every = square ? 1 : Math.ceil(13 / height);
  card.layout = { gutter, cell, height };
  const snap = (x) => Math.round(x * scale) / scale;
  for (let row = 0; row < rows.length; row++) {
    if (row % every === 0) {
      pen.fillStyle = ink.muted;
      pen.fillText(name(lines[row]), gutter - 8 - 24 * (row % lanes), (row + 0.5) * height);
    }
    for (let j = 0; j < columns; j++) {
      const code = codes[lines[row] * columns + experts[row][j]];
      const left = snap(gutter + j * cell), right = snap(gutter + (j + 1) * cell);
      pen.fillStyle = ink.codes[code];
      pen.fillRect(left, row * height, right - left - gap, height - (height > 10 ? 1 : 0));
    }
  }
  if (card.cursor) {
    const [row, j] = card.cursor;
    pen.strokeStyle = ink.ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(gutter + j * cell - 0.5, row * height - 0.5, Math.max(cell, 3), height);
  }
}

// What a cell says.
function tellCell(card, kind, clientX, clientY) {
  const [row, j] = card.cursor;
  const expert = card.experts[row][j];
  const line = card.lines[row];
  const code = card.codes[line * card.pack.columns + expert];
  if (kind === "pairs") {
    const often = line === expert ? "the same expert" : code === 0 ? "one of them served nobody" : code === 1 ? "never on one token" : `${ratio(code).toPrecision(2)}× as often as by chance`;
    return showTip(clientX, clientY, `experts ${line} and ${expert}`, [[colours().codes[code], often, ""]]);
  }
  const load = code === 0 ? "not measured" : code === 1 ? "dead: < 0.01× an even share" : `${ratio(code).toPrecision(2)}× an even share`;
  const rank = kind === "loads" ? `, ${card.rank(row, expert)} of ${card.pack.columns}` : "";
  showTip(clientX, clientY, `${card.pack.rows[row]}, expert ${expert}`, [[colours().codes[code], load + rank, ""]]);
}

function pointing(card, kind) {
  const { canvas } = card;
  const go = (row, j, x, y) => {
    const rows = card.pack.rows.length, columns = card.pack.columns;
    card.cursor = [Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(columns - 1, j))];
    draw(card);
    const { gutter, cell, height } = card.layout;
    const box = canvas.getBoundingClientRect();
    tellCell(card, kind, x ?? box.left + gutter + card.cursor[1] * cell, y ?? box.top + (card.cursor[0] + 1) * height);
  };
  const leave = () => {
    card.cursor = null;
    hideTip();
    draw(card);
  };
  canvas.addEventListener("pointermove", (event) => {
    const { gutter, cell, height } = card.layout;
    const box = canvas.getBoundingClientRect();
    const x = event.clientX - box.left - gutter;
    if (x < 0) return leave();
    go(Math.floor((event.clientY - box.top) / height), Math.floor(x / cell), event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [];
    if (event.key === "Escape") leave();
    if (down === undefined) return;
    event.preventDefault();
    const [row, j] = card.cursor || [-down, -right];
    go(row + down, j + right);
  });
}

// The line of a method in the chart of loads by rank, for the frame that is shown.
function drawSorted(explorer, card) {
  const chart = explorer.querySelector("svg.sorted");
  const series = [...(chart?.querySelectorAll(".series:has(.line)") || [])].find((s) => s.dataset.label === card.figure.dataset.label);
  if (!series) return;
  const across = axis(chart.dataset.x), up = axis(chart.dataset.y);
  const { rows, columns } = card.pack;
  const sums = new Float64Array(columns), counts = new Float64Array(columns);
  for (let row = 0; row < rows.length; row++) {
    const line = card.codes.subarray(row * columns, (row + 1) * columns).filter((c) => c > 0).sort().reverse();
    line.forEach((code, i) => { sums[i] += ratio(code); counts[i] += 1; });
  }
  const path = [...sums].flatMap((sum, i) => (counts[i] ? [`${across.pixel(i + 1).toFixed(1)} ${up.pixel(sum / counts[i]).toFixed(1)}`] : []));
  series.querySelector(".line").setAttribute("d", `M${path.join("L")}`);
}

// When a frame was taken: an evaluation comes after the training batches of its step.
const moment = ([step, what]) => step + (what === "evaluation" ? 0.5 : 0);

async function explore(explorer) {
  if (typeof DecompressionStream === "undefined") return;
  const kind = explorer.dataset.kind, name = explorer.dataset.keep;
  const cards = await Promise.all([...explorer.querySelectorAll("figure[data-pack]")].map(async (figure) => {
    const pack = JSON.parse(figure.dataset.pack);
    const frames = await unpack(pack, pack.rows.length * pack.columns);
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    canvas.ariaLabel = `${figure.dataset.label}: map with ${pack.rows.length} rows and ${pack.columns} experts; arrow keys move over its cells`;
    figure.append(canvas);
    const card = { figure, canvas, pack, frames, cursor: null };
    card.rank = (row, expert) => {
      const line = card.codes.subarray(row * pack.columns, (row + 1) * pack.columns);
      return `rank ${1 + line.filter((code) => code > line[expert]).length}`;
    };
    return card;
  }));
  if (!cards.length) return;
  const slider = explorer.querySelector("input[type=range]"), output = explorer.querySelector("output");
  const button = explorer.querySelector(".play"), radios = [...explorer.querySelectorAll("input[type=radio]")];
  const all = new Map(cards.flatMap((card) => card.pack.frames.map((frame) => [moment(frame), frame])));
  const stops = [...all.keys()].sort((a, b) => a - b);
  const state = kept.get(name) || { at: Infinity, order: radios[0].value };
  if (kind !== "loads" && !kept.has(name)) state.at = stops[0];
  kept.set(name, state);

  const show = () => {
    const position = stops.findLastIndex((stop) => stop <= state.at);
    slider.value = Math.max(0, position);
    const frame = all.get(stops[slider.value]);
    const words = kind === "loads" ? `${frame[0]} · ${frame[1]}` : frame[1];
    output.textContent = words;
    slider.setAttribute("aria-valuetext", words);
    for (const card of cards) {
      const index = Math.max(0, card.pack.frames.findLastIndex((f) => moment(f) <= stops[slider.value]));
      card.codes = card.frames[index];
      card.experts = arrangement(card, kind, state.order);
      const [step, what] = card.pack.frames[index];
      card.figure.querySelector(".now").textContent = kind === "loads" ? `step ${step}, ${what}` : what;
      draw(card);
      if (kind === "loads") drawSorted(explorer, card);
    }
  };
  const choose = (position) => {
    // At the end of a live page means: at whatever the end will be.
    state.at = position >= stops.length - 1 ? Infinity : stops[position];
    show();
  };
  let playing = null;
  const stop = () => {
    clearInterval(playing);
    playing = null;
    button.textContent = "▶";
    button.ariaLabel = "Play";
  };
  button.addEventListener("click", () => {
    if (playing) return stop();
    let position = Number(slider.value) >= stops.length - 1 ? 0 : Number(slider.value);
    button.textContent = "❚❚";
    button.ariaLabel = "Pause";
    choose(position);
    playing = setInterval(() => {
      position += 1;
      choose(position);
      if (position >= stops.length - 1 || !explorer.isConnected) stop();
    }, Math.max(60, Math.min(500, 8000 / stops.length)));
  });
  slider.max = stops.length - 1;
  slider.addEventListener("input", () => { stop(); choose(Number(slider.value)); });
  for (const radio of radios) {
    radio.checked = radio.value === state.order;
    radio.addEventListener("change", () => { state.order = radio.value; show(); });
  }
  explorer.querySelector(".slide").hidden = stops.length < 2;
  explorer.querySelector(".controls").hidden = false;
  explorer.classList.add("alive");
  for (const card of cards) pointing(card, kind);
  show();
  // On paper stand the drawn maps, which show the end; so must the lines by rank.
  const rank = (card, codes) => drawSorted(explorer, { ...card, codes });
  if (kind === "loads") {
    addEventListener("beforeprint", () => cards.forEach((card) => rank(card, card.frames.at(-1))));
    addEventListener("afterprint", () => cards.forEach((card) => rank(card, card.codes)));
  }
  const again = () => (explorer.isConnected ? cards.forEach(draw) : observer.disconnect());
  const observer = new ResizeObserver(again);
  cards.forEach((card) => observer.observe(card.figure));
  explorer.addEventListener("repaint", again);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  palette = null;
  for (const explorer of document.querySelectorAll(".explorer")) explorer.dispatchEvent(new Event("repaint"));
});
