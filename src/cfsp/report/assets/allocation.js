/* Allocation, as cfsp/allocation.py does it: from block importance and a budget to widths.
   A test runs both on the same numbers. Arrays ending in L have one entry for each block. */

/* Neumaier's compensated sum: Python's fmean and fsum sum exactly, and ties in rounding depend on it. */
function exactSum(values) {
  let sum = 0, lost = 0;
  for (const value of values) {
    const next = sum + value;
    lost += Math.abs(sum) >= Math.abs(value) ? (sum - next) + value : (value - next) + sum;
    sum = next;
  }
  return sum + lost;
}

const mean = (values) => exactSum(values) / values.length;

function channelsToKeep(run, sparsity) {
  const total = exactSum(run.widths);
  if (run.of === "ffn") return (1 - sparsity) * total;
  return total - sparsity * run.parameters / mean(run.channelParameters);
}

function keepFractions(importanceL, sparsity) {
  const middle = mean(importanceL);
  const highest = Math.max(...importanceL);
  let scoreL = importanceL;
  if (highest / middle * (1 - sparsity) >= 1) {
    const shrink = middle * (1 / (1 - sparsity) - 1) / (highest - middle) / 1.05;
    scoreL = importanceL.map((score) => middle + (score - middle) * shrink);
  }
  return scoreL.map((score) => score / middle * (1 - sparsity));
}

function waterFill(importanceL, widthL, total) {
  const whole = new Set();
  for (;;) {
    const others = widthL.map((_, i) => i).filter((i) => !whole.has(i));
    const wanted = exactSum(others.map((i) => importanceL[i] * widthL[i]));
    const left = total - [...whole].reduce((sum, i) => sum + widthL[i], 0);
    const level = others.length ? left / wanted : 0;
    const full = others.filter((i) => level * importanceL[i] >= 1);
    if (!full.length) {
      return widthL.map((width, i) => whole.has(i) ? width : level * importanceL[i] * width);
    }
    full.forEach((i) => whole.add(i));
  }
}

function publishedShare(importanceL, widthL, total) {
  const fractionL = keepFractions(importanceL, 1 - total / exactSum(widthL));
  const idealL = fractionL.map((fraction, i) => fraction * widthL[i]);
  const ideal = idealL.reduce((sum, value) => sum + value, 0);
  return idealL.map((value) => value * total / ideal);
}

function roundWidths(idealL, widthL, multiple, total) {
  const least = (width) => Math.min(multiple, width);
  const keptL = idealL.map((ideal, i) => ideal >= widthL[i]
    ? widthL[i] : Math.max(least(widthL[i]), Math.floor(ideal / multiple) * multiple));
  const up = (i) => Math.min(widthL[i], keptL[i] + multiple);
  const down = (i) => Math.max(least(widthL[i]), keptL[i] - (keptL[i] % multiple || multiple));
  for (;;) {
    const missing = total - exactSum(keptL);
    const growing = missing > 0;
    const step = growing ? up : down;
    let chosen = -1, most = -Infinity;
    keptL.forEach((kept, i) => {
      const change = step(i) - kept;
      if (change === 0 || Math.abs(missing - change) >= Math.abs(missing)) return;
      const lost = growing ? idealL[i] - kept : kept - idealL[i];
      if (lost > most) { most = lost; chosen = i; }
    });
    if (chosen < 0) return keptL;
    keptL[chosen] = step(chosen);
  }
}

function allocate(run, sparsity) {
  if (sparsity === 0) return [...run.widths];
  const total = channelsToKeep(run, sparsity);
  const share = run.clamp === "published" ? publishedShare : waterFill;
  return roundWidths(share(run.importances, run.widths, total), run.widths, run.multiple, total);
}

function parametersWith(run, keptL) {
  return keptL.reduce(
    (left, kept, i) => left - (run.widths[i] - kept) * run.channelParameters[i], run.parameters);
}

/* Share of each block's activation energy that goes; between two points of a curve, linear. */
function energyRemoved(run, keptL) {
  return keptL.map((kept, i) => {
    const curve = run.removed[i], step = run.steps[i];
    if (kept >= run.widths[i]) return 0;
    const before = Math.floor(kept / step);
    const begin = before * step;
    const end = Math.min(begin + step, run.widths[i]);
    const next = curve[Math.min(before + 1, curve.length - 1)];
    return curve[before] + (next - curve[before]) * (kept - begin) / (end - begin);
  });
}
