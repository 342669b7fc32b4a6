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
      inverse += weight ** 2 / one.decided;
    }
    const whole = categories.reduce((sum, one) => sum + one.size, 0);
    return { share: Math.min(1, share), number: 1 / inverse, covered: size / whole };
  }

  function inWords(share, number) {
    const [low, high] = wilson(share, number);
    if (share >= TARGET.share && low >= TARGET.low) return "meets the target";
    if (share >= TARGET.share) {
      let needed = Math.ceil(number);
      while (wilson(share, needed)[0] < TARGET.low) needed += 1;
      return `on target so far, but not yet certain: about ${count(Math.ceil(needed - number))} more decisions like these`;
    }
    return high < TARGET.share ? "misses the target" : "below the target so far";
  }

  return { TARGET, count, wilson, overall, inWords };
})();
