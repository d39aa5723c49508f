"use strict";
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const status = document.getElementById("status");
  let quiet;
  const say = (words) => {
    status.textContent = words;
    clearTimeout(quiet);
    quiet = setTimeout(() => { status.textContent = ""; }, 2500);
  };

  // Light and dark: the system's choice until the reader makes one.
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); root.dispatchEvent(new Event("theme")); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { name(); root.dispatchEvent(new Event("theme")); });
  name();

  // Tables that sort: numbers by their full value, words by the reader's alphabet, what is missing always last.
  const sort = (table, column, down) => {
    const value = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
    const body = table.tBodies[0];
    const rows = Array.from(body.rows).map((row) => [value(row), row]);
    const missing = (text) => text === "" || text === "–";
    rows.sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const difference = a - b;
      const order = Number.isNaN(difference) ? a.localeCompare(b, undefined, { numeric: true }) : difference;
      return down ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
  };
  for (const table of all("table.sortable")) {
    all("thead th", table).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const first = head.matches(".n:not(.words)") ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? (first === "ascending" ? "descending" : "ascending") : first;
        all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        sort(table, column, order === "descending");
      });
    });
  }

  // Copying gives tab-separated text with full precision, ready for a spreadsheet.
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };
  for (const button of all("[data-copy]")) {
    button.addEventListener("click", async () => {
      const rows = Array.from(document.getElementById(button.dataset.copy).rows);
      await copy(rows.map((row) => Array.from(row.cells, (cell) => cell.dataset.sort || cell.textContent.trim()).join("\t")).join("\n"));
      say(rows.length - 1 + " rows copied");
    });
  }

  // One weight up close: chosen in the list or in the map.
  const choose = document.getElementById("choose");
  const show = (weight, scroll) => {
    for (const article of all("#close-up article")) article.hidden = article.dataset.weight !== weight;
    choose.value = weight;
    root.dispatchEvent(new CustomEvent("weight", { detail: weight }));
    if (scroll) document.getElementById("close-up").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth", block: "start" });
  };
  if (choose) {
    choose.addEventListener("change", () => show(choose.value, false));
    const step = (by) => show(choose.options[(choose.selectedIndex + by + choose.length) % choose.length].value, false);
    document.getElementById("previous").addEventListener("click", () => step(-1));
    document.getElementById("next").addEventListener("click", () => step(1));
  }

  for (const button of all(".outside [data-weight]")) button.addEventListener("click", () => show(button.dataset.weight, true));

  // The map by keyboard: one stop for Tab, arrows within, Enter chooses.
  for (const map of all("table.map")) {
    const first = map.querySelector("td[data-weight]");
    if (first) first.tabIndex = 0;
    map.addEventListener("click", (event) => {
      const cell = event.target.closest("td[data-weight]");
      if (cell) show(cell.dataset.weight, true);
    });
    map.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td[data-weight]");
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!cell) return;
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        show(cell.dataset.weight, true);
      } else if (move) {
        event.preventDefault();
        const rows = map.tBodies[0].rows;
        let row = cell.parentElement.sectionRowIndex + move[0];
        let column = cell.cellIndex + move[1];
        while (rows[row] && rows[row].cells[column] && !rows[row].cells[column].dataset.weight) { row += move[0]; column += move[1]; }
        const next = rows[row] && rows[row].cells[column];
        if (next && next.dataset.weight) { cell.tabIndex = -1; next.tabIndex = 0; next.focus(); }
      }
    });
  }
})();
