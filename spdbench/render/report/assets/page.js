"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const { specs, config } = read("charts");
  let answers = null; // until they are unpacked, and in browsers that cannot do that
  const dialog = document.getElementById("answer");

  const textOf = async (packed) => {
    const bytes = Uint8Array.from(atob(packed), (each) => each.charCodeAt(0));
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(unpacked).text();
  };

  const element = (name, text) => {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  };

  const KINDS = { a: "accepted", r: "rejected", d: "dropped", o: "own" };
  const NAMES = { a: "accepted", r: "rejected", d: "dropped without a verdict", o: "the target's own" };

  // A step of an answer with kept drafts; pointing at it says what became of each draft.
  const stepElement = ([number, ms, ...tokens]) => {
    const step = element("span", "");
    step.className = "step";
    const said = [`step ${number}, ${ms} ms`];
    for (const [code, name] of Object.entries(NAMES)) {
      const own = tokens.filter((token) => token[0] === code).map((token) => token.slice(1));
      if (own.length) said.push(`${name}: ${own.join("\u00b7")}`);
    }
    step.title = said.join("\n");
    for (const token of tokens) {
      const unused = token[0] === "r" || token[0] === "d";
      const text = token.slice(1).replaceAll("\u21b5", unused ? "\u21b5" : "\u21b5\n");
      const part = element(unused ? "del" : "span", text);
      part.className = KINDS[token[0]];
      step.append(part);
    }
    return step;
  };

  // The columns of an answer with kept drafts as steps: number, ms since the request's start, tokens behind their codes.
  const stepsOf = ([numbers, waits, codes, texts]) => {
    let ms = 0;
    return numbers.map((number, at) => [number, ms += waits[at], ...texts[at].map((text, of) => codes[at][of] + text)]);
  };

  const answerElement = (content) => {
    const made = element("pre", typeof content === "string" ? content : "");
    made.dir = "auto";
    if (typeof content !== "string") made.append(...stepsOf(content).map(stepElement));
    return made;
  };

  // Text is only ever set as textContent or title: what models write stays text.
  const openAnswer = (prompt) => {
    const found = answers ? answers.prompts[prompt] : [];
    if (!found) return;
    document.getElementById("answer-prompt").textContent = prompt;
    const blocks = found.flatMap(([turn, repeat, place, labels]) => {
      const title = `turn ${turn}${repeat ? `, repeat ${repeat}` : ""}: ${labels.join(", ")}`;
      return [element("h3", title), answerElement(answers.texts[place])];
    });
    if (!answers) blocks.push(element("p", "This browser cannot unpack the answers: a newer one can, and `spdbench answers`."));
    document.getElementById("answer-texts").replaceChildren(...blocks);
    document.getElementById("answer-legend").hidden = !found.some(([, , place]) => typeof answers.texts[place] !== "string");
    dialog.showModal();
  };

  const draw = async (place) => {
    const spec = specs[place.dataset.chart][Number(place.dataset.panel)];
    const narrow = place.clientWidth < 520;
    const hasLongLabels = spec.data.values.some((row) => (row.label ?? row.series ?? "").length > 14);
    const labelLimit = narrow && place.dataset.chart === "speedup" ? 76 : config.axisY.labelLimit; // words stand there
    const result = await vegaEmbed(place, { ...spec, width: "container", description: place.ariaLabel }, {
      actions: false,
      ast: true, // expressions are interpreted: the page's policy allows no code made at run time
      renderer: "svg",
      config: {
        ...config,
        legend: { ...config.legend, columns: narrow ? (hasLongLabels ? 1 : 2) : 4 },
        axisY: { ...config.axisY, labelLimit },
      },
      tooltip: { theme: "custom" },
    });
    result.view.addEventListener("click", (_, item) => {
      if (item && item.datum && item.datum.prompt !== undefined) openAnswer(item.datum.prompt);
    });
  };

  // A date is no number, though it begins like one; changes are written with a minus sign.
  const numberIn = (text) => (/^\d{4}-\d\d-\d\d/.test(text) ? NaN : parseFloat(text.replace("\u2212", "-")));

  const sortBy = (header) => {
    const row = header.parentElement;
    const body = header.closest("table").tBodies[0];
    const column = [...row.cells].indexOf(header);
    const down = header.getAttribute("aria-sort") === "ascending";
    const key = (line) => line.cells[column].textContent.trim();
    const lines = [...body.rows].sort((first, second) => {
      const [a, b] = [key(first), key(second)];
      const [x, y] = [numberIn(a), numberIn(b)];
      if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1; // what is no number comes last
      return (Number.isNaN(x) ? a.localeCompare(b) : x - y) * (down ? -1 : 1);
    });
    for (const cell of row.cells) cell.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...lines);
  };

  for (const header of document.querySelectorAll("table.sortable thead th")) {
    header.querySelector("button").addEventListener("click", () => sortBy(header));
  }
  for (const button of document.querySelectorAll("button.answer")) {
    button.addEventListener("click", () => openAnswer(button.dataset.prompt));
  }
  // The page's policy runs the library by the hash of its unpacked text.
  const drawAll = async () => {
    const library = element("script", await textOf(read("library")));
    document.head.append(library);
    await Promise.all([...places].map((place) => draw(place).catch((error) => sayWhyNot(error, [place]))));
  };

  const sayWhyNot = (error, missing) => {
    console.error(error);
    for (const place of missing) {
      place.replaceChildren(element("p", "The chart could not be drawn; a newer browser may. Its numbers are behind the CSV link."));
    }
  };

  const places = document.querySelectorAll(".chart");
  const unpacked = textOf(read("answers")).then(
    (found) => { answers = JSON.parse(found); },
    (error) => console.warn(`answers: ${error}`),
  );
  Promise.all([unpacked, drawAll()]).then(() => document.body.setAttribute("data-drawn", "yes"), (error) => sayWhyNot(error, places));
})();
