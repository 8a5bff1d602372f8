"use strict";
// Load the page anew once it is old and nobody has touched it for a while; what is open and where it stands is kept.
(() => {
  const key = `geoalign ${location.pathname}`, folds = () => [...document.querySelectorAll("details")];
  try {
    const kept = JSON.parse(sessionStorage.getItem(key) || "null");
    if (kept) { folds().forEach((fold, i) => { fold.open = kept.open.includes(i); }); scrollTo(0, kept.top); }
    sessionStorage.removeItem(key);
  } catch { /* storage is off: the page begins at its top */ }
  let touched = performance.now();
  for (const kind of ["pointerdown", "keydown", "scroll", "wheel"]) addEventListener(kind, () => { touched = performance.now(); }, { passive: true, capture: true });
  setInterval(() => {
    const playing = document.querySelector(".film .play.on");
    if (performance.now() - touched < geoalignRefresh * 1000 || playing) return;
    try { sessionStorage.setItem(key, JSON.stringify({ top: scrollY, open: folds().flatMap((fold, i) => (fold.open ? [i] : [])) })); } catch { /* as above */ }
    location.reload();
  }, 1000);
})();
