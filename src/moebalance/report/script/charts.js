// The figures with axes: values are read back off the drawing, so that nothing is carried twice.

// An axis written as "low high start end [log]": from a pixel to its value, and back.
function axis(text) {
  const [low, high, start, end] = text.split(" ").map(Number);
  const log = text.endsWith("log");
  return {
    value(pixel) {
      const share = (pixel - start) / (end - start);
      return log ? low * (high / low) ** share : low + share * (high - low);
    },
    pixel(value) {
      const inside = Math.min(Math.max(value, low), high);
      const share = log ? Math.log(inside / low) / Math.log(high / low) : (inside - low) / (high - low);
      return start + share * (end - start);
    },
    start,
    end,
  };
}

function points(series) {
  const numbers = (series.querySelector(".line").getAttribute("d").match(/[\d.e+-]+/g) || []).map(Number);
  return Array.from({ length: numbers.length / 2 }, (_, i) => [numbers[2 * i], numbers[2 * i + 1]]);
}

// Marks and discs say at once what they are, also to a finger and to the keyboard.
function marks(svg) {
  for (const title of svg.querySelectorAll("title")) {
    const mark = title.parentNode;
    const words = title.textContent;
    title.remove();
    mark.setAttribute("aria-label", words);
    const tell = (x, y) => showTip(x, y, words);
    mark.addEventListener("pointermove", (event) => tell(event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hideTip);
    if (mark.tagName === "g") {
      mark.tabIndex = 0;
      mark.addEventListener("focus", () => {
        const box = mark.getBoundingClientRect();
        tell(box.right, box.bottom);
      });
      mark.addEventListener("blur", hideTip);
    }
  }
}

// A line through all charts of a stack at one step, with every method's value there.
function hover(chart) {
  const stack = [...chart.closest("figure").querySelectorAll("svg.chart")];
  const across = axis(chart.dataset.x);
  const up = axis(chart.dataset.y);
  const sorted = chart.classList.contains("sorted");
  chart.insertAdjacentHTML("beforeend", '<path class="cross" visibility="hidden"/>');
  let at = null;

  const shown = () => [...chart.querySelectorAll(".series:has(.line)")].filter((s) => s.style.display !== "none").reverse();
  const nearest = (line, x) => line.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  const cross = (x) => {
    for (const other of stack) {
      const { start, end } = axis(other.dataset.y);
      const path = other.querySelector(".cross");
      path.setAttribute("visibility", x === null ? "hidden" : "visible");
      if (x !== null) path.setAttribute("d", `M${x} ${start}V${end}`);
    }
  };
  const tell = (x, clientX, clientY) => {
    const found = shown().map((s) => [s, points(s)]).filter(([, line]) => line.length);
    if (!found.length) return;
    at = nearest(found.flatMap(([, line]) => line), x)[0];
    const rows = found.map(([series, line]) => {
      const point = nearest(line, at);
      const known = Math.abs(point[0] - at) < 4;
      const colour = series.querySelector(".line").style.stroke;
      return [colour, series.dataset.label, known ? short(up.value(point[1])) + (sorted ? "×" : "") : "–"];
    });
    cross(at);
    const place = Math.round(across.value(at) * 2) / 2;
    showTip(clientX, clientY, sorted ? `expert ${Math.round(place)} from the top` : `step ${place}`, rows);
  };
  const leave = () => {
    at = null;
    cross(null);
    hideTip();
  };
  chart.addEventListener("pointermove", (event) => {
    const matrix = chart.getScreenCTM().inverse();
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix).x;
    tell(x, event.clientX, event.clientY);
  });
  chart.addEventListener("pointerleave", leave);
  chart.addEventListener("blur", leave);
  chart.addEventListener("keydown", (event) => {
    const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") leave();
    if (!turn) return;
    event.preventDefault();
    const places = [...new Set(shown().flatMap((s) => points(s).map((p) => p[0])))].sort((a, b) => a - b);
    const from = at === null ? (turn > 0 ? -1 : places.length) : places.indexOf(at);
    const x = places[Math.max(0, Math.min(places.length - 1, from + turn))];
    const box = chart.getBoundingClientRect();
    const left = new DOMPoint(x, 0).matrixTransform(chart.getScreenCTM()).x;
    if (x !== undefined) tell(x, left, box.top + box.height / 3);
  });
}
