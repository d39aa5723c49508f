"use strict";
// The charts. Their numbers come from the page's own JSON; names in it are anybody's words and are shown as such.
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  // Plotly reads a few tags in its texts; a name must not be one of them.
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (name) => {
    const parts = name.replace(/\.weight$/, "").split(".");
    const number = parts.findIndex((part) => /^\d+$/.test(part));
    const tail = parts.slice(number < 0 ? -2 : number).join(".");
    return safe(tail.length > 28 ? "…" + tail.slice(-27) : tail);
  };
  const fine = matchMedia("(pointer: fine)");
  const narrow = matchMedia("(max-width: 560px)");
  const known = (values) => values.filter((value) => value !== null && value !== undefined);

  // Numbers in the words of the page: three digits.
  const show = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(2).replace("-", "−");
    return (size >= 100 ? value.toFixed(0) : value.toPrecision(3)).replace("-", "−");
  };
  const percent = (share) => share >= 0.01 ? `${(100 * share).toFixed(1)} %` : share < 1e-4 ? "less than 0.01 %" : `${(100 * share).toFixed(2)} %`;

  // Plotly wants plain colours; the style sheet has variables, one for light paper and one for dark.
  const probe = document.createElement("span");
  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const css = (value, alpha = 1) => {
    probe.style.color = value;
    document.body.append(probe);
    const computed = getComputedStyle(probe).color;
    probe.remove();
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = computed;
    pen.fillRect(0, 0, 1, 1);
    const [red, green, blue] = pen.getImageData(0, 0, 1, 1).data;
    return `rgba(${red},${green},${blue},${alpha})`;
  };
  const colour = (name, alpha) => css(`var(${name})`, alpha);
  const tint = (series, alpha) => series.ramp === undefined ? colour(series.colour, alpha)
    : css(`color-mix(in oklab, var(--ramp1) ${100 * series.ramp}%, var(--ramp0))`, alpha);
  const LINES = [["--s2d", "solid", "circle"], ["--adamw", "dash", "triangle-up"], ["--other1", "dot", "square"],
    ["--other2", "dashdot", "diamond"], ["--other3", "longdash", "cross"], ["--none", "longdashdot", "x"]];
  const look = (index) => { const [name, dash, symbol] = LINES[index % LINES.length]; return { colour: name, dash, symbol }; };
  const line = (series, more = {}) => ({
    type: "scatter", mode: "lines+markers", connectgaps: false,
    line: { color: tint(series), dash: series.dash, width: 2.25 },
    marker: { color: tint(series), symbol: series.symbol, size: 8, line: { color: colour("--paper"), width: 1 } },
    ...more,
  });

  const frame = (more = {}) => {
    const ink = colour("--quiet"), rule = colour("--rule");
    const axis = { gridcolor: rule, linecolor: rule, zeroline: false, tickfont: { color: ink }, automargin: true, fixedrange: true };
    const { xaxis = {}, yaxis = {}, legend = {}, margin = {}, ...rest } = more;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
      margin: { l: 40, r: 8, t: 6, b: 30, ...margin },
      hoverlabel: { bgcolor: colour("--ink"), bordercolor: colour("--ink"), font: { color: colour("--paper"), size: 13 }, align: "left", namelength: -1 },
      dragmode: false, hovermode: "closest", showlegend: false, autosize: true,
      legend: { orientation: "h", x: 0, y: -0.16, yanchor: "top", font: { color: colour("--ink"), size: 12 }, ...legend },
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  };
  const options = { responsive: true, displayModeBar: false, displaylogo: false, scrollZoom: false, doubleClick: "reset" };
  const draw = (place, traces, layout) => Plotly.react(place, traces, layout, options);
  const log = (values, wide = 1.2) => {
    const low = Math.min(...values) / wide, high = Math.max(...values) * wide;
    const few = high / low < 30, fewer = high / low < 5;
    return { type: "log", range: [Math.log10(low), Math.log10(high)], dtick: fewer ? "D1" : few ? "D2" : 1, tickformat: "~g", minor: { showgrid: false } };
  };

  const scores = (place) => {
    const figure = data.scores[place.dataset.index], panel = figure.panels[place.dataset.panel];
    const count = panel.series.length;
    const traces = panel.series.map((series, number) => line(series, {
      name: safe(series.name), x: figure.specs.map((_, index) => index + 0.05 * (number - (count - 1) / 2)), y: series.mean,
      error_y: {
        type: "data", symmetric: false, visible: series.seeds.some((seeds) => seeds > 1), thickness: 1.5, width: 4, color: tint(series),
        array: series.high.map((high, index) => high - series.mean[index]), arrayminus: series.low.map((low, index) => series.mean[index] - low),
      },
      text: series.mean.map((mean, index) => `${safe(series.name)}, ${safe(figure.specs[index])}: ${show(mean)}` +
        (series.seeds[index] > 1 ? `<br>${show(series.low[index])} to ${show(series.high[index])} over ${series.seeds[index]} seeds` : "")),
      hoverinfo: "text",
    }));
    draw(place, traces, frame({
      showlegend: true,
      xaxis: { tickvals: figure.specs.map((_, index) => index), ticktext: figure.specs.map(safe), range: [-0.35, figure.specs.length - 0.65], showgrid: false },
      yaxis: figure.logarithmic ? { type: "log", range: figure.range.map(Math.log10), dtick: 1, exponentformat: "power" } : { range: figure.range, nticks: 6 },
    }));
  };

  const trend = (place) => {
    const { labels } = data.trend, panel = data.trend.panels[place.dataset.index];
    const many = panel.series.length > 1;
    const traces = panel.series.map((series, number) => line(look(number), {
      name: short(series.name), x: labels.map((_, index) => index), y: series.values,
      text: series.values.map((value, index) => `${safe(labels[index])}${series.name ? ": " + safe(series.name) : ""}: ${panel.percent && value !== null ? percent(value) : show(value)}`), hoverinfo: "text",
    }));
    const values = known(panel.series.flatMap((series) => series.values)).filter((value) => value > 0);
    // "step 250", "step 500", ...: the word stands once, below the numbers.
    const word = (labels[0].match(/^\S+ (?=\S)/) || [""])[0];
    const shared = word && labels.every((label) => label.startsWith(word)) ? word : "";
    const ticks = labels.map((label) => label.slice(shared.length)).map((label) => safe(label.length > 16 ? label.slice(0, 15) + "…" : label));
    const wide = Math.max(...ticks.map((tick) => tick.length)) * 7 * ticks.length > (place.clientWidth || 400) - 50;
    draw(place, traces, frame({
      showlegend: many, margin: { b: shared ? 44 : 54 }, legend: { y: shared ? -0.32 : -0.3, font: { color: colour("--ink"), size: 11.5 } },
      xaxis: { tickvals: labels.map((_, index) => index), ticktext: ticks, range: [-0.3, labels.length - 0.7], showgrid: false, tickangle: wide ? -35 : 0, title: shared ? { text: safe(shared.trim()), standoff: 6 } : undefined },
      yaxis: panel.logarithmic && values.length && Math.max(...values) > 5 * Math.min(...values) ? log(values) : { rangemode: "tozero", nticks: 5, tickformat: panel.percent ? ".0%" : undefined },
    }));
  };

  const history = (place) => {
    const panel = data.history[place.dataset.index];
    const traces = panel.weights.map((name, number) => {
      const track = data.weights[name].history, series = look(number);
      return line(series, {
        name: short(name), x: track.step, y: track[panel.measure], hoverinfo: "text",
        marker: { color: tint(series), symbol: series.symbol, size: track.selected.map((yes) => yes ? 7 : 0.1) },
        text: track.step.map((step, index) => `step ${step}: ${show(track[panel.measure][index])}${track.selected[index] ? ", selected" : ""}<br>${safe(name)}`),
      });
    });
    const values = known(panel.weights.flatMap((name) => data.weights[name].history[panel.measure]));
    draw(place, traces, frame({
      showlegend: true, margin: { b: 44 }, legend: { y: -0.22, font: { color: colour("--ink"), size: 11.5 } },
      xaxis: { title: { text: "optimizer step", standoff: 6 }, showgrid: false, nticks: 7 }, yaxis: log(values),
    }));
  };

  // The picture: what enters a weight, and the few levels that 4 bits have for it.
  const histogram = (place, picture, window) => {
    const inside = picture.pieces.filter(([left, right]) => right > window[0] && left < window[1]);
    const density = picture.pieces.map((piece) => piece[2]);
    const low = Math.log10(Math.min(...density) / 3), high = Math.log10(Math.max(...density)) + 0.25;
    const tints = [colour("--cell0"), colour("--cell1")];
    const level = colour("--level");
    const trace = {
      type: "bar", x: inside.map(([left, right]) => (left + right) / 2), width: inside.map(([left, right]) => right - left),
      y: inside.map((piece) => piece[2]), marker: { color: inside.map((piece) => tints[piece[3] % 2]), line: { width: 0 } },
      text: inside.map((piece) => `level ${piece[3] + 1} of ${picture.grid.length}, which stands for ${show(picture.grid[piece[3]])}<br>${percent(picture.shares[piece[3]])} of all values are rounded to it`),
      hoverinfo: "text", textposition: "none",
    };
    const levels = picture.grid.map((value, index) => [value, picture.shares[index]]).filter(([value]) => value >= window[0] && value <= window[1]);
    // Shares are written over the levels that are a number's width apart; of a crowd, over the fullest.
    const pixel = (window[1] - window[0]) / Math.max((place.clientWidth || 400) - 12, 1);
    const numbers = [];
    for (const [value, share] of levels.filter((one) => one[1] >= 0.005).sort((a, b) => b[1] - a[1])) {
      if (numbers.every(([other]) => Math.abs(other - value) > 27 * pixel)) numbers.push([value, share]);
    }
    draw(place, [trace], frame({
      bargap: 0, hovermode: "closest", hoverdistance: 40, dragmode: fine.matches ? "zoom" : false, margin: { l: 6, r: 6, t: 20, b: 42 },
      xaxis: { range: window, showgrid: false, fixedrange: !fine.matches, nticks: narrow.matches ? 5 : 8, ticks: "outside", tickcolor: colour("--quiet"),
        title: { text: `value · ${levels.length} of ${picture.grid.length} levels in view`, standoff: 4 } },
      yaxis: { type: "log", range: [low, high], showgrid: false, showticklabels: false, showline: false },
      shapes: levels.map(([value]) => ({ type: "line", x0: value, x1: value, yref: "paper", y0: 0, y1: 1, line: { color: level, width: 1.25, dash: "4px,3px" } })),
      annotations: numbers.map(([value, share]) => ({ x: value, yref: "paper", y: 1, yanchor: "bottom", xanchor: value - window[0] < 14 * pixel ? "left" : "center", showarrow: false, font: { color: level, size: 12 },
        text: (share >= 0.1 && share < 0.99 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)) + (numbers.length === 1 ? " %" : "") })),
    }));
  };

  const spectra = (place, curves) => {
    const values = known(curves.flatMap((curve) => curve.sigma));
    draw(place, curves.map((curve) => line(curve, {
      name: safe(curve.name), x: curve.rank, y: curve.sigma, mode: "lines+markers", hoverinfo: "text",
      marker: { color: tint(curve), symbol: curve.symbol, size: curve.rank.map((rank) => rank <= 3 ? 9 : 0.1) },
      text: curve.sigma.map((value, index) => `${safe(curve.name)}: σ of rank ${curve.rank[index]} is ${show(value)}`),
    })), frame({
      showlegend: curves.length > 1, margin: { b: 44 }, legend: { y: -0.24 },
      xaxis: { type: "log", showgrid: false, title: { text: "rank", standoff: 6 }, dtick: 1, range: [-0.06, Math.log10(Math.max(2, ...curves.flatMap((curve) => curve.rank))) + 0.05] },
      yaxis: { ...log(values), range: [Math.log10(Math.max(Math.min(...values), Math.max(...values) / 3000)) - 0.08, Math.log10(Math.max(...values)) + 0.08], dtick: Math.max(...values) / Math.min(...values) > 100 ? 1 : "D2" },
    }));
  };

  const pcdr = (place, rows) => {
    const ranks = ["PCDR₁", "PCDR₂", "PCDR₃"], groups = [["weight", "of its singular values"], ["data", "of its outputs' directions"]];
    const shown = groups.filter(([key]) => rows.some((row) => known(row[key]).length));
    const traces = rows.map((row) => ({
      type: "bar", name: safe(row.name), x: [shown.flatMap(([, words]) => ranks.map(() => words)), shown.flatMap(() => ranks)], y: shown.flatMap(([key]) => row[key]),
      marker: { color: tint(row), pattern: { shape: { solid: "", dash: "/", dot: "." }[row.dash] ?? "", bgcolor: tint(row), fgcolor: colour("--paper"), size: 6, solidity: 0.25 } },
      text: shown.flatMap(([key]) => row[key].map((value, index) => `${safe(row.name)}: ${ranks[index]} ${value === null ? "–" : value.toFixed(3)}`)), hoverinfo: "text", textposition: "none",
    }));
    draw(place, traces, frame({
      showlegend: rows.length > 1, margin: { b: 54 }, legend: { y: -0.3 }, bargap: 0.28, bargroupgap: 0.06,
      xaxis: { type: "multicategory", showgrid: false, showdividers: false },
      yaxis: { range: [0, Math.max(1.05, ...known(rows.flatMap((row) => [...row.weight, ...row.data])))], dtick: 0.25 },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: colour("--quiet"), width: 1, dash: "dot" } }],
    }));
  };

  const track = (place, name, told) => {
    const rows = [["ratio", "largest output / RMS", look(0)], ["sigma", "σ₁ where the decay looks", look(1)]].filter(([key]) => known(told[key]).length > 1);
    draw(place, rows.map(([key, words, series]) => line(series, {
      name: words, x: told.step, y: told[key], hoverinfo: "text", marker: { color: tint(series), symbol: series.symbol, size: told.selected.map((yes) => yes ? 8 : 0.1) },
      text: told.step.map((step, index) => `step ${step}: ${words} ${show(told[key][index])}${told.selected[index] ? ", selected" : ""}`),
    })), frame({
      showlegend: true, margin: { b: 44 }, legend: { y: -0.24 },
      xaxis: { title: { text: "optimizer step", standoff: 6 }, showgrid: false, nticks: 7 }, yaxis: log(known(rows.flatMap(([key]) => told[key]))),
    }));
  };

  // One weight up close: the pictures stand in the article that is shown, and are drawn anew for each weight.
  const stage = document.createElement("div");
  stage.className = "stage";
  const element = (tag, className, text, parent) => {
    const made = document.createElement(tag);
    made.className = className;
    if (text) made.textContent = text;
    parent.append(made);
    return made;
  };
  const figure = (parent, heading, said) => {
    const box = element("figure", "", "", parent);
    element("figcaption", "", heading, box);
    const place = element("div", "chart", "", box);
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", said);
    return place;
  };
  const closeUp = (name) => {
    for (const old of stage.querySelectorAll(".chart")) Plotly.purge(old);
    stage.replaceChildren();
    const article = Array.from(document.querySelectorAll("#close-up article")).find((one) => one.dataset.weight === name);
    if (!article) return;
    article.querySelector(".slot").append(stage);
    const found = data.weights[name] || {}, pictures = found.histograms || [];
    const later = []; // charts take the width of their place, so all places come first
    if (pictures.length) {
      const grid = element("div", "pictures" + (pictures.length === 1 ? " single" : ""), "", stage);
      for (const picture of pictures) {
        const column = element("div", "picture", "", grid);
        if (pictures.length > 1) element("h4", "", picture.name, column);
        const views = element("div", "views", "", column);
        const whole = figure(views, "all values", `${picture.name}: all inputs of ${name}. ${picture.caption}`);
        later.push(() => histogram(whole, picture, picture.window));
        if (picture.close) {
          const middle = figure(views, "the middle 99.9 %", `${picture.name}: the middle 99.9 % of the inputs of ${name}`);
          later.push(() => histogram(middle, picture, picture.close));
        }
        element("p", "said", picture.caption, column);
      }
      for (const words of article.querySelectorAll(".captions")) words.hidden = words.children.length === pictures.length;
    }
    const panels = element("div", "panels", "", stage);
    const curves = found.spectra || [], shares = found.pcdr || [];
    const panel = (heading, said, paint) => { const place = figure(panels, heading, said); later.push(() => paint(place)); };
    if (curves.length) panel("singular values", `singular values of ${name}; the leading ones are in the table below`, (place) => spectra(place, curves));
    if (shares.length) panel("who makes the outliers: PCDR", `PCDR of ${name}; its numbers are in the table below`, (place) => pcdr(place, shares));
    if (found.history) panel("over the refreshes of the decay", `history of ${name} over the refreshes`, (place) => track(place, name, found.history));
    for (const paint of later) paint();
  };

  const kinds = { scores, trend, history };
  const drawn = new Set();
  const places = Array.from(document.querySelectorAll("[data-chart]"));
  const paint = (place) => { drawn.add(place); kinds[place.dataset.chart](place); };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !drawn.has(entry.target)) paint(entry.target);
  }, { rootMargin: "400px" });
  for (const place of places) watcher.observe(place);

  const choose = document.getElementById("choose");
  const current = () => choose && closeUp(choose.value);
  const again = () => { for (const place of drawn) paint(place); current(); };
  root.addEventListener("weight", (event) => closeUp(event.detail));
  root.addEventListener("theme", again);
  narrow.addEventListener("change", current);
  addEventListener("beforeprint", () => {
    const theme = root.dataset.theme;
    root.dataset.theme = "light"; // paper is light
    for (const place of places) paint(place);
    current();
    addEventListener("afterprint", () => { if (theme) root.dataset.theme = theme; else delete root.dataset.theme; again(); }, { once: true });
  });
  current();
})();
