"use strict";
// How many of the pairs are truly wrong: shares, their intervals, and what they say about the target.
const Estimate = (() => {
  const TARGET = { share: 0.95, low: 0.92 };
  const count = (number) => number.toLocaleString("en");

  // Wilson's 95 % interval of a share (E. B. Wilson, JASA 22 (1927) 209).
  function wilson(share, number) {
    const z2 = 1.959963984540054 ** 2;
    const middle = (share + z2 / (2 * number)) / (1 + z2 / number);
    const half = Math.sqrt((z2 * share * (1 - share)) / number + (z2 / (2 * number)) ** 2) / (1 + z2 / number);
    return [Math.max(0, middle - half), Math.min(1, middle + half)];
  }

  // Decisions as if from a set without end: a category of which every pair is decided leaves no doubt (the correction for
  // finite populations, W. G. Cochran, Sampling Techniques, 3rd ed. 1977, 2.6).
  function effective(decided, size) {
    return decided >= size ? Infinity : (decided * (size - 1)) / (size - decided);
  }

  // Categories count by their share of the whole set. The interval is Wilson's at Kish's effective number of decisions,
  // 1 / sum(weight^2 / decisions) (L. Kish, Survey Sampling, 1965), which is their number where the sample is proportional.
  function overall(categories) {
    const decided = categories.filter((one) => one.decided > 0);
    const size = decided.reduce((sum, one) => sum + one.size, 0);
    let share = 0;
    let inverse = 0;
    for (const one of decided) {
      const weight = one.size / size;
      share += weight * one.share;
      inverse += weight ** 2 / effective(one.decided, one.size);
    }
    const whole = categories.reduce((sum, one) => sum + one.size, 0);
    const open = categories.reduce((sum, one) => sum + one.open + one.unsure, 0);
    return { share: Math.min(1, share), number: 1 / inverse, covered: size / whole, size, open };
  }

  // Whether the target is met; if that is not certain yet, about how many decisions it takes, and whether the page has them.
  function inWords({ share, number, size = Infinity, open = Infinity }) {
    const [low, high] = wilson(share, number);
    if (share >= TARGET.share && low >= TARGET.low) return "meets the target";
    if (share < TARGET.share) return high < TARGET.share ? "misses the target" : "below the target so far";
    let needed = Math.ceil(number);
    while (wilson(share, needed)[0] < TARGET.low) needed += 1;
    const decisions = (count) => (size === Infinity ? count : (count * size) / (size - 1 + count)); // effective() backwards
    const more = Math.max(1, Math.ceil(decisions(needed) - decisions(number)));
    if (open === 0) return `on target, but not certain: a sample of about ${count(more)} more pairs would tell`;
    const here = open < more ? `, of which this page has ${count(open)}` : "";
    return `on target so far, but not yet certain: about ${count(more)} more decisions like these${here}`;
  }

  return { TARGET, count, wilson, effective, overall, inWords };
})();
