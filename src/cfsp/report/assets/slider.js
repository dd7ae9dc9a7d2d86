/* The slider: it shows one of the models that were measured, and never a number of its own. */

(function () {
  const whole = new Intl.NumberFormat("en");

  function showWidths(section, full, kept) {
    for (const mark of section.querySelectorAll(".plot .mark")) {
      const i = Number(mark.dataset.index);
      const all = mark.querySelector(".gone"), stays = mark.querySelector(".kept");
      if (!all) continue;  // a block without an FFN
      const top = Number(all.getAttribute("y")), height = Number(all.getAttribute("height"));
      const tall = height * kept[i] / full[i];
      stays.setAttribute("y", top + height - tall);
      stays.setAttribute("height", tall);
      const name = mark.dataset.say.split(":")[0];
      mark.dataset.say = `${name}: keeps ${whole.format(kept[i])} of ` +
        `${whole.format(full[i])} channels (${Math.round(100 * kept[i] / full[i])}%)`;
    }
  }

  for (const section of document.querySelectorAll("section.slider")) {
    const series = JSON.parse(section.querySelector(".stops").textContent);
    const at = section.querySelector(".stop"), method = section.querySelector(".series");
    const values = section.querySelectorAll(".answers .value");
    const notes = section.querySelectorAll(".answers .note");

    const show = () => {
      const stops = series[method.value], stop = stops[Number(at.value)];
      section.querySelector(".name").textContent = stop.name;
      at.setAttribute("aria-valuetext", stop.name);
      stop.cells.forEach(([value, note], i) => {
        values[i].textContent = value;
        notes[i].textContent = note;
      });
      showWidths(section, stops[0].widths, stop.widths);
    };
    const choose = () => {
      const last = series[method.value].length - 1;
      at.value = Math.min(Number(at.value), last);
      at.max = last;
      show();
    };
    at.addEventListener("input", show);
    method.addEventListener("change", choose);
    choose();
  }
})();
