/* Allocation, as cfsp/allocation.py does it: from block importance and a budget to widths.
   A test runs both on the same numbers. Arrays ending in L have one entry for each block. */

/* Neumaier's compensated sum: Python's fmean sums exactly, and ties in rounding depend on it. */
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

function blockImportance(run) {
  const middle = mean(run.distances);
  return run.distances.map((distance) => {
    const x = run.gain * (distance - middle);
    return x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x));
  });
}

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
  const fractionL = keepFractions(blockImportance(run), 1 - total / exactSum(run.widths));
  const idealL = fractionL.map((fraction, i) => fraction * run.widths[i]);
  const ideal = idealL.reduce((sum, value) => sum + value, 0);
  return roundWidths(
    idealL.map((value) => value * total / ideal), run.widths, run.multiple, total);
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
