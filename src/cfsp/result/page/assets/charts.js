/* Reading charts: pointer or arrow keys select a block; the line below says its values.
   A selected block is marked in all charts, so that one can be compared across them. */

(function () {
  function marksOf(plot) {
    const image = [...plot.querySelectorAll("svg")]
      .find((svg) => getComputedStyle(svg).display !== "none");
    return image ? [...image.querySelectorAll(".mark")] : [];
  }

  function lightUp(index) {
    for (const mark of document.querySelectorAll(".mark")) {
      mark.classList.toggle("lit", mark.dataset.index === String(index));
    }
  }

  function say(plot, index) {
    plot.dataset.at = index;
    lightUp(index);
    const words = marksOf(plot).filter((mark) => mark.dataset.index === String(index));
    const readout = plot.parentElement.querySelector(".readout");
    readout.replaceChildren(...words.map((mark) => {
      const line = document.createElement("span");
      line.textContent = mark.dataset.say;
      return line;
    }));
    readout.classList.add("said");
  }

  for (const plot of document.querySelectorAll(".plot")) {
    plot.addEventListener("pointerover", (event) => {
      const mark = event.target.closest(".mark");
      if (mark) say(plot, Number(mark.dataset.index));
    });
    plot.addEventListener("focus", () => say(plot, Number(plot.dataset.at || 0)));
    plot.addEventListener("keydown", (event) => {
      const last = Math.max(...marksOf(plot).map((mark) => Number(mark.dataset.index)));
      const at = Number(plot.dataset.at || 0);
      const to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last}[event.key];
      if (to === undefined) return;
      event.preventDefault();
      say(plot, Math.min(last, Math.max(0, to)));
    });
  }

  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("code").textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Select and copy by hand";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
})();
