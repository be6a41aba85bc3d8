"use strict";
// What the page does beyond being read: views, calls, and what is behind a cell.
(async () => {
  const { views, calls } = JSON.parse(document.getElementById("views").textContent);
  const unpacked = async (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  };
  const behind = await unpacked(document.getElementById("cells").textContent);
  const levels = (text) =>
    Array.from(atob(text), (c) => (c.charCodeAt(0) === 255 ? null : c.charCodeAt(0) / 4 - 10));
  const $ = (selector) => document.querySelector(selector);
  const make = (tag, text, properties = {}) =>
    Object.assign(document.createElement(tag), text === undefined ? {} : { textContent: text }, properties);

  let view = views[0];
  let call = -1;
  let open = null;

  // --- the heat map

  const tables = [...document.querySelectorAll("table.heat")];
  const buttons = new Map(); // id of a cell -> its button
  for (const table of tables) {
    for (const cell of table.querySelectorAll("td[id]")) {
      const key = cell.id.slice(2);
      if (!behind[table.dataset.side]?.[key]) continue;
      const button = make("button", cell.textContent, { type: "button", tabIndex: -1 });
      button.addEventListener("click", () => show(cell.id, true));
      cell.replaceChildren(button);
      buttons.set(cell.id, button);
    }
    const first = table.querySelector("td[data-fault] button") ?? table.querySelector("button");
    if (first) first.tabIndex = 0;
    table.addEventListener("keydown", move);
  }

  const named = (key) => {
    const [layer, ...stage] = key.split("-");
    return layer === "end" ? stage.join("-") : `layer ${layer} ${stage.join("-")}`;
  };

  const shade = (value) => {
    const reached = view.edges.filter((edge) => Math.abs(value) >= edge).length;
    return view.good ? view.edges.length - reached : reached;
  };

  // [text, shade] of a cell: of the whole sequence, or of the rows of one call.
  function shown(side, key) {
    const whole = view.cells[side]?.[key];
    if (!whole || call < 0 || view.name !== "bits") return whole;
    const packed = behind[side][key]?.calls;
    const value = (packed && levels(packed)[call]) ?? null;
    return value === null ? undefined : [value >= 53 ? "exact" : value.toFixed(1), shade(value)];
  }

  // Whether a fault is in the rows of the call that is shown.
  const wrong = (id) => behind[id[0]]?.[id.slice(2)]?.wrong?.[call] ?? true;

  function draw() {
    for (const table of tables) {
      const side = table.dataset.side;
      for (const cell of table.querySelectorAll("td[id]")) {
        const [text, number] = shown(side, cell.id.slice(2)) ?? ["–", null];
        const faulty = cell.hasAttribute("data-fault") && (call < 0 || view.name !== "bits" || wrong(cell.id));
        cell.className = [number === null ? "none" : `s${number}`, faulty ? "fault" : "",
          cell.id === open ? "open" : ""].filter(Boolean).join(" ");
        const place = buttons.get(cell.id) ?? cell;
        place.textContent = text + (faulty && number !== null ? "*" : "");
        if (place !== cell) {
          place.ariaLabel = `${named(cell.id.slice(2))}: ${text}${faulty ? ", fault" : ""}`;
        }
      }
    }
    $("#says").textContent = view.says;
    $("#legend").replaceChildren(...view.legend.map(([n, says]) => make("li", says, { className: `s${n}` })));
  }

  function move(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const here = event.target.closest("td");
    if (!here || (!step && event.key !== "Home" && event.key !== "End")) return;
    event.preventDefault();
    const rows = [...here.closest("tbody").rows];
    let row = rows.indexOf(here.parentElement);
    let column = here.cellIndex;
    const at = (r, c) => rows[r]?.cells[c]?.querySelector("button");
    let next = null;
    if (step) {
      do {
        row += step[0];
        column += step[1];
        next = at(row, column);
      } while (!next && rows[row] && column > 0 && column < rows[row].cells.length);
    } else {
      const all = [...here.parentElement.querySelectorAll("button")];
      next = event.key === "Home" ? all[0] : all.at(-1);
    }
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  // --- the controls

  for (const choice of document.querySelectorAll("input[name=view]")) {
    choice.addEventListener("change", () => {
      view = views.find((each) => each.name === choice.value);
      $("#call").hidden = !calls.length || view.name !== "bits";
      draw();
      if (open) show(open, false);
    });
  }
  const slider = $("#call input");
  slider.max = calls.length - 1;
  slider.addEventListener("input", () => {
    call = Number(slider.value);
    const text = call < 0 ? "all" : calls[call];
    $("#call output").textContent = text;
    slider.ariaValueText = text;
    draw();
  });
  $("#call").hidden = !calls.length;
  $("#controls").hidden = views.length < 2 && !calls.length;
  $("#hint").hidden = false;

  // --- what is behind a cell

  const style = { background: "transparent", color: "inherit", fontSize: "11px" };
  const scheme = { scheme: "cividis", legend: true };

  function chart(title, says, options) {
    const figure = make("figure");
    const plot = Plot.plot({ style, ariaLabel: title, ariaDescription: says, width: 520, height: 240, ...options });
    figure.append(make("h3", title), plot);
    if (says) figure.append(make("p", says, { className: "quiet" }));
    return figure;
  }

  // At most twelve of the places of an axis, each a whole number.
  const whole = (count, first, step) =>
    d3.range(0, count, Math.ceil(count / 12)).map((i) => first + i * step);

  function slices(axis, slice) {
    const data = levels(slice.levels).map((bits, i) => ({ place: slice.first + i * slice.step, bits }));
    const name = { position: "position (row of the sequence)", key: "position of the key" }[axis] ?? axis;
    const lowest = data.reduce((a, b) => ((b.bits ?? 99) < (a.bits ?? 99) ? b : a));
    const more = slice.step > 1 ? `; the lowest of ${slice.step} neighbours each` : "";
    const known = data.map((d) => d.bits).filter((bits) => bits !== null);
    return chart(`bits by ${axis}`, `lowest: ${lowest.bits} bits at ${lowest.place}${more}`, {
      x: { label: name, tickFormat: "d", ticks: whole(data.length, slice.first, slice.step) },
      y: { label: "bits", grid: true, tickFormat: "~r", domain: [d3.min(known) - 1, d3.max(known) + 1] },
      height: 160,
      marks: [
        Plot.line(data, { x: "place", y: "bits", stroke: "#1d91c0", curve: "step" }),
        Plot.dot([lowest], { x: "place", y: "bits", stroke: "#d55e00", r: 4 }),
        Plot.tip(data, Plot.pointerX({ x: "place", y: "bits" })),
      ],
    });
  }

  function grid(found) {
    const values = levels(found.levels);
    const width = values.length / found.rows;
    const data = values.map((bits, i) => ({
      row: Math.floor(i / width) * found.height,
      position: found.first + (i % width) * found.width,
      bits,
    }));
    const [least, most] = d3.extent(values.filter((bits) => bits !== null));
    if (least === undefined) return "";
    if (least === most) return make("p", `${least} bits in every ${found.of} and position.`);
    const text = found.of + (found.height > 1 ? ` (${found.height} together)` : "");
    return chart(`bits by ${found.of} and position`, "", {
      marginLeft: 60,
      x: { label: found.width > 1 ? `position (${found.width} together)` : "position", tickFormat: (d) => `${d}`,
        ticks: whole(width, found.first, found.width) },
      y: { label: text, ticks: whole(found.rows, 0, found.height) },
      color: { ...scheme, label: "bits", reverse: true },
      marks: [Plot.cell(data, { x: "position", y: "row", fill: "bits", inset: 0.2, tip: true })],
    });
  }

  function histogram(found) {
    const points = found.counts.map(([value, error, count]) => ({ value, error, count }));
    const data = points.filter((d) => d.error !== null);
    const none = d3.sum(points, (d) => (d.error === null ? d.count : 0));
    const says = `A constant relative error lies on a diagonal. Without any error: ${none} elements.`;
    if (!data.length) return make("p", "No element has an error.");
    return chart("error against value", says, {
      x: { label: "log2 |expected value|" },
      y: { label: "log2 |error|" },
      color: { ...scheme, type: "log", label: "elements", reverse: true },
      marks: [Plot.rect(data, { x1: "value", x2: (d) => d.value + 1, y1: "error", y2: (d) => d.error + 1,
        fill: "count", inset: 0.3, tip: true })],
    });
  }

  function layers(side, key) {
    const stage = key.slice(key.indexOf("-") + 1);
    const here = Number(key.slice(0, key.indexOf("-")));
    const data = Object.keys(view.cells).flatMap((each) =>
      Object.entries(view.cells[each])
        .filter(([other]) => other.slice(other.indexOf("-") + 1) === stage && !other.startsWith("end"))
        .map(([other, [, , value]]) => ({ side: each, layer: parseInt(other, 10), value })));
    if (data.length < 3) return "";
    return chart(`${stage} over the layers`, "", {
      x: { label: "layer", tickFormat: "d", ticks: d3.range(0, data.length, Math.ceil(data.length / 14)) },
      y: { label: view.label, grid: true, tickFormat: view.good ? "~r" : "~e", type: view.good || data.some((d) => d.value <= 0) ? "linear" : "log" },
      color: { domain: ["A", "B"], range: ["#1d91c0", "#d55e00"], legend: tables.length > 1 },
      height: 180,
      marks: [
        Plot.ruleX([here], { strokeDasharray: "3,3" }),
        Plot.line(data, { x: "layer", y: "value", stroke: "side" }),
        Plot.dot(data, { x: "layer", y: "value", stroke: "side", tip: true }),
      ],
    });
  }

  function numbers(found) {
    const listed = make("details");
    listed.append(make("summary", "the slices as numbers"));
    for (const [axis, slice] of Object.entries(found.slices ?? {})) {
      const text = levels(slice.levels).map((bits, i) => `${slice.first + i * slice.step}: ${bits}`).join(", ");
      listed.append(make("p", `bits by ${axis}: ${text}`));
    }
    return listed;
  }

  function behindOne(side, key) {
    const found = behind[side]?.[key];
    const part = make("div");
    if (!found) return part;
    if (tables.length > 1) part.append(make("h3", side));
    if (found.fault?.length) {
      const list = make("ul", undefined, { className: "note" });
      list.append(...found.fault.map((line) => make("li", line)));
      part.append(list);
    }
    const facts = make("dl");
    for (const [name, value] of found.facts) facts.append(make("dt", name), make("dd", value));
    const columns = make("div", undefined, { className: "columns" });
    columns.append(facts);
    if (found.grid) columns.append(grid(found.grid));
    if (found.histogram) columns.append(histogram(found.histogram));
    for (const axis of ["head", "position", "channel", "key"]) {
      if (found.slices?.[axis]) columns.append(slices(axis, found.slices[axis]));
    }
    columns.append(layers(side, key));
    part.append(columns);
    if (found.slices) part.append(numbers(found));
    return part;
  }

  function show(id, focus) {
    const key = id.slice(2);
    open = id;
    const panel = $("#detail");
    const head = make("div", undefined, { className: "head" });
    const close = make("button", "close (Esc)", { type: "button", className: "close" });
    close.addEventListener("click", hide);
    head.append(make("h2", named(key), { id: "detail-title" }), close);
    const sides = tables.map((table) => table.dataset.side);
    const pair = make("div", undefined, { className: "pair" });
    pair.append(...sides.map((side) => behindOne(side, key)));
    panel.replaceChildren(head, pair);
    panel.hidden = false;
    draw();
    if (!focus) return;
    history.replaceState(null, "", `#${id}`);
    panel.focus({ preventScroll: true });
    panel.scrollIntoView({ block: "nearest" });
  }

  function hide() {
    const button = buttons.get(open);
    open = null;
    $("#detail").hidden = true;
    history.replaceState(null, "", location.pathname + location.search); // a link opens it again
    draw();
    button?.focus();
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && open) hide();
  });
  const linked = () => {
    const id = decodeURIComponent(location.hash.slice(1));
    if (buttons.has(id)) show(id, true);
  };
  window.addEventListener("hashchange", linked);
  draw();
  linked();
  document.documentElement.dataset.ready = "yes";
})();
