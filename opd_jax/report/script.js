
"use strict";
const tip = document.getElementById("tip");
const told = (x, sign) => x === null ? "not scored" : (sign && x >= 5e-4 ? "+" : "") + (Math.abs(x) < 5e-4 ? 0 : x).toFixed(3);
const chance = x => x === null ? "" : "  (" + (100 * Math.exp(x)).toPrecision(3) + " %)";
function show(event) {
  const token = event.target, box = token.tagName === "I" && token.closest(".sample");
  tip.hidden = !box;
  if (!box) return;
  box.rows ??= JSON.parse(box.querySelector("script").textContent);
  box.order ??= new Map([...box.querySelectorAll(".tokens i")].map((each, i) => [each, i]));
  const [student, teacher, advantage] = box.rows[box.order.get(token)];
  tip.textContent = "student log-prob  " + told(student) + chance(student) +
    "\nteacher log-prob  " + told(teacher) + chance(teacher) + "\nadvantage         " + told(advantage, true);
  const at = token.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(at.left, innerWidth - size.width - 8)) + "px";
  tip.style.top = (at.top > size.height + 8 ? at.top - size.height - 6 : at.bottom + 6) + "px";
}
document.addEventListener("pointerover", show);
document.addEventListener("click", show);
document.addEventListener("scroll", () => { tip.hidden = true; }, true);
