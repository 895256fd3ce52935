
"use strict";
// Shows the pairs that the form asks for, in its order.
const form = document.querySelector("form.filter");
const pairs = [...document.querySelectorAll("figure.pair")];
const similarity = (pair) => Number(pair.dataset.similarity);

function show() {
  const { kind, least, most, photo, order } = Object.fromEntries(new FormData(form));
  const from = least === "" ? -1 : Number(least);
  const to = most === "" ? 1 : Number(most);
  let shown = 0;
  for (const pair of pairs) {
    const value = similarity(pair);
    const wanted = (!kind || pair.dataset.kind === kind) && value >= from && value <= to &&
      pair.dataset.photos.toLowerCase().includes(photo.toLowerCase());
    pair.hidden = !wanted;
    shown += wanted;
  }
  const sorted = order ? [...pairs].sort((a, b) => similarity(a) - similarity(b)) : pairs;
  document.querySelector("div.pairs").append(...sorted);
  form.querySelector("output").textContent = `${shown} of ${pairs.length} pairs of photos`;
}

form.hidden = false;
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
show();
