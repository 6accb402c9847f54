// Two texts side by side: the words that only one of them has are marked.

import { el } from "./dom.js";

const MOST = 400; // words compared; what follows is shown unmarked

const pieces = (text) => text.match(/\s+|[\p{L}\p{N}]+(?:[.,'’][\p{L}\p{N}]+)*|[^\s\p{L}\p{N}]/gu) ?? [];
const isWord = (piece) => /[\p{L}\p{N}]/u.test(piece);

// Which words of a and of b are in a longest common sequence, letter case aside.
function common(a, b) {
  const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      longest[i][j] = a[i] === b[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  const [inA, inB] = [new Set(), new Set()];
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { inA.add(i); inB.add(j); i += 1; j += 1; }
    else if (longest[i + 1][j] >= longest[i][j + 1]) i += 1;
    else j += 1;
  }
  return [inA, inB];
}

// [nodes of left, nodes of right]
export function marked(left, right) {
  const sides = [pieces(left), pieces(right)];
  const spoken = sides.map((side) => side.filter(isWord).slice(0, MOST).map((word) => word.toLowerCase()));
  const shared = common(...spoken);
  return sides.map((side, which) => {
    let number = -1;
    return side.map((piece) => {
      if (!isWord(piece)) return piece;
      number += 1;
      return number >= MOST || shared[which].has(number) ? piece : el("mark", {}, piece);
    });
  });
}
