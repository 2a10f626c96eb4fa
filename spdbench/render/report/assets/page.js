"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const { specs, config } = read("charts");
  const answers = read("answers");
  const dialog = document.getElementById("answer");

  const element = (name, text) => {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  };

  // Text is only ever set as textContent: what models write stays text.
  const openAnswer = (prompt) => {
    const found = answers.prompts[prompt];
    if (!found) return;
    document.getElementById("answer-prompt").textContent = prompt;
    const blocks = found.flatMap(([turn, repeat, place, labels]) => {
      const text = element("pre", answers.texts[place]);
      text.dir = "auto";
      return [element("h3", `turn ${turn}${repeat ? `, repeat ${repeat}` : ""}: ${labels.join(", ")}`), text];
    });
    document.getElementById("answer-texts").replaceChildren(...blocks);
    dialog.showModal();
  };

  const draw = async (place) => {
    const spec = specs[place.dataset.chart][Number(place.dataset.panel)];
    const columns = place.clientWidth < 520 ? 2 : 4;
    const result = await vegaEmbed(place, { ...spec, width: "container", description: place.ariaLabel }, {
      actions: false,
      ast: true, // expressions are interpreted: the page's policy allows no code made at run time
      renderer: "svg",
      config: { ...config, legend: { ...config.legend, columns } },
      tooltip: { theme: "custom" },
    });
    result.view.addEventListener("click", (_, item) => {
      if (item && item.datum && item.datum.prompt !== undefined) openAnswer(item.datum.prompt);
    });
  };

  const sortBy = (header) => {
    const row = header.parentElement;
    const body = header.closest("table").tBodies[0];
    const column = [...row.cells].indexOf(header);
    const down = header.getAttribute("aria-sort") === "ascending";
    const key = (line) => line.cells[column].textContent.trim();
    const lines = [...body.rows].sort((first, second) => {
      const [a, b] = [key(first), key(second)];
      const [x, y] = [parseFloat(a), parseFloat(b)];
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
  Promise.all([...document.querySelectorAll(".chart")].map(draw)).then(
    () => document.body.setAttribute("data-drawn", "yes"),
    (error) => console.error(error),
  );
})();
