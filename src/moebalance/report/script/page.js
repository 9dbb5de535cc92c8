"use strict";
// What the reader chose, by name: a live page puts new content in and asks here what was on.
const kept = new Map();

const tip = document.getElementById("tip");

// Say something beside a point of the window: a heading, then rows of [colour, words, number].
function showTip(x, y, heading, rows = []) {
  tip.replaceChildren();
  const head = document.createElement("b");
  head.textContent = heading;
  tip.append(head);
  for (const [colour, words, number] of rows) {
    const row = document.createElement("div");
    const [dot, name, value] = ["i", "span", "span"].map((tag) => document.createElement(tag));
    dot.style.background = colour;
    name.textContent = words;
    value.textContent = number;
    row.append(dot, name, value);
    tip.append(row);
  }
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const across = x + 18 + width > innerWidth ? x - width - 14 : x + 18;
  tip.style.left = `${Math.max(6, Math.min(across, innerWidth - width - 6))}px`;
  tip.style.top = `${Math.max(6, Math.min(y + 14, innerHeight - height - 6))}px`;
}

function hideTip() {
  tip.hidden = true;
}

// Three digits, however large or small.
function short(value) {
  const size = Math.abs(value);
  if (size === 0 || (size >= 0.001 && size < 1e5)) {
    return value.toFixed(Math.max(0, Math.min(4, 2 - Math.floor(Math.log10(size || 1)))));
  }
  return value.toExponential(2);
}

// Sort a table by the column whose button was pressed; missing values stay last either way.
function sortable(table, name) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const sort = (column, order) => {
    for (const head of heads) if (head.ariaSort) head.ariaSort = "none";
    heads[column].ariaSort = order;
    kept.set(name, [column, order]);
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.sort;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (column === 0 ? x.localeCompare(y) : Number(x) - Number(y));
    });
    body.append(...rows);
  };
  heads.forEach((head, column) => {
    const button = head.querySelector("button.sort");
    if (!button) return;
    const turned = { ascending: "descending", descending: "ascending" };
    button.addEventListener("click", () => sort(column, turned[head.ariaSort] || button.dataset.first));
  });
  if (kept.has(name)) sort(...kept.get(name));
}

// Show or hide a method in the figures of its section.
function toggles(section, name) {
  const hidden = kept.get(name) || new Set();
  kept.set(name, hidden);
  const apply = () => {
    for (const button of section.querySelectorAll(".legend button")) {
      button.ariaPressed = String(!hidden.has(button.dataset.method));
    }
    for (const series of section.querySelectorAll(".series")) {
      series.style.display = hidden.has(series.dataset.method) ? "none" : "";
    }
  };
  for (const button of section.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const method = button.dataset.method;
      if (!hidden.delete(method)) hidden.add(method);
      apply();
    });
  }
  apply();
}

// Tables wider than the window say so, until they are moved.
function scrolls(root) {
  const tell = (box) => box.classList.toggle("more", box.scrollWidth > box.clientWidth + 1 && !box.scrollLeft);
  const seen = new ResizeObserver((entries) => entries.forEach((entry) => tell(entry.target)));
  for (const box of root.querySelectorAll(".scroll")) {
    seen.observe(box);
    box.addEventListener("scroll", () => box.scrollLeft && box.classList.remove("more"));
  }
}

// Words about a column open beside its question mark.
function helps(root) {
  for (const button of root.querySelectorAll(".help")) {
    button.addEventListener("click", () => {
      const words = document.getElementById(button.getAttribute("popovertarget"));
      const box = button.getBoundingClientRect();
      words.style.left = `${Math.max(10, Math.min(box.left - 20, innerWidth - 350))}px`;
      words.style.top = `${box.bottom + 8}px`;
    });
  }
}

// Breathe life into the content; called once, and again for each new content of a live page.
function start(root) {
  helps(root);
  scrolls(root);
  for (const details of root.querySelectorAll("details[data-keep]")) {
    details.open = kept.get(details.dataset.keep) || false;
    details.addEventListener("toggle", () => kept.set(details.dataset.keep, details.open));
  }
  root.querySelectorAll("section.mode").forEach((section, i) => {
    section.querySelectorAll("table.methods").forEach((table, j) => sortable(table, `sort-${i}-${j}`));
    toggles(section, `hidden-${i}`);
    for (const svg of section.querySelectorAll("svg")) marks(svg);
    for (const chart of section.querySelectorAll("svg.chart")) hover(chart);
    for (const explorer of section.querySelectorAll(".explorer")) explore(explorer);
  });
}

addEventListener("DOMContentLoaded", () => start(document.querySelector("main")));
