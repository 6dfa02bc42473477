"use strict";
// The row by row part: the slider over α, the search, sorting. Texts enter the page as text nodes only.
(() => {
  const source = document.getElementById("row-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const slider = document.getElementById("alpha");
  const search = document.getElementById("find");
  let state = data.start;

  const element = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  const number = (value) => {
    if (value === null || value === undefined) return "–";
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) {
      const [mantissa, exponent] = value.toExponential(1).split("e");
      const raised = [...String(Number(exponent))].map((sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
      return (mantissa + "·10" + raised.join("")).replace("-", "−");
    }
    return value.toFixed(Math.abs(value) < 10 ? 3 : 1).replace("-", "−");
  };

  // What stands side by side: before, the α of the slider, retrained.
  const columnsOf = (set) => {
    const columns = [];
    const two = data.before !== null;
    if (two) columns.push(["Before, " + data.labels[data.before], set.states[data.before], "before"]);
    columns.push([(two ? "After, " : "") + data.labels[state], set.states[state], two ? "after" : "(" + data.labels[state] + ")"]);
    if (set.retrained) columns.push(["Retrained", set.retrained, "retrained"]);
    return columns.filter(([, column]) => column.answers);
  };

  const answer = (set, label, column, row) => {
    const node = element("div");
    const reference = set.rows[row][1];
    const probability = set.probability && column.values[0] ? column.values[0][row] : null;
    node.append(element("small", label + (probability === null ? "" : ", probability " + number(probability))));
    const text = column.answers[row];
    if (text === reference) node.append(" ", element("span", "= reference", "badge"));
    const missing = text === null ? "(not among its rows)" : "(empty)";
    const paragraph = element("p");
    paragraph.append(text ? text : element("em", missing, "soft"));
    node.append(paragraph);
    return node;
  };

  const card = (set, row, columns) => {
    const [prompt, reference] = set.rows[row];
    const node = element("li", undefined, "card");
    const given = element("p");
    given.append(element("small", "Reference answer"), element("br"), reference);
    const pair = element("div", undefined, "pair");
    pair.append(...columns.map(([label, column]) => answer(set, label, column, row)));
    node.append(element("h4", prompt), given, pair);
    return node;
  };

  const line = (set, row) => {
    const node = element("tr");
    const id = element("th", set.ids[row], "number");
    id.scope = "row";
    const prompt = element("td", set.rows[row][0]);
    prompt.title = set.rows[row][0];
    node.append(id, prompt, ...set.states[state].values.map((c) => element("td", number(c && c[row]), "number")));
    return node;
  };

  const found = (set, row, columns) => {
    const query = search.value.trim().toLowerCase();
    const texts = [...set.rows[row], ...columns.map(([, column]) => column.answers[row] || "")];
    return texts.some((text) => text.toLowerCase().includes(query));
  };

  // Column −2 is the id of the row, −1 its prompt.
  const sorted = (set, rows, { column, direction }) => {
    const values = column < 0 ? null : set.states[state].values[column];
    const key = (row) => (column === -2 ? set.ids[row] : column === -1 ? set.rows[row][0] : values && values[row]);
    const rank = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
    const missing = (value) => value === null || value === undefined;
    return rows.sort((one, two) => {
      const [a, b] = [key(one), key(two)];
      if (missing(a) || missing(b)) return missing(a) - missing(b); // last, whichever the direction
      return direction * rank(a, b);
    });
  };

  const views = [...document.querySelectorAll("details[data-set]")].map((section) => {
    const set = data.sets[section.dataset.set];
    const view = { section, set, order: { column: -2, direction: 1 }, shown: data.page };
    const [some, all] = section.querySelectorAll(".more button");
    some.onclick = () => { view.shown += data.page; render(view); };
    all.onclick = () => { view.shown = Infinity; render(view); };
    section.addEventListener("toggle", () => render(view));
    section.querySelectorAll(".values thead th").forEach((head, place) => {
      const button = element("button", head.textContent);
      button.type = "button";
      button.onclick = () => {
        const again = view.order.column === place - 2;
        view.order = { column: place - 2, direction: again ? -view.order.direction : 1 };
        render(view);
      };
      head.replaceChildren(button);
    });
    return view;
  });

  const render = ({ section, set, order, shown }) => {
    const columns = columnsOf(set);
    const equal = columns.map(([, column, when]) => {
      const count = column.answers.filter((text, row) => text === set.rows[row][1]).length;
      return count + " of " + column.answers.filter((text) => text !== null).length + " " + when;
    });
    section.querySelector(".count").textContent = equal.length ? "equal to the reference answer: " + equal.join(", ") : "";
    if (!section.open) return;
    const all = [...set.rows.keys()].filter((row) => found(set, row, columns));
    const rows = sorted(set, all, order).slice(0, shown);
    section.querySelector(".answers").replaceChildren(...(columns.length ? rows.map((row) => card(set, row, columns)) : []));
    section.querySelector(".values tbody").replaceChildren(...rows.map((row) => line(set, row)));
    section.querySelectorAll(".values thead th").forEach((head, place) => {
      if (place - 2 !== order.column) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", order.direction > 0 ? "ascending" : "descending");
    });
    const more = section.querySelector(".more");
    more.hidden = all.length === set.rows.length && rows.length === all.length;
    more.querySelector("span").textContent = rows.length + " of " + all.length + (search.value.trim() ? " found rows" : " rows");
    const [some, every] = more.querySelectorAll("button");
    some.hidden = every.hidden = rows.length === all.length;
    every.textContent = "Show all " + all.length;
  };

  const update = () => {
    state = Number(slider.value);
    const label = data.labels[state] + (state === data.chosen ? " (chosen)" : "");
    slider.setAttribute("aria-valuetext", label);
    document.getElementById("alpha-shown").textContent = label;
    document.getElementById("alpha-figures").textContent = data.figures[state].join(" · ");
    views.forEach(render);
  };

  slider.addEventListener("input", update);
  search.addEventListener("input", () => views.forEach(render));
  slider.value = state;
  document.querySelector(".tools").hidden = false;
  update();
})();
