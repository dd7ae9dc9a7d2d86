/* The slider: allocation at any sparsity, and what the statistics predict for it. */

(function () {
  const holder = document.getElementById("what-if-data");
  const runs = holder ? JSON.parse(holder.textContent) : [];
  /* Tests compare these with Python's. */
  window.cfspReport = Object.freeze({runs, allocate, parametersWith, energyRemoved});
  if (!runs.length) return;

  const find = (id) => document.getElementById(id);
  const slider = find("what-if-sparsity"), chosen = find("what-if-run");
  const whole = new Intl.NumberFormat("en");
  const percent = (share, digits) => (100 * share).toFixed(digits) + "%";
  const total = (values) => values.reduce((sum, value) => sum + value, 0);
  const NS = "http://www.w3.org/2000/svg";
  let bars = [], drawnFor = null;

  function svg(tag, attributes, parent) {
    const node = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    parent.append(node);
    return node;
  }

  /* Lays out the chart for a run once; moving the slider only changes heights. */
  function layOut(run, width) {
    const plot = find("what-if-plot");
    plot.replaceChildren();
    const left = 52, right = 6, top = 26, tall = 170, gap = 56, low = run.removed ? 110 : 0;
    const height = top + tall + (low ? gap + low : 0) + 40;
    const image = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": "Kept channels and predicted error of every block at the chosen sparsity; " +
        "the numbers are in the table below"}, plot);
    const each = (width - left - right) / run.widths.length;
    const highest = Math.max(...run.widths);
    const text = (x, y, className, content) => {
      svg("text", {x, y, class: className}, image).textContent = content;
    };
    const axis = (y0, y1, high, label) => {
      for (const share of [0, 0.25, 0.5, 0.75, 1]) {
        const y = y0 + (y1 - y0) * share;
        svg("line", {class: "grid", x1: left, x2: width - right, y1: y, y2: y}, image);
        text(left - 8, y + 4, "tick end", label(high * share));
      }
    };
    text(left, 14, "panel", "Channels that would stay (line: this run)");
    axis(top + tall, top, highest, (value) => whole.format(Math.round(value)));
    const second = top + tall + gap;
    if (low) {
      text(left, second - 12, "panel", "Activation energy that would go");
      axis(second + low, second, 1, (value) => percent(value, 0));
    }
    const foot = low ? second + low : top + tall;
    const every = [1, 2, 5, 10, 20, 50].find((n) => n * each >= 26) || run.widths.length;
    bars = run.widths.map((full, i) => {
      const x = left + each * i + each * 0.14, wide = each * 0.72;
      const place = (value) => ({y: top + tall * (1 - value / highest),
        height: tall * value / highest});
      const group = svg("g", {class: "mark", "data-index": i}, image);
      svg("rect", {class: "hit", x: left + each * i, y: top - 6, width: each,
        height: foot - top + 6}, group);
      svg("rect", {class: "gone", x, width: wide, rx: 1.5, ...place(full)}, group);
      const kept = svg("rect", {class: "kept", x, width: wide, rx: 1.5}, group);
      const now = place(run.kept[i]).y;
      svg("line", {class: "now", x1: x - 2, x2: x + wide + 2, y1: now, y2: now}, group);
      const error = low
        ? svg("rect", {class: "energy", x, width: wide, rx: 1.5}, group) : null;
      if (i % every === 0) text(x + wide / 2, foot + 16, "tick middle", i);
      const set = (node, from, tallness, share) => {
        node.setAttribute("y", from + tallness * (1 - share));
        node.setAttribute("height", tallness * share);
      };
      return {group, show(value, removed) {
        set(kept, top, tall, value / highest);
        if (error) set(error, second, low, removed);
        group.dataset.say = `Block ${i}: would keep ${whole.format(value)} of ` +
          `${whole.format(full)} channels` +
          (error ? `, ${percent(removed, 1)} of the activation energy goes` : "");
      }};
    });
    text(width - right, foot + 32, "tick end", "block");
  }

  function fillTable(run, keptL, removedL) {
    const body = find("what-if-table");
    body.replaceChildren(...keptL.map((kept, i) => {
      const row = document.createElement("tr");
      const cells = [i, whole.format(run.widths[i]), whole.format(run.kept[i]),
        whole.format(kept), removedL ? percent(removedL[i], 2) : "–"];
      cells.forEach((value, column) => {
        const cell = document.createElement(column ? "td" : "th");
        if (!column) cell.scope = "row";
        cell.textContent = value;
        row.append(cell);
      });
      return row;
    }));
  }

  function update() {
    const run = runs[Number(chosen.value)];
    const width = window.matchMedia("(max-width: 44rem)").matches ? 400 : 920;
    const key = chosen.value + "/" + width;
    if (drawnFor !== key) { layOut(run, width); drawnFor = key; }
    const sparsity = Number(slider.value) / 100;
    const keptL = allocate(run, sparsity);
    const removedL = run.removed ? energyRemoved(run, keptL) : null;
    bars.forEach((bar, i) => bar.show(keptL[i], removedL ? removedL[i] : 0));
    const left = parametersWith(run, keptL);
    const noun = run.of === "ffn" ? "of the FFN channels" : "of all parameters";
    slider.setAttribute("aria-valuetext", `${slider.value} percent ${noun} removed`);
    find("what-if-asked").textContent = `${slider.value}% ${noun}`;
    find("what-if-channels").textContent = whole.format(total(keptL));
    find("what-if-channels-note").textContent =
      percent(1 - total(keptL) / total(run.widths), 1) + " removed";
    find("what-if-parameters").textContent = whole.format(left);
    find("what-if-parameters-note").textContent =
      percent(1 - left / run.parameters, 1) + " removed";
    find("what-if-error").textContent = removedL ? percent(mean(removedL), 1) : "–";
    find("what-if-error-note").textContent = removedL
      ? "worst: block " + removedL.indexOf(Math.max(...removedL)) + ", " +
        percent(Math.max(...removedL), 1)
      : "needs statistics, which this run has not";
    fillTable(run, keptL, removedL);
  }

  /* The curves rank channels by activation. Where the run did not, say how far off that is. */
  function explainRanking(run) {
    const note = find("what-if-ranking");
    note.hidden = run.channelMetric === "activation" || !run.removed;
    if (note.hidden) return;
    note.textContent = "This run chose its channels by “" + run.channelMetric + "”; the " +
      "prediction ranks them by activation alone. At the run’s own widths it predicts " +
      percent(mean(energyRemoved(run, run.kept)), 1) + ", and the channels that really went " +
      "held " + percent(mean(run.ownRemoved), 1) + ".";
  }

  function choose() {
    const run = runs[Number(chosen.value)];
    explainRanking(run);
    slider.max = Math.round(100 * run.most);
    slider.value = Math.round(100 * run.sparsity);
    update();
  }

  slider.addEventListener("input", update);
  chosen.addEventListener("change", choose);
  window.addEventListener("resize", update);
  choose();
})();
