"use strict";
(() => {
  const board = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const MARKS = ["M-5 0A5 5 0 1 1 5 0A5 5 0 1 1 -5 0Z", "M-4.5 -4.5H4.5V4.5H-4.5Z", "M0 -6L6 4.8H-6Z", "M0 -6.5L6.5 0L0 6.5L-6.5 0Z",
    "M-5.5 -2H-2V-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5Z"]; // a form for each kind, so that colour is not all that tells
  const COLUMNS = [ // [key, heading, value to sort by, direction that comes first]
    ["stack", "Stack", (s) => s.stack.toLowerCase(), "ascending"],
    ["bytes", "Bytes", (s) => s.share, "ascending"],
    ["score", "Score", (s) => s.score.value, "descending"],
    ["dense", "Of dense", (s) => (s.dense ? s.dense.value : null), "descending"],
    ["contexts", "Contexts", (s) => s.score.contexts, "descending"],
    ["front", "Front", (s) => (s.front ? 1 : 0), "descending"],
  ];
  const FEW = 16; // stacks of a plot that are all named
  const state = { model: "", task: "", question: "", stack: "", sort: "bytes", order: "descending" };
  const card = document.getElementById("card");
  const find = (selector) => document.querySelector(selector);

  // Elements. Names that rows bring become text or attributes here, never markup.
  function element(tag, attributes = {}, ...children) {
    return fill(document.createElement(tag), attributes, children);
  }
  function drawn(tag, attributes = {}, ...children) {
    return fill(document.createElementNS(SVG, tag), attributes, children);
  }
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children);
    return node;
  }

  // What is shown stands in the address, so that a link shows the same.
  function readAddress() {
    const models = [...new Set(board.panels.map((p) => p.model))];
    const address = new URLSearchParams(location.hash.slice(1));
    Object.assign(state, { model: models.length > 1 ? models[0] : "" });
    for (const key of Object.keys(state)) if (address.has(key)) state[key] = address.get(key);
    for (const key of ["model", "task", "question"]) if (!board.panels.some((p) => p[key] === state[key])) state[key] = "";
    if (!COLUMNS.some(([key]) => key === state.sort)) state.sort = "bytes";
    if (state.order !== "ascending") state.order = "descending";
  }
  function writeAddress() {
    history.replaceState(null, "", "#" + new URLSearchParams(state));
  }

  const panels = () => board.panels.filter((p) => ["model", "task", "question"].every((k) => !state[k] || p[k] === state[k]));
  const wanted = (s) => s.stack.toLowerCase().includes(state.stack.toLowerCase());
  const title = (p) => `${p.model}, ${p.task}, ${p.setting}`;
  const metric = (p) => (p.perplexity ? "perplexity, lower is better" : `${p.metric}, higher is better`);

  function render() {
    writeAddress();
    close();
    renderFilters();
    renderPlots();
    renderTable();
  }

  function renderFilters() {
    for (const key of ["model", "task", "question"]) {
      const select = find(`[name=${key}]`);
      const names = [...new Set(board.panels.map((p) => p[key]))];
      const all = names.length > 1 ? [element("option", { value: "" }, "all")] : [];
      select.replaceChildren(...all, ...names.map((name) => element("option", { value: name }, name)));
      select.value = names.length > 1 ? state[key] : names[0];
    }
    find("[name=stack]").value = state.stack;
  }

  function renderPage() {
    const stacks = new Set(board.panels.flatMap((p) => p.standings.map((s) => s.stack)));
    const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
    const models = new Set(board.panels.map((p) => p.model));
    find("#summary").textContent = `${count(stacks.size, "stack")}, ${count(models.size, "model")}, ${count(board.panels.length, "contest")}`;
    find("#legend").replaceChildren(...board.legend.map((line) => element("li", {}, line)));
    find("#notes").hidden = !board.notes.length;
    find("#notes summary").textContent = `${count(board.notes.length, "note")} on what is missing, double or measured otherwise`;
    find("#notes ul").replaceChildren(...board.notes.map((note) => element("li", {}, note)));
    const there = new Set(board.panels.flatMap((p) => p.standings.map((s) => s.kind)));
    const sample = (...marks) => drawn("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true" }, ...marks);
    const kinds = board.kinds.filter((kind) => there.has(kind)).map((kind) => {
      const mark = drawn("g", { class: `point kind${board.kinds.indexOf(kind)}` }, drawn("path", { class: "mark", d: MARKS[board.kinds.indexOf(kind)] }));
      return element("li", {}, sample(mark), kind);
    });
    kinds.push(element("li", {}, sample(drawn("path", { class: "front", d: "M-9 5H0V-5H9" })), "Pareto front"));
    if (board.panels.some((p) => p.standings.some((s) => s.partial))) {
      kinds.push(element("li", {}, sample(drawn("g", { class: "point partial kind0" }, drawn("path", { class: "mark", d: MARKS[0] }))), "shards are missing"));
    }
    find("#kinds").replaceChildren(...kinds);
    find("thead tr").replaceChildren(...COLUMNS.map(([key, name]) =>
      element("th", { scope: "col", "data-key": key }, element("button", { type: "button", onclick: () => sortBy(key) }, name))));
  }

  // The table: a group for each contest, and order within a group, so that what is not comparable is never mixed.
  function sortBy(key) {
    const [, , , first] = COLUMNS.find(([name]) => name === key);
    const turned = { ascending: "descending", descending: "ascending" };
    state.order = state.sort === key ? turned[state.order] : first;
    state.sort = key;
    writeAddress();
    renderTable();
  }

  function renderTable() {
    for (const th of document.querySelectorAll("thead th")) {
      if (th.dataset.key === state.sort) th.setAttribute("aria-sort", state.order);
      else th.removeAttribute("aria-sort");
    }
    const table = find("table");
    table.querySelectorAll("tbody").forEach((body) => body.remove());
    for (const panel of panels()) {
      const lines = sorted(panel.standings.filter(wanted)).map((s) => line(panel, s));
      const heading = element("th", { scope: "rowgroup", colspan: COLUMNS.length }, title(panel), " ", element("small", {}, metric(panel)));
      if (lines.length) table.append(element("tbody", {}, element("tr", {}, heading), ...lines));
    }
  }

  function sorted(standings) {
    const [, , value] = COLUMNS.find(([key]) => key === state.sort);
    const sign = state.order === "ascending" ? 1 : -1;
    return [...standings].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what was not measured is last either way
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    });
  }

  function line(panel, s) {
    const name = element("button", { type: "button", onclick: (event) => open(panel, s, event.currentTarget, true) }, s.stack);
    const partial = s.partial ? [" ", element("small", {}, s.partial)] : [];
    const cells = [[name, ...partial], said(s.text.share), said(s.text.score), said(s.text.dense), [s.score.contexts], [s.front ? "yes" : ""]];
    return element("tr", { "data-stack": s.stack, onmouseenter: () => mark(s.stack), onmouseleave: () => mark(pinned) },
      ...cells.map((content) => element("td", {}, ...content)));
  }

  // A number, and smaller what stands in brackets behind it.
  function said(text) {
    const [, number, rest] = text.match(/^(.*?)( \(.*)?$/);
    return rest ? [number, element("small", {}, rest)] : [number];
  }

  // The plots: quality over the logarithm of bytes, an SVG for each contest; hidden and seen side by side on one scale.
  function renderPlots() {
    const together = new Map();
    for (const panel of panels()) {
      const name = `${panel.model}, ${panel.task}`;
      together.set(name, [...(together.get(name) || []), panel]);
    }
    const drawings = [];
    const groups = [...together].map(([name, pair]) => {
      const figures = pair.map((panel) => element("figure", {}, element("figcaption", {}, `${panel.setting}: ${metric(panel)}`)));
      pair.forEach((panel, i) => drawings.push([panel, pair, figures[i]]));
      return element("section", {}, element("h2", {}, name, element("small", {}, pair[0].options)), element("div", { class: "pair" }, ...figures));
    });
    find("#plots").replaceChildren(...groups);
    for (const [panel, pair, figure] of drawings) {
      const style = getComputedStyle(figure);
      plot(panel, pair, figure, figure.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
    }
  }

  function plot(panel, pair, figure, width) {
    const box = { left: 44, right: Math.max(width - 14, 90), top: 14, bottom: 276 };
    const ratios = panel.perplexity && pair.every((p) => p.standings.some((s) => s.dense));
    const quality = (s) => (ratios ? s.dense : s.score);
    const plotted = (p) => p.standings.filter((s) => wanted(s) && s.share > 0 && quality(s) && quality(s).value !== null);
    const [shown, both] = [plotted(panel), pair.flatMap(plotted)];
    const svg = drawn("svg", { viewBox: `0 0 ${width} 320`, role: "group", "aria-label": `Quality over bytes: ${title(panel)}` });
    figure.append(svg);
    if (!shown.length) return svg.append(drawn("text", { x: box.left, y: 40 }, "no stack to show"));
    const x = bytesAxis(svg, box, both);
    const y = qualityAxis(svg, box, both.map(quality), panel, ratios);
    const dense = panel.standings.find((s) => s.kind === board.kinds[0] && quality(s));
    if (dense) svg.append(drawn("line", { class: "dense", x1: box.left, x2: box.right, y1: y(quality(dense).value), y2: y(quality(dense).value) }));
    const places = shown.map((s) => ({ s, panel, x: x(s.share), y: y(quality(s).value), low: y(quality(s).low), high: y(quality(s).high) }));
    places.sort((a, b) => a.x - b.x || b.y - a.y);
    svg.append(drawn("path", { class: "front", d: steps(places.filter((p) => p.s.front), box) }));
    const points = places.map((place) => point(place, places));
    points[0].setAttribute("tabindex", "0");
    svg.append(...points, ...names(places, box));
  }

  function bytesAxis(svg, box, shown) {
    const least = Math.min(...shown.map((s) => s.share)) / 1.25;
    const most = Math.max(1, ...shown.map((s) => s.share)) * 1.12;
    const x = (share) => box.left + 6 + ((Math.log(share) - Math.log(least)) / (Math.log(most) - Math.log(least))) * (box.right - box.left - 12);
    let factor = 2;
    while (x(1) - x(1 / factor) < 38 && factor < 1e6) factor *= 2;
    for (let share = 1; share > least; share /= factor) {
      const label = share === 1 ? "all" : `1/${Math.round(1 / share)}`;
      svg.append(drawn("line", { class: "grid", x1: x(share), x2: x(share), y1: box.bottom, y2: box.bottom + 4 }),
        drawn("text", { x: x(share), y: box.bottom + 18, "text-anchor": "middle" }, label));
    }
    const middle = (box.left + box.right) / 2;
    svg.append(drawn("text", { x: middle, y: box.bottom + 38, "text-anchor": "middle" }, "bytes held, of the bfloat16 cache (log scale)"));
    return x;
  }

  function qualityAxis(svg, box, qualities, panel, ratios) {
    const ends = qualities.flatMap((q) => [q.low, q.value, q.high]).filter((v) => v !== null);
    const [low, high] = [Math.min(...ends), Math.max(...ends)];
    const logs = panel.perplexity && high / low > 3;
    const scale = logs ? Math.log : (v) => v;
    const back = logs ? Math.exp : (v) => v;
    const room = (scale(high) - scale(low)) * 0.06 || Math.abs(scale(high)) * 0.05 || 0.05;
    let [bottom, top] = [scale(low) - room, scale(high) + room];
    if (!panel.perplexity) [bottom, top] = [Math.max(bottom, -0.03), Math.min(top, 1.03)];
    if (panel.perplexity) [bottom, top] = [top, bottom]; // up is better
    const y = (value) => box.bottom - ((scale(value) - bottom) / (top - bottom)) * (box.bottom - box.top);
    const ticks = logs ? decades(back(top), back(bottom)) : round(Math.min(bottom, top), Math.max(bottom, top));
    for (const tick of ticks) {
      if (!panel.perplexity && (tick < 0 || tick > 1)) continue;
      const label = panel.perplexity ? (ratios ? "×" : "") + String(tick) : `${Math.round(tick * 100)} %`;
      svg.append(drawn("line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
        drawn("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, label));
    }
    return y;
  }

  function round(low, high) {
    const raw = (high - low) / 6;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
    const ticks = [];
    for (let n = Math.ceil(low / step); n * step <= high; n++) ticks.push(Number((n * step).toPrecision(12)));
    return ticks;
  }
  function decades(low, high) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const n of high / low > 200 ? [1] : [1, 2, 5]) ticks.push(Number((n * 10 ** power).toPrecision(3)));
    }
    return ticks.filter((t) => t >= low && t <= high);
  }

  function steps(front, box) {
    const path = front.map((p, i) => (i ? `H${p.x}V${p.y}` : `M${p.x} ${p.y}`)).join("");
    return path && path + `H${box.right}`;
  }

  // One of the points of a plot is a tab stop; arrows go to the others by their bytes.
  function point(place, places) {
    const { s, panel } = place;
    const go = (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (step) places[(places.indexOf(place) + step + places.length) % places.length].node.focus();
      else if (event.key === "Enter" || event.key === " ") open(panel, s, place.node, true);
      else return;
      event.preventDefault();
    };
    const focus = () => {
      places.forEach((other) => other.node.setAttribute("tabindex", other === place ? "0" : "-1"));
      if (!pinned) open(panel, s, place.node, false);
    };
    const leave = () => pinned || close();
    place.node = drawn("g", {
      class: `point kind${board.kinds.indexOf(s.kind)}${s.partial ? " partial" : ""}`, "data-stack": s.stack, tabindex: "-1", role: "button",
      "aria-label": `${s.stack}: ${s.text.score}, ${s.text.share} of the bytes`,
      onclick: () => open(panel, s, place.node, true), onkeydown: go, onfocus: focus, onblur: leave,
      onmouseenter: () => pinned || open(panel, s, place.node, false), onmouseleave: leave,
    },
      drawn("line", { class: "whisker", x1: place.x, x2: place.x, y1: place.low, y2: place.high }),
      drawn("path", { class: "mark", d: MARKS[board.kinds.indexOf(s.kind)], transform: `translate(${place.x} ${place.y})` }),
      drawn("circle", { class: "reach", cx: place.x, cy: place.y, r: 10 }));
    return place.node;
  }

  // Names where there is room for them: of the stacks on the front, then, where they are few, of the others.
  function names(places, box) {
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = "12px system-ui, sans-serif";
    const taken = places.map((p) => ({ left: p.x - 6, right: p.x + 6, top: p.y - 6, bottom: p.y + 6, place: p }));
    const texts = [];
    const others = places.length > FEW ? [] : places.filter((p) => !p.s.front);
    for (const place of [...places.filter((p) => p.s.front), ...others]) {
      const text = place.s.stack.length > 30 ? place.s.stack.slice(0, 29) + "…" : place.s.stack;
      const width = pen.measureText(text).width;
      const sides = [[7, 17], [-7 - width, -8], [7, -8], [-7 - width, 17], [10, 4], [-10 - width, 4], [-width / 2, -11], [-width / 2, 20]];
      for (const [dx, dy] of sides) {
        const area = { left: place.x + dx, right: place.x + dx + width, top: place.y + dy - 11, bottom: place.y + dy + 3 };
        const inside = area.left >= box.left && area.right <= box.right + 10 && area.top >= 0 && area.bottom <= box.bottom;
        const free = taken.every((t) => t.place === place || area.right < t.left || t.right < area.left || area.bottom < t.top || t.bottom < area.top);
        if (!inside || !free) continue;
        taken.push(area);
        texts.push(drawn("text", { class: place.s.front ? "name" : "name other", x: area.left, y: place.y + dy }, text));
        break;
      }
    }
    return texts;
  }

  // The card: all of one stack, beside what was pointed at; a click holds it open.
  let pinned = null, opener = null;

  function open(panel, s, anchor, hold) {
    pinned = hold ? s.stack : null;
    opener = anchor;
    const facts = [
      [panel.perplexity ? "Perplexity" : "Score", s.text.score], ["Of dense", s.text.dense], ["Bytes", `${s.text.share}: ${s.text.held} a cache of ${s.text.tokens} tokens`],
      ["In its dtype", s.text.share_run], ["Positions", `${s.text.positions} beside`], ["Rests on", `${s.score.contexts} contexts, ${s.score.answers} ${panel.perplexity ? "texts" : "answers"}; ${s.text.seconds}`],
      ["Missing", s.partial && `only ${s.partial} are there`], ["Parts", Object.entries(s.text.parts).map(([name, text]) => `${name}: ${text}`).join("; ")],
    ].filter(([, text]) => text);
    const code = element("code", {}, s.command);
    const copy = element("button", { type: "button", onclick: () => copyText(code, copy) }, "Copy the command");
    card.replaceChildren(
      element("button", { type: "button", class: "close", "aria-label": "Close", onclick: dismiss }, "×"),
      element("h2", {}, s.stack, element("small", {}, `${title(panel)}; ${s.kind}`)),
      element("dl", {}, ...facts.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)])),
      code, copy, element("p", { class: "hint" }, "Click, or press Enter, to hold this open."));
    card.classList.toggle("pinned", hold);
    card.hidden = false;
    beside(anchor);
    mark(s.stack);
    if (hold) copy.focus({ preventScroll: true });
  }

  function beside(anchor) {
    const target = (anchor.querySelector(".mark") || anchor).getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = card;
    const right = target.right + 14 + width <= innerWidth;
    const left = right ? target.right + 14 : target.left - 14 - width;
    card.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
    card.style.top = `${Math.max(8, Math.min(target.top - 20, innerHeight - height - 8))}px`;
  }

  function close() {
    pinned = null;
    card.hidden = true;
    mark(null);
  }

  function dismiss() {
    if (pinned) opener.focus(); // while it is held, so that the focus does not open it again
    close();
  }

  function mark(stack) {
    for (const node of document.querySelectorAll(".point[data-stack], tr[data-stack]")) {
      node.classList.toggle("same", node.dataset.stack === stack);
      node.classList.toggle("other", stack !== null && node.dataset.stack !== stack);
    }
  }

  async function copyText(code, button) {
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch { // no clipboard here: select it, and let the browser copy if it will
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
  }

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || card.hidden) return;
    dismiss();
  });
  document.addEventListener("pointerdown", (event) => {
    if (pinned && !card.contains(event.target) && !event.target.closest(".point, td button")) close();
  });
  find("#filters").addEventListener("submit", (event) => event.preventDefault());
  find("#filters").addEventListener("input", (event) => {
    state[event.target.name] = event.target.value;
    writeAddress();
    close();
    renderPlots();
    renderTable();
  });
  addEventListener("hashchange", () => { readAddress(); render(); });
  let drawnAt = 0;
  new ResizeObserver(() => {
    if (find("#plots").clientWidth === drawnAt) return;
    drawnAt = find("#plots").clientWidth;
    close();
    renderPlots();
  }).observe(find("#plots"));

  readAddress();
  renderPage();
  render();
  drawnAt = find("#plots").clientWidth;
})();
