"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("page-data").textContent);
  const SHOWN = 10; // items at once
  const KEPT = 400; // files held in memory
  const byId = (id) => document.getElementById(id);

  /* Elements are made with text only: what a model wrote is never read as markup. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) {
        element.setAttribute(name, value);
      }
    }
    element.append(...children.filter((child) => child !== null && child !== ""));
    return element;
  }

  // ------------------------------------------------------------- files on demand

  const kept = new Map();
  const waiting = new Map();
  window.tloraData = (name, value) => {
    kept.set(name, value);
    if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  };
  function part(name) {
    if (kept.has(name)) {
      const value = kept.get(name);
      kept.delete(name);
      kept.set(name, value);
      return Promise.resolve(value);
    }
    if (!waiting.has(name)) {
      waiting.set(name, new Promise((resolve, reject) => {
        const script = make("script", { src: `${DATA.files}/${name}.js` });
        script.onload = () => { script.remove(); waiting.delete(name); resolve(kept.get(name)); };
        script.onerror = () => {
          script.remove();
          waiting.delete(name);
          reject(new Error(`${DATA.files}/${name}.js cannot be read`));
        };
        document.head.append(script);
      }));
    }
    return waiting.get(name);
  }

  // ------------------------------------------------------------- tables

  function keyOf(row, column) {
    const key = row.cells[column].dataset.key;
    if (key === undefined || key === "") return null;
    const number = Number(key);
    return Number.isNaN(number) ? key : number;
  }
  function compare(one, other) {
    if (typeof one === "number" && typeof other === "number") return one - other;
    return String(one).localeCompare(String(other), undefined, { numeric: true });
  }
  function sort(table, column, order) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const sign = order === "descending" ? -1 : 1;
    rows.sort((one, other) => {
      if (order === "none") return one.dataset.place - other.dataset.place;
      const [a, b] = [keyOf(one, column), keyOf(other, column)];
      // what has no value stands last in either order
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * compare(a, b) || one.dataset.place - other.dataset.place;
    });
    body.append(...rows);
    [...table.tHead.rows[0].cells].forEach((cell, index) => {
      cell.setAttribute("aria-sort", index === column ? order : "none");
    });
  }
  function sortable(table) {
    [...table.tBodies[0].rows].forEach((row, index) => { row.dataset.place = index; });
    [...table.tHead.rows[0].cells].forEach((cell, index) => {
      const numeric = !cell.classList.contains("text");
      const button = make("button", { type: "button" }, ...cell.childNodes);
      cell.append(button);
      cell.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        // numbers begin with the highest, texts with the first; the third click undoes it
        const steps = numeric ? ["descending", "ascending", "none"]
          : ["ascending", "descending", "none"];
        const now = cell.getAttribute("aria-sort");
        sort(table, index, now === "none" ? steps[0] : steps[steps.indexOf(now) + 1]);
      });
    });
  }
  document.querySelectorAll("table.sortable").forEach(sortable);

  document.querySelectorAll("input[data-search]").forEach((input) => {
    const table = byId(input.dataset.search);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      byId(`${table.id}-count`).textContent =
        words.length ? `${shown} of ${table.tBodies[0].rows.length} rows` : "";
    });
  });

  const filters = byId("filters");
  function filter() {
    const text = byId("filter-text").value.trim().toLowerCase();
    const task = byId("filter-task")?.value ?? "";
    const model = byId("filter-model")?.value ?? "";
    const good = byId("filter-good").checked;
    let [shown, all] = [0, 0];
    for (const section of document.querySelectorAll("section.setting")) {
      const here = (!task || section.dataset.task === task)
        && (!model || section.dataset.model === model);
      let some = false;
      for (const row of section.querySelector("table").tBodies[0].rows) {
        const name = row.querySelector("th").textContent.toLowerCase();
        row.hidden = !(here && name.includes(text) && (!good || row.dataset.good === "1"));
        all += 1;
        shown += !row.hidden;
        some ||= !row.hidden;
      }
      section.hidden = !some;
    }
    for (const group of document.querySelectorAll(".setting-plots")) {
      group.hidden = !((!task || group.dataset.task === task)
        && (!model || group.dataset.model === model));
    }
    byId("filter-count").textContent = shown === all ? "" : `${shown} of ${all} rows`;
  }
  filters.addEventListener("input", filter);
  filters.addEventListener("change", filter);
  filters.addEventListener("submit", (event) => event.preventDefault());

  // ------------------------------------------------------------- panels

  const panel = byId("panel");
  let beneath = ""; // the address without a panel

  function linked(cell) {
    if (!Array.isArray(cell)) return String(cell);
    return make("a", { href: cell[1] }, cell[0]);
  }
  function table(block) {
    const head = make("tr", {}, ...block.head.map((title) => make("th", { scope: "col" }, title)));
    const rows = block.rows.map((row) => make("tr", {}, ...row.map((cell, index) => (
      index ? make("td", {}, linked(cell)) : make("th", { scope: "row" }, linked(cell))))));
    return make("div", { class: "wide", role: "region", tabindex: "0", "aria-label": block.title },
      make("table", { class: "panel-table" }, make("caption", {}, block.title),
        make("thead", {}, head), make("tbody", {}, ...rows)));
  }
  function facts(block) {
    return make("dl", { class: "facts" }, ...block.items.map(([key, value, link]) => make("div", {},
      make("dt", {}, key), make("dd", {}, link ? make("a", { href: link }, value) : value))));
  }
  const SVG = "http://www.w3.org/2000/svg";
  function draw(tag, attributes, text = "") {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  }
  function ticks(low, high, count) {
    const raw = (high - low || Math.abs(high) || 1) / count;
    const size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((factor) => factor * size >= raw) * size;
    const found = [];
    for (let index = Math.ceil(low / step); index * step <= high + step * 1e-9; index += 1) {
      found.push(Number((index * step).toPrecision(12)));
    }
    return found;
  }
  const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
  function line(index) {
    return { class: `curve s${index % 6}`, "stroke-dasharray": DASHES[Math.floor(index / 6) % 4] };
  }
  function curve(block) {
    // as wide as it is shown, so that its letters keep their size
    const width = Math.min(720, Math.max(280, window.innerWidth - 80));
    const [height, left, bottom] = [280, 52, 40];
    const points = block.series.flatMap((one) => one.points);
    const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
    const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    const [y0, y1] = [Math.min(0, ...ys), Math.max(...ys)];
    const x = (v) => left + (width - left - 12) * (v - x0) / (x1 - x0 || 1);
    const y = (v) => height - bottom - (height - bottom - 10) * (v - y0) / (y1 - y0 || 1);
    const told = block.series.map((one) => {
      const [first, last] = [one.points[0], one.points.at(-1)];
      return `${one.name}: ${first[1].toPrecision(3)} at step ${first[0]}, `
        + `${last[1].toPrecision(3)} at step ${last[0]}`;
    }).join("; ");
    const picture = draw("svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${block.title}. ${told}` });
    for (const value of ticks(y0, y1, 5)) {
      picture.append(draw("line", { class: "axis", x1: left, x2: width - 12, y1: y(value), y2: y(value) }),
        draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, String(value)));
    }
    for (const value of ticks(x0, x1, Math.round(width / 110))) {
      picture.append(draw("text",
        { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, value.toLocaleString("en")));
    }
    picture.append(draw("text",
      { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "step"));
    block.series.forEach((one, index) => {
      const path = one.points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`);
      picture.append(draw("path", { ...line(index), d: path.join("") }));
    });
    const legend = block.series.length > 1 ? [make("ul", { class: "legend" },
      ...block.series.map((one, index) => {
        const sample = draw("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" });
        sample.append(draw("path", { ...line(index), d: "M0 5L30 5" }));
        return make("li", {}, sample, one.name);
      }))] : [];
    return make("figure", {}, picture, ...legend);
  }
  const KINDS = {
    table, facts, curve,
    links: (block) => make("ul", { class: "links" }, ...block.items.map(([text, href]) =>
      make("li", {}, make("a", { href }, text)))),
    warning: (block) => make("p", { class: "warning" }, block.text),
  };
  function show(content) {
    byId("panel-title").textContent = content.title;
    byId("panel-body").replaceChildren(...content.blocks.flatMap((block) => [
      block.title && block.kind !== "table" ? make("h3", {}, block.title) : "",
      KINDS[block.kind](block),
      block.note ? make("p", { class: "warning" }, block.note) : "",
    ]).filter(Boolean));
    if (!panel.open) panel.showModal();
    panel.scrollTop = 0;
    byId("panel-title").focus();
  }
  function address(hash) {
    history.replaceState(null, "", hash || location.pathname + location.search);
  }
  byId("panel-close").addEventListener("click", () => panel.close());
  panel.addEventListener("click", (event) => { if (event.target === panel) panel.close(); });
  panel.addEventListener("close", () => {
    if (/^#(run|row)-\d+$/.test(location.hash)) address(beneath);
  });

  // ------------------------------------------------------------- completions

  const state = { place: 0, a: "", b: "", filter: "all", text: "", more: [], first: 0 };
  let matching = [];
  let turn = 0; // of the newest question: older answers are dropped

  const rowOf = (run) => DATA.rows.find((row) => row.runs.includes(run));
  function runsOf(choice) {
    const number = Number(choice.slice(3));
    const here = DATA.places[state.place].runs;
    const runs = choice.startsWith("row") ? DATA.rows[number]?.runs ?? [] : [number];
    return runs.filter((run) => here.includes(run));
  }
  function nameOf(choice) {
    const number = Number(choice.slice(3));
    return choice.startsWith("row") ? DATA.rows[number].label : DATA.runs[number];
  }
  function groups() {
    const here = DATA.places[state.place].runs;
    const seen = new Set();
    return [runsOf(state.a), runsOf(state.b), state.more].map((runs) => runs.filter((run) => {
      const fresh = here.includes(run) && !seen.has(run);
      seen.add(run);
      return fresh;
    })).filter((runs) => runs.length);
  }
  const columns = () => groups().flat();
  function rowsHere() {
    const here = DATA.places[state.place].runs;
    return DATA.rows.map((row, number) => ({ ...row, number, runs: row.runs.filter((r) => here.includes(r)) }))
      .filter((row) => row.runs.length);
  }
  function fill(select, chosen, otherwise) {
    select.replaceChildren();
    for (const row of rowsHere()) {
      if (row.runs.length === 1) {
        select.append(make("option", { value: `run${row.runs[0]}` }, DATA.runs[row.runs[0]]));
        continue;
      }
      select.append(make("optgroup", { label: row.label },
        make("option", { value: `row${row.number}` }, `${row.label}, all ${row.runs.length} seeds`),
        ...row.runs.map((run) => make("option", { value: `run${run}` }, DATA.runs[run]))));
    }
    const values = [...select.options].map((option) => option.value);
    select.value = [chosen, otherwise, values[0]].find((one) => values.includes(one));
    return select.value;
  }
  function choices(binary) {
    const [a, b] = [nameOf(state.a), nameOf(state.b)];
    return binary
      ? [["all", "all"], ["better", `A (${a}) right and B (${b}) wrong`],
        ["worse", `A (${a}) wrong and B (${b}) right`], ["right", "both right"],
        ["wrong", "both wrong"], ["mixed", `runs of A or of B disagree`],
        ["unread", "no answer found in A"]]
      : [["all", "all"], ["better", `A (${a}) higher than B (${b})`],
        ["worse", `A (${a}) lower than B (${b})`], ["equal", "A and B equal"],
        ["unread", "no answer found in A"]];
  }
  function verdict(known, run, index) {
    const found = known.verdicts[run];
    if (found === undefined) return null;
    if (typeof found !== "string") return found[index] ?? null;
    return found[index] === "1" ? 1 : found[index] === "0" ? 0 : null;
  }
  function accepts(known, binary) {
    const [a, b] = [runsOf(state.a), runsOf(state.b)];
    const of = (runs, index) => runs.map((run) => verdict(known, run, index)).filter((v) => v !== null);
    const every = (values, wanted) => values.length > 0 && values.every((v) => v === wanted);
    const mean = (values) => (values.length ? values.reduce((s, v) => s + v, 0) / values.length : NaN);
    const unread = new Set(state.filter === "unread" ? a.flatMap((run) => known.unread[run] ?? []) : []);
    const tests = {
      all: () => true,
      better: binary ? (i) => every(of(a, i), 1) && every(of(b, i), 0)
        : (i) => mean(of(a, i)) > mean(of(b, i)),
      worse: binary ? (i) => every(of(a, i), 0) && every(of(b, i), 1)
        : (i) => mean(of(a, i)) < mean(of(b, i)),
      equal: (i) => mean(of(a, i)) === mean(of(b, i)),
      right: (i) => every([...of(a, i), ...of(b, i)], 1),
      wrong: (i) => every([...of(a, i), ...of(b, i)], 0),
      mixed: (i) => [a, b].some((runs) => new Set(of(runs, i)).size > 1),
      unread: (i) => unread.has(i),
    };
    return tests[state.filter] ?? tests.all;
  }
  const isBinary = (known) => Object.values(known.verdicts).every((v) => typeof v === "string");

  async function files(page, runs) {
    const base = `items/${state.place}`;
    const [asked, ...answers] = await Promise.all([
      part(`${base}/prompts/${page}`),
      ...runs.map((run) => part(`${base}/${run}/${page}`).catch(() => [])),
    ]);
    return { asked, answers };
  }

  async function choose() {
    const mine = ++turn;
    const status = byId("item-count");
    const known = await part(`items/${state.place}/verdicts`);
    if (mine !== turn) return;
    const binary = isBinary(known);
    const select = byId("item-filter");
    select.replaceChildren(...choices(binary).map(([value, name]) => make("option", { value }, name)));
    select.value = state.filter;
    if (!select.value) { state.filter = "all"; select.value = "all"; }
    const test = accepts(known, binary);
    let found = known.ids.map((_, index) => index).filter(test);
    const words = state.text.toLowerCase();
    if (words) {
      const runs = columns();
      const pages = [...new Set(found.map((index) => Math.floor(index / DATA.page)))];
      const hits = [];
      for (const [done, page] of pages.entries()) {
        status.textContent = `Searching: ${done} of ${pages.length} parts`;
        const { asked, answers } = await files(page, runs);
        if (mine !== turn) return;
        for (const index of found.filter((i) => Math.floor(i / DATA.page) === page)) {
          const at = index % DATA.page;
          const texts = [known.ids[index], ...asked[at]];
          for (const answer of answers) if (answer[at]) texts.push(answer[at][0], ...(answer[at][5] ?? []));
          if (texts.some((text) => text.toLowerCase().includes(words))) hits.push(index);
        }
      }
      found = hits;
    }
    matching = found;
    state.first = Math.min(state.first, Math.max(0, Math.floor((found.length - 1) / SHOWN) * SHOWN));
    await list(known, binary, mine);
  }

  function marked(text) {
    const words = state.text.toLowerCase();
    const lower = text.toLowerCase();
    // lower case may be longer than the text itself; then nothing is marked
    if (!words || lower.length !== text.length) return [text];
    const pieces = [];
    let from = 0;
    for (let at = lower.indexOf(words); at >= 0; at = lower.indexOf(words, from)) {
      pieces.push(text.slice(from, at), make("mark", {}, text.slice(at, at + words.length)));
      from = at + words.length;
    }
    return [...pieces, text.slice(from)].filter((piece) => piece !== "");
  }
  function block(text, label) {
    if (!text) return make("pre", { class: "empty" }, "(empty)");
    return make("pre", { tabindex: "0", role: "region", "aria-label": label }, ...marked(text));
  }
  function badge(value, binary, unread) {
    if (value === null) return make("span", { class: "badge none" }, "no verdict");
    if (!binary) return make("span", { class: "badge plain" }, String(Number(value.toFixed(4))));
    return value === 1 ? make("span", { class: "badge right" }, "✓ right")
      : make("span", { class: "badge wrong" }, unread ? "✗ no answer" : "✗ wrong");
  }
  function tally(known, binary, index) {
    const entries = rowsHere().map((row) => {
      const values = row.runs.map((run) => verdict(known, run, index)).filter((v) => v !== null);
      const sum = values.reduce((total, value) => total + value, 0);
      if (!values.length) return "";
      const text = binary ? `${row.label} ${sum}/${values.length}`
        : `${row.label} ${Number((sum / values.length).toFixed(2))}`;
      const kind = !binary ? "plain" : sum === values.length ? "right" : sum ? "none" : "wrong";
      return make("li", { class: `badge ${kind}` }, text);
    });
    const label = binary ? "Right runs of each method" : "Mean of each method";
    return make("ul", { class: "tally", "aria-label": label }, ...entries);
  }
  function answered(known, binary, run, index, answer) {
    const name = make("h5", {}, make("a", { href: `#run-${run}` }, DATA.runs[run]));
    if (!answer) return make("div", { class: "answer" }, name, make("p", {}, "no completion"));
    const [text, extracted, finish, tokens, further, asked] = answer;
    const value = verdict(known, run, index);
    const unread = (known.unread[run] ?? []).includes(index);
    name.append(badge(value, binary, unread));
    const facts = [finish && `ended by ${finish}`, tokens !== null && tokens !== undefined && `${tokens} tokens`];
    const details = known.fields.map((field, place) => [field, further[place]])
      .filter(([, found]) => found !== undefined && found !== null);
    const kind = binary && value !== null ? (value ? " right" : " wrong") : "";
    return make("div", { class: `answer${kind}` }, name,
      make("p", {}, extracted === null ? "" : "answer read: ",
        extracted === null ? "" : make("b", {}, extracted)),
      block(text, `Completion of ${DATA.runs[run]}`),
      make("p", {}, facts.filter(Boolean).join(", ")),
      details.length ? make("details", {}, make("summary", {}, "What the scorer says"),
        make("dl", { class: "facts" }, ...details.map(([field, found]) => make("div", {},
          make("dt", {}, field), make("dd", {}, String(found)))))) : "",
      asked ? make("details", {}, make("summary", {}, "Asked otherwise"), block(asked[0], "Prompt"),
        block(asked[1], "Reference")) : "");
  }
  async function list(known, binary, mine) {
    const runs = columns();
    const shown = matching.slice(state.first, state.first + SHOWN);
    const pages = [...new Set(shown.map((index) => Math.floor(index / DATA.page)))];
    const read = new Map(await Promise.all(pages.map(async (page) => [page, await files(page, runs)])));
    if (mine !== turn) return;
    const count = byId("item-count");
    const all = known.ids.length;
    count.textContent = matching.length
      ? `Items ${state.first + 1} to ${state.first + shown.length} of ${matching.length}`
        + (matching.length < all ? ` that match, of ${all}` : "")
      : `None of ${all} items matches.`;
    byId("item-list").replaceChildren(...shown.map((index) => {
      const { asked, answers } = read.get(Math.floor(index / DATA.page));
      const at = index % DATA.page;
      return make("article", { "aria-label": `Item ${known.ids[index]}` },
        make("div", { class: "item-head" }, make("h4", {}, ...marked(known.ids[index])), tally(known, binary, index)),
        make("div", { class: "asked" },
          make("div", {}, make("h6", {}, "Prompt"), block(asked[at][0], "Prompt")),
          make("div", {}, make("h6", {}, "Reference"), block(asked[at][1], "Reference"))),
        ...groups().map((group) => make("div", { class: "answers" }, ...group.map((run) => (
          answered(known, binary, run, index, answers[runs.indexOf(run)][at]))))));
    }));
    byId("item-back-2").parentElement.hidden = !shown.length;
    for (const id of ["item-back", "item-back-2"]) byId(id).disabled = state.first === 0;
    for (const id of ["item-next", "item-next-2"]) {
      byId(id).disabled = state.first + SHOWN >= matching.length;
    }
  }
  function failed(error) {
    byId("item-count").textContent = `${error.message}: it belongs beside this page.`;
  }
  function remember() {
    const words = new URLSearchParams({ place: state.place, a: state.a, b: state.b });
    if (state.filter !== "all") words.set("filter", state.filter);
    if (state.text) words.set("text", state.text);
    if (state.more.length) words.set("more", state.more.join(","));
    if (state.first) words.set("first", state.first);
    address(`#items?${words}`);
  }
  function ask() {
    byId("item-count").textContent = "Reading";
    choose().catch(failed);
  }
  function offer() {
    const place = DATA.places[state.place];
    byId("item-place").value = state.place;
    state.a = fill(byId("item-a"), state.a, place.a);
    state.b = fill(byId("item-b"), state.b, place.b);
    byId("item-text").value = state.text;
    byId("item-more").replaceChildren(...rowsHere().map((row) => make("fieldset", {},
      make("legend", {}, row.label), ...row.runs.map((run) => {
        const box = make("input", { type: "checkbox", id: `more-${run}`, value: run,
          checked: state.more.includes(run) });
        const name = DATA.runs[run].replace(`${row.label}, `, "");
        return make("span", { class: "choice" }, box, make("label", { for: `more-${run}` }, name));
      }))));
  }
  if (DATA.places.length) {
    const form = byId("item-form");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", (event) => {
      if (event.target.id === "item-text") return;
      const place = Number(byId("item-place").value);
      if (place !== state.place) Object.assign(state, { place, a: "", b: "", more: [] });
      else {
        state.a = byId("item-a").value;
        state.b = byId("item-b").value;
        state.more = [...byId("item-more").querySelectorAll(":checked")].map((box) => Number(box.value));
      }
      state.filter = byId("item-filter").value || "all";
      state.first = 0;
      if (event.target.id === "item-place") offer();
      remember();
      ask();
    });
    let pause = 0;
    byId("item-text").addEventListener("input", (event) => {
      clearTimeout(pause);
      pause = setTimeout(() => {
        state.text = event.target.value.trim();
        state.first = 0;
        remember();
        ask();
      }, 250);
    });
    const move = (by, up) => () => {
      state.first = Math.max(0, state.first + by);
      remember();
      choose().then(() => { if (up) byId("item-count").scrollIntoView(); }).catch(failed);
    };
    byId("item-back").addEventListener("click", move(-SHOWN, false));
    byId("item-next").addEventListener("click", move(SHOWN, false));
    byId("item-back-2").addEventListener("click", move(-SHOWN, true));
    byId("item-next-2").addEventListener("click", move(SHOWN, true));
  }

  // ------------------------------------------------------------- addresses

  let begun = false;
  function begin() {
    if (begun || !DATA.places.length) return;
    begun = true;
    offer();
    ask();
  }
  function route() {
    const hash = location.hash;
    const found = /^#(run|row)-(\d+)$/.exec(hash);
    if (found) {
      part(`${found[1]}s/${found[2]}`).then(show).catch((error) => show(
        { title: "Not found", blocks: [{ kind: "warning", text: error.message }] }));
      return;
    }
    beneath = hash;
    if (panel.open) panel.close();
    if (hash.startsWith("#items?") && DATA.places.length) {
      const words = new URLSearchParams(hash.slice(7));
      const place = Number(words.get("place"));
      Object.assign(state, {
        place: DATA.places[place] ? place : 0,
        a: words.get("a") ?? "", b: words.get("b") ?? "",
        filter: words.get("filter") ?? "all", text: words.get("text") ?? "",
        more: (words.get("more") ?? "").split(",").filter(Boolean).map(Number),
        first: Number(words.get("first")) || 0,
      });
      begun = true;
      offer();
      ask();
      byId("items").scrollIntoView();
    }
  }
  window.addEventListener("hashchange", route);
  route();
  // the first items are read only when someone comes near them
  if (DATA.places.length) {
    new IntersectionObserver((entries, observer) => {
      if (entries.some((entry) => entry.isIntersecting)) { observer.disconnect(); begin(); }
    }, { rootMargin: "600px" }).observe(byId("items"));
  }
})();
