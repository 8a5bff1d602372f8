"use strict";
// The path editor. A path is a few points over the frames, each with a place in metres and a direction of view; between
// them everything is interpolated smoothly. The first point is the first view of the source and cannot be moved.
const geoalignPath = (() => {
  const { make, round, niceStep, variable } = geoalignFilm;
  const facts = JSON.parse(document.getElementById("drawing").textContent), F = facts.frames;
  const KEYS = ["x", "y", "z", "yaw", "pitch"], DEGREE = Math.PI / 180, REACH = 24, ARM = 38;
  const element = (id) => document.getElementById(id);
  const frames = [...new Set([0, 0.25, 0.5, 0.75, 1].map((s) => Math.round(s * (F - 1))))];
  const still = () => frames.map(() => ({ x: 0, y: 0, z: 0, yaw: 0, pitch: 0 }));
  let points = still(), selected = frames.length - 1, start = still(), history = [];

  // ---- from points to poses ----
  // Cubic Hermite curve through the points with the slope of their neighbours; ends keep the slope of their side.
  function interpolate(key, frame) {
    let i = 0;
    while (i < frames.length - 2 && frame > frames[i + 1]) i++;
    if (frames.length < 2) return points[0][key];
    const value = (n) => points[n][key], slope = (n) => {
      const a = Math.max(n - 1, 0), b = Math.min(n + 1, frames.length - 1);
      return (value(b) - value(a)) / (frames[b] - frames[a]);
    };
    const h = frames[i + 1] - frames[i], t = (frame - frames[i]) / h, u = 1 - t;
    return (1 + 2 * t) * u * u * value(i) + t * u * u * h * slope(i) + t * t * (3 - 2 * t) * value(i + 1) - t * t * u * h * slope(i + 1);
  }
  function pose(frame) {
    const [x, y, z, yaw, pitch] = KEYS.map((key) => interpolate(key, frame));
    const c = Math.cos(yaw * DEGREE), s = Math.sin(yaw * DEGREE), p = Math.cos(pitch * DEGREE), q = Math.sin(pitch * DEGREE);
    return [[c, s * q, s * p, x], [0, p, -q, y], [-s, c * q, c * p, z]];  // yaw to the right after pitch upwards
  }
  const poses = () => Array.from({ length: F }, (_, frame) => pose(frame));
  const nearest = (yaw, to) => yaw + 360 * Math.round((to - yaw) / 360);  // of one direction's headings, so that no curve goes the long way round
  function angle(a, b) {
    let square = 0;
    for (let i = 0; i < 3; i++) for (let j = 0; j < 3; j++) square += (a[i][j] - b[i][j]) ** 2;
    return 2 * Math.asin(Math.min(Math.sqrt(square / 8), 1)) / DEGREE;
  }
  function speeds(path) {
    const steps = path.slice(1).map((b, i) => [path[i], b]);
    return { metres: steps.map(([a, b]) => facts.fps * Math.hypot(...[0, 1, 2].map((k) => b[k][3] - a[k][3]))),
      degrees: steps.map(([a, b]) => facts.fps * angle(a, b)) };
  }

  // ---- editing ----
  function change(edit) { history.push(JSON.stringify(points)); if (history.length > 50) history.shift(); edit(); draw(); }
  function load(name) {
    const path = facts.presets[name], yaws = [];
    for (const m of path || []) yaws.push(nearest(Math.atan2(m[0][2], m[2][2]) / DEGREE, yaws.length ? yaws[yaws.length - 1] : 0));
    start = frames.map((frame) => {
      if (!path) return still()[0];
      const m = path[frame];
      return { x: m[0][3], y: m[1][3], z: m[2][3], yaw: yaws[frame], pitch: Math.asin(Math.max(-1, Math.min(1, -m[1][2]))) / DEGREE };
    });
    element("strength").value = 1;
    change(() => { points = start.map((p) => ({ ...p })); });
    for (const view of views) view.fit();
    draw();
  }
  function strengthen() {
    const s = Number(element("strength").value);
    points = start.map((p) => Object.fromEntries(KEYS.map((key) => [key, p[key] * s])));
    for (const view of views) view.fit();
    draw();
  }

  // ---- a view in one plane: `across` to the right and `up` upwards, both in metres ----
  class View {
    constructor(canvas, across, up, turn) {
      Object.assign(this, { canvas, across, up, turn, drag: null });
      canvas.addEventListener("pointerdown", (e) => this.grab(e));
      canvas.addEventListener("pointermove", (e) => this.drag && this.move(e));
      for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { if (this.drag) { this.drag = null; this.fit(); keep(); draw(); } });
    }
    fit() {
      const places = points.map((p) => [this.across.get(p), this.up.get(p)]);
      const low = [0, 1].map((k) => Math.min(0, ...places.map((p) => p[k]))), high = [0, 1].map((k) => Math.max(0, ...places.map((p) => p[k])));
      this.centre = low.map((v, k) => (v + high[k]) / 2);
      this.half = Math.max(0.15, 0.75 * (high[0] - low[0]), 0.75 * (high[1] - low[1]));
    }
    scale() { return Math.min(this.width, this.height) / 2 / this.half; }
    place(a, b) { return [this.width / 2 + (a - this.centre[0]) * this.scale(), this.height / 2 - (b - this.centre[1]) * this.scale()]; }
    metres(x, y) { return [this.centre[0] + (x - this.width / 2) / this.scale(), this.centre[1] - (y - this.height / 2) / this.scale()]; }
    at(n) { return this.place(this.across.get(points[n]), this.up.get(points[n])); }
    handle(n) {
      const [x, y] = this.at(n), [dx, dy] = this.turn.direction(points[n]);
      return [x + ARM * dx, y - ARM * dy];
    }
    grab(event) {
      const x = event.offsetX, y = event.offsetY, near = [];
      for (let n = 1; n < points.length; n++) for (const kind of ["at", "handle"]) near.push({ n, kind, far: Math.hypot(...this[kind](n).map((v, k) => v - [x, y][k])) });
      const found = near.sort((a, b) => a.far - b.far)[0];
      if (!found || found.far > REACH) return;
      history.push(JSON.stringify(points));
      selected = found.n; this.drag = found; this.canvas.setPointerCapture(event.pointerId); draw();
    }
    move(event) {
      const point = points[this.drag.n];
      if (this.drag.kind === "at") {
        const [a, b] = this.metres(event.offsetX, event.offsetY);
        this.across.set(point, a); this.up.set(point, b);
      } else {
        const [x, y] = this.at(this.drag.n);
        this.turn.set(point, event.offsetX - x, y - event.offsetY);
      }
      draw();
    }
    draw(path) {
      const ratio = window.devicePixelRatio || 1, { canvas } = this, c = canvas.getContext("2d");
      this.width = canvas.clientWidth; this.height = canvas.clientHeight;
      canvas.width = this.width * ratio; canvas.height = this.height * ratio; c.scale(ratio, ratio);
      this.grid(c);
      const places = path.map((m) => this.place(this.across.of(m), this.up.of(m)));
      c.lineWidth = 2.5; c.strokeStyle = variable("--accent"); c.beginPath();
      places.forEach((p, i) => (i ? c.lineTo(...p) : c.moveTo(...p))); c.stroke();
      points.forEach((point, n) => {
        const at = this.at(n), handle = this.handle(n), colour = variable(n === 0 ? "--soft" : n === selected ? "--before" : "--accent");
        c.strokeStyle = c.fillStyle = colour; c.lineWidth = 1.6;
        c.beginPath(); c.moveTo(...at); c.lineTo(...handle); c.stroke();
        c.beginPath(); c.arc(...handle, n ? 4.5 : 2.5, 0, 7); c.fillStyle = variable("--card"); c.fill(); c.stroke();
        c.beginPath(); c.arc(...at, n ? 8 : 6, 0, 7); c.fillStyle = colour; c.fill();
        c.fillStyle = variable("--card"); c.font = "600 10px sans-serif"; c.textAlign = "center"; c.fillText(String(n), at[0], at[1] + 3.5);
      });
    }
    grid(c) {
      const step = niceStep(this.half / 2.5), digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), [a0, b0] = this.metres(0, this.height), [a1, b1] = this.metres(this.width, 0);
      c.font = "11px sans-serif"; c.fillStyle = variable("--soft"); c.textAlign = "left";
      for (const [from, to, ends] of [[a0, a1, (v) => [this.place(v, b0), this.place(v, b1)]], [b0, b1, (v) => [this.place(a0, v), this.place(a1, v)]]]) {
        for (let i = Math.ceil(from / step); i <= to / step; i++) {
          const [p, q] = ends(i * step);
          c.strokeStyle = variable(i ? "--faint" : "--line"); c.lineWidth = i ? 1 : 1.6;
          c.beginPath(); c.moveTo(...p); c.lineTo(...q); c.stroke();
          const label = i ? (i * step).toFixed(digits).replace("-", "\u2212") : "0";
          if (p[0] === q[0]) c.fillText(label, p[0] + 3, this.height - 5); else if (i) c.fillText(label, 5, p[1] - 3);
        }
      }
    }
  }
  const coordinate = (key, row, sign = 1) => ({ get: (p) => sign * p[key], set: (p, v) => { p[key] = sign * v; }, of: (m) => sign * m[row][3] });
  const turning = (key, direction) => ({
    direction: (p) => direction(p[key] * DEGREE),
    set: (p, dx, dy) => { const raw = Math.atan2(...(key === "yaw" ? [dx, dy] : [dy, dx])) / DEGREE; p[key] = key === "pitch" ? Math.max(-89, Math.min(89, raw)) : nearest(raw, p[key]); },
  });
  const views = [
    new View(element("top"), coordinate("x", 0), coordinate("z", 2), turning("yaw", (a) => [Math.sin(a), Math.cos(a)])),
    new View(element("side"), coordinate("z", 2), coordinate("y", 1, -1), turning("pitch", (a) => [Math.cos(a), Math.sin(a)])),
  ];

  // ---- the selected point in numbers ----
  const WORDS = { x: ["right", "m", 1], y: ["up", "m", -1], z: ["forward", "m", 1], yaw: ["turned right", "\u00b0", 1], pitch: ["tilted up", "\u00b0", 1] };
  const inputs = Object.fromEntries(KEYS.map((key) => [key, make("input", { type: "number", step: key.length > 1 ? 1 : 0.05, "aria-label": WORDS[key][0], onchange: (e) => {
    const value = Number(e.target.value);
    if (Number.isFinite(value)) { change(() => { points[selected][key] = WORDS[key][2] * value; }); keep(); views.forEach((v) => v.fit()); draw(); }
  } })]));
  const title = make("b");
  element("point").append(title, ...KEYS.map((key) => make("label", {}, `${WORDS[key][0]} (${WORDS[key][1]}) `, inputs[key])));

  // ---- speeds against the law of training ----
  function chart(id, values, [mean, low, high], unitName) {
    const canvas = element(id), ratio = window.devicePixelRatio || 1, c = canvas.getContext("2d"), width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio; canvas.height = height * ratio; c.scale(ratio, ratio);
    const peak = Math.max(...values, 0), top = 1.1 * Math.max(high, peak), y = (v) => height - 16 - (height - 22) * v / top;
    c.fillStyle = variable("--good"); c.globalAlpha = 0.13; c.fillRect(34, y(high), width - 34, y(low) - y(high)); c.globalAlpha = 1;
    c.font = "11px sans-serif"; c.textAlign = "right"; c.fillStyle = variable("--soft");
    for (const v of [low, mean, high]) { c.strokeStyle = variable("--line"); c.setLineDash(v === mean ? [4, 4] : []); c.beginPath(); c.moveTo(34, y(v)); c.lineTo(width, y(v)); c.stroke(); c.fillText(round(v, 2), 29, y(v) + 4); }
    c.setLineDash([]); c.lineWidth = 2.2; c.strokeStyle = variable(peak > high ? "--bad" : "--accent"); c.beginPath();
    values.forEach((v, i) => { const x = 34 + (width - 36) * (values.length > 1 ? i / (values.length - 1) : 0.5); if (i) c.lineTo(x, y(v)); else c.moveTo(x, y(v)); });
    c.stroke();
    const still_ = peak < 1e-6, where = still_ ? "none" : peak > high ? "faster than trained" : peak < low ? "slower than trained" : "inside the law";
    const said = element(`${id}-said`);
    said.textContent = `peak ${round(peak)} ${unitName}: ${where}`;
    said.className = peak > high || (!still_ && peak < low) ? "path-said-out" : "";
  }

  function draw() {
    const path = poses(), found = speeds(path), player = document.querySelector("article.film").player;
    if (!views[0].half) views.forEach((view) => view.fit());
    for (const view of views) view.draw(path);
    chart("metres", found.metres, facts.metres, "m/s"); chart("degrees", found.degrees, facts.degrees, "\u00b0/s");
    title.textContent = `Point ${selected} of ${frames.length - 1}, frame ${frames[selected] + 1}`;
    for (const key of KEYS) if (document.activeElement !== inputs[key]) inputs[key].value = +(WORDS[key][2] * points[selected][key]).toFixed(3);
    element("undo").disabled = !history.length;
    const length = found.metres.reduce((a, b) => a + b, 0) / facts.fps, yaws = path.map((_, i) => interpolate("yaw", i)), span = Math.max(...yaws) - Math.min(...yaws);
    element("limits").textContent = `The path is ${round(length)} m long and its heading spans ${round(span)}\u00b0; training took paths of up to ${facts.mostPath} m and ${facts.mostYaw}\u00b0. ` +
      `Shaded: the peak speeds that training drew, dashed their mean.`;
    element("limits").className = length > facts.mostPath || span > facts.mostYaw ? "note path-said-out" : "note";
    player.facts.paths[0].c2w = facts.kept.map((frame) => path[frame]);
    if (player.orbit) { player.orbit.measure(); player.draw(); }
  }
  function keep() { start = points.map((p) => ({ ...p })); element("strength").value = 1; }

  // ---- the file: an npz is a zip of arrays, here without compression ----
  const CRC = Uint32Array.from({ length: 256 }, (_, n) => { for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1; return n >>> 0; });
  const crc = (bytes) => { let c = ~0; for (const b of bytes) c = CRC[(c ^ b) & 255] ^ (c >>> 8); return ~c >>> 0; };
  const ascii = (text) => Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  function npy(descr, shape, bytes) {
    const told = `{'descr': '${descr}', 'fortran_order': False, 'shape': (${shape.map((n) => `${n},`).join(" ")}), }`;
    const padded = told.padEnd(Math.ceil((told.length + 11) / 64) * 64 - 11) + "\n";  // 10 bytes stand before it
    return Uint8Array.from([0x93, ...ascii("NUMPY"), 1, 0, padded.length & 255, padded.length >> 8, ...ascii(padded), ...bytes]);
  }
  const doubles = (values) => new Uint8Array(Float64Array.from(values).buffer), longs = (values) => new Uint8Array(BigInt64Array.from(values.map(BigInt)).buffer);
  function zip(files) {
    const parts = [], index = [], word = (value, size) => Array.from({ length: size }, (_, k) => Math.floor(value / 256 ** k) & 255);
    let offset = 0;
    for (const [name, bytes] of files) {
      const common = [...word(0, 2), ...word(0, 2), ...word(0, 2), ...word(0x21, 2), ...word(crc(bytes), 4), ...word(bytes.length, 4), ...word(bytes.length, 4), ...word(name.length, 2), ...word(0, 2)];
      const local = [...ascii("PK\x03\x04"), ...word(20, 2), ...common, ...ascii(name)];
      index.push([...ascii("PK\x01\x02"), ...word(20, 2), ...word(20, 2), ...common, ...word(0, 2), ...word(0, 2), ...word(0, 2), ...word(0, 4), ...word(offset, 4), ...ascii(name)]);
      parts.push(Uint8Array.from(local), bytes); offset += local.length + bytes.length;
    }
    const listed = index.flat();
    return new Blob([...parts, Uint8Array.from([...listed, ...ascii("PK\x05\x06"), ...word(0, 4), ...word(files.length, 2), ...word(files.length, 2), ...word(listed.length, 4), ...word(offset, 4), ...word(0, 2)])]);
  }
  function file() {
    const [height, width] = facts.size, [fx, fy, cx, cy] = facts.lens, path = poses();
    const lens = [fx * width, 0, cx * width, 0, fy * height, cy * height, 0, 0, 1];
    const arrays = [["extrinsic.npy", npy("<f8", [F, 4, 4], doubles(path.flatMap((m) => [...m.flat(), 0, 0, 0, 1])))],
      ["intrinsic.npy", npy("<f8", [F, 3, 3], doubles(path.flatMap(() => lens)))],
      ["image_size.npy", npy("<i8", [2], longs(facts.size))], ["metric.npy", npy("|b1", [], Uint8Array.of(1))]];
    if (facts.plane) arrays.push(["ground_plane.npy", npy("<f8", [4], doubles(facts.plane))]);
    return zip(arrays);
  }
  function save() {
    const name = `${facts.name.replace(/\.[^.]*$/, "").replace(/[^\w-]+/g, "_") || "camera"}_path.npz`, link = make("a", { href: URL.createObjectURL(file()), download: name });
    link.click(); element("file").textContent = name;
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  element("preset").append(...["none", ...Object.keys(facts.presets)].map((name) => make("option", { value: name }, name.replaceAll("_", " "))));
  element("preset").addEventListener("change", (e) => load(e.target.value));
  element("strength").addEventListener("input", strengthen);
  element("save").addEventListener("click", save);
  element("undo").addEventListener("click", () => { points = JSON.parse(history.pop()); keep(); views.forEach((view) => view.fit()); draw(); });
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const root = document.querySelector("article.film");
  new MutationObserver((_, observer) => { if (root.classList.contains("live")) { observer.disconnect(); root.player.show({ lines: "asked" }); draw(); } }).observe(root, { attributes: true });
  draw();
  return { poses, place: (view, n) => views[view].at(n), points: () => points };
})();
