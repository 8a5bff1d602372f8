"use strict";
// A number of a table shows the cases behind it, the worst first; without this script it leads to the worst one's row.
(() => {
  const told = JSON.parse(document.getElementById("behind-facts").textContent);
  const box = document.getElementById("behind"), title = box.querySelector("h3"), list = box.querySelector("ol"), more = box.querySelector("p");
  const link = (text, href) => { const made = document.createElement("a"); made.textContent = text; made.href = href; return made; };
  const show = (number) => {
    const { title: text, method, cases, of } = told.cells[number], videos = told.videos[method] || {};
    title.textContent = text;
    list.replaceChildren(...cases.map(([place, shown]) => {
      const name = told.cases[place], row = document.createElement("li");
      const film = document.getElementById(`film-${name}`);
      row.append(link(name, `#${film ? "film" : "case"}-${name}`), " ", videos[place] ? link(shown, videos[place]) : shown);
      return row;
    }));
    more.textContent = cases.length < of ? `The ${cases.length} worst of ${of} cases; cases.jsonl has all.` : `${of} ${of === 1 ? "case" : "cases"}, the worst first.`;
    box.hidden = false;
    box.scrollIntoView();
  };
  // A row that is linked to lies in a fold.
  const unfold = () => {
    const row = document.getElementById(decodeURIComponent(location.hash.slice(1))), fold = row && row.closest("details");
    if (fold) { fold.open = true; row.scrollIntoView(); }
  };
  document.addEventListener("click", (event) => {
    const cell = event.target.closest("a[data-behind]");
    if (cell) { event.preventDefault(); show(Number(cell.dataset.behind)); }
  });
  addEventListener("hashchange", unfold);
  unfold();
})();
